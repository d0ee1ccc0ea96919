"""Products of few rows of x: every weight is read once, by the thread that multiplies it.

A program has REPEAT * LANES rows of w. Its tiles are [WARPS, LANES, ACROSS, 4]: a thread has what one load brings, a
unit of 32 columns (floats: of 4), and a warp reads ACROSS units side by side from each of its rows. Weights, scales
and x have one layout, so nothing goes between threads until the end. REPEAT tiles of other rows keep as many loads
under way, and multiply the same x.
"""

import triton
import triton.language as tl

from .epilogue import finish
from .reduce import total
from .weights import bits_of_two23, packed, scales, some_quants


@triton.jit
def _bytes(x, norm, column, offset, NORM: tl.constexpr):
    """16 columns of x behind `column` [..., 4], as 4 tensors of the columns 4 i, 4 i + 1, 4 i + 2 and 4 i + 3; and
    their squares [..., 4], of each 4 i + j their sum, before the norm's weight."""
    pieces = ()
    squares = 0.0
    for j in tl.static_range(4):
        piece = tl.load(x + column + 4 * j)
        if NORM:
            squares += piece * piece
            piece *= tl.load(norm + column + 4 * j) + offset
        pieces = pieces + (piece,)
    both = tl.join(tl.join(pieces[0], pieces[2]), tl.join(pieces[1], pieces[3]))  # [..., 4, 2, 2]
    both = tl.reshape(both, column.shape[:-1] + [2, 2, 4])
    even, odd = tl.split(tl.permute(both, [0, 1, 2, 5, 3, 4]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return (first, second, third, fourth), squares


@triton.jit
def _chain(tile, x, two23, HALF: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr):
    """Products over 16 columns, added up to [..., 4]."""
    products = some_quants(tile, two23, 0, HALF, BITS, OFFSET) * x[0]
    for byte in tl.static_range(1, 4):
        products += some_quants(tile, two23, byte, HALF, BITS, OFFSET) * x[byte]
    return products


@triton.jit
def _tile(
    w_quants, w_high, w_scales, w_supers, row, columns, unit, column, is_column,
    BITS: tl.constexpr, IS_SUPER: tl.constexpr,
):  # fmt: skip
    """Weights of the rows int64 [1, LANES, 1] as they lie in memory."""
    if BITS == 0:
        tile = (tl.load(w_quants + tl.expand_dims(row, -1) * columns + column, mask=is_column, other=0.0),)
    else:
        tile = packed(w_quants, w_high, w_scales, w_supers, row * (columns // 32) + unit, BITS, IS_SUPER)
    return tile


@triton.jit
def _product(
    tile, lo, hi, sum_of_x, is_unit, two23,
    BITS: tl.constexpr, OFFSET: tl.constexpr, HAS_MIN: tl.constexpr, IS_SUPER: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Of a tile of weights and one of a row of x: [WARPS, LANES, ACROSS], 0 behind the last unit."""
    if BITS == 0:
        product = total(tile[0].to(tl.float32) * lo, 3)
    else:
        scale_lo, scale_hi, minimum = scales(tile, HAS_MIN, IS_SUPER, HALVES)
        lo = _chain(tile, lo, two23, 0, BITS, OFFSET)
        hi = _chain(tile, hi, two23, 1, BITS, OFFSET)
        if HALVES:
            product = scale_lo * total(lo, 3) + scale_hi * total(hi, 3)
        else:
            product = scale_lo * total(lo + hi, 3)
        if HAS_MIN:
            product += minimum * sum_of_x
        product = tl.where(is_unit, product, 0.0)
    return product


@triton.jit
def _with(totals, AT: tl.constexpr, addend, COUNT: tl.constexpr):
    """The COUNT `totals`, `addend` added to the one AT."""
    found = ()
    for i in tl.static_range(COUNT):
        if i == AT:
            found = found + (totals[i] + addend,)
        else:
            found = found + (totals[i],)
    return found


@triton.jit
def _sums(totals, COUNT: tl.constexpr):
    """COUNT (a power of two) of [WARPS, LANES, ACROSS] to [LANES, COUNT], with one exchange between warps for all."""
    LEFT: tl.constexpr = COUNT // 2
    if COUNT == 1:
        stacked = tl.expand_dims(totals[0], -1)
    else:
        stacked = _stack(totals, LEFT)
        stacked = tl.reshape(stacked, totals[0].shape + [COUNT])
    return total(total(stacked, 2), 0)


@triton.jit
def _stack(totals, LEFT: tl.constexpr):
    """2 * LEFT tensors as one with the axes [..., 2, 2] of their number's bits behind."""
    found = ()
    for i in tl.static_range(LEFT):
        found = found + (tl.join(totals[i], totals[i + LEFT]),)
    if LEFT == 1:
        result = found[0]
    else:
        result = _stack(found, LEFT // 2)
    return result


@triton.jit
def gemv(
    x, x_stride, norm, w_quants, w_high, w_scales, w_supers, u_quants, u_high, u_scales, u_supers,
    bias, y, y_stride, sums, sums_stride, parts_stride, squares, rows, n, columns, steps, eps, offset,
    NORM: tl.constexpr, GLU: tl.constexpr, BIASED: tl.constexpr, ADD: tl.constexpr, SPLIT: tl.constexpr,
    BITS: tl.constexpr, OFFSET: tl.constexpr, HAS_MIN: tl.constexpr, IS_SUPER: tl.constexpr, HALVES: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, REPEAT: tl.constexpr, WARPS: tl.constexpr, LANES: tl.constexpr,
    ACROSS: tl.constexpr,
):  # fmt: skip
    """y[rows <= ROWS, n] = x w^T, normed, gated, added to y; with SPLIT, `steps` of K each, to sums (and squares).

    With NORM the sums of squares come from the same loop, and the products are divided by the root at the end.
    """
    PARTS: tl.constexpr = 1 if GLU == "" else 2
    COUNT: tl.constexpr = REPEAT * ROWS * PARTS
    lane = tl.arange(0, LANES)
    in_tile = tl.arange(0, WARPS)[:, None, None] * ACROSS + tl.arange(0, ACROSS)[None, None, :]
    two23 = bits_of_two23(columns)
    totals = ()
    for _ in tl.static_range(COUNT):
        totals = totals + (tl.full([WARPS, LANES, ACROSS], 0.0, tl.float32),)
    squares_of_x = ()
    for _ in tl.static_range(ROWS):
        squares_of_x = squares_of_x + (tl.full([WARPS, LANES, ACROSS], 0.0, tl.float32),)

    units = (columns + UNIT - 1) // UNIT
    first = tl.program_id(1) * steps
    last = tl.minimum(first + steps, (units + WARPS * ACROSS - 1) // (WARPS * ACROSS))
    for step in range(first, last):
        unit = tl.broadcast_to(step * (WARPS * ACROSS) + in_tile, [WARPS, LANES, ACROSS])
        is_unit = unit < units
        if BITS != 0:  # nothing is masked but the products: what is read behind the last unit is the last one again
            unit = tl.minimum(unit, units - 1)
        column = tl.expand_dims(unit, -1) * UNIT + tl.arange(0, 4)
        is_column = column < columns
        tiles = ()
        for r in tl.static_range(REPEAT):
            row = (tl.program_id(0) * REPEAT + r) * LANES + lane
            row = tl.minimum(row, n - 1).to(tl.int64)[None, :, None]
            tile = _tile(
                w_quants, w_high, w_scales, w_supers, row, columns, unit, column, is_column, BITS, IS_SUPER
            )  # fmt: skip
            tiles = tiles + (tile,)
            if GLU != "":
                tile = _tile(
                    u_quants, u_high, u_scales, u_supers, row, columns, unit, column, is_column, BITS, IS_SUPER
                )  # fmt: skip
                tiles = tiles + (tile,)
        for m in tl.static_range(ROWS):
            source = x + tl.minimum(m, rows - 1).to(tl.int64) * x_stride
            if BITS == 0:
                lo = tl.load(source + column, mask=is_column, other=0.0)
                square = lo * lo
                if NORM:
                    lo *= tl.load(norm + column, mask=is_column, other=0.0) + offset
                hi = lo
            else:
                lo, square = _bytes(source, norm, column, offset, NORM)
                hi, square_hi = _bytes(source, norm, column + 16, offset, NORM)
                square += square_hi
            if HAS_MIN:
                sum_of_x = total((lo[0] + lo[1]) + (lo[2] + lo[3]) + (hi[0] + hi[1]) + (hi[2] + hi[3]), 3)
            else:
                sum_of_x = 0.0
            if NORM:
                squares_of_x = _with(squares_of_x, m, tl.where(is_unit, total(square, 3), 0.0), ROWS)
            for t in tl.static_range(REPEAT * PARTS):
                product = _product(tiles[t], lo, hi, sum_of_x, is_unit, two23, BITS, OFFSET, HAS_MIN, IS_SUPER, HALVES)
                totals = _with(totals, t * ROWS + m, product, COUNT)

    # totals are [REPEAT, PARTS, ROWS], now behind the lanes
    value = tl.reshape(_sums(totals, COUNT), [LANES, REPEAT, PARTS, ROWS])
    square = tl.reshape(_sums(squares_of_x, ROWS), [LANES, 1, ROWS]) if NORM else 0.0
    if GLU != "":
        value, up = tl.split(tl.permute(value, [0, 1, 3, 2]))
    else:
        value = tl.reshape(value, [LANES, REPEAT, ROWS])
        up = value
    row = tl.arange(0, ROWS)[None, None, :]
    column = tl.program_id(0) * (REPEAT * LANES) + tl.arange(0, REPEAT)[None, :, None] * LANES + lane[:, None, None]
    mask = (row < rows) & (column < n)
    if SPLIT:
        split = tl.program_id(1)
        to = sums + split.to(tl.int64) * parts_stride + row * sums_stride + column
        tl.store(to, value, mask=mask)
        if GLU != "":
            tl.store(to + rows * sums_stride, up, mask=mask)
        if NORM:
            is_one = (row < rows) & (lane[:, None, None] + tl.program_id(0) == 0)
            tl.store(squares + split * rows + row + lane[:, None, None], square, mask=is_one)
    else:
        if NORM:
            root = tl.rsqrt(square / columns + eps)
            value *= root
            up *= root
        finish(value, up, bias, y, y_stride, row, column, mask, GLU, BIASED, ADD)
