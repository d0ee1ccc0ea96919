"""embedding: rows of a weight by token id, dequantised and scaled."""

from __future__ import annotations

from typing import Any

import numpy as np

from .gemm import weight_mutants
from .mutants import (
    changed_attrs,
    changed_inputs,
    changed_output,
    last_column_is_its_neighbour,
    last_row_is_its_neighbour,
)
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
from .quant import FORMATS, Array, Weight
from .testdata import random_weight


def _rows(weight: Weight, ids: Array) -> Weight:
    """The named rows, those of ids outside the vocabulary being row 0; only they are ever dequantised."""
    safe = np.where((ids >= 0) & (ids < weight.shape[0]), ids, 0)
    return Weight(weight.format, (len(ids), weight.shape[1]), weight.data[safe])


def _known(ids: Array, weight: Weight) -> Array:
    return ((ids >= 0) & (ids < weight.shape[0]))[:, None]


def reference(inputs: Inputs, attrs: Attrs) -> Outputs:
    """float32 whatever the inputs: there is no float among them but the weight, whose numbers are float32."""
    ids, weight = inputs["token_ids"], inputs["w"]
    rows = _rows(weight, ids).dense(np.float32) * np.float32(attrs["scale"])
    return {"y": np.where(_known(ids, weight), rows, np.float32(0))}


def cost(signature: Signature) -> Cost:
    tokens, features = signature.tensors["y"].shape
    row_bytes = FORMATS[signature.tensors["w"].dtype].row_bytes(features)
    return Cost(tokens * row_bytes + signature_bytes(signature, ("token_ids", "y")), tokens * features)


def error_bound(inputs: Inputs, attrs: Attrs, outputs: Outputs, numerics: Numerics) -> Outputs:
    """Three roundings of the dequantised terms, one of the product, one of the reference itself; zero rows are zero."""
    ids, weight = inputs["token_ids"], inputs["w"]
    size = _rows(weight, ids).magnitude() * abs(attrs["scale"])
    return {"y": np.where(_known(ids, weight), 5 * U32 * size, 0.0)}


def make_inputs(case: Case) -> dict[str, Any]:
    """Ids random, with the last and a repeated one; in "strange" cases some are no row of the weight."""
    rng, d = rng_for(case), case.dims
    ids = rng.integers(0, d["V"], d["T"])
    ids[-1] = d["V"] - 1
    if d["T"] > 2:
        ids[1] = ids[-1]
    if d.get("strange"):
        ids[0], ids[2], ids[3] = -1, d["V"], 2**31 - 1
    return {
        "token_ids": ids.astype(np.int32),
        "w": random_weight(rng, d["format"], d["V"], d["K"], case.fill),
    }


def _cases() -> tuple[Case, ...]:
    cases: list[Case] = []
    for name, fmt in FORMATS.items():
        k = max(fmt.block_length, 32)
        cases.append(Case(f"{name}-1", {"T": 1, "V": 123, "K": k, "format": name}))
        cases.append(Case(f"{name}-5", {"T": 5, "V": 41, "K": 3 * k, "format": name}, {"scale": 11.3137085}))
        cases.append(Case(f"{name}-integer", {"T": 6, "V": 7, "K": 2 * k, "format": name}, {}, "integer"))
        cases.append(Case(f"{name}-strange-ids", {"T": 6, "V": 9, "K": 2 * k, "format": name, "strange": True}))
    cases.append(Case("F32-odd", {"T": 3, "V": 5, "K": 123, "format": "F32"}, {"scale": 0.5}))
    return tuple(cases)


def _clamped(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"token_ids": np.clip(inputs["token_ids"], 0, inputs["w"].shape[0] - 1)}


def _wrapped(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"token_ids": inputs["token_ids"] % inputs["w"].shape[0]}


def _next_id(inputs: dict[str, Any]) -> dict[str, Any]:
    ids = inputs["token_ids"]
    return {"token_ids": np.where(ids > 0, ids - 1, ids)}


EMBEDDING = Op(
    name="embedding",
    doc="y[t] = scale * w[token_ids[t]]. An id outside 0..V-1 (padding is -1) gives a row of zeros.",
    params=(
        Param("token_ids", ("tokens",), dtypes=("i32",), values="token_ids"),
        Param("w", ("vocab", "features"), "weight"),
        Param("y", ("tokens", "features"), "out"),
    ),
    attrs={"scale": 1.0},
    splits=("tokens",),
    reference=reference,
    cost=cost,
    make_inputs=make_inputs,
    error_bound=error_bound,
    cases=_cases(),
    mutants=(
        *weight_mutants(reference),
        Mutant("scale_ignored", changed_attrs(reference, lambda a: {"scale": 1.0})),
        Mutant("row_off_by_one", changed_inputs(reference, _next_id)),
        Mutant("strange_ids_clamped", changed_inputs(reference, _clamped)),
        Mutant("strange_ids_wrapped", changed_inputs(reference, _wrapped)),
        Mutant(
            "first_id_for_all",
            changed_inputs(reference, lambda i: {"token_ids": i["token_ids"] * 0 + i["token_ids"][0]}),
        ),
        Mutant("last_column_is_its_neighbour", changed_output(reference, "y", last_column_is_its_neighbour)),
        Mutant("last_row_is_its_neighbour", changed_output(reference, "y", last_row_is_its_neighbour)),
    ),
)
