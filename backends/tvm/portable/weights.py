"""Weights as they lie in a GGUF file, dequantised in registers: `rows.run(n, r, out)` writes one run of numbers.

A run is what shares a scale (a group of a quantised format), or as many floats as divide a row. Block layouts:
ggml-common.h and the dequantize_row_* of ggml-quants.c (ggml-org/ggml at d99724f); kernels/quant.py names the fields.
Rows are read in 16-bit words (two bytes of a block never straddle one), F32 in 32-bit ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ....kernels.quant import QuantFormat

if TYPE_CHECKING:
    from .builder import Builder, Expr, Local


def run_length(fmt: QuantFormat, in_features: int) -> int:
    """Numbers that `WeightRows.run` gives at once."""
    if not fmt.is_float:
        return fmt.group_length
    return next(length for length in (32, 16, 8, 4, 2, 1) if in_features % length == 0)


class WeightRows:
    """A packed weight [N, K] of a kernel: the bytes of the file."""

    def __init__(self, builder: Builder, flat: Any, fmt: QuantFormat, in_features: int) -> None:
        self.k, self.flat, self.format = builder, flat, fmt
        self.length = run_length(fmt, in_features)
        self.runs = in_features // self.length
        self._row_bytes = fmt.row_bytes(in_features)

    def run(self, row: Expr, run: Expr, out: Local) -> None:
        """Numbers run * length .. of `row` into out[0 .. length-1], float32."""
        k, fmt = self.k, self.format
        if fmt.is_float:
            self._floats(row, run, out)
            return
        per_block = fmt.block_length // fmt.group_length
        block = run if per_block == 1 else k.quotient(run, per_block)
        group = 0 if per_block == 1 else k.keep(k.remainder(run, per_block))
        # bytes of the row and block before, in words of 16 bits
        start = k.keep(k.wide(row) * k.wide(self._row_bytes // 2) + k.wide(block) * k.wide(fmt.block_bytes // 2))
        _READERS[fmt.name](self, start, group, out)

    def word(self, index: Expr) -> Expr:
        """16-bit word `index` of the weight, as uint32."""
        k = self.k
        if k.machine.word_bits == 16:
            return self.flat[index].astype("uint32")
        index = k.keep(index)
        shift = ((index & k.wide(1)) * k.wide(16)).astype("uint32")
        return (self.flat[index >> k.wide(1)] >> shift) & k.constant(0xFFFF, "u32")

    def half(self, index: Expr) -> Expr:
        return self.k.half_to_float(self.word(index))

    def byte(self, start: Expr, index: Expr) -> Expr:
        """Byte `index` behind word `start`, as uint32."""
        k = self.k
        shift = (index & 1).astype("uint32") * k.constant(8, "u32") if not isinstance(index, int) else 8 * (index & 1)
        place = start + (k.wide(index >> 1))
        return k.keep((self.word(place) >> (shift if not isinstance(shift, int) else k.constant(shift, "u32"))) & 255)

    def _floats(self, row: Expr, run: Expr, out: Local) -> None:
        k, name = self.k, self.format.name
        start = k.keep(k.wide(row) * k.wide(self.runs * self.length) + k.wide(run) * k.wide(self.length))
        with k.loop(self.length) as j:
            place = start + k.wide(j)
            if name == "F32":
                out[j] = k.as_float(self.flat[place])
            elif name == "F16":
                out[j] = self.half(place)
            else:
                out[j] = k.as_float(self.word(place) << k.constant(16, "u32"))


def _low(k: Builder, word: Expr, shift: int, mask: int = 15) -> Expr:
    """A field of a word as uint32."""
    return (word >> k.constant(shift, "u32") if shift else word) & k.constant(mask, "u32")


def _number(quant: Expr) -> Expr:
    return quant.astype("float32")


def _fours(w: WeightRows, start: Expr, group: Expr, out: Local) -> None:
    """Q4_0, Q4_1: byte i of qs holds number i in its low and number i + 16 in its high half."""
    k, has_min = w.k, w.format.name == "Q4_1"
    d = k.keep(w.half(start))
    least = k.keep(w.half(start + k.wide(1)) if has_min else d * -8.0)
    with k.loop(8) as i:
        word = k.keep(w.word(start + k.wide(2 if has_min else 1) + k.wide(i)))
        for j, shift in ((0, 0), (16, 4), (1, 8), (17, 12)):
            out[2 * i + j] = d * _number(_low(k, word, shift)) + least


def _fives(w: WeightRows, start: Expr, group: Expr, out: Local) -> None:
    """Q5_0, Q5_1: as the fours, and bit i of qh is the fifth bit of number i."""
    k, has_min = w.k, w.format.name == "Q5_1"
    first = 2 if has_min else 1
    d = k.keep(w.half(start))
    least = k.keep(w.half(start + k.wide(1)) if has_min else d * -16.0)
    high = k.keep(w.word(start + k.wide(first)) | (w.word(start + k.wide(first + 1)) << k.constant(16, "u32")))
    with k.loop(8) as i:
        word = k.keep(w.word(start + k.wide(first + 2) + k.wide(i)))
        bits = k.keep(high >> (2 * i).astype("uint32"))
        for j, shift in ((0, 0), (16, 4), (1, 8), (17, 12)):
            fifth = _low(k, bits, j, 1) << k.constant(4, "u32")
            out[2 * i + j] = d * _number(_low(k, word, shift) | fifth) + least


def _signed(k: Builder, byte: Expr) -> Expr:
    """An int8 in the low byte of a uint32, as float32."""
    return ((byte ^ k.constant(0x80, "u32")).astype("int32") - 128).astype("float32")


def _eights(w: WeightRows, start: Expr, group: Expr, out: Local) -> None:
    """Q8_0: 32 int8."""
    k = w.k
    d = k.keep(w.half(start))
    with k.loop(16) as i:
        word = k.keep(w.word(start + k.wide(1) + k.wide(i)))
        for j in (0, 1):
            out[2 * i + j] = d * _signed(k, _low(k, word, 8 * j, 255))


def _six_bits(w: WeightRows, start: Expr, group: Expr) -> tuple[Expr, Expr]:
    """Scale and minimum of a group of Q4_K and Q5_K: 6 bits each in 12 bytes, those of groups 4..7 in two places."""
    k = w.k
    scales = start + k.wide(2)  # behind d and dmin
    early = group < 4
    # Bytes that both ways of reading can use: i, i + 4 and i - 4 of the group, where there is none any other.
    at, above = w.byte(scales, group), w.byte(scales, group + 4)
    below = w.byte(scales, k.select(early, group, group - 4))
    scale = k.select(early, at & 63, (above & 15) | ((below >> 6) << 4))
    least = k.select(early, above & 63, (above >> 4) | ((at >> 6) << 4))
    return k.keep(w.half(start) * _number(scale)), k.keep(w.half(start + k.wide(1)) * _number(least))


def _k_fours(w: WeightRows, start: Expr, group: Expr, out: Local) -> None:
    """Q4_K, Q5_K: bytes 32 c .. 32 c + 31 of qs hold group 2 c in their low and 2 c + 1 in their high halves; bit g of
    byte i of qh is the fifth bit of number i of group g."""
    k, has_high = w.k, w.format.name == "Q5_K"
    scale, least = _six_bits(w, start, group)
    shift = k.keep(((group & 1) * 4).astype("uint32"))
    quants = k.keep(start + k.wide(24 if has_high else 8) + k.wide((group >> 1) * 16))
    with k.loop(16) as i:
        word = k.keep(w.word(quants + k.wide(i)) >> shift)
        bits = k.keep(w.word(start + k.wide(8) + k.wide(i)) >> group.astype("uint32")) if has_high else None
        for j in (0, 1):
            quant = _low(k, word, 8 * j)
            if bits is not None:
                quant = quant | (_low(k, bits, 8 * j, 1) << k.constant(4, "u32"))
            out[2 * i + j] = scale * _number(quant) - least


def _k_sixes(w: WeightRows, start: Expr, group: Expr, out: Local) -> None:
    """Q6_K, 16 numbers a group: group g is part of quarter r = g // 2 % 4 of half n = g // 8.

    Low 4 bits: byte 64 n + 32 (r % 2) + 16 (g % 2) + i of ql, its low half for r < 2. High 2 bits: from bit 2 r on of
    byte 32 n + 16 (g % 2) + i of qh. The factor of the group: an int8.
    """
    k = w.k
    n, r, side = group >> 3, (group >> 1) & 3, group & 1
    factor = _signed(k, w.byte(start + k.wide(96), group))
    scale = k.keep(w.half(start + k.wide(104)) * factor)
    low = k.keep(start + k.wide(n * 32 + (r & 1) * 16 + side * 8))
    high = k.keep(start + k.wide(64 + n * 16 + side * 8))
    low_shift, high_shift = k.keep(((r >> 1) * 4).astype("uint32")), k.keep((r * 2).astype("uint32"))
    with k.loop(8) as i:
        word = k.keep(w.word(low + k.wide(i)) >> low_shift)
        bits = k.keep(w.word(high + k.wide(i)) >> high_shift)
        for j in (0, 1):
            quant = _low(k, word, 8 * j) | (_low(k, bits, 8 * j, 3) << k.constant(4, "u32"))
            out[2 * i + j] = scale * (_number(quant) - 32.0)


_READERS: dict[str, Any] = {
    "Q4_0": _fours, "Q4_1": _fours, "Q5_0": _fives, "Q5_1": _fives, "Q8_0": _eights,
    "Q4_K": _k_fours, "Q5_K": _k_fours, "Q6_K": _k_sixes,
}  # fmt: skip
