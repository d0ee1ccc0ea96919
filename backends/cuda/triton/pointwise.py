"""add, softcap, glu, gather, advance. A program does a tile of rows and columns."""

import triton
import triton.language as tl

from .activation import activate, tanh


@triton.jit
def tile(rows, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Row numbers, int64 [R, 1], columns [1, C] and mask [R, C] of this program."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    return row.to(tl.int64)[:, None], column[None, :], mask


@triton.jit
def add(x, x_stride, y, y_stride, rows, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    row, column, mask = tile(rows, columns, BLOCK_R, BLOCK_C)
    to = x + row * x_stride + column
    tl.store(to, tl.load(to, mask=mask) + tl.load(y + row * y_stride + column, mask=mask), mask=mask)


@triton.jit
def softcap(x, x_stride, rows, columns, cap, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    row, column, mask = tile(rows, columns, BLOCK_R, BLOCK_C)
    to = x + row * x_stride + column
    tl.store(to, cap * tanh(tl.load(to, mask=mask, other=0.0) / cap), mask=mask)


@triton.jit
def glu(
    gate, gate_stride, up, up_stride, y, y_stride, rows, columns,
    KIND: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, column, mask = tile(rows, columns, BLOCK_R, BLOCK_C)
    one = activate(tl.load(gate + row * gate_stride + column, mask=mask, other=0.0), KIND)
    other = tl.load(up + row * up_stride + column, mask=mask, other=0.0)
    tl.store(y + row * y_stride + column, one * other, mask=mask)


@triton.jit
def gather(
    x, x_stride, chosen, y, y_stride, rows, columns, tokens, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """y[r] = x[chosen[r]], zeros where there is no such row."""
    row, column, mask = tile(rows, columns, BLOCK_R, BLOCK_C)
    source = tl.load(chosen + row, mask=row < rows, other=-1)
    is_known = (source >= 0) & (source < tokens)
    values = tl.load(x + source.to(tl.int64) * x_stride + column, mask=mask & is_known, other=0.0)
    tl.store(y + row * y_stride + column, values, mask=mask)


@triton.jit
def advance(positions, seq_ids, tokens, BLOCK: tl.constexpr):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_live = tl.load(seq_ids + token, mask=token < tokens, other=-1) >= 0
    tl.store(positions + token, tl.load(positions + token, mask=is_live, other=0) + 1, mask=is_live)
