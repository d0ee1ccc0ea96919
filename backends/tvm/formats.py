"""Packed weights: how a matrix lies in memory for dot products over 16 rows at once, and how kernels read it.

A tile is 32 rows, two vectors of 16. Floats: row k of a tile is its 32 numbers of column k. Quantised formats, for each
32 columns (a "block") of a tile:

    scales   head (see below) at the start of a super-block, subscales at the start of each block
    low      per half of the tile 4 vectors of 64 bytes: byte (row r, i) of vector j holds in its low half the quant of
             column 4j + i, in its high half that of column 4j + i + 16; 8-bit quants: 8 vectors, column 4j + i, with
             128 added
    high     5 bits: per half 64 bytes, bit j of byte (r, i) is the fifth bit of column 4j + i. 6 bits: per half twice
             64 bytes, bits 2j and 2j + 1 of byte (r, i) are the upper bits of column 4j + i, and of 4j + i + 16

so that four consecutive columns of a row are the four bytes of one 32-bit lane, as dot products want them. A K-quant's
super-block is 8 blocks. Every part is a multiple of 64 bytes; the file's bits are kept, only K-quants' 6-bit subscales
take 8 (3% more than the file).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...kernels.quant import Array, QuantFormat, Weight
from .emit import LANES, Emitter, Expr, Memory

TILE_ROWS = 2 * LANES
BLOCK = 32
LEVELS = 127  # largest integer that a block of 32 activations is rounded to: dot products take int8


@dataclass(frozen=True)
class Layout:
    """Bytes of a quantised format. `offset` is what is subtracted from a quant, `head` the float16 vectors (scale, or
    scale and min) of a super-block of `blocks` blocks, `subscales` the vectors of 32 bytes in each block."""

    bits: int
    offset: int
    head: int
    blocks: int = 1
    subscales: int = 0
    group: int = 32

    @property
    def head_bytes(self) -> int:
        return self.head * 2 * TILE_ROWS

    @property
    def half_bytes(self) -> int:
        """Quants of a block for 16 rows."""
        return {4: 256, 5: 320, 6: 384, 8: 512}[self.bits]

    @property
    def block_bytes(self) -> int:
        return self.subscales * TILE_ROWS + 2 * self.half_bytes

    @property
    def super_bytes(self) -> int:
        return self.head_bytes + self.blocks * self.block_bytes

    @property
    def has_min(self) -> bool:
        return self.head == 2


LAYOUTS = {
    "Q4_0": Layout(4, 8, 1),
    "Q4_1": Layout(4, 0, 2),
    "Q5_0": Layout(5, 16, 1),
    "Q5_1": Layout(5, 0, 2),
    "Q8_0": Layout(8, 128, 1),
    "Q4_K": Layout(4, 0, 2, 8, 2),
    "Q5_K": Layout(5, 0, 2, 8, 2),
    "Q6_K": Layout(6, 32, 1, 8, 2, 16),
}
FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def tiles_of(out_features: int) -> int:
    return -(-out_features // TILE_ROWS)


def tile_bytes(fmt: QuantFormat, in_features: int) -> int:
    if fmt.is_float:
        return TILE_ROWS * in_features * FLOAT_BYTES[fmt.name]
    layout = LAYOUTS[fmt.name]
    return in_features // (BLOCK * layout.blocks) * layout.super_bytes


def packed_bytes(fmt: QuantFormat, out_features: int, in_features: int) -> int:
    return tiles_of(out_features) * tile_bytes(fmt, in_features)


# Packing, in NumPy


def pack(weight: Weight, packed: Array) -> None:
    """Write `weight` into `packed`, uint8 [packed_bytes]; a few tiles at a time, so that it takes no second copy."""
    fmt, (rows, columns) = weight.format, weight.shape
    size = tile_bytes(fmt, columns)
    step = max(1, (4 << 20) // size)
    for first in range(0, tiles_of(rows), step):
        last = min(first + step, tiles_of(rows))
        data = weight.data[first * TILE_ROWS : last * TILE_ROWS]
        if len(data) < (last - first) * TILE_ROWS:
            data = np.concatenate([data, np.zeros(((last - first) * TILE_ROWS - len(data), data.shape[1]), np.uint8)])
        part = packed[first * size : last * size]
        if fmt.is_float:
            unit = np.dtype(f"u{FLOAT_BYTES[fmt.name]}")
            source = np.ascontiguousarray(data).view(unit).reshape(last - first, TILE_ROWS, columns)
            part.view(unit).reshape(last - first, columns, TILE_ROWS)[...] = source.transpose(0, 2, 1)
        else:
            _pack_blocks(fmt, LAYOUTS[fmt.name], data.reshape(last - first, TILE_ROWS, -1, fmt.block_bytes), part)


def _pack_blocks(fmt: QuantFormat, layout: Layout, source: Array, part: Array) -> None:
    """`source`: uint8 [tiles, 32, super-blocks, block bytes] of the file."""
    tiles, _, supers, _ = source.shape
    target = part.reshape(tiles, supers, layout.super_bytes)
    fields = {
        field.name: source[..., field.offset : field.offset + field.nbytes] for field in fmt.fields
    }  # each [tiles, 32, supers, nbytes]
    heads = [fields[name] for name in ("d", "m", "dmin") if name in fields]
    for i, head in enumerate(heads):
        place = target[..., 64 * i : 64 * i + 64].view(np.uint16)
        place[...] = head.view(np.uint16)[..., 0].transpose(0, 2, 1)
    blocks = target[..., layout.head_bytes :].reshape(tiles, supers, layout.blocks, layout.block_bytes)
    for i, sub in enumerate(_subscales(fmt, fields)):  # each [tiles, 32, supers, blocks]
        blocks[..., 32 * i : 32 * i + 32] = sub.transpose(0, 2, 3, 1)
    quants = blocks[..., layout.subscales * TILE_ROWS :].reshape(tiles, supers, layout.blocks, 2, layout.half_bytes)
    low, high = _quants(fmt, fields)  # [tiles, 32, supers, blocks, 16 or 32], [..., 4 or 8] or None
    vectors = low.shape[-1] // 4
    _spread(low, quants[..., : 64 * vectors], vectors)
    if high is not None:
        _spread(high, quants[..., 64 * vectors :], high.shape[-1] // 4)


def _spread(values: Array, target: Array, vectors: int) -> None:
    """Bytes [tiles, 32, supers, blocks, 4 * vectors] to [tiles, supers, blocks, half, vectors * (16 rows x 4)]."""
    tiles, _, supers, blocks, _ = values.shape
    words = np.ascontiguousarray(values).view(np.uint32).reshape(tiles, 2, LANES, supers, blocks, vectors)
    shape = (tiles, supers, blocks, 2, vectors, LANES)
    target.view(np.uint32).reshape(shape)[...] = words.transpose(0, 3, 4, 1, 5, 2)


def _subscales(fmt: QuantFormat, fields: dict[str, Array]) -> list[Array]:
    """The factors of each block, uint8 (Q6_K: int8 as bytes) [tiles, 32, supers, blocks]: scale and min, or two scales
    of 16 columns. 6-bit fields: get_scale_min_k4 in ggml-quants.c of ggml-org/ggml at d99724f."""
    if fmt.name == "Q6_K":
        return [fields["scales"][..., 0::2], fields["scales"][..., 1::2]]
    if "scales" not in fields:
        return []
    s = fields["scales"]
    first, mins, last = s[..., 0:4], s[..., 4:8], s[..., 8:12]
    scale = np.concatenate([first & 63, (last & 15) | (first >> 6 << 4)], -1)
    minimum = np.concatenate([mins & 63, (last >> 4) | (mins >> 6 << 4)], -1)
    return [scale, minimum]


def _quants(fmt: QuantFormat, fields: dict[str, Array]) -> tuple[Array, Array | None]:
    """Low bytes and high bytes of each block, uint8 [tiles, 32, supers, blocks, ...] in the order described above."""
    if fmt.name == "Q8_0":
        return (fields["qs"] ^ 0x80)[..., None, :], None
    if fmt.name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):  # the file's bytes are in this order already
        low = fields["qs"][..., None, :]
        return low, _fifth_bits(np.unpackbits(fields["qh"], axis=-1, bitorder="little"))[..., None, :] if (
            "qh" in fields
        ) else None
    if fmt.name in ("Q4_K", "Q5_K"):
        qs = fields["qs"].reshape(*fields["qs"].shape[:-1], 4, 1, 32)
        q = np.concatenate([qs & 15, qs >> 4], -2).reshape(*qs.shape[:-3], 8, 32)
        low = q[..., :16] | (q[..., 16:] << 4)
        if "qh" not in fields:
            return low, None
        bits = np.unpackbits(fields["qh"][..., None], axis=-1, bitorder="little").swapaxes(-1, -2)
        return low, _fifth_bits(bits)
    ql, qh = (fields[name].reshape(*fields[name].shape[:-1], 2, -1) for name in ("ql", "qh"))  # Q6_K, 128 at a time
    q = np.stack([ql[..., :32] & 15, ql[..., 32:] & 15, ql[..., :32] >> 4, ql[..., 32:] >> 4], -2)
    upper = np.stack([qh & 3, qh >> 2 & 3, qh >> 4 & 3, qh >> 6], -2)
    q, upper = (a.reshape(*a.shape[:-3], 8, 32) for a in (q, upper))
    pairs = upper.reshape(*upper.shape[:-1], 2, 4, 4)  # columns as (sixteen, j, i)
    high = sum(pairs[..., j, :] << (2 * j) for j in range(4))
    return q[..., :16] | (q[..., 16:] << 4), np.asarray(high).reshape(*upper.shape[:-1], 8)


def _fifth_bits(bits: Array) -> Array:
    """Bits [..., 32 columns] to bytes [..., 4]: bit j of byte i belongs to column 4j + i."""
    return np.packbits(bits.reshape(*bits.shape[:-1], 8, 4).swapaxes(-1, -2), axis=-1, bitorder="little")[..., 0]


# Reading, in kernels


class Block:
    """A block of one half of a tile, as a kernel reads it. `w` is the weight's memory as int8 and as float16."""

    def __init__(self, k: Emitter, fmt: str, w: Memory, halves: Memory, start: Expr, number: Expr, half: Expr) -> None:
        """`start`: byte of the super-block in `w`, `number`: block in it, `half`: 0 or 1; int32 expressions."""
        layout = LAYOUTS[fmt]
        self.k, self.layout, self.w, self.half = k, layout, w, half
        self._heads, self._start = halves, start
        self._block = k.let(start + layout.head_bytes + number * layout.block_bytes) if layout.blocks > 1 else (
            k.let(start + layout.head_bytes)
        )  # fmt: skip
        self._quants = layout.subscales * TILE_ROWS + half * layout.half_bytes

    def head(self, i: int) -> Expr:
        """Scale (0) or minimum (1) of the super-block, float32x16."""
        return self.k.floats(self._heads.load(self.k.div(self._start, 2) + TILE_ROWS * i + LANES * self.half))

    def subscale(self, i: int) -> Expr:
        """int8 or uint8 factors of the block as float32x16."""
        raw = self.w.load(self._block + TILE_ROWS * i + LANES * self.half)
        if self.layout.group == 32:
            raw = self.k.bits(raw, f"uint8x{LANES}")
        return self.k.floats(raw)

    def scale(self, i: int = 0) -> Expr:
        """What the quants of group `i` of the block are multiplied with."""
        head = self.head(0)
        return self.k.let(head * self.subscale(i)) if self.layout.subscales else head

    def minimum(self) -> Expr:
        """What is added to each number of the block."""
        head = self.head(1)
        if not self.layout.subscales:
            return head
        return self.k.let(self.k.splat(0.0) - head * self.subscale(1))

    def numbers(self, scale: Expr, minimum: Expr) -> list[Expr]:
        """The 32 columns, scale * quant + minimum, float32x16.

        A quant is taken where it lies in its word, as so many times a power of two: a mask, no shift.
        """
        k, T = self.k, self.k.T
        width = 4 if self.layout.bits == 4 else 8
        base = self._block + self._quants
        words = [k.let(k.bits(self.w.load(base + 64 * j, 64), "int32x16")) for j in range(4)] if width == 4 else [
            k.let(k.bits(vector, "int32x16")) for vector in self.vectors()
        ]  # fmt: skip
        scales = {at: k.let(scale * k.splat(2.0**-at)) if at else scale for at in range(0, 32 - width, width)}

        def number(word: Expr, at: int) -> Expr:
            if at + width == 32:  # the sign bit: below zero as it is
                bits = T.shift_right(k.let(k.bits(word, "uint32x16")), k.splat(T.uint32(at)))
                return k.fma(k.floats(k.bits(k.let(bits), "int32x16")), scale, minimum)
            field = T.bitwise_and(word, k.splat(T.int32(((1 << width) - 1) << at)))
            return k.fma(k.floats(field), scales[at], minimum)

        places = [(word, 8 * i) for word in words for i in range(4)]
        if width == 4:
            places += [(word, at + 4) for word, at in places]
        return [number(*place) for place in places]

    def vectors(self) -> list[Expr]:
        """The quants as 8 vectors int8x64: byte (r, i) of vector j is column 4j + i."""
        k, T, bits = self.k, self.k.T, self.layout.bits
        base = self._block + self._quants
        load = lambda j: self.w.load(base + 64 * j, 64)  # noqa: E731
        if bits == 8:
            return [load(j) for j in range(8)]
        nibble = k.splat(T.int8(15), 64)
        words = [k.let(k.bits(load(j), "uint32x16")) for j in range(4)]
        low = [k.let(T.bitwise_and(k.bits(word, "int8x64"), nibble)) for word in words]
        high = [k.let(T.bitwise_and(self._shifted(word, 4), nibble)) for word in words]
        found = low + high
        if bits == 4:
            return found
        extra = [k.let(k.bits(load(4 + j), "uint32x16")) for j in range(bits - 4)]
        mask = 16 if bits == 5 else 48
        for j in range(8):
            source, place = (extra[0], j) if bits == 5 else (extra[j // 4], 2 * (j % 4))
            moved = self._shifted(source, place - 4)
            found[j] = k.let(T.bitwise_or(found[j], T.bitwise_and(moved, k.splat(T.int8(mask), 64))))
        return found

    def _shifted(self, word: Expr, right: int) -> Expr:
        """Words shifted right (left if negative), as bytes; bits that cross into a neighbour byte must be masked."""
        k, T = self.k, self.k.T
        if right > 0:
            word = T.shift_right(word, k.splat(T.uint32(right)))
        elif right < 0:
            word = T.shift_left(word, k.splat(T.uint32(-right)))
        return k.bits(k.let(word), "int8x64")


def float_column(k: Emitter, fmt: str, w: Memory, index: Expr, half: int) -> Expr:
    """16 numbers of a float format at element `index` of a tile's column, as float32x16."""
    raw = w.load(index + LANES * half)
    if fmt == "BF16":
        wide = k.T.shift_left(k.cast(raw, f"uint32x{LANES}"), k.splat(k.T.uint32(16)))
        return k.let(k.bits(wide, f"float32x{LANES}"))
    return k.floats(raw)


def row_block(
    k: Emitter, fmt: str, w: Memory, heads: Memory, words: Memory, number: Expr, block: Expr, row: Expr
) -> list[Expr]:  # fmt: skip
    """The 32 numbers of one row of a tile in block `block` of super-block `number`, as two float32x16.

    `w`, `heads` and `words` are the tile as int8, float16 and uint32. Four consecutive columns of a row are one word.
    """
    layout, T = LAYOUTS[fmt], k.T
    start = k.let(number * layout.super_bytes)
    base = k.let(start + layout.head_bytes + block * layout.block_bytes)

    def head(i: int) -> Expr:
        return k.let(k.cast(heads[k.div(start, 2) + TILE_ROWS * i + row], "float32"))

    def subscale(i: int) -> Expr:
        raw = k.let(w[base + TILE_ROWS * i + row])
        return k.let(k.cast(raw if layout.group < BLOCK else k.bits(raw, "uint8"), "float32"))

    quants = k.let(base + layout.subscales * TILE_ROWS + k.div(row, LANES) * layout.half_bytes)
    first = k.let(k.div(quants, 4) + k.mod(row, LANES))

    def four(j: int) -> Expr:
        """Words j .. j + 3 of the row: 16 columns as they lie."""
        return k.vector([words[first + LANES * (j + i)] for i in range(4)])

    def fields(value: Expr, shifts: Sequence[int], mask: int) -> Expr:
        moved = T.shift_right(value, k.vector([T.uint32(s) for s in shifts]))
        return k.let(T.bitwise_and(moved, k.splat(T.uint32(mask * 0x01010101), 4)))

    if layout.bits == 8:
        found = [four(0), four(4)]
    else:
        low = four(0)
        found = [fields(low, [0] * 4, 15), fields(low, [4] * 4, 15)]
    if layout.bits in (5, 6):
        extra = layout.bits - 4
        sources = [k.let(k.splat(words[first + LANES * (4 + i)], 4)) for i in range(extra)]
        for i in range(2):
            source, begin = (sources[0], 4 * i) if extra == 1 else (sources[i], 0)
            upper = fields(source, [begin + extra * j for j in range(4)], (1 << extra) - 1)
            found[i] = k.let(T.bitwise_or(found[i], T.shift_left(upper, k.splat(T.uint32(4), 4))))
    scales = [head(0)] * 2
    if layout.subscales:
        scales = [k.let(scales[i] * subscale(0 if layout.group == BLOCK else i)) for i in range(2)]
    numbers: list[Expr] = []
    for value, scale in zip(found, scales, strict=True):
        quant = k.let(k.cast(k.bits(value, f"uint8x{LANES}"), f"int32x{LANES}"))
        centred = k.floats(quant - k.splat(T.int32(layout.offset)))
        if layout.has_min:
            minimum = k.let(k.f32(0.0) - head(1) * subscale(1)) if layout.subscales else head(1)
            numbers.append(k.fma(centred, k.splat(scale), k.splat(minimum)))
        else:
            numbers.append(k.let(centred * k.splat(scale)))
    return numbers


def row_element(k: Emitter, fmt: str, w: Memory, index: Expr) -> Expr:
    """One number of a float format, float32."""
    if fmt == "BF16":
        return k.let(k.bits(k.T.shift_left(k.cast(w[index], "uint32"), k.T.uint32(16)), "float32"))
    return k.let(k.cast(w[index], "float32"))


def memory_dtype(fmt: str) -> str:
    """How kernels see the packed bytes of a format."""
    return {"F32": "float32", "F16": "float16", "BF16": "uint16"}.get(fmt, "int8")


def layout_of(fmt: str) -> Layout:
    return LAYOUTS[fmt]
