"""rms_norm_gemm: y = rms_norm(x) @ w.T + bias, the way into every projection of a decoder layer."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import gemm
from .gemm import PRECISIONS, addend_bound, product_bound, product_mutants, weight_mutants
from .mutants import (
    changed_inputs,
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
    fp64,
    rng_for,
    signature_bytes,
)
from .quant import FORMATS, Array
from .rms_norm import Normalize, norm_bound, norm_mutants, norm_weight, normalize, validate_eps
from .testdata import activations, random_weight


def _normed(inputs: Inputs, attrs: Attrs, norm: Normalize = normalize) -> Array:
    return norm(inputs["x"], inputs["weight"], attrs["eps"], attrs["weight_offset"])


def _run(inputs: Inputs, attrs: Attrs, norm: Normalize) -> Outputs:
    return gemm.reference({**inputs, "x": _normed(inputs, attrs, norm)}, attrs)


def reference(inputs: Inputs, attrs: Attrs) -> Outputs:
    return _run(inputs, attrs, normalize)


def cost(signature: Signature) -> Cost:
    tokens, in_features = signature.tensors["x"].shape
    out_features = signature.tensors["w"].shape[0]
    nbytes = signature_bytes(signature, ("x", "weight", "w", "bias", "y"))
    return Cost(nbytes, tokens * in_features * (2 * out_features + 4))


def normed_product_bound(inputs: Inputs, attrs: Attrs, name: str, numerics: Numerics) -> Array:
    """Largest error of rms_norm(x) @ w.T: what the norm is off by goes through the product, and into int8 rounding.

    A kernel may multiply by the inverse root after the product instead of before: the same relative error, once per
    output instead of once per term.
    """
    x = _normed(fp64(inputs), attrs)
    return product_bound(x, inputs[name], numerics, norm_bound(x, numerics))


def error_bound(inputs: Inputs, attrs: Attrs, outputs: Outputs, numerics: Numerics) -> Outputs:
    bound = normed_product_bound(inputs, attrs, "w", numerics) + addend_bound(inputs, numerics, "bias")
    return {"y": bound + 2 * U32 * np.abs(outputs["y"]) + 1e-30}


def make_inputs(case: Case) -> dict[str, Any]:
    rng, d = rng_for(case), case.dims
    inputs: dict[str, Any] = {
        "x": activations(rng, d["T"], d["K"], case.fill),
        "weight": norm_weight(rng, d["K"], case.attrs),
        "w": random_weight(rng, d["format"], d["N"], d["K"], case.fill),
    }
    if d.get("bias"):
        inputs["bias"] = rng.integers(-9, 10, d["N"]).astype(np.float32)
    return inputs


def decompose(signature: Signature, emit: Emit) -> None:
    attrs = signature.attrs
    between = ("normed", signature.tensors["x"])
    emit(
        "rms_norm",
        {"x": "x", "weight": "weight", "y": between},
        {"eps": attrs["eps"], "weight_offset": attrs["weight_offset"]},
    )
    emit("gemm", {"x": between, "w": "w", "bias": "bias", "y": "y"}, {"precision": attrs["precision"]})


def fused_cases(**attrs: Any) -> tuple[Case, ...]:
    """Cases of a fused norm and product: every format and precision, and the norm's attributes in some."""
    cases: list[Case] = []
    for name, fmt in FORMATS.items():
        k = max(fmt.block_length, 64)
        for precision in PRECISIONS:
            plain = {"precision": precision, **attrs}
            for t, n in ((1, 19), (3, 123)):
                dims = {"T": t, "N": n, "K": k, "format": name}
                cases.append(Case(f"{name}-{precision}-{t}x{n}x{k}", dims, plain))
            if name in ("F32", "Q4_1", "Q6_K"):
                dims = {"T": 5, "N": 48, "K": 2 * k, "format": name}
                for fill in ("outlier", "zeros", "last"):
                    cases.append(Case(f"{name}-{precision}-{fill}", dims, plain, fill))
                cases += [Case(f"{name}-{precision}-{f}", {**dims, "T": 3}, plain, f) for f in ("extreme", "nan")]
                for t in (2, 5):
                    dims = {"T": t, "N": 48, "K": 2 * k, "format": name}
                    cases.append(Case(f"{name}-{precision}-small-eps-{t}", dims, {**plain, "eps": 1e-6}, "small"))
                    cases.append(Case(f"{name}-{precision}-large-eps-{t}", dims, {**plain, "eps": 0.5}))
                    cases.append(Case(f"{name}-{precision}-offset-{t}", dims, {**plain, "weight_offset": 1.0}))
    return tuple(cases)


def _cases() -> tuple[Case, ...]:
    cases = list(fused_cases())
    for precision in PRECISIONS:
        attrs = {"precision": precision}
        for name in ("F16", "Q4_0", "Q5_K"):
            k = max(FORMATS[name].block_length, 64)
            dims = {"T": 2, "N": 35, "K": k, "format": name, "bias": True}
            cases.append(Case(f"{name}-{precision}-bias", dims, attrs))
    cases.append(Case("F32-exact-odd", {"T": 3, "N": 17, "K": 123, "format": "F32"}))
    return tuple(cases)


def last_norm_weight_zero(inputs: dict[str, Any]) -> dict[str, Any]:
    """Drops the last product, where weight_offset is 0."""
    weight = inputs["weight"].copy()
    weight[-1] = 0
    return {"weight": weight}


RMS_NORM_GEMM = Op(
    name="rms_norm_gemm",
    doc="y = rms_norm(x, weight) @ w.T (+ bias); see rms_norm and gemm. `precision` fast rounds the normalised x.",
    params=(
        Param("x", ("tokens", "in_features")),
        Param("weight", ("in_features",)),
        Param("w", ("out_features", "in_features"), "weight"),
        Param("bias", ("out_features",), optional=True),
        Param("y", ("tokens", "out_features"), "out"),
    ),
    attrs={"eps": 1e-5, "weight_offset": 0.0, "precision": "exact"},
    choices={"precision": PRECISIONS},
    validate=validate_eps,
    splits=("tokens", "out_features"),
    reference=reference,
    cost=cost,
    make_inputs=make_inputs,
    error_bound=error_bound,
    cases=_cases(),
    mutants=(
        *norm_mutants(_run),
        *weight_mutants(reference),
        Mutant("bias_ignored", changed_inputs(reference, lambda i: {"bias": None})),
        Mutant("last_product_dropped", changed_inputs(reference, last_norm_weight_zero)),
        *product_mutants(reference),
    ),
    decompose=decompose,
)
