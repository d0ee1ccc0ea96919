"""argmax and sample. Definition: kernels/sample.py.

A row of logits is cut into parts of `part_columns` tokens, a program each; what they find lies in scratch
[rows, PARTS], and the next kernel puts it together, each of its programs for itself.
"""

import triton
import triton.language as tl

from .reduce import largest, smallest, total

ONE: tl.constexpr = tl.constexpr(0x3F800000)  # the bits of 1.0, the largest mass


@triton.jit
def largest_of_parts(
    x, x_stride, values, places, columns, part_columns, PARTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """values and places [rows, PARTS]: the largest number of a part and the lowest index that has it; -inf and no
    matter what if there is none."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    start = part * part_columns
    i = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    where = i
    for begin in range(start, tl.minimum(start + part_columns, columns), BLOCK):
        value = tl.load(x + row * x_stride + begin + i, mask=i < columns - begin, other=float("-inf"))
        is_better = value > best  # not for NaN
        best = tl.where(is_better, value, best)
        where = tl.where(is_better, begin + i, where)
    top = largest(best, 0)
    tl.store(values + row * PARTS + part, top)
    tl.store(places + row * PARTS + part, smallest(tl.where(best == top, where, columns), 0))


@triton.jit
def largest_of_row(values, places, row, PARTS: tl.constexpr):
    """The largest number of a row and its index: -inf, 0 if it has none."""
    i = row * PARTS + tl.arange(0, PARTS)
    value = tl.load(values + i)
    top = largest(value, 0)
    place = smallest(tl.where(value == top, tl.load(places + i), 2147483647), 0)
    return top, tl.where(top > float("-inf"), place, 0)


@triton.jit
def argmax(values, places, ids, PARTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tl.store(ids + row, largest_of_row(values, places, row, PARTS)[1])


@triton.jit
def uniform(counter, seed):
    """In [0, 1): of the first word of Philox4x32-10 (Salmon et al., SC'11, doi 10.1145/2063384.2063405) 24 bits."""
    c0 = counter
    c1 = counter ^ counter
    c2 = c1
    c3 = c1
    key0 = seed
    key1 = c1
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        low0 = c0 * 0xD2511F53
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low1 = c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ key0
        c1 = low1
        c2 = high0 ^ c3 ^ key1
        c3 = low0
        key0 = key0 + 0x9E3779B9
        key1 = key1 + 0xBB67AE85
    return (c0 >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def plan(
    params, params_stride, rng, rng_stride, values, places, plans, ids, columns, PARTS: tl.constexpr
):  # fmt: skip
    """ids: the most likely tokens, which rows without a temperature keep; counters of rng moved on; plans [rows, 6]:
    largest logit, temperature, top_k, top_p, min_p, u. What is not asked for is 0, 0, 1, 0 there, so that no kernel
    need look for NaN; a temperature of 0 means that nothing is drawn."""
    row = tl.program_id(0).to(tl.int64)
    top, place = largest_of_row(values, places, row, PARTS)
    tl.store(ids + row, place)
    state = rng + row * rng_stride
    seed = tl.load(state)
    counter = tl.load(state + 1)
    tl.store(state + 1, counter + 1)
    setting = params + row * params_stride
    temperature = tl.load(setting)
    top_k = tl.load(setting + 1)
    top_p = tl.load(setting + 2)
    min_p = tl.load(setting + 3)
    infinity = float("inf")
    is_drawn = (temperature > 0.0) & (temperature < infinity) & (top > -infinity) & (top < infinity)
    to = plans + row * 6
    tl.store(to, top)
    tl.store(to + 1, tl.where(is_drawn, temperature, 0.0))
    tl.store(to + 2, tl.where(is_drawn & (top_k >= 1.0) & (top_k < columns), tl.floor(top_k), 0.0))
    tl.store(to + 3, tl.where(is_drawn & (top_p < 1.0), top_p, 1.0))
    tl.store(to + 4, tl.where(is_drawn & (min_p > 0.0), tl.minimum(min_p, 1.0), 0.0))
    tl.store(to + 5, uniform(counter, seed))


@triton.jit
def masses(x, at, mask, top, temperature):
    """exp((x - top) / temperature), 0 for NaN and where not `mask`. That of the largest is 1 to the bit, also where
    a GPU takes a temperature below the smallest normal number for 0."""
    value = tl.load(x + at, mask=mask, other=float("-inf"))
    mass = tl.exp((value - top) / temperature)
    return tl.where(value == top, 1.0, tl.where(mass <= 1.0, mass, 0.0))


@triton.jit
def raised(sums, row, low, enough, width, WAYS: tl.constexpr, PARTS: tl.constexpr):
    """The largest of the thresholds low, low + width, ... up to 1 above which `enough` lies; `sums` [rows, PARTS, WAYS]
    say how much is above each. Thresholds are bits of floats that are not negative: their order is that of the numbers.
    """
    part = tl.arange(0, PARTS)
    i = tl.arange(0, WAYS)
    above = total(tl.load(sums + (row * PARTS + part)[:, None] * WAYS + i[None, :]), 0)
    is_enough = (above >= enough) & (i * width <= ONE - low)
    return low + width * largest(tl.where(is_enough, i, 0), 0)


@triton.jit
def low_of(
    lows, sums, first_sums, plans, row, width, KIND: tl.constexpr, WAYS: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """The threshold a row has come to. KIND says what the turn before has summed up: nothing (""), numbers ("count") or
    masses ("mass") of tokens above thresholds that are `width` apart, the first of which is its entry of `lows`."""
    if KIND == "":
        low = 0
    else:
        low = tl.load(lows + row)
        if KIND == "count":
            top_k = tl.load(plans + row * 6 + 2)
            if top_k > 0.0:
                low = raised(sums, row, low, top_k, width, WAYS, PARTS)
        else:
            top_p = tl.load(plans + row * 6 + 3)
            if top_p < 1.0:
                kept = total(tl.load(first_sums + (row * PARTS + tl.arange(0, PARTS)) * WAYS), 0)
                low = raised(sums, row, low, top_p * kept, width, WAYS, PARTS)
    return low


@triton.jit
def sums_above(
    x, x_stride, plans, lows_before, sums_before, first_sums, lows, sums, columns, part_columns, width_before, width,
    KIND_BEFORE: tl.constexpr, KIND: tl.constexpr, WAYS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A turn in the search of a threshold: settles the turn before, and of a part of a row finds number (KIND "count",
    for top_k) or mass ("mass", for top_p) of the tokens above WAYS thresholds, `width` apart."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    start = part * part_columns
    low = low_of(lows_before, sums_before, first_sums, plans, row, width_before, KIND_BEFORE, WAYS, PARTS)
    if part == 0:
        tl.store(lows + row, low)
    if KIND == "count":
        is_asked = tl.load(plans + row * 6 + 2) > 0.0
    else:
        is_asked = tl.load(plans + row * 6 + 3) < 1.0
    if is_asked:
        top = tl.load(plans + row * 6)
        temperature = tl.load(plans + row * 6 + 1)
        i = tl.arange(0, BLOCK)
        for first in range(0, WAYS, BLOCK_W):
            way = first + tl.arange(0, BLOCK_W)
            limit = (low + way * width).to(tl.float32, bitcast=True)
            if KIND == "count":
                found = tl.full([BLOCK_W], 0, tl.int32)
            else:
                found = tl.full([BLOCK_W], 0.0, tl.float32)
            for begin in range(start, tl.minimum(start + part_columns, columns), BLOCK):
                mass = masses(x + row * x_stride, begin + i, i < columns - begin, top, temperature)
                is_kept = mass[None, :] >= limit[:, None]
                if KIND == "count":
                    # counted in float32 within a block: ptxas gives whole numbers a stack frame
                    found += total(tl.where(is_kept, 1.0, 0.0), 1).to(tl.int32)
                else:
                    found += total(tl.where(is_kept, mass[None, :], 0.0), 1)
            tl.store(sums + (row * PARTS + part) * WAYS + way, found)


@triton.jit
def shares(
    x, x_stride, plans, lows_before, sums_before, first_sums, leasts, kept, columns, part_columns, width_before,
    WAYS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """leasts [rows]: the least mass of a token that may be drawn; kept [rows, PARTS]: the mass of those of a part."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    start = part * part_columns
    temperature = tl.load(plans + row * 6 + 1)
    if temperature > 0.0:
        top = tl.load(plans + row * 6)
        low = low_of(lows_before, sums_before, first_sums, plans, row, width_before, "mass", WAYS, PARTS)
        least = tl.maximum(low.to(tl.float32, bitcast=True), tl.load(plans + row * 6 + 4))
        if part == 0:
            tl.store(leasts + row, least)
        i = tl.arange(0, BLOCK)
        found = tl.full([BLOCK], 0.0, tl.float32)
        for begin in range(start, tl.minimum(start + part_columns, columns), BLOCK):
            mass = masses(x + row * x_stride, begin + i, i < columns - begin, top, temperature)
            found += tl.where(mass >= least, mass, 0.0)
        tl.store(kept + row * PARTS + part, total(found, 0))


@triton.jit
def reached(kept, before, goal, N: tl.constexpr):
    """Of kept masses [N] behind `before` the place at which their sum exceeds `goal`, or else the last that is not 0
    (rounding may bring that about); and the sum before that place."""
    i = tl.arange(0, N)
    upto = before + total(tl.where(i[None, :] <= i[:, None], kept[None, :], 0.0), 1)
    is_some = kept > 0.0
    last = largest(tl.where(is_some, i, 0), 0)
    first = smallest(tl.where(is_some & (upto > goal), i, N), 0)
    place = tl.minimum(first, last)
    return place, before + total(tl.where(i < place, kept, 0.0), 0)


@triton.jit
def sample(
    x, x_stride, plans, leasts, kept, ids, columns, part_columns,
    PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The walk through the kept tokens: to a part, to a tile of it, to a row of that, to a token."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(plans + row * 6 + 1)
    if temperature > 0.0:
        top = tl.load(plans + row * 6)
        logits = x + row * x_stride
        least = tl.load(leasts + row)
        of_parts = tl.load(kept + row * PARTS + tl.arange(0, PARTS))
        goal = tl.load(plans + row * 6 + 5) * total(of_parts, 0)
        part, before = reached(of_parts, 0.0, goal, PARTS)
        stop = tl.minimum(part * part_columns + part_columns, columns)
        r = tl.arange(0, BLOCK_R)
        c = tl.arange(0, BLOCK_C)
        inside = r[:, None] * BLOCK_C + c[None, :]
        tile = part * part_columns
        sum_here = before
        is_open = 1
        for begin in range(part * part_columns, stop, BLOCK_R * BLOCK_C):
            mass = masses(logits, begin + inside, inside < stop - begin, top, temperature)
            more = total(total(tl.where(mass >= least, mass, 0.0), 1), 0)
            is_taken = tl.where(more > 0.0, is_open, 0)
            tile = tl.where(is_taken > 0, begin, tile)
            before = tl.where(is_taken > 0, sum_here, before)
            sum_here += more
            is_open = tl.where(sum_here > goal, 1 - is_taken, is_open)
        mass = masses(logits, tile + inside, inside < stop - tile, top, temperature)
        line, before = reached(total(tl.where(mass >= least, mass, 0.0), 1), before, goal, BLOCK_R)
        begin = tile + line * BLOCK_C
        mass = masses(logits, begin + c, c < stop - begin, top, temperature)
        place, before = reached(tl.where(mass >= least, mass, 0.0), before, goal, BLOCK_C)
        tl.store(ids + row, begin + place)
