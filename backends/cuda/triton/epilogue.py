"""What becomes of the sums of a product, and how sums of parts of K are put together."""

import triton
import triton.language as tl

from .activation import activate


@triton.jit
def finish(
    value, up, bias, y, y_stride, row, column, mask, GLU: tl.constexpr, BIASED: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    """Stores the sums `value` of the rows and columns of y: the bias added, y added, or as a gate to `up` (GLU)."""
    place = y + row.to(tl.int64) * y_stride + column
    if BIASED:
        value += tl.load(bias + column, mask=mask, other=0.0)
    if ADD:
        value += tl.load(place, mask=mask, other=0.0)
    if GLU != "":
        value = activate(value, GLU) * up
    tl.store(place, value, mask=mask)


@triton.jit
def add_parts(
    sums, squares, bias, y, y_stride, rows, n, columns, splits, eps,
    NORM: tl.constexpr, GLU: tl.constexpr, BIASED: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y from sums [splits, 1 (GLU: 2), rows, n] and, with NORM, sums of squares [splits, rows], added in order."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < n
    PARTS: tl.constexpr = 1 if GLU == "" else 2
    value = tl.full([BLOCK], 0.0, tl.float32)
    up = value
    square = 0.0
    for split in range(splits):
        first = sums + (split * PARTS * rows + row).to(tl.int64) * n + column
        value += tl.load(first, mask=mask, other=0.0)
        if GLU != "":
            up += tl.load(first + rows.to(tl.int64) * n, mask=mask, other=0.0)
        if NORM:
            square += tl.load(squares + split * rows + row)
    if NORM:
        root = tl.rsqrt(square / columns + eps)
        value *= root
        up *= root
    finish(value, up, bias, y, y_stride, row, column, mask, GLU, BIASED, ADD)
