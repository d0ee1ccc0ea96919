"""rms_norm: every row divided by its root mean square and multiplied by a weight (arXiv 1910.07467)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .mutants import Run, changed_output, last_column_is_its_neighbour, last_row_is_its_neighbour
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
from .quant import Array
from .testdata import activations

Normalize = Callable[[Array, Array, float, float], Array]


def normalize(x: Array, weight: Array, eps: float, weight_offset: float) -> Array:
    """x / sqrt(mean(x**2) + eps) * (weight + weight_offset), row by row [T, K]."""
    mean_square = np.mean(x * x, axis=1, keepdims=True)
    return x / np.sqrt(mean_square + eps) * (weight + weight_offset)


def _run(inputs: Inputs, attrs: Attrs, norm: Normalize) -> Outputs:
    return {"y": norm(inputs["x"], inputs["weight"], attrs["eps"], attrs["weight_offset"])}


def reference(inputs: Inputs, attrs: Attrs) -> Outputs:
    return _run(inputs, attrs, normalize)


def validate_eps(signature: Signature) -> str | None:
    eps = signature.attrs["eps"]
    return f"eps is {eps}, expected at least 0" if eps < 0 else None


def cost(signature: Signature) -> Cost:
    tokens, features = signature.tensors["x"].shape
    return Cost(signature_bytes(signature, ("x", "weight", "y")), 4 * tokens * features)


def norm_bound(normed: Array, numerics: Numerics) -> Array:
    """Largest error of a normalised value, from the value itself [T, K].

    The sum of squares has only positive terms, so it, the mean and the added eps are off by gamma(depth + 5)
    relatively, of which a square root passes on half; then come rsqrt, the offset weight and two products.
    """
    relative = numerics.gamma(5) / 2 + (2 * numerics.function_ulp + 4) * U32
    return relative * np.abs(normed.astype(np.float64))


def error_bound(inputs: Inputs, attrs: Attrs, outputs: Outputs, numerics: Numerics) -> Outputs:
    return {"y": norm_bound(outputs["y"], numerics) + 1e-30}


def norm_weight(rng: np.random.Generator, features: int, attrs: Attrs) -> Array:
    """float32 [K] such that weight + weight_offset is around 1 and of either sign."""
    return (1 - attrs.get("weight_offset", 0.0) + rng.standard_normal(features)).astype(np.float32)


def make_inputs(case: Case) -> dict[str, Any]:
    rng, d = rng_for(case), case.dims
    x = activations(rng, d["T"], d["K"], case.fill)
    return {"x": x, "weight": norm_weight(rng, d["K"], case.attrs)}


def _cases() -> tuple[Case, ...]:
    cases = [
        Case(f"{t}x{k}", {"T": t, "K": k})
        for t, k in ((1, 1), (1, 5), (5, 123), (3, 64), (1, 576), (17, 96), (2, 2048), (1, 4099))
    ]
    for fill in ("outlier", "zeros", "small", "last"):
        cases.append(Case(f"{fill}-5x123", {"T": 5, "K": 123}, {}, fill))
    cases += [
        Case("eps-6-small", {"T": 3, "K": 77}, {"eps": 1e-6}, "small"),
        Case("eps-large", {"T": 3, "K": 64}, {"eps": 0.5}),
        Case("offset", {"T": 4, "K": 80}, {"weight_offset": 1.0}),
        Case("offset-small", {"T": 4, "K": 123}, {"weight_offset": 1.0, "eps": 1e-6}, "small"),
    ]
    return tuple(cases)


def _root_of(mean_square: Callable[[Array], Array]) -> Normalize:
    return lambda x, weight, eps, offset: x / np.sqrt(mean_square(x) + eps) * (weight + offset)


_WRONG_NORMS: Mapping[str, Normalize] = {
    "eps_ignored": lambda x, weight, eps, offset: normalize(x, weight, 1e-30, offset),
    "eps_is_the_default": lambda x, weight, eps, offset: normalize(x, weight, 1e-5, offset),
    "eps_outside_root": lambda x, weight, eps, offset: (
        x / (np.sqrt(np.mean(x * x, axis=1, keepdims=True)) + eps) * (weight + offset)
    ),
    "weight_offset_ignored": lambda x, weight, eps, offset: normalize(x, weight, eps, 0.0),
    "weight_ignored": lambda x, weight, eps, offset: normalize(x, np.ones_like(weight), eps, 0.0),
    "layer_norm": lambda x, weight, eps, offset: normalize(x - x.mean(axis=1, keepdims=True), weight, eps, offset),
    "sum_instead_of_mean": _root_of(lambda x: np.sum(x * x, axis=1, keepdims=True)),
    "last_square_dropped": _root_of(lambda x: np.sum(x[:, :-1] ** 2, axis=1, keepdims=True) / x.shape[1]),
    "norm_of_first_row_for_all": _root_of(lambda x: np.mean(x[:1] ** 2, axis=1, keepdims=True)),
    "not_normalized": lambda x, weight, eps, offset: x * (weight + offset),
}


def norm_mutants(run: Callable[[Inputs, Attrs, Normalize], Outputs]) -> tuple[Mutant, ...]:
    """Mutants of an op whose result `run` computes with a given norm."""

    def with_norm(norm: Normalize) -> Run:
        return lambda inputs, attrs: run(inputs, attrs, norm)

    return tuple(Mutant(name, with_norm(norm)) for name, norm in _WRONG_NORMS.items())


RMS_NORM = Op(
    name="rms_norm",
    doc="y = x / sqrt(mean(x**2) + eps) * (weight + weight_offset), the mean over a row. Gemma stores weight - 1 "
    "(weight_offset 1). Norms over the heads of q and k see x as [T * H, D].",
    params=(
        Param("x", ("tokens", "features")),
        Param("weight", ("features",)),
        Param("y", ("tokens", "features"), "out"),
    ),
    attrs={"eps": 1e-5, "weight_offset": 0.0},
    validate=validate_eps,
    splits=("tokens",),
    reference=reference,
    cost=cost,
    make_inputs=make_inputs,
    error_bound=error_bound,
    cases=_cases(),
    mutants=(
        *norm_mutants(_run),
        Mutant("last_column_is_its_neighbour", changed_output(reference, "y", last_column_is_its_neighbour)),
        Mutant("last_row_is_its_neighbour", changed_output(reference, "y", last_row_is_its_neighbour)),
    ),
)
