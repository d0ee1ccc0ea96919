"""Packed weights: how a matrix lies in device memory, and how it gets there.

Every row is cut into blocks of 32 columns. Each part of all blocks is a plane of its own, [rows, blocks] of equal
records, so that neighbouring threads read neighbouring words and one thread reads the quants of a block at once:

    quants  4, 5 and 6 bits: 16 bytes, byte i holds the low 4 bits of column i in its low half, of column i + 16 in its
            high half. 8 bits: 32 signed bytes. Floats: the row as it is, any number of columns
    high    5 bits: one uint32, bit i is the fifth bit of column i. 6 bits: two uint32, bits 2i and 2i + 1 of the first
            are the upper bits of column i, of the second those of column i + 16
    scales  float16 scale, or scale and minimum; K-quants: uint8 subscale and subminimum, or int8 subscales of columns
            0..15 and 16..31
    supers  K-quants only, one record for 8 blocks: float16 scale and minimum (Q6_K: scale)

A number is (quant - offset) * scale, plus the minimum where there is one. The file's bits are kept; only the 6-bit
subscales of Q4_K and Q5_K take 8 (3% more than the file).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...kernels.quant import Array, QuantFormat, Weight

BLOCK = 32
SUPER = 8  # blocks of a K-quant's super-block
ALIGNMENT = 256  # of a plane, as CuPy's allocations have it: loads of 16 bytes need 16
_PACKED_AT_ONCE = 4 << 20  # bytes: a few times that in copies stay in a cache


@dataclass(frozen=True)
class Layout:
    """Bytes of the records of a format. `halves`: the two halves of a block have scales of their own."""

    bits: int
    offset: int
    has_min: bool = False
    is_super: bool = False
    halves: bool = False

    @property
    def records(self) -> dict[str, int]:
        """Plane name -> bytes for one block (of `supers`: for 8)."""
        found = {"quants": 32 if self.bits == 8 else 16}
        if self.bits in (5, 6):
            found["high"] = 4 * (self.bits - 4)
        found["scales"] = 2 if self.is_super or not self.has_min else 4
        if self.is_super:
            found["supers"] = 4 if self.has_min else 2
        return found


LAYOUTS = {
    "Q4_0": Layout(4, 8),
    "Q4_1": Layout(4, 0, has_min=True),
    "Q5_0": Layout(5, 16),
    "Q5_1": Layout(5, 0, has_min=True),
    "Q8_0": Layout(8, 0),
    "Q4_K": Layout(4, 0, has_min=True, is_super=True),
    "Q5_K": Layout(5, 0, has_min=True, is_super=True),
    "Q6_K": Layout(6, 32, is_super=True, halves=True),
}
FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
PLANES = ("quants", "high", "scales", "supers")


def constants(fmt: QuantFormat) -> dict[str, int]:
    """What kernels are compiled for: BITS 0 is a float, whose pointer says which."""
    if fmt.is_float:
        return {"BITS": 0, "OFFSET": 0, "HAS_MIN": 0, "IS_SUPER": 0, "HALVES": 0}
    x = LAYOUTS[fmt.name]
    flags = {"HAS_MIN": x.has_min, "IS_SUPER": x.is_super, "HALVES": x.halves}
    return {"BITS": x.bits, "OFFSET": x.offset, **{name: int(value) for name, value in flags.items()}}


def dtypes(fmt: QuantFormat) -> dict[str, str]:
    """Plane name -> type of its elements, in Triton's words."""
    if fmt.is_float:
        return {"quants": {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}[fmt.name]}
    records = LAYOUTS[fmt.name].records
    words = {2: "u16", 4: "u32"}
    found = {"quants": "i8" if LAYOUTS[fmt.name].bits == 8 else "u8"}
    return found | {name: "u32" if name == "high" else words[records[name]] for name in records if name != "quants"}


def planes(fmt: QuantFormat, rows: int, columns: int) -> dict[str, tuple[int, int]]:
    """Plane name -> (first byte, bytes), in the order of PLANES."""
    if fmt.is_float:
        return {"quants": (0, rows * columns * FLOAT_BYTES[fmt.name])}
    found: dict[str, tuple[int, int]] = {}
    begin = 0
    for name, nbytes in LAYOUTS[fmt.name].records.items():
        size = rows * (columns // BLOCK) * nbytes // (SUPER if name == "supers" else 1)
        found[name] = (begin, size)
        begin += -(-size // ALIGNMENT) * ALIGNMENT
    return found


def packed_bytes(fmt: QuantFormat, rows: int, columns: int) -> int:
    """Of all planes; their gaps count, what is behind the last does not."""
    begin, size = list(planes(fmt, rows, columns).values())[-1]
    return begin + size


def pack(weight: Weight) -> Array:
    """`weight` as uint8 [packed_bytes]."""
    fmt, (rows, columns) = weight.format, weight.shape
    if fmt.is_float:
        return np.ascontiguousarray(weight.data).reshape(-1)
    packed = np.zeros(packed_bytes(fmt, rows, columns), np.uint8)
    places = {
        name: packed[begin : begin + size].reshape(rows, -1)
        for name, (begin, size) in planes(fmt, rows, columns).items()
    }
    step = max(1, _PACKED_AT_ONCE // weight.data.shape[1])
    for first in range(0, rows, step):
        part = weight.data[first : first + step]
        blocks = np.ascontiguousarray(part).reshape(len(part), -1, fmt.block_bytes)
        fields = {f.name: blocks[:, :, f.offset : f.offset + f.nbytes] for f in fmt.fields}
        for name, values in _records(fmt.name, fields).items():
            places[name][first : first + step] = values.reshape(len(part), -1)
    return packed


def _records(name: str, fields: dict[str, Array]) -> dict[str, Array]:
    """The planes of some rows: of every field uint8 [rows, blocks of the file, bytes]."""
    if name == "Q8_0":
        return {"quants": fields["qs"], "scales": fields["d"]}
    if name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        scales = np.concatenate([fields[f] for f in ("d", "m") if f in fields], axis=2)
        found = {"quants": fields["qs"], "scales": scales}
        return found | ({"high": fields["qh"]} if "qh" in fields else {})
    if name == "Q6_K":
        return _six_bits(fields)
    scales, minima = _subscales(fields["scales"])
    quants = _nibbles(fields["qs"])  # [rows, blocks, 8, 32]
    found = {
        "quants": _halves(quants),
        "scales": np.stack([scales, minima], axis=3),
        "supers": np.concatenate([fields["d"], fields["dmin"]], axis=2),
    }
    if name == "Q5_K":  # bit j of byte i: column 32 j + i
        bits = fields["qh"][:, :, None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1
        found["high"] = np.packbits(bits, axis=3, bitorder="little")
    return found


def _nibbles(qs: Array) -> Array:
    """[rows, blocks, 128] with 64 columns in 32 bytes, low halves first -> [rows, blocks, 8, 32]."""
    bytes_ = qs.reshape(*qs.shape[:2], 4, 1, 32)
    return np.concatenate([bytes_ & 15, bytes_ >> 4], axis=3).reshape(*qs.shape[:2], 8, 32)


def _halves(low: Array) -> Array:
    """4-bit numbers [..., 32] -> bytes [..., 16]."""
    return low[..., :16] | low[..., 16:] << 4


def _subscales(packed: Array) -> tuple[Array, Array]:
    """The 6-bit scales and minima of 8 blocks from 12 bytes: [rows, blocks, 8] each (get_scale_min_k4 of
    ggml-quants.c, ggml-org/ggml at d99724f)."""
    first, second, third = (packed[:, :, i : i + 4] for i in (0, 4, 8))
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=2)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=2)
    return scales, minima


def _six_bits(fields: dict[str, Array]) -> dict[str, Array]:
    """Q6_K: of 128 columns, byte i of 64 holds the low bits of columns i and 64 + i; of 32 bytes, bits 2j and 2j + 1 of
    byte i are the high bits of column 32 j + i."""
    shape = fields["d"].shape[:2]
    ql, qh = fields["ql"].reshape(*shape, 2, 1, 64), fields["qh"].reshape(*shape, 2, 1, 32)
    low = np.concatenate([ql & 15, ql >> 4], axis=3).reshape(*shape, 8, 32)
    high = (qh >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3).reshape(*shape, 8, 2, 16)
    words = (high.astype(np.uint32) << (2 * np.arange(16, dtype=np.uint32))).sum(axis=4, dtype=np.uint32)
    return {
        "quants": _halves(low),
        "high": words.view(np.uint8),
        "scales": fields["scales"].reshape(*shape, 8, 2),
        "supers": fields["d"],
    }
