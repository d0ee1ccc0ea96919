"""gemm: y = x @ w.T + bias, with weights in any QuantFormat. One row of x is the decode GEMV."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .mutants import (
    Run,
    changed_inputs,
    changed_output,
    last_column_is_its_neighbour,
    last_element_zero,
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
    Reference,
    Signature,
    dense,
    rng_for,
    signature_bytes,
)
from .quant import FORMATS, Array, Weight
from .testdata import activations, random_weight

PRECISIONS = ("exact", "fast")


def reference(inputs: Inputs, attrs: Attrs) -> Outputs:
    x = inputs["x"]
    y = x @ dense(inputs["w"], x).T
    if inputs.get("bias") is not None:
        y = y + inputs["bias"]
    return {"y": y}


def cost(signature: Signature) -> Cost:
    tokens, in_features = signature.tensors["x"].shape
    out_features = signature.tensors["w"].shape[0]
    return Cost(signature_bytes(signature, ("x", "w", "bias", "y")), 2 * tokens * in_features * out_features)


def block_steps(x: Array, levels: int) -> Array:
    """The step max|x| / levels of each number's block of 32 along a row [T, K]; the last block may be short."""
    tokens, features = x.shape
    padded = np.pad(np.abs(x), ((0, 0), (0, -features % 32)))
    steps = padded.reshape(tokens, -1, 32).max(axis=2) / levels
    return np.repeat(steps, 32, axis=1)[:, :features]


def _magnitude(weight: Weight) -> Array:
    """`weight.magnitude()`, once per weight: every bound of a case asks for it, and most of its time goes there."""
    if "_magnitude" not in weight.__dict__:
        weight.__dict__["_magnitude"] = weight.magnitude()
    return weight.__dict__["_magnitude"]


def product_bound(x: Array, weight: Weight, numerics: Numerics, x_error: Array | None = None) -> Array:
    """Largest error of x @ w.T [T, N], element by element, where x [T, K] itself may be off by up to `x_error`.

    gamma(depth + 6) * sum |x||w| for the sums: 6 roundings per term cover scale conversion, scale * quant, offset, and
    the product itself. With int8 activations each x is off by up to half its block's step (plus the rounding of the
    step, hence 0.505). With bf16 each product is off by two roundings to 8 bits.
    """
    x, magnitude = np.abs(x.astype(np.float64)), _magnitude(weight)
    bound = np.zeros((x.shape[0], magnitude.shape[0]))
    if x_error is not None:
        x = x + x_error
        bound += x_error @ magnitude.T
    bound += numerics.gamma(6) * (x @ magnitude.T)
    if numerics.activations == "int8":
        bound += (0.505 * block_steps(x, numerics.activation_levels)) @ magnitude.T
    elif numerics.activations == "bf16":  # two roundings to 8 bits, each off by up to 2**-8
        bound += 1.01 * 2.0**-7 * (x @ magnitude.T)
    return bound


def addend_bound(inputs: Inputs, numerics: Numerics, *names: str) -> Array | float:
    """Error from addends, which may be where an accumulation starts and so take part in all of its roundings."""
    return sum(
        (numerics.gamma(2) * np.abs(inputs[n].astype(np.float64)) for n in names if inputs.get(n) is not None), 0.0
    )


def error_bound(inputs: Inputs, attrs: Attrs, outputs: Outputs, numerics: Numerics) -> Outputs:
    bound = product_bound(inputs["x"], inputs["w"], numerics) + addend_bound(inputs, numerics, "bias")
    return {"y": bound + 2 * U32 * np.abs(outputs["y"]) + 1e-30}


def make_inputs(case: Case) -> dict[str, Any]:
    rng, d = rng_for(case), case.dims
    inputs: dict[str, Any] = {
        "x": activations(rng, d["T"], d["K"], case.fill),
        "w": random_weight(rng, d["format"], d["N"], d["K"], case.fill),
    }
    if d.get("bias"):
        inputs["bias"] = rng.integers(-9, 10, d["N"]).astype(np.float32)
    return inputs


def shapes(block: int) -> list[tuple[int, int, int]]:
    """(T, N, K): one row and odd row counts, N off and on a multiple of 16, K of one block and of several, and deep."""
    k = max(block, 32)
    odd_k = [(1, 3, 1), (2, 17, 5), (5, 123, 123), (6, 40, 301)] if block == 1 else [(6, 40, 10 * k)]
    return [(1, 1, k), (1, 5, 2 * k), (1, 123, 3 * k), (1, 64, 2 * k), (3, 48, k), (5, 123, k), (33, 20, 2 * k), *odd_k]


def _cases() -> tuple[Case, ...]:
    cases: list[Case] = []
    for name, fmt in FORMATS.items():
        for precision in PRECISIONS:
            attrs = {"precision": precision}
            for t, n, k in shapes(fmt.block_length):
                cases.append(Case(f"{name}-{precision}-{t}x{n}x{k}", {"T": t, "N": n, "K": k, "format": name}, attrs))
            k = max(fmt.block_length, 64)
            for fill in ("integer", "outlier", "cancel", "zeros", "last"):
                for t in (1, 17):
                    dims = {"T": t, "N": 35, "K": 2 * k if fill in ("cancel", "zeros") else k, "format": name}
                    cases.append(Case(f"{name}-{precision}-{fill}-{t}", dims, attrs, fill))
            dims = {"T": 2, "N": 35, "K": 2 * k, "format": name}
            cases += [Case(f"{name}-{precision}-{fill}", dims, attrs, fill) for fill in ("extreme", "nan")]
            for t in (2, 7):
                dims = {"T": t, "N": 99, "K": k, "format": name, "bias": True}
                cases.append(Case(f"{name}-{precision}-bias-{t}", dims, attrs))
            if name in ("F16", "Q4_0"):  # rows enough for every core of a large machine
                dims = {"T": 2, "N": 8219, "K": 32, "format": name}
                cases.append(Case(f"{name}-{precision}-wide", dims, attrs))
    return tuple(cases)


def _changed_bytes(weight: Weight, kinds: tuple[str, ...], change: Any) -> Weight:
    blocks = weight.data.reshape(-1, weight.format.block_bytes).copy()
    for field in weight.format.fields:
        if field.kind in kinds and not weight.format.is_float:
            part = slice(field.offset, field.offset + field.nbytes)
            blocks[:, part] = change(blocks[:, part])
    return Weight(weight.format, weight.shape, blocks.reshape(weight.data.shape))


def nibbles_swapped(w: Weight) -> Weight:
    if w.format.bits not in (4, 5):
        return w
    return _changed_bytes(w, ("quants",), lambda b: (b >> 4) | (b << 4))


def min_dropped(w: Weight) -> Weight:
    return _changed_bytes(w, ("min",), np.zeros_like)


def high_bits_dropped(w: Weight) -> Weight:
    return _changed_bytes(w, ("high",), np.zeros_like)


def scale_of_next_block(w: Weight) -> Weight:
    return _changed_bytes(w, ("scale", "min", "subscale"), lambda b: np.roll(b, 1, axis=0))


def last_feature_dropped(inputs: dict[str, Any]) -> dict[str, Any]:
    x = inputs["x"].copy()
    x[:, -1] = 0
    return {"x": x}


def product_mutants(reference: Reference) -> tuple[Mutant, ...]:
    """Mutants of every op that ends in a product y [T, N]."""
    return (
        Mutant("last_row_is_its_neighbour", changed_output(reference, "y", last_column_is_its_neighbour)),
        Mutant("last_token_is_its_neighbour", changed_output(reference, "y", last_row_is_its_neighbour)),
        Mutant("one_element_zero", changed_output(reference, "y", last_element_zero)),
        Mutant("nan_is_zero", changed_inputs(reference, lambda i: {"x": np.nan_to_num(i["x"])})),
        Mutant("nan_spreads_to_all_rows", changed_output(reference, "y", _all_nan)),
    )


def _all_nan(y: Array, inputs: Inputs) -> None:
    y[:] += y[-1:] * 0


def weight_mutants(reference: Reference, name: str = "w") -> tuple[Mutant, ...]:
    """Mutants that read the weight `name` wrongly."""

    def on_weight(change: Callable[[Weight], Weight]) -> Run:
        return changed_inputs(reference, lambda inputs: {name: change(inputs[name])})

    return (
        Mutant(f"{name}_nibbles_swapped", on_weight(nibbles_swapped)),
        Mutant(f"{name}_min_dropped", on_weight(min_dropped)),
        Mutant(f"{name}_high_bits_dropped", on_weight(high_bits_dropped)),
        Mutant(f"{name}_scale_of_next_block", on_weight(scale_of_next_block)),
    )


GEMM = Op(
    name="gemm",
    doc="y = x @ w.T (+ bias). `precision` exact: float32 activations; fast: they may be rounded to int8 per block "
    "of 32, or they and the weights to bfloat16.",
    params=(
        Param("x", ("tokens", "in_features")),
        Param("w", ("out_features", "in_features"), "weight"),
        Param("bias", ("out_features",), optional=True),
        Param("y", ("tokens", "out_features"), "out"),
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
        Mutant("last_product_dropped", changed_inputs(reference, last_feature_dropped)),
        Mutant("bias_ignored", changed_inputs(reference, lambda i: {"bias": None})),
        Mutant("scale_5_percent_off", changed_output(reference, "y", lambda y, i: y * 1.05)),
        *product_mutants(reference),
    ),
    required=True,
)
