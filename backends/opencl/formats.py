"""Packed weights: what formats.h is told of a format, and how large a packed weight is."""

from __future__ import annotations

from ...kernels.quant import QuantFormat
from .launch import ProgramSpec

TILE_ROWS = 32  # rows of a packed tile: two 16-wide vectors, which the kernels write out

# Largest integer that a block of 32 activations is rounded to. 254 rather than int8's 127 where sums of 16 bits leave
# room: the rounding error halves (mean |change of nll| per token of SmolLM2-135M 0.063 -> 0.042), sums are widened
# twice as often. Twice 127, so that integers stay integers. Q8_0's quants leave none.
_LEVELS, _LEVELS_Q8_0 = 254, 127


def activation_levels(fmt: QuantFormat) -> int:
    return _LEVELS_Q8_0 if fmt.name == "Q8_0" else _LEVELS


def tiles_of(out_features: int) -> int:
    return -(-out_features // TILE_ROWS)


def weight_program(fmt: QuantFormat, file: str, *before: str, defines: tuple[str, ...] = ()) -> ProgramSpec:
    """The program of `file` for one format, formats.h and the headers `before` it first."""
    sizes = (
        f"BLOCK={fmt.block_length}",
        f"GROUP={fmt.group_length}",
        f"WORDS={fmt.block_bytes // 2}",
        f"LEVELS={activation_levels(fmt)}",
    )
    return ProgramSpec((*before, "formats.h", file), (f"FORMAT_{fmt.name}", *defines), sizes)
