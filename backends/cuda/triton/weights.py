"""Tiles of packed weights (formats.py): what every kernel that reads weights is built on.

Columns of a block of 32 come in two halves of 16, `lo` and `hi`, as they lie in the bytes of 4-bit quants; floats are
read in the same two halves, so that one kernel serves all formats.
"""

import triton
import triton.language as tl


@triton.jit
def bits_of_two23(length):
    """0x4B000000, 2**23 as a float32, for any length: the compiler does not know that, and keeps it in a register. One
    operation can mask a word with a constant and add a register's bits, but not those of a second constant."""
    return tl.where(length > 0, 0x4B000000, 0)


@triton.jit
def _number(bits, two23, POSITION: tl.constexpr, OFFSET: tl.constexpr):
    """Whole numbers below 128, at `bits` << POSITION (at most 16) with zeros around, less OFFSET, as float32.

    They become the low bits of a float32 between 2**23 and 2**24, exactly: one operation on the integer pipe and one
    fused multiply-add, where shift, mask and conversion take three on pipes of half and a quarter of the rate (CUDA C++
    Programming Guide 12.9, table 5).
    """
    number = (bits | two23).to(tl.float32, bitcast=True)
    return number * (0.5**POSITION) - (2.0 ** (23 - POSITION) + OFFSET)


@triton.jit
def _nibbles(word, high, two23, BYTE: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr):
    """Of the words [..., 4] of blocks, the columns 4 i + BYTE of a half of 16, with their upper bits of `high`."""
    POSITION: tl.constexpr = 8 * BYTE + 4 * HALF if 8 * BYTE + 4 * HALF <= 16 else 8 * BYTE + 4 * HALF - 12
    if 8 * BYTE + 4 * HALF > 16:
        word = word >> 12
    bits = word & (15 << POSITION)
    column = tl.arange(0, 4) * 4 + BYTE
    if BITS == 5:
        bits = bits | (((high >> (column + 16 * HALF)) & 1) << (POSITION + 4))
    if BITS == 6:
        bits = bits | (((high >> (2 * column)) & 3) << (POSITION + 4))
    return _number(bits, two23, POSITION, OFFSET)


@triton.jit
def _byte(word, two23, BYTE: tl.constexpr):
    """Of the words [..., 4] of half blocks of signed bytes, with their signs turned, the columns 4 i + BYTE."""
    POSITION: tl.constexpr = 8 * (BYTE % 2)
    if BYTE >= 2:
        word = word >> 16
    return _number(word & (255 << POSITION), two23, POSITION, 128)


@triton.jit
def _columns(first, second, third, fourth):
    """Columns 4 i, 4 i + 1, 4 i + 2 and 4 i + 3, [..., 4] each, in order: [..., 16]. Moves nothing between threads."""
    both = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(both, both.shape[:-3] + [16])


@triton.jit
def packed(
    w_quants, w_high, w_scales, w_supers, at,
    BITS: tl.constexpr, IS_SUPER: tl.constexpr,
):  # fmt: skip
    """What memory holds of the blocks `at`, int64 [...] (row * blocks + block): for `quants` and `scales`.

    There is no mask, which would cost a register set to 0 for each that is read: behind the last block let `at` be any
    other, and x be 0.
    """
    return packed_quants(w_quants, w_high, at, BITS) + packed_scales(w_scales, w_supers, at, IS_SUPER)


@triton.jit
def packed_quants(w_quants, w_high, at, BITS: tl.constexpr):
    """Half of `packed`: a thread reads 16 bytes of quants at once and holds all columns of its blocks."""
    words = w_quants.to(tl.pointer_type(tl.uint32), bitcast=True)
    i = tl.arange(0, 4)
    if BITS == 8:
        first = words + tl.expand_dims(at, -1) * 8 + i
        lo = tl.load(first)
        hi = tl.load(first + 4)
    else:
        lo = tl.load(words + tl.expand_dims(at, -1) * 4 + i)
        hi = lo
    high_lo = at
    if BITS == 5:
        high_lo = tl.load(w_high + at)
    if BITS == 6:
        high_lo = tl.load(w_high + at * 2)
        high_hi = tl.load(w_high + at * 2 + 1)
    else:
        high_hi = high_lo
    return lo, hi, high_lo, high_hi


@triton.jit
def packed_scales(w_scales, w_supers, at, IS_SUPER: tl.constexpr):
    """The other half of `packed`, for those who want it earlier."""
    scale = tl.load(w_scales + at)
    if IS_SUPER:
        above = tl.load(w_supers + at // 8)
    else:
        above = scale
    return scale, above


@triton.jit
def some_quants(tile, two23, BYTE: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr):
    """Whole numbers of what `packed` returned, float32 [..., 4]: columns 4 i + BYTE of lo (HALF 0) or hi (HALF 1)."""
    lo, hi, high_lo, high_hi, _, _ = tile
    if BITS == 8:
        numbers = _byte((hi if HALF else lo) ^ 0x80808080, two23, BYTE)
    else:
        high = tl.expand_dims(high_hi if HALF else high_lo, -1)
        numbers = _nibbles(lo, high, two23, BYTE, HALF, BITS, OFFSET)
    return numbers


@triton.jit
def quants(tile, two23, BITS: tl.constexpr, OFFSET: tl.constexpr):
    """Whole numbers of what `packed` returned, as float32 lo, hi [..., 16]."""
    lo = _columns(
        some_quants(tile, two23, 0, 0, BITS, OFFSET), some_quants(tile, two23, 1, 0, BITS, OFFSET),
        some_quants(tile, two23, 2, 0, BITS, OFFSET), some_quants(tile, two23, 3, 0, BITS, OFFSET),
    )  # fmt: skip
    hi = _columns(
        some_quants(tile, two23, 0, 1, BITS, OFFSET), some_quants(tile, two23, 1, 1, BITS, OFFSET),
        some_quants(tile, two23, 2, 1, BITS, OFFSET), some_quants(tile, two23, 3, 1, BITS, OFFSET),
    )  # fmt: skip
    return lo, hi


@triton.jit
def half(word):
    """The float16 in the low bits of a word, as float32."""
    return (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def scales(tile, HAS_MIN: tl.constexpr, IS_SUPER: tl.constexpr, HALVES: tl.constexpr):
    """Scale of lo, scale of hi, and minimum of what `packed` returned: float32 [...] each."""
    _, _, _, _, word, above = tile
    if IS_SUPER:
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
    """The numbers themselves: of the rows int64 [R] the blocks [B], float32 lo, hi [R, B, 16], any where not `mask`."""
    if BITS == 0:
        lo, hi = floats(w_quants, rows, columns, blocks, mask)
    else:
        at = tl.where(mask, rows[:, None] * (columns // 32) + blocks[None, :], 0)
        tile = packed(w_quants, w_high, w_scales, w_supers, at, BITS, IS_SUPER)
        lo, hi = quants(tile, bits_of_two23(columns), BITS, OFFSET)
        scale_lo, scale_hi, minimum = scales(tile, HAS_MIN, IS_SUPER, HALVES)
        lo = lo * scale_lo[:, :, None] + minimum[:, :, None]
        hi = hi * scale_hi[:, :, None] + minimum[:, :, None]
    return lo, hi
