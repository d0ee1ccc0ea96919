"""embedding and dequantize: rows of a packed weight as floats."""

import triton
import triton.language as tl

from .weights import weights


@triton.jit
def rows_of_weight(
    ids, w_quants, w_high, w_scales, w_supers, y, y_stride, rows, columns, vocab, factor,
    HAS_IDS: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, HAS_MIN: tl.constexpr, IS_SUPER: tl.constexpr,
    HALVES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """y[r] = w[ids[r]] * factor (HAS_IDS), or w[r]; rows of ids outside the vocabulary are zeros."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    block = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    is_row = row < rows
    mask = is_row[:, None] & (block < (columns + 31) // 32)[None, :]
    if HAS_IDS:
        token = tl.load(ids + row, mask=is_row, other=0)
        is_known = (token >= 0) & (token < vocab)
        source = tl.where(is_known, token, 0).to(tl.int64)
    else:
        is_known = is_row
        source = row.to(tl.int64)
    lo, hi = weights(
        w_quants, w_high, w_scales, w_supers, source, columns, block, mask, BITS, OFFSET, HAS_MIN, IS_SUPER, HALVES
    )
    if HAS_IDS:
        lo = tl.where(is_known[:, None, None], lo * factor, 0.0)
        hi = tl.where(is_known[:, None, None], hi * factor, 0.0)
    column = block[None, :, None] * 32 + tl.arange(0, 16)[None, None, :]
    to = y + row.to(tl.int64)[:, None, None] * y_stride + column
    tl.store(to, lo, mask=mask[:, :, None] & (column < columns))
    tl.store(to + 16, hi, mask=mask[:, :, None] & (column + 16 < columns))
