"""advance: positions of live rows moved on by one, so that a replayed step needs nothing from the host."""

from __future__ import annotations

from typing import Any

import numpy as np

from .mutants import changed_inputs, changed_output
from .op import Attrs, Case, Cost, Inputs, Mutant, Numerics, Op, Outputs, Param, Signature, rng_for, signature_bytes
from .quant import Array


def reference(inputs: Inputs, attrs: Attrs) -> Outputs:
    return {"positions": inputs["positions"] + (inputs["seq_ids"] >= 0).astype(np.int32)}


def cost(signature: Signature) -> Cost:
    return Cost(signature_bytes(signature, ("positions", "positions", "seq_ids")), 0)


def error_bound(inputs: Inputs, attrs: Attrs, outputs: Outputs, numerics: Numerics) -> Outputs:
    return {"positions": np.zeros(1)}


def make_inputs(case: Case) -> dict[str, Any]:
    rng, tokens = rng_for(case), case.dims["T"]
    seq_ids = rng.permutation(tokens).astype(np.int32)
    positions = rng.integers(0, 100_000, tokens).astype(np.int32)
    if tokens > 2:
        seq_ids[[1, -1]], positions[1] = -1, -1
    return {"positions": positions, "seq_ids": seq_ids}


def _undo_last(positions: Array, inputs: Inputs) -> None:
    live = np.flatnonzero(inputs["seq_ids"] >= 0)[-1]
    positions[live] = inputs["positions"][live]


ADVANCE = Op(
    name="advance",
    doc="positions[t] += 1 where seq_ids[t] >= 0; padding rows stay.",
    params=(
        Param("positions", ("tokens",), "inout", dtypes=("i32",), values="positions"),
        Param("seq_ids", ("tokens",), dtypes=("i32",), values="seq_ids"),
    ),
    splits=("tokens",),
    reference=reference,
    cost=cost,
    make_inputs=make_inputs,
    error_bound=error_bound,
    cases=tuple(Case(f"{t}", {"T": t}) for t in (1, 2, 5, 123)),
    mutants=(
        Mutant("padding_advanced", changed_inputs(reference, lambda i: {"seq_ids": np.abs(i["seq_ids"])})),
        Mutant("sequence_0_is_padding", changed_inputs(reference, lambda i: {"seq_ids": i["seq_ids"] - 1})),
        Mutant("not_advanced", changed_inputs(reference, lambda i: {"seq_ids": i["seq_ids"] * 0 - 1})),
        Mutant("last_row_left_out", changed_output(reference, "positions", _undo_last)),
        Mutant(
            "advanced_by_two",
            changed_output(reference, "positions", lambda p, i: 2 * p - i["positions"]),
        ),
    ),
)
