"""Products of many rows of x, on tensor cores: weights become bfloat16 (float32) in registers, tile by tile.

The product is computed as w x^T: tiles of w are the left operand, of 64 rows and more as the matrix instructions want
them, and the rows of x, which may be few, are the right one.
"""

# pyright: basic
import triton
import triton.language as tl

from .epilogue import finish
from .reduce import total
from .weights import bits_of_two23, packed, quants, scales


@triton.jit
def _operand(x, ROUND: tl.constexpr):
    """A tile of float32 as a product takes it. ROUND 0: as it is. 1: bfloat16. 2: rounded to bfloat16, but float32, for
    the interpreter: it cuts off where hardware rounds, and its product knows no bfloat16."""
    if ROUND == 1:
        x = x.to(tl.bfloat16)
    if ROUND == 2:
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def prepare(
    x, x_stride, norm, z, width, k, eps, offset, NORM: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """z [rows, width] = x, normed or as it is, as an operand of `gemm`; zeros behind the k columns of x."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x += row * x_stride
    z += row * width
    root = 1.0
    if NORM:
        squares = tl.full([BLOCK], 0.0, tl.float32)
        for first in range(0, k, BLOCK):
            value = tl.load(x + first + column, mask=first + column < k, other=0.0)
            squares += value * value
        root = tl.rsqrt(total(squares, 0) / k + eps)
    for first in range(0, width, BLOCK):
        is_x = first + column < k
        value = tl.load(x + first + column, mask=is_x, other=0.0)
        if NORM:
            value = value * root * (tl.load(norm + first + column, mask=is_x, other=0.0) + offset)
        tl.store(z + first + column, _operand(value, ROUND), mask=first + column < width)


@triton.jit
def _tile(
    w_quants, w_high, w_scales, w_supers, row, block, k, two23,
    BITS: tl.constexpr, OFFSET: tl.constexpr, HAS_MIN: tl.constexpr, IS_SUPER: tl.constexpr, HALVES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_N, 32 * BLOCK_B]: of the rows int64 [BLOCK_N] the blocks [BLOCK_B]; any behind the last."""
    if BITS == 0:
        column = tl.reshape(block[:, None] * 32 + tl.arange(0, 32)[None, :], [BLOCK_B * 32])
        place = w_quants + row[:, None] * k + column[None, :]
        tile = tl.load(place, mask=(column < k)[None, :], other=0.0).to(tl.float32)
    else:
        at = row[:, None] * (k // 32) + tl.minimum(block, k // 32 - 1)[None, :]
        raw = packed(w_quants, w_high, w_scales, w_supers, at, BITS, HAS_MIN, IS_SUPER, HALVES)
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
    z, width, w_quants, w_high, w_scales, w_supers, u_quants, u_high, u_scales, u_supers,
    bias, y, y_stride, sums, sums_stride, rows, n, k, steps,
    GLU: tl.constexpr, BIASED: tl.constexpr, ADD: tl.constexpr, SPLIT: tl.constexpr,
    BITS: tl.constexpr, OFFSET: tl.constexpr, HAS_MIN: tl.constexpr, IS_SUPER: tl.constexpr, HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, GROUP: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """y[rows, n] = z w^T, z [rows, width] from `prepare` and width whole steps of 32 * BLOCK_B; with SPLIT, `steps` of
    K each, to sums.

    Neighbouring programs share rows of w, then (up to GROUP of BLOCK_M) rows of z, so that both come from the L2 cache.
    """
    tiles_m = (rows + BLOCK_M - 1) // BLOCK_M
    tiles_n = (n + BLOCK_N - 1) // BLOCK_N
    group = tl.program_id(0) // (GROUP * tiles_n)
    in_group = tl.program_id(0) % (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    row = (group * GROUP + in_group % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (in_group // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    source = z + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * width + tl.arange(0, BLOCK_B * 32)[None, :]
    row_of_w = tl.minimum(column, n - 1).to(tl.int64)
    two23 = bits_of_two23(k)
    sums_of_w = tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32)
    sums_of_u = sums_of_w
    first = tl.program_id(1) * steps
    last = tl.minimum(first + steps, width // (BLOCK_B * 32))
    for step in range(first, last):
        block = step * BLOCK_B + tl.arange(0, BLOCK_B)
        x = tl.load(source + step * (BLOCK_B * 32))
        w = _tile(
            w_quants, w_high, w_scales, w_supers, row_of_w, block, k, two23,
            BITS, OFFSET, HAS_MIN, IS_SUPER, HALVES, BLOCK_N, BLOCK_B,
        )  # fmt: skip
        sums_of_w = tl.dot(_operand(w, ROUND), tl.trans(x), sums_of_w, input_precision="ieee")
        if GLU != "":
            u = _tile(
                u_quants, u_high, u_scales, u_supers, row_of_w, block, k, two23,
                BITS, OFFSET, HAS_MIN, IS_SUPER, HALVES, BLOCK_N, BLOCK_B,
            )  # fmt: skip
            sums_of_u = tl.dot(_operand(u, ROUND), tl.trans(x), sums_of_u, input_precision="ieee")
    row = row[None, :]
    column = column[:, None]
    mask = (row < rows) & (column < n)
    if SPLIT:
        to = sums + tl.program_id(1).to(tl.int64) * sums_stride + row.to(tl.int64) * n + column
        tl.store(to, sums_of_w, mask=mask)
        if GLU != "":
            tl.store(to + rows.to(tl.int64) * n, sums_of_u, mask=mask)
    else:
        finish(sums_of_w, sums_of_u, bias, y, y_stride, row, column, mask, GLU, BIASED, ADD)
