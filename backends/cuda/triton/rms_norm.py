"""rms_norm. A program does a tile of rows; rows longer than the tile are read twice, the second time from a cache."""

import triton
import triton.language as tl

from .reduce import total


@triton.jit
def rms_norm(
    x, x_stride, weight, y, y_stride, rows, columns, eps, weight_offset,
    IS_WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """IS_WHOLE: a row fits BLOCK_C columns and stays in registers."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_C)[None, :]
    is_row = (row < rows)[:, None]
    source = x + row.to(tl.int64)[:, None] * x_stride + column
    to = y + row.to(tl.int64)[:, None] * y_stride + column
    if IS_WHOLE:
        mask = is_row & (column < columns)
        values = tl.load(source, mask=mask, other=0.0)
        factor = tl.rsqrt(total(values * values, 1) / columns + eps)[:, None]
        scale = tl.load(weight + column, mask=column < columns, other=0.0) + weight_offset
        tl.store(to, values * factor * scale, mask=mask)
    else:
        squares = tl.full([BLOCK_R, BLOCK_C], 0.0, tl.float32)
        for start in range(0, columns, BLOCK_C):
            values = tl.load(source + start, mask=is_row & (column < columns - start), other=0.0)
            squares += values * values
        factor = tl.rsqrt(total(squares, 1) / columns + eps)[:, None]
        for start in range(0, columns, BLOCK_C):
            is_column = column < columns - start
            values = tl.load(source + start, mask=is_row & is_column, other=0.0)
            scale = tl.load(weight + start + column, mask=is_column, other=0.0) + weight_offset
            tl.store(to + start, values * factor * scale, mask=is_row & is_column)
