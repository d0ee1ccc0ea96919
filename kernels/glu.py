"""glu: a gated linear unit's gate applied, y = activation(gate) * up (SwiGLU, GeGLU; arXiv 2002.05202)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

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
from .quant import Array

KINDS = ("silu", "gelu_tanh", "gelu_erf")
GELU_SCALE = math.sqrt(2 / math.pi)  # arXiv 1606.08415, the tanh approximation
GELU_CUBIC = 0.044715
# OpenCL 3.0 full profile lets erf be off by 16 ulp; `Numerics.function_ulp` does not speak of erf.
ERF_ULP = 16.0


def _erf(x: Array) -> Array:
    """erf, element by element through the C library (numpy has none)."""
    return np.array([math.erf(value) for value in x.flat], x.dtype).reshape(x.shape)


def _gelu_argument(g: Array) -> Array:
    with np.errstate(over="ignore"):  # the cube may be infinite: tanh is then 1, which is right
        return GELU_SCALE * (g + GELU_CUBIC * g * g * g)


def activate(g: Array, kind: str) -> Array:
    """The activation of a kind of KINDS, in the precision of `g`."""
    if kind == "silu":
        with np.errstate(over="ignore"):  # exp(-g) may be infinite: the quotient is then -0, which is right
            return g / (1 + np.exp(-g))
    if kind == "gelu_tanh":
        return 0.5 * g * (1 + np.tanh(_gelu_argument(g)))
    return 0.5 * g * (1 + _erf(g * math.sqrt(0.5)))


def reference(inputs: Inputs, attrs: Attrs) -> Outputs:
    return {"y": activate(inputs["gate"], attrs["kind"]) * inputs["up"]}


def cost(signature: Signature) -> Cost:
    tokens, features = signature.tensors["gate"].shape
    return Cost(signature_bytes(signature, ("gate", "up", "y")), 5 * tokens * features)


def activation_bound(g: Array, kind: str, numerics: Numerics) -> Array:
    """Largest error of activation(g) for exact g, float64.

    silu = g / (1 + e), e = exp(-g): e is off by its function error and its argument's rounding (a kernel may compute
    exp2(-g * log2 e)), which e / (1 + e) passes on; then a sum and a quotient of at most 2.5 ulp.
    gelu = g/2 (1 + t): the sum cancels for negative g, so what t is off by counts absolutely (by ulps of 1: a tanh made
    of exp is no better near 0); the argument of tanh or erf is off by 8 roundings, which the slope 1 - t**2 of tanh (or
    the density for erf) passes on.
    """
    g = g.astype(np.float64)
    value = np.abs(activate(g, kind))
    if kind == "silu":
        with np.errstate(over="ignore"):
            passed_on = 1 / (1 + np.exp(g))
        return value * (passed_on * (2 * numerics.function_ulp + 2 * np.abs(g)) + 8) * U32
    if kind == "gelu_tanh":
        z = _gelu_argument(g)
        t = np.tanh(z)
        off = 2 * numerics.function_ulp + 8 * np.abs(z) * (1 - t * t) + 2
    else:
        z = g * math.sqrt(0.5)
        density = 2 / math.sqrt(math.pi) * np.exp(-z * z)
        off = 2 * max(ERF_ULP, numerics.function_ulp) + 8 * np.abs(z) * density + 2
    return (0.5 * np.abs(g) * off + 3 * value) * U32


def error_bound(inputs: Inputs, attrs: Attrs, outputs: Outputs, numerics: Numerics) -> Outputs:
    up = np.abs(inputs["up"].astype(np.float64))
    return {"y": activation_bound(inputs["gate"], attrs["kind"], numerics) * up + U32 * np.abs(outputs["y"]) + 1e-30}


_EXTREME = (-1e15, -1e4, -200.0, -100.0, -88.0, -30.0, 0.0, 30.0, 88.0, 100.0, 200.0, 1e4, 1e15, np.nan)


def make_inputs(case: Case) -> dict[str, Any]:
    """ "wide": gates up to some +-12, "extreme": up to +-1e15, where exp and cubes overflow and tanh is 1; and NaN."""
    rng, d = rng_for(case), case.dims
    gate = rng.standard_normal((d["T"], d["N"])) * (4.0 if case.fill == "wide" else 1.0)
    if case.fill == "extreme":
        gate = rng.choice(_EXTREME, gate.shape)
    return {"gate": gate.astype(np.float32), "up": rng.standard_normal(gate.shape, dtype=np.float32)}


def _cases() -> tuple[Case, ...]:
    cases: list[Case] = []
    for kind in KINDS:
        for t, n in ((1, 1), (1, 5), (5, 123), (3, 64), (1, 1536)):
            cases.append(Case(f"{kind}-{t}x{n}", {"T": t, "N": n}, {"kind": kind}))
        cases.append(Case(f"{kind}-wide", {"T": 7, "N": 123}, {"kind": kind}, "wide"))
        cases.append(Case(f"{kind}-extreme", {"T": 2, "N": 33}, {"kind": kind}, "extreme"))
    return tuple(cases)


def _cubic_dropped(inputs: Inputs, attrs: Attrs) -> Outputs:
    g = inputs["gate"]
    if attrs["kind"] != "gelu_tanh":
        return reference(inputs, attrs)
    return {"y": 0.5 * g * (1 + np.tanh(GELU_SCALE * g)) * inputs["up"]}


def _quick_gelu(inputs: Inputs, attrs: Attrs) -> Outputs:
    """g * sigmoid(1.702 g) for every gelu."""
    g = inputs["gate"]
    if attrs["kind"] == "silu":
        return reference(inputs, attrs)
    with np.errstate(over="ignore"):
        return {"y": g / (1 + np.exp(-1.702 * g)) * inputs["up"]}


def _kind_read_as(kinds: dict[str, str]) -> Any:
    return changed_attrs(reference, lambda a: {"kind": kinds.get(a["kind"], a["kind"])})


def _naive_silu(inputs: Inputs, attrs: Attrs) -> Outputs:
    """g * exp(g) / (1 + exp(g)): infinity over infinity for large g."""
    if attrs["kind"] != "silu":
        return reference(inputs, attrs)
    with np.errstate(over="ignore", invalid="ignore"):
        e = np.exp(inputs["gate"])
        return {"y": inputs["gate"] * e / (1 + e) * inputs["up"]}


GLU = Op(
    name="glu",
    doc="y = activation(gate) * up. `kind` silu: g / (1 + exp(-g)); gelu_tanh: g/2 (1 + tanh(sqrt(2/pi) (g + 0.044715 "
    "g**3))); gelu_erf: g/2 (1 + erf(g / sqrt 2)).",
    params=(
        Param("gate", ("tokens", "features")),
        Param("up", ("tokens", "features")),
        Param("y", ("tokens", "features"), "out"),
    ),
    attrs={"kind": "silu"},
    choices={"kind": KINDS},
    splits=("tokens", "features"),
    reference=reference,
    cost=cost,
    make_inputs=make_inputs,
    error_bound=error_bound,
    cases=_cases(),
    mutants=(
        Mutant("gate_and_up_swapped", changed_inputs(reference, lambda i: {"gate": i["up"], "up": i["gate"]})),
        Mutant("always_silu", changed_attrs(reference, lambda a: {"kind": "silu"})),
        Mutant("gelu_erf_for_tanh", _kind_read_as({"gelu_tanh": "gelu_erf"})),
        Mutant("gelu_tanh_for_erf", _kind_read_as({"gelu_erf": "gelu_tanh"})),
        Mutant("gelu_cubic_term_dropped", _cubic_dropped),
        Mutant("gelu_by_sigmoid", _quick_gelu),
        Mutant("silu_overflows", _naive_silu),
        Mutant("up_ignored", changed_inputs(reference, lambda i: {"up": np.ones_like(i["up"])})),
        Mutant("last_column_is_its_neighbour", changed_output(reference, "y", last_column_is_its_neighbour)),
        Mutant("last_row_is_its_neighbour", changed_output(reference, "y", last_row_is_its_neighbour)),
    ),
)
