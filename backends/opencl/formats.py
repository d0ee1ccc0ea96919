"""Packed weights: what formats.h is told of a format, and how a weight is packed."""

from __future__ import annotations

import numpy as np

from ...kernels.quant import Array, QuantFormat, Weight
from .launch import ProgramSpec

TILE_ROWS = 32  # rows of a packed tile: two 16-wide vectors, which the kernels write out

# Largest integer that a block of 32 activations is rounded to. Their products are added up in pairs of 16-bit numbers,
# so that int8's 127 would be no faster. A multiple of 127, so that integers stay integers.
ACTIVATION_LEVELS = 127 * 256

# What to subtract from quants, which kernels read as numbers >= 0. (Q4_1, Q5_1, Q4_K and Q5_K have a minimum instead.)
_OFFSETS = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128, "Q6_K": 32}

_PACKED_AT_ONCE = 1 << 20  # bytes: what is read and written of so many rows stays in a cache


def tiles_of(out_features: int) -> int:
    return -(-out_features // TILE_ROWS)


def packed_bytes(fmt: QuantFormat, out_features: int, in_features: int) -> int:
    return tiles_of(out_features) * TILE_ROWS * fmt.row_bytes(in_features)


def weight_program(fmt: QuantFormat, file: str, *before: str, defines: tuple[str, ...] = ()) -> ProgramSpec:
    """The program of `file` for one format, formats.h and the headers `before` it first."""
    sizes = (
        f"BLOCK={fmt.block_length}",
        f"GROUP={fmt.group_length}",
        f"WORDS={fmt.block_bytes // 2}",
        f"OFFSET={_OFFSETS.get(fmt.name, 0)}",
        f"LEVELS={ACTIVATION_LEVELS}",
    )
    return ProgramSpec((*before, "formats.h", file), (f"FORMAT_{fmt.name}", *defines), sizes)


def pack(weight: Weight, packed: Array) -> None:
    """`weight` into `packed`, uint8 [tiles, 32 * row bytes]: formats.h says how it lies there."""
    rows = max(1, _PACKED_AT_ONCE // (TILE_ROWS * weight.data.shape[1])) * TILE_ROWS
    for start in range(0, weight.shape[0], rows):
        part = weight.data[start : start + rows]
        to = packed[start // TILE_ROWS : tiles_of(start + len(part))]
        if len(part) % TILE_ROWS:
            whole = np.zeros((len(to) * TILE_ROWS, part.shape[1]), np.uint8)
            whole[: len(part)] = part
            part = whole
        _pack_tiles(weight.format, part, to)


def _pack_tiles(fmt: QuantFormat, rows: Array, packed: Array) -> None:
    """`rows`, uint8 [32 * tiles, row bytes]."""
    tiles, row_bytes = len(packed), rows.shape[1]
    blocks = row_bytes // fmt.block_bytes
    for field in fmt.fields:
        # Scales are read as 16-bit numbers, quants as 32-bit ones; F16 and BF16 have only 16 bits.
        is_wide = field.kind in ("quants", "high") and field.nbytes % 4 == 0
        unit = np.dtype("<u4" if is_wide else "<u2")
        words = field.nbytes // unit.itemsize
        source = np.ndarray(
            (tiles, TILE_ROWS, blocks, words), unit, rows, field.offset,
            (TILE_ROWS * rows.strides[0], rows.strides[0], fmt.block_bytes, unit.itemsize),
        )  # fmt: skip
        target = np.ndarray(
            (tiles, blocks, words, TILE_ROWS), unit, packed, TILE_ROWS * field.offset,
            (packed.strides[0], TILE_ROWS * fmt.block_bytes, TILE_ROWS * unit.itemsize, unit.itemsize),
        )  # fmt: skip
        target[:] = source.transpose(0, 2, 3, 1)
        if fmt.name == "Q8_0" and field.kind == "quants":
            target ^= 0x80808080  # -128 .. 127 -> 0 .. 255
        elif fmt.name in ("Q5_0", "Q5_1") and field.kind == "high":
            target[:] = _bits_by_pair(target)


def _bits_by_pair(bits: Array) -> Array:
    """Bit k of each uint32, that of weight k, to where the pair of that weight has it.

    Weight 16 a + 4 j + 2 c + b (digits in binary: a jj c b) is number c of pair 8 a + 2 j + b: its bit goes to
    16 c + 8 a + 2 j + b (c a jj b).
    """
    for low, high in ((1, 2), (2, 3), (3, 4)):  # c trades places with each digit above it
        shift = (1 << high) - (1 << low)
        moved = sum(1 << k for k in range(32) if k >> low & 1 and not k >> high & 1)
        differ = (bits ^ bits >> np.uint32(shift)) & np.uint32(moved)
        bits = bits ^ differ ^ differ << np.uint32(shift)
    return bits
