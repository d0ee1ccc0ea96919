"""softcap: x = cap * tanh(x / cap), which bounds the final logits of Gemma 2 (arXiv 2408.00118, 2)."""

from __future__ import annotations

from typing import Any

import numpy as np

from .mutants import changed_attrs, changed_output, last_column_is_its_neighbour, last_row_is_its_neighbour
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
    return {"x": attrs["cap"] * np.tanh(inputs["x"] / attrs["cap"])}


def _validate(signature: Signature) -> str | None:
    cap = signature.attrs["cap"]
    return None if cap > 0 else f"cap is {cap}, expected more than 0"


def cost(signature: Signature) -> Cost:
    tokens, features = signature.tensors["x"].shape
    return Cost(signature_bytes(signature, ("x", "x")), 3 * tokens * features)


def error_bound(inputs: Inputs, attrs: Attrs, outputs: Outputs, numerics: Numerics) -> Outputs:
    """The quotient is off by up to 7 roundings (2.5 ulp of division, the rounding of cap), which tanh passes on with
    slope 1 - tanh**2; then tanh itself and the product."""
    z = inputs["x"].astype(np.float64) / attrs["cap"]
    t = np.tanh(z)
    with np.errstate(invalid="ignore"):
        passed_on = np.where(np.abs(t) == 1, 0.0, 7 * np.abs(z) * (1 - t * t))  # infinity * 0 where tanh is flat
    relative = 2 * numerics.function_ulp * np.abs(t) + passed_on + 2 * np.abs(t)
    return {"x": abs(attrs["cap"]) * relative * U32 + 1e-30}


def make_inputs(case: Case) -> dict[str, Any]:
    """Twice as wide as the cap: most numbers are bent, many reach it. "small": far below it, where it must not show."""
    rng, d = rng_for(case), case.dims
    spread = 0.001 if case.fill == "small" else 2.0
    x = rng.standard_normal((d["T"], d["N"])) * spread * case.attrs.get("cap", 30.0)
    if case.fill == "extreme":
        x = rng.choice([-np.inf, -1e30, -3e3, 0.0, 3e3, 1e30, np.inf, np.nan], x.shape)
    return {"x": x.astype(np.float32)}


SOFTCAP = Op(
    name="softcap",
    doc="x = cap * tanh(x / cap).",
    params=(Param("x", ("tokens", "features"), "inout"),),
    attrs={"cap": 30.0},
    validate=_validate,
    splits=("tokens", "features"),
    reference=reference,
    cost=cost,
    make_inputs=make_inputs,
    error_bound=error_bound,
    cases=(
        *(Case(f"{t}x{n}", {"T": t, "N": n}) for t, n in ((1, 1), (1, 5), (5, 123), (3, 64))),
        Case("cap-5", {"T": 2, "N": 123}, {"cap": 5.0}),
        Case("cap-50", {"T": 1, "N": 1000}, {"cap": 50.0}),
        Case("small", {"T": 3, "N": 33}, {}, "small"),
        Case("extreme", {"T": 2, "N": 35}, {}, "extreme"),
    ),
    mutants=(
        Mutant("identity", changed_output(reference, "x", lambda y, i: i["x"])),
        Mutant("cap_ignored", changed_attrs(reference, lambda a: {"cap": 30.0})),
        Mutant("cap_5_percent_off", changed_attrs(reference, lambda a: {"cap": 1.05 * a["cap"]})),
        Mutant("clipped", lambda i, a: {"x": np.clip(i["x"], -a["cap"], a["cap"])}),
        Mutant("not_scaled_back", lambda i, a: {"x": np.tanh(i["x"] / a["cap"])}),
        Mutant("last_column_is_its_neighbour", changed_output(reference, "x", last_column_is_its_neighbour)),
        Mutant("last_row_is_its_neighbour", changed_output(reference, "x", last_row_is_its_neighbour)),
    ),
)
