"""rms_norm_gemm_glu: norm, gate and up projections and activation, the first half of a feed-forward block."""

from __future__ import annotations

from typing import Any

import numpy as np

from .gemm import PRECISIONS, product_mutants, weight_mutants
from .glu import KINDS, activate, activation_bound
from .mutants import (
    changed_attrs,
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
    TensorType,
    dense,
    fp64,
    rng_for,
    signature_bytes,
)
from .quant import Array
from .rms_norm import Normalize, norm_mutants, norm_weight, normalize, validate_eps
from .rms_norm_gemm import fused_cases, last_norm_weight_zero, normed_product_bound
from .testdata import activations, random_weight


def _projections(inputs: Inputs, attrs: Attrs, norm: Normalize) -> tuple[Array, Array]:
    x = norm(inputs["x"], inputs["weight"], attrs["eps"], attrs["weight_offset"])
    return x @ dense(inputs["w_gate"], x).T, x @ dense(inputs["w_up"], x).T


def _run(inputs: Inputs, attrs: Attrs, norm: Normalize) -> Outputs:
    gate, up = _projections(inputs, attrs, norm)
    return {"y": activate(gate, attrs["kind"]) * up}


def reference(inputs: Inputs, attrs: Attrs) -> Outputs:
    return _run(inputs, attrs, normalize)


def cost(signature: Signature) -> Cost:
    tokens, in_features = signature.tensors["x"].shape
    out_features = signature.tensors["w_gate"].shape[0]
    nbytes = signature_bytes(signature, ("x", "weight", "w_gate", "w_up", "y"))
    return Cost(nbytes, tokens * (4 * in_features * (out_features + 1) + 5 * out_features))


def error_bound(inputs: Inputs, attrs: Attrs, outputs: Outputs, numerics: Numerics) -> Outputs:
    """Errors of gate and up, as in rms_norm_gemm, through the activation and the product, plus those two's own.

    What an error d of the gate does to the activation is taken at both ends; d**2 covers what lies between them
    (the second derivatives of silu and gelu are below 2).
    """
    kind = attrs["kind"]
    gate, up = _projections(fp64(inputs), attrs, normalize)
    gate_error = normed_product_bound(inputs, attrs, "w_gate", numerics) + U32 * np.abs(gate)
    up_error = normed_product_bound(inputs, attrs, "w_up", numerics) + U32 * np.abs(up)
    value = activate(gate, kind)
    ends = [np.abs(activate(gate + sign * gate_error, kind) - value) for sign in (-1, 1)]
    moved = np.maximum(*ends) + gate_error**2 + 1.5 * activation_bound(gate, kind, numerics)
    bound = moved * (np.abs(up) + up_error) + np.abs(value) * up_error
    return {"y": bound + 2 * U32 * np.abs(outputs["y"]) + 1e-30}


def make_inputs(case: Case) -> dict[str, Any]:
    rng, d = rng_for(case), case.dims
    return {
        "x": activations(rng, d["T"], d["K"], case.fill),
        "weight": norm_weight(rng, d["K"], case.attrs),
        "w_gate": random_weight(rng, d["format"], d["N"], d["K"], case.fill),
        "w_up": random_weight(rng, d.get("up_format", d["format"]), d["N"], d["K"], case.fill),
    }


def decompose(signature: Signature, emit: Emit) -> None:
    attrs, x = signature.attrs, signature.tensors["x"]
    hidden = TensorType((x.shape[0], signature.tensors["w_gate"].shape[0]), "f32")
    emit(
        "rms_norm",
        {"x": "x", "weight": "weight", "y": ("normed", x)},
        {"eps": attrs["eps"], "weight_offset": attrs["weight_offset"]},
    )
    for name in ("gate", "up"):
        arguments = {"x": ("normed", x), "w": f"w_{name}", "y": (name, hidden)}
        emit("gemm", arguments, {"precision": attrs["precision"]})
    emit("glu", {"gate": ("gate", hidden), "up": ("up", hidden), "y": "y"}, {"kind": attrs["kind"]})


def _cases() -> tuple[Case, ...]:
    cases = list(fused_cases())
    for kind in KINDS[1:]:
        for precision in ("exact", "fast"):
            attrs = {"precision": precision, "kind": kind}
            cases.append(Case(f"F16-{precision}-{kind}", {"T": 3, "N": 35, "K": 128, "format": "F16"}, attrs))
            cases.append(Case(f"Q4_0-{precision}-{kind}", {"T": 1, "N": 123, "K": 96, "format": "Q4_0"}, attrs))
    wide = {"T": 2, "N": 8219, "K": 32, "format": "Q4_0"}
    cases += [Case(f"Q4_0-{p}-wide", wide, {"precision": p}) for p in ("exact", "fast")]
    mixed = {"T": 2, "N": 33, "K": 256, "format": "Q4_K", "up_format": "Q6_K"}
    cases += [Case(f"Q4_K-and-Q6_K-{p}", mixed, {"precision": p}) for p in ("exact", "fast")]
    return tuple(cases)


RMS_NORM_GEMM_GLU = Op(
    name="rms_norm_gemm_glu",
    doc="y = activation(h @ w_gate.T) * (h @ w_up.T), h = rms_norm(x, weight); see rms_norm, gemm and glu. `precision` "
    "fast rounds h.",
    params=(
        Param("x", ("tokens", "in_features")),
        Param("weight", ("in_features",)),
        Param("w_gate", ("out_features", "in_features"), "weight"),
        Param("w_up", ("out_features", "in_features"), "weight"),
        Param("y", ("tokens", "out_features"), "out"),
    ),
    attrs={"eps": 1e-5, "weight_offset": 0.0, "precision": "exact", "kind": "silu"},
    choices={"precision": PRECISIONS, "kind": KINDS},
    validate=validate_eps,
    splits=("tokens", "out_features"),
    reference=reference,
    cost=cost,
    make_inputs=make_inputs,
    error_bound=error_bound,
    cases=_cases(),
    mutants=(
        *norm_mutants(_run),
        *weight_mutants(reference, "w_gate"),
        *weight_mutants(reference, "w_up"),
        Mutant("gate_and_up_swapped", changed_inputs(reference, lambda i: {"w_gate": i["w_up"], "w_up": i["w_gate"]})),
        Mutant("always_silu", changed_attrs(reference, lambda a: {"kind": "silu"})),
        Mutant("last_product_dropped", changed_inputs(reference, last_norm_weight_zero)),
        *product_mutants(reference),
    ),
    decompose=decompose,
)
