"""dequantize: a weight as float32 numbers, the meaning of every QuantFormat."""

from __future__ import annotations

from typing import Any

import numpy as np

from .gemm import weight_mutants
from .mutants import changed_output, last_column_is_its_neighbour, last_row_is_its_neighbour
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
from .quant import FORMATS
from .testdata import random_weight


def reference(inputs: Inputs, attrs: Attrs) -> Outputs:
    """float32 whatever the inputs: dequantised numbers are float32 by definition."""
    return {"y": inputs["w"].dense(np.float32)}


def cost(signature: Signature) -> Cost:
    out_features, in_features = signature.tensors["w"].shape
    return Cost(signature_bytes(signature, ("w", "y")), 2 * out_features * in_features)


def error_bound(inputs: Inputs, attrs: Attrs, outputs: Outputs, numerics: Numerics) -> Outputs:
    """Floats are copied or widened. Otherwise scale * quant and the offset are rounded, and so is their sum."""
    weight = inputs["w"]
    return {"y": np.zeros((1, 1)) if weight.format.is_float else 3 * U32 * weight.magnitude()}


def make_inputs(case: Case) -> dict[str, Any]:
    rng, d = rng_for(case), case.dims
    return {"w": random_weight(rng, d["format"], d["N"], d["K"], case.fill)}


def _cases() -> tuple[Case, ...]:
    cases: list[Case] = []
    for name, fmt in FORMATS.items():
        block = fmt.block_length
        for n, k in ((1, block), (5, 3 * block), (123, 2 * block), (16, 4 * max(block, 32))):
            cases.append(Case(f"{name}-{n}x{k}", {"N": n, "K": k, "format": name}))
        for fill in ("integer", "zeros"):
            cases.append(Case(f"{name}-{fill}", {"N": 3, "K": 2 * max(block, 32), "format": name}, {}, fill))
    return tuple(cases)


DEQUANTIZE = Op(
    name="dequantize",
    doc="y = w as float32.",
    params=(
        Param("w", ("out_features", "in_features"), "weight"),
        Param("y", ("out_features", "in_features"), "out"),
    ),
    splits=("out_features",),
    reference=reference,
    cost=cost,
    make_inputs=make_inputs,
    error_bound=error_bound,
    cases=_cases(),
    mutants=(
        *weight_mutants(reference),
        Mutant("scale_5_percent_off", changed_output(reference, "y", lambda y, i: y * 1.05)),
        Mutant("sign_turned", changed_output(reference, "y", lambda y, i: -y)),
        Mutant("last_column_is_its_neighbour", changed_output(reference, "y", last_column_is_its_neighbour)),
        Mutant("last_row_is_its_neighbour", changed_output(reference, "y", last_row_is_its_neighbour)),
    ),
    required=True,
)
