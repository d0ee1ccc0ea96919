"""add: x += y, the residual connection."""

from __future__ import annotations

from typing import Any

import numpy as np

from .mutants import changed_inputs, changed_output, last_column_is_its_neighbour, last_row_is_its_neighbour
from .op import (
    U32,
    Attrs,
    Case,
    Cost,
    Inputs,
    Mutant,
    Numerics,
    Op,
    Outputs,
    Param,
    Signature,
    rng_for,
    signature_bytes,
)


def reference(inputs: Inputs, attrs: Attrs) -> Outputs:
    return {"x": inputs["x"] + inputs["y"]}


def cost(signature: Signature) -> Cost:
    tokens, features = signature.tensors["x"].shape
    return Cost(signature_bytes(signature, ("x", "x", "y")), tokens * features)


def error_bound(inputs: Inputs, attrs: Attrs, outputs: Outputs, numerics: Numerics) -> Outputs:
    return {"x": U32 * np.abs(outputs["x"])}  # one rounding


def make_inputs(case: Case) -> dict[str, Any]:
    rng, shape = rng_for(case), (case.dims["T"], case.dims["N"])
    if case.is_exact:
        return {name: rng.integers(-(2**20), 2**20, shape).astype(np.float32) for name in ("x", "y")}
    return {name: rng.standard_normal(shape, dtype=np.float32) for name in ("x", "y")}


_SHAPES = ((1, 1), (1, 5), (5, 123), (3, 64), (2, 576))

ADD = Op(
    name="add",
    doc="x += y.",
    params=(Param("x", ("tokens", "features"), "inout"), Param("y", ("tokens", "features"))),
    splits=("tokens", "features"),
    reference=reference,
    cost=cost,
    make_inputs=make_inputs,
    error_bound=error_bound,
    cases=(
        *(Case(f"{t}x{n}", {"T": t, "N": n}) for t, n in _SHAPES),
        *(Case(f"integer-{t}x{n}", {"T": t, "N": n}, {}, "integer") for t, n in _SHAPES),
    ),
    mutants=(
        Mutant("x_overwritten", changed_inputs(reference, lambda i: {"x": np.zeros_like(i["x"])})),
        Mutant("y_ignored", changed_inputs(reference, lambda i: {"y": np.zeros_like(i["y"])})),
        Mutant("added_twice", changed_inputs(reference, lambda i: {"y": 2 * i["y"]})),
        Mutant("subtracted", changed_inputs(reference, lambda i: {"y": -i["y"]})),
        Mutant("last_column_is_its_neighbour", changed_output(reference, "x", last_column_is_its_neighbour)),
        Mutant("last_row_is_its_neighbour", changed_output(reference, "x", last_row_is_its_neighbour)),
    ),
)
