"""Tiles of packed weights (formats.py): what every kernel that reads weights is built on.

Columns of a block of 32 come in two halves of 16, `lo` and `hi`, as they lie in the bytes of 4-bit quants; floats are
read in the same two halves, so that one kernel serves all formats.
"""

# pyright: basic
import triton
import triton.language as tl


@triton.jit
def quants(w_quants, w_high, at, mask, BITS: tl.constexpr, OFFSET: tl.constexpr):
    """Whole numbers of the blocks `at`, int64 [R, B] (row * blocks + block), as float32 lo, hi [R, B, 16]."""
    i = tl.arange(0, 16)[None, None, :]
    if BITS == 8:
        first = w_quants + at[:, :, None] * 32 + i
        lo = tl.load(first, mask=mask[:, :, None], other=0).to(tl.int32)
        hi = tl.load(first + 16, mask=mask[:, :, None], other=0).to(tl.int32)
    else:
        both = tl.load(w_quants + at[:, :, None] * 16 + i, mask=mask[:, :, None], other=0).to(tl.int32)
        lo = both & 15
        hi = both >> 4
    if BITS == 5:
        high = tl.load(w_high + at, mask=mask, other=0)[:, :, None]
        lo = lo | (((high >> i) & 1) << 4).to(tl.int32)
        hi = hi | (((high >> (i + 16)) & 1) << 4).to(tl.int32)
    if BITS == 6:
        first = tl.load(w_high + at * 2, mask=mask, other=0)[:, :, None]
        second = tl.load(w_high + at * 2 + 1, mask=mask, other=0)[:, :, None]
        lo = lo | (((first >> (2 * i)) & 3) << 4).to(tl.int32)
        hi = hi | (((second >> (2 * i)) & 3) << 4).to(tl.int32)
    return (lo - OFFSET).to(tl.float32), (hi - OFFSET).to(tl.float32)


@triton.jit
def half(word):
    """The float16 in the low bits of a word, as float32."""
    return (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def scales(w_scales, w_supers, at, mask, HAS_MIN: tl.constexpr, IS_SUPER: tl.constexpr, HALVES: tl.constexpr):
    """Scale of lo, scale of hi, and minimum of the blocks `at`: float32 [R, B] each."""
    word = tl.load(w_scales + at, mask=mask, other=0)
    if IS_SUPER:
        above = tl.load(w_supers + at // 8, mask=mask, other=0)
        scale = half(above)
        if HALVES:
            lo = scale * (word & 0xFF).to(tl.int8, bitcast=False).to(tl.float32)
            hi = scale * (word >> 8).to(tl.int8, bitcast=False).to(tl.float32)
            minimum = tl.full(lo.shape, 0.0, tl.float32)
        else:
            lo = scale * (word & 0xFF).to(tl.float32)
            hi = lo
            minimum = -half(above >> 16) * (word >> 8).to(tl.float32)
    else:
        lo = half(word)
        hi = lo
        if HAS_MIN:
            minimum = half(word >> 16)
        else:
            minimum = tl.full(lo.shape, 0.0, tl.float32)
    return lo, hi, minimum


@triton.jit
def floats(w_quants, rows, columns, blocks, mask):
    """Of a float weight [., columns], the blocks [B] of the rows int64 [R]: float32 lo, hi [R, B, 16]; 0 past it."""
    column = blocks[None, :, None] * 32 + tl.arange(0, 16)[None, None, :]
    first = w_quants + rows[:, None, None] * columns + column
    lo = tl.load(first, mask=mask[:, :, None] & (column < columns), other=0).to(tl.float32)
    hi = tl.load(first + 16, mask=mask[:, :, None] & (column + 16 < columns), other=0).to(tl.float32)
    return lo, hi


@triton.jit
def weights(
    w_quants, w_high, w_scales, w_supers, rows, columns, blocks, mask,
    BITS: tl.constexpr, OFFSET: tl.constexpr, HAS_MIN: tl.constexpr, IS_SUPER: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """The numbers themselves: of the rows int64 [R] the blocks [B], float32 lo, hi [R, B, 16], 0 where not `mask`."""
    if BITS == 0:
        lo, hi = floats(w_quants, rows, columns, blocks, mask)
    else:
        at = rows[:, None] * (columns // 32) + blocks[None, :]
        lo, hi = quants(w_quants, w_high, at, mask, BITS, OFFSET)
        scale_lo, scale_hi, minimum = scales(w_scales, w_supers, at, mask, HAS_MIN, IS_SUPER, HALVES)
        lo = lo * scale_lo[:, :, None] + minimum[:, :, None]
        hi = hi * scale_hi[:, :, None] + minimum[:, :, None]
    return lo, hi
