"""rope: rotary position embedding (arXiv 2104.09864) from a table of cosines and sines; how to make that table.

The table holds everything a model family does to its frequencies, so kernels know two pairings and nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .errors import ContractError
from .mutants import changed_attrs, changed_inputs, changed_output, last_element_zero, last_row_is_its_neighbour
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

PAIRINGS = ("interleaved", "half")


@dataclass(frozen=True)
class RopeScaling:
    """How a model stretches its frequencies.

    none     as they are
    linear   divided by `factor`
    llama3   low frequencies divided by `factor`, high ones kept, a ramp between (low_freq_factor, high_freq_factor)
    yarn     the same with a ramp over dimensions (beta_fast, beta_slow), arXiv 2309.00071
    factors  each divided by its own of `factors` [rot_dim / 2]: LongRoPE, or the tensor rope_freqs of a GGUF file

    `original_context` is the context length the model was trained with. `attention_factor` multiplies cosines and
    sines; None: 0.1 ln(factor) + 1 for yarn, 1 otherwise.
    """

    kind: Literal["none", "linear", "llama3", "yarn", "factors"] = "none"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    factors: tuple[float, ...] = ()
    attention_factor: float | None = None


# The formulas below: src/transformers/modeling_rope_utils.py of huggingface/transformers at 0044e3b; those of yarn and
# of the factors also in src/ggml-cpu/ops.cpp of ggml-org/ggml at 084bfe1, which gives the same numbers.


def frequencies(rot_dim: int, base: float, scaling: RopeScaling | None = None) -> Array:
    """Angle per position of each rotated pair, float64 [rot_dim / 2]."""
    scaling = scaling or RopeScaling()
    if rot_dim <= 0 or rot_dim % 2:
        raise ContractError(f"rope: {rot_dim} rotated dimensions; expected a positive even number")
    pair = np.arange(rot_dim // 2)
    inv_freq = base ** (-2.0 * pair / rot_dim)
    if scaling.kind == "linear":
        return inv_freq / scaling.factor
    if scaling.kind == "factors":
        if len(scaling.factors) != len(pair):
            raise ContractError(f"rope: {len(scaling.factors)} factors for {len(pair)} frequencies")
        return inv_freq / np.array(scaling.factors, np.float64)
    if scaling.kind in ("llama3", "yarn") and scaling.original_context <= 0:
        raise ContractError(f"rope: {scaling.kind} scaling needs original_context, the context length of training")
    if scaling.kind == "llama3":
        turns = scaling.original_context * inv_freq / (2 * math.pi)  # full turns within the original context
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
    elif scaling.kind == "yarn":

        def dimension(turns: float) -> float:
            """The (fractional) pair that makes `turns` full turns within the original context."""
            return rot_dim * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(dimension(scaling.beta_fast)), 0)
        high = min(math.ceil(dimension(scaling.beta_slow)), rot_dim - 1)
        kept = 1 - np.clip((pair - low) / max(high - low, 0.001), 0, 1)
    else:
        kept = np.ones(len(pair))
    return inv_freq * kept + inv_freq / scaling.factor * (1 - kept)


def attention_factor(scaling: RopeScaling) -> float:
    """What cosines and sines are multiplied by."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1 if scaling.kind == "yarn" and scaling.factor > 1 else 1.0


def cos_sin_table(inv_freq: Array, length: int, attention_factor: float = 1.0) -> Array:
    """float32 [length, rot_dim]: per position the cosine of every frequency, then the sine; computed in float64."""
    angles = np.arange(length, dtype=np.float64)[:, None] * inv_freq.astype(np.float64)
    return (np.concatenate([np.cos(angles), np.sin(angles)], axis=1) * attention_factor).astype(np.float32)


def _pairs(rot_dim: int, pairing: str) -> tuple[slice, slice]:
    """The first and the second members of the rotated pairs, as slices of head_dim."""
    if pairing == "interleaved":
        return slice(0, rot_dim, 2), slice(1, rot_dim, 2)
    return slice(0, rot_dim // 2), slice(rot_dim // 2, rot_dim)


def rotate(x: Array, cos_sin: Array, positions: Array, pairing: str, sign: float = 1.0) -> Array:
    """x [T, H, D] rotated. The table's numbers are taken in the precision of x; `sign` -1 is the wrong direction."""
    length, rot_dim = cos_sin.shape
    known = np.flatnonzero((positions >= 0) & (positions < length))
    first, second = _pairs(rot_dim, pairing)
    row = cos_sin[positions[known], None, :].astype(x.dtype, copy=False)
    cos, sin = row[..., : rot_dim // 2], sign * row[..., rot_dim // 2 :]
    a, b = x[known][..., first], x[known][..., second]
    y, rotated = x.copy(), x[known]
    rotated[..., first] = a * cos - b * sin
    rotated[..., second] = a * sin + b * cos
    y[known] = rotated
    return y


def reference(inputs: Inputs, attrs: Attrs) -> Outputs:
    return {"x": rotate(inputs["x"], inputs["cos_sin"], inputs["positions"], attrs["pairing"])}


def rot_dim_problem(signature: Signature, name: str) -> str | None:
    """Why the table's rot_dim does not fit the heads of tensor `name`."""
    head_dim, rot_dim = signature.tensors[name].shape[2], signature.tensors["cos_sin"].shape[1]
    if rot_dim % 2 == 0 and rot_dim <= head_dim:
        return None
    return f"{rot_dim} rotated dimensions of {head_dim}; expected an even number up to that"


def cost(signature: Signature) -> Cost:
    tokens, heads, _ = signature.tensors["x"].shape
    rot_dim = signature.tensors["cos_sin"].shape[1]
    moved = 4 * tokens * rot_dim * (2 * heads + 1)
    return Cost(moved + signature_bytes(signature, ("positions",)), 3 * tokens * heads * rot_dim)


def rotation_bound(x: Array, cos_sin: Array, positions: Array, pairing: str) -> Array:
    """Largest error of `rotate`: three roundings of |a cos| + |b sin|; what is not rotated stays as it is."""
    length, rot_dim = cos_sin.shape
    known = np.flatnonzero((positions >= 0) & (positions < length))
    first, second = _pairs(rot_dim, pairing)
    row = np.abs(cos_sin[positions[known], None, :].astype(np.float64))
    cos, sin = row[..., : rot_dim // 2], row[..., rot_dim // 2 :]
    size = np.abs(x[known].astype(np.float64))
    a, b = size[..., first], size[..., second]
    rotated = np.zeros_like(size)
    rotated[..., first] = a * cos + b * sin
    rotated[..., second] = a * sin + b * cos
    bound = np.zeros(x.shape)
    bound[known] = 3 * U32 * rotated
    return bound


def error_bound(inputs: Inputs, attrs: Attrs, outputs: Outputs, numerics: Numerics) -> Outputs:
    return {"x": rotation_bound(inputs["x"], inputs["cos_sin"], inputs["positions"], attrs["pairing"])}


def make_table(rot_dim: int, length: int) -> Array:
    return cos_sin_table(frequencies(rot_dim, 10000.0), length, 1.07)


def make_inputs(case: Case) -> dict[str, Any]:
    """Positions in no order, the last of the table among them; "strange" rows have none of the table's."""
    rng, d = rng_for(case), case.dims
    length = d.get("L", 50)
    positions = rng.integers(0, length, d["T"])
    positions[0] = length - 1
    if d.get("strange"):
        positions[1], positions[2], positions[-1] = -1, length, -5
    return {
        "x": rng.standard_normal((d["T"], d["H"], d["D"]), dtype=np.float32),
        "cos_sin": make_table(d.get("R", d["D"]), length),
        "positions": positions.astype(np.int32),
    }


def _cases() -> tuple[Case, ...]:
    cases: list[Case] = []
    for pairing in PAIRINGS:
        attrs = {"pairing": pairing}
        for t, h, dim, rot in (
            (1, 1, 2, 2),
            (1, 9, 64, 64),
            (5, 3, 80, 32),
            (3, 2, 96, 96),
            (2, 4, 128, 128),
            (7, 1, 5, 4),
        ):
            cases.append(Case(f"{pairing}-{t}x{h}x{dim}-{rot}", {"T": t, "H": h, "D": dim, "R": rot}, attrs))
        cases.append(Case(f"{pairing}-strange-positions", {"T": 6, "H": 3, "D": 64, "strange": True}, attrs))
        cases.append(Case(f"{pairing}-partial-256", {"T": 2, "H": 2, "D": 256, "R": 64, "L": 700}, attrs))
    return tuple(cases)


def other_pairing(attrs: Attrs) -> dict[str, Any]:
    return {"pairing": PAIRINGS[1 - PAIRINGS.index(attrs["pairing"])]}


def next_position(inputs: dict[str, Any]) -> dict[str, Any]:
    positions = inputs["positions"]
    return {"positions": np.where(positions > 0, positions - 1, positions)}


def _tail_zeroed(x: Array, inputs: Inputs) -> None:
    x[..., inputs["cos_sin"].shape[1] :] = 0


def _strange_zeroed(x: Array, inputs: Inputs) -> None:
    positions = inputs["positions"]
    x[(positions < 0) | (positions >= len(inputs["cos_sin"]))] = 0


def _halves_swapped(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"cos_sin": np.roll(inputs["cos_sin"], inputs["cos_sin"].shape[1] // 2, axis=1)}


ROPE = Op(
    name="rope",
    doc="x rotated by its position's angles, which are rows of `cos_sin`: first the cosines, then the sines. A pair "
    "(a, b) becomes (a cos - b sin, a sin + b cos). `pairing` interleaved: (x[2i], x[2i+1]); half: (x[i], x[i + R/2]). "
    "Numbers from rot_dim on stay, as do rows whose position is outside the table (padding is -1).",
    params=(
        Param("x", ("tokens", "heads", "head_dim"), "inout"),
        Param("cos_sin", ("table_length", "rot_dim"), values="angles"),
        Param("positions", ("tokens",), dtypes=("i32",), values="positions"),
    ),
    attrs={"pairing": "interleaved"},
    choices={"pairing": PAIRINGS},
    validate=lambda signature: rot_dim_problem(signature, "x"),
    splits=("tokens", "heads"),
    reference=reference,
    cost=cost,
    make_inputs=make_inputs,
    error_bound=error_bound,
    cases=_cases(),
    mutants=(
        Mutant("pairing_swapped", changed_attrs(reference, other_pairing)),
        Mutant(
            "wrong_direction",
            lambda i, a: {"x": rotate(i["x"], i["cos_sin"], i["positions"], a["pairing"], sign=-1.0)},
        ),
        Mutant("position_off_by_one", changed_inputs(reference, next_position)),
        Mutant("cos_and_sin_swapped", changed_inputs(reference, _halves_swapped)),
        Mutant("tail_not_passed_through", changed_output(reference, "x", _tail_zeroed)),
        Mutant("padding_zeroed", changed_output(reference, "x", _strange_zeroed)),
        Mutant(
            "padding_at_position_0", changed_inputs(reference, lambda i: {"positions": np.maximum(i["positions"], 0)})
        ),
        Mutant(
            "only_first_head",
            changed_output(reference, "x", lambda x, i: np.where(np.arange(x.shape[1])[:, None], i["x"], x)),
        ),
        Mutant("not_rotated", changed_output(reference, "x", lambda x, i: i["x"])),
        Mutant("last_row_is_its_neighbour", changed_output(reference, "x", last_row_is_its_neighbour)),
        Mutant("last_element_zero", changed_output(reference, "x", last_element_zero)),
    ),
)
