"""Products of many rows of x, on tensor cores: weights become bfloat16 (float32) in registers, tile by tile.

The product is computed as w x^T: tiles of w are the left operand, of 64 rows and more as the matrix instructions want
them, and the rows of x, which may be few, are the right one.
"""

import triton
import triton.language as tl

from .epilogue import finish
from .reduce import total
from .weights import bits_of_two23, packed_quants, packed_scales, quants, scales


@triton.jit
def _operand(x, ROUND: tl.constexpr):
    """A tile as a product takes it. ROUND 0: float32. 1: bfloat16. 2: rounded to bfloat16, but float32, for the
    interpreter: it cuts off where hardware rounds, and its product knows no bfloat16."""
    if ROUND == 1:
        x = x.to(tl.bfloat16)
    else:
        x = x.to(tl.float32)
    if ROUND == 2:
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def prepare(
    x, x_stride, norm, z, z_stride, columns, eps, offset, NORM: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """z [rows, z_stride] = x, normed or as it is, as an operand of `gemm`; zeros behind the columns columns of x."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x += row * x_stride
    z += row * z_stride
    root = 1.0
    if NORM:
        squares = tl.full([BLOCK], 0.0, tl.float32)
        for first in range(0, columns, BLOCK):
            value = tl.load(x + first + column, mask=first + column < columns, other=0.0)
            squares += value * value
        root = tl.rsqrt(total(squares, 0) / columns + eps)
    for first in range(0, z_stride, BLOCK):
        is_x = first + column < columns
        value = tl.load(x + first + column, mask=is_x, other=0.0)
        if NORM:
            value = value * root * (tl.load(norm + first + column, mask=is_x, other=0.0) + offset)
        tl.store(z + first + column, _operand(value, ROUND), mask=first + column < z_stride)


@triton.jit
def _scales(w_scales, w_supers, row, block, columns, BITS: tl.constexpr, IS_SUPER: tl.constexpr):
    """What `_tile` needs of the scales of the rows and blocks."""
    if BITS == 0:
        found = ()
    else:
        found = packed_scales(w_scales, w_supers, _blocks(row, block, columns), IS_SUPER)
    return found


@triton.jit
def _blocks(row, block, columns):
    """Number of the blocks [BLOCK_B] of the rows int64 [BLOCK_N]; the last of a row for any behind it, where x is 0."""
    return row[:, None] * (columns // 32) + tl.minimum(block, columns // 32 - 1)[None, :]


@triton.jit
def _tile(
    w_quants, w_high, scale, row, block, columns, two23,
    BITS: tl.constexpr, OFFSET: tl.constexpr, HAS_MIN: tl.constexpr, IS_SUPER: tl.constexpr, HALVES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Weights [BLOCK_N, 32 * BLOCK_B] of the rows int64 [BLOCK_N] and the blocks [BLOCK_B]."""
    if BITS == 0:
        column = tl.reshape(block[:, None] * 32 + tl.arange(0, 32)[None, :], [BLOCK_B * 32])
        place = w_quants + row[:, None] * columns + column[None, :]
        if WHOLE:
            tile = tl.load(place)
        else:
            tile = tl.load(place, mask=(column < columns)[None, :], other=0.0)
    else:
        raw = packed_quants(w_quants, w_high, _blocks(row, block, columns), BITS) + scale
        lo, hi = quants(raw, two23, BITS, OFFSET)
        scale_lo, scale_hi, minimum = scales(raw, HAS_MIN, IS_SUPER, HALVES)
        lo *= scale_lo[:, :, None]
        hi *= scale_hi[:, :, None]
        if HAS_MIN:
            lo += minimum[:, :, None]
            hi += minimum[:, :, None]
        tile = tl.reshape(tl.permute(tl.join(lo, hi), [0, 1, 3, 2]), [BLOCK_N, BLOCK_B * 32])
    return tile


@triton.jit
def gemm(
    z, z_stride, w_quants, w_high, w_scales, w_supers, u_quants, u_high, u_scales, u_supers,
    bias, y, y_stride, sums, sums_stride, parts_stride, rows, n, columns, steps,
    GLU: tl.constexpr, BIASED: tl.constexpr, ADD: tl.constexpr, SPLIT: tl.constexpr,
    BITS: tl.constexpr, OFFSET: tl.constexpr, HAS_MIN: tl.constexpr, IS_SUPER: tl.constexpr, HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, WHOLE: tl.constexpr, GROUP: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    """y[rows, n] = z w^T, z [rows, z_stride] from `prepare`, z_stride whole steps of 32 * BLOCK_B columns; with SPLIT,
    `steps` of them each, to sums. WHOLE: rows of a float weight end with a step.

    Neighbouring programs share rows of w, then (up to GROUP of BLOCK_M) rows of z, so that both come from the L2 cache.
    """
    tiles_m = (rows + BLOCK_M - 1) // BLOCK_M
    tiles_n = (n + BLOCK_N - 1) // BLOCK_N
    group = tl.program_id(0) // (GROUP * tiles_n)
    in_group = tl.program_id(0) % (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    row = (group * GROUP + in_group % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (in_group // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    source = z + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * z_stride + tl.arange(0, BLOCK_B * 32)[None, :]
    row_of_w = tl.minimum(column, n - 1).to(tl.int64)
    two23 = bits_of_two23(columns)
    sums_of_w = tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32)
    sums_of_u = sums_of_w
    first = tl.program_id(1) * steps
    last = tl.minimum(first + steps, z_stride // (BLOCK_B * 32))
    block = tl.arange(0, BLOCK_B)
    scale_of_w = _scales(w_scales, w_supers, row_of_w, first * BLOCK_B + block, columns, BITS, IS_SUPER)
    scale_of_u = _scales(u_scales, u_supers, row_of_w, first * BLOCK_B + block, columns, BITS, IS_SUPER)
    for step in range(first, last):
        here = step * BLOCK_B + block
        x = tl.load(source + step * (BLOCK_B * 32))
        # Scales are too short for asynchronous copies, which Triton makes of the other loads: they come a step ahead.
        next_of_w = _scales(w_scales, w_supers, row_of_w, here + BLOCK_B, columns, BITS, IS_SUPER)
        w = _tile(
            w_quants, w_high, scale_of_w, row_of_w, here, columns, two23,
            BITS, OFFSET, HAS_MIN, IS_SUPER, HALVES, BLOCK_N, BLOCK_B, WHOLE,
        )  # fmt: skip
        sums_of_w = tl.dot(_operand(w, ROUND), tl.trans(x), sums_of_w, input_precision="ieee")
        scale_of_w = next_of_w
        if GLU != "":
            next_of_u = _scales(u_scales, u_supers, row_of_w, here + BLOCK_B, columns, BITS, IS_SUPER)
            u = _tile(
                u_quants, u_high, scale_of_u, row_of_w, here, columns, two23,
                BITS, OFFSET, HAS_MIN, IS_SUPER, HALVES, BLOCK_N, BLOCK_B, WHOLE,
            )  # fmt: skip
            sums_of_u = tl.dot(_operand(u, ROUND), tl.trans(x), sums_of_u, input_precision="ieee")
            scale_of_u = next_of_u
    row = row[None, :]
    column = column[:, None]
    mask = (row < rows) & (column < n)
    if SPLIT:
        to = sums + tl.program_id(1).to(tl.int64) * parts_stride + row.to(tl.int64) * sums_stride + column
        tl.store(to, sums_of_w, mask=mask)
        if GLU != "":
            tl.store(to + rows.to(tl.int64) * sums_stride, sums_of_u, mask=mask)
    else:
        finish(sums_of_w, sums_of_u, bias, y, y_stride, row, column, mask, GLU, BIASED, ADD)
