"""gemm_add: y += x @ w.T + bias, a projection back into the residual stream."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import gemm
from .gemm import PRECISIONS, addend_bound, last_feature_dropped, product_bound, product_mutants, weight_mutants
from .mutants import (
    changed_inputs,
    changed_output,
)
from .op import (
    U32,
    Attrs,
    Case,
    Cost,
    Emit,
    Inputs,
    Mutant,
    Numerics,
    Op,
    Outputs,
    Param,
    Signature,
    TensorType,
    rng_for,
    signature_bytes,
)
from .quant import FORMATS


def reference(inputs: Inputs, attrs: Attrs) -> Outputs:
    return {"y": inputs["y"] + gemm.reference(inputs, attrs)["y"]}


def cost(signature: Signature) -> Cost:
    tokens, in_features = signature.tensors["x"].shape
    out_features = signature.tensors["w"].shape[0]
    nbytes = signature_bytes(signature, ("x", "w", "bias", "y", "y"))
    return Cost(nbytes, tokens * out_features * (2 * in_features + 1))


def error_bound(inputs: Inputs, attrs: Attrs, outputs: Outputs, numerics: Numerics) -> Outputs:
    bound = product_bound(inputs["x"], inputs["w"], numerics) + addend_bound(inputs, numerics, "bias", "y")
    return {"y": bound + 2 * U32 * np.abs(outputs["y"]) + 1e-30}


def make_inputs(case: Case) -> dict[str, Any]:
    rng, d = rng_for(case), case.dims
    inputs = gemm.make_inputs(case)
    y = rng.integers(-99, 100, (d["T"], d["N"])) if case.is_exact else rng.standard_normal((d["T"], d["N"]))
    return {**inputs, "y": y.astype(np.float32)}


def decompose(signature: Signature, emit: Emit) -> None:
    tokens, out_features = signature.tensors["y"].shape
    between = ("product", TensorType((tokens, out_features), "f32"))
    emit("gemm", {"x": "x", "w": "w", "bias": "bias", "y": between}, {"precision": signature.attrs["precision"]})
    emit("add", {"x": "y", "y": between}, {})


def _cases() -> tuple[Case, ...]:
    cases: list[Case] = []
    for name, fmt in FORMATS.items():
        k = max(fmt.block_length, 64)
        for precision in PRECISIONS:
            attrs = {"precision": precision}
            for t, n in ((1, 19), (3, 123)):
                cases.append(Case(f"{name}-{precision}-{t}x{n}x{k}", {"T": t, "N": n, "K": k, "format": name}, attrs))
            dims = {"T": 5, "N": 35, "K": 2 * k, "format": name}
            cases.append(Case(f"{name}-{precision}-integer", dims, attrs, "integer"))
            cases.append(Case(f"{name}-{precision}-extreme", {**dims, "T": 2}, attrs, "extreme"))
            if name in ("F16", "Q4_0", "Q5_K"):
                cases.append(Case(f"{name}-{precision}-nan", {**dims, "T": 3}, attrs, "nan"))
                cases.append(Case(f"{name}-{precision}-bias", {**dims, "bias": True}, attrs))
                cases.append(Case(f"{name}-{precision}-outlier", dims, attrs, "outlier"))
    cases.append(Case("F32-exact-odd", {"T": 3, "N": 17, "K": 123, "format": "F32"}))
    return tuple(cases)


GEMM_ADD = Op(
    name="gemm_add",
    doc="y += x @ w.T (+ bias); see gemm.",
    params=(
        Param("x", ("tokens", "in_features")),
        Param("w", ("out_features", "in_features"), "weight"),
        Param("bias", ("out_features",), optional=True),
        Param("y", ("tokens", "out_features"), "inout"),
    ),
    attrs={"precision": "exact"},
    choices={"precision": PRECISIONS},
    splits=("tokens", "out_features"),
    reference=reference,
    cost=cost,
    make_inputs=make_inputs,
    error_bound=error_bound,
    cases=_cases(),
    mutants=(
        *weight_mutants(reference),
        Mutant("residual_overwritten", changed_inputs(reference, lambda i: {"y": np.zeros_like(i["y"])})),
        Mutant("residual_added_twice", changed_inputs(reference, lambda i: {"y": 2 * i["y"]})),
        Mutant("product_added_twice", changed_output(reference, "y", lambda y, i: 2 * y - i["y"])),
        Mutant("product_subtracted", changed_output(reference, "y", lambda y, i: 2 * i["y"] - y)),
        Mutant("bias_ignored", changed_inputs(reference, lambda i: {"bias": None})),
        Mutant("last_product_dropped", changed_inputs(reference, last_feature_dropped)),
        *product_mutants(reference),
    ),
    decompose=decompose,
)
