"""attention over paged keys and values: tiles of rows, a part of the keys at a time, then the parts together.

A row is a token and one of the R = GROUP query heads that share a kv head. Online softmax (arXiv:1805.02867) in base 2,
its keys in parts side by side where rows alone would not fill a GPU (flash-decoding, arXiv:2311.01282).

Products of float32 with float16 keys or values are of float16, twice: the float32 factor is the sum of two float16
numbers, 22 bits. The largest of a query is brought to 2**13 or more and the largest weight to 2**14, so that what else
the second number loses is 2**-38 of the largest: less than adding up loses, unless max |q| * max |k| * scale is above
2**18 or the values of heavy keys are 2**-19 of the others'.
"""

import triton
import triton.language as tl

from .activation import tanh
from .reduce import largest, smallest, total

NOTHING = tl.constexpr(2147483647)  # behind every seq_id and position
WEIGHT_ONE = tl.constexpr(16384.0)  # 2**14: what a weight of 1 is, so that the small ones have bits in float16


@triton.jit
def halves(x):
    """float32 as float16 + float16: off by 2**-22 of x, or by 2**-25 where that is more."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def into_range(x):
    """x [M, D] times a power of two for each row, its largest then in [2**13, 2**15), and the powers' inverses [M]."""
    exponent = largest(tl.abs(x), 1).to(tl.int32, bitcast=True) >> 23
    exponent = tl.maximum(exponent, 15)  # 127 more than the exponent; both powers are normal numbers
    up = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    down = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    return x * up[:, None], down


@triton.jit
def product(a, a_low, b, sums, IS_HALF: tl.constexpr, PRECISION: tl.constexpr):
    """sums + (a + a_low) @ b for float16, sums + a @ b for float32."""
    if IS_HALF:
        sums = tl.dot(a, b, tl.dot(a_low, b, sums))
    else:
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    return sums


@triton.jit
def part_of(begin, end, BLOCK_N: tl.constexpr):
    """First and last + 1 of the keys of this program's part: of equal length, whole 16s, but no less than a block."""
    share = 16 * tl.num_programs(2)
    length = tl.maximum((end - begin + share - 1) // share * 16, BLOCK_N)
    first = begin + tl.minimum(tl.program_id(2) * length, end - begin)
    return first, tl.minimum(first + length, end)


@triton.jit
def load_query(q, q_stride, token, head, mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Queries of (token, head) [M]."""
    at = token.to(tl.int64)[:, None] * q_stride + (head * HEAD_DIM)[:, None] + tl.arange(0, BLOCK_D)[None, :]
    return tl.load(q + at, mask=mask, other=0.0)


@triton.jit
def split_query(query, factor, K_HALF: tl.constexpr):
    """Queries [M, D] in two halves for float16 keys, and what scores are to be multiplied by [M]."""
    low = query
    factors = tl.full([query.shape[0]], 1.0, tl.float32) * factor
    if K_HALF:
        query, down = into_range(query)
        factors = factors * down
        query, low = halves(query)
    return query, low, factors


@triton.jit
def load_pages(table, key, end, PAGE: tl.constexpr):
    """Pages of the keys before `end`, -1 for others."""
    return tl.load(table + key // PAGE, mask=key < end, other=-1)


@triton.jit
def over_keys(
    q, q_low, factors, first, last, begin, end, table, k_pages, k_stride, v_pages, v_stride, head, pages, cap,
    page, top, norm, sums,
    HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, K_HALF: tl.constexpr, V_HALF: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys begin to end - 1 of one sequence, its pages in `table`, for rows that see of them first to last [M].

    `page` holds those of the first block. Before exp2, scores are (q @ k) * factors, or tanh of that times `cap`. Keys
    that do not exist are zeros.
    """
    d = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        # Read a block ahead, or what keeps keys and values under way would have to wait for pages first.
        page_ahead = load_pages(table, key + BLOCK_N, end, PAGE)
        is_there = (page >= 0) & (page < pages)
        mask = is_there[:, None] & (d < HEAD_DIM)[None, :]
        page = page.to(tl.int64)
        inside = ((head * PAGE + key % PAGE) * HEAD_DIM)[:, None] + d[None, :]
        k = tl.load(k_pages + (page * k_stride)[:, None] + inside, mask=mask, other=0.0)
        v = tl.load(v_pages + (page * v_stride)[:, None] + inside, mask=mask, other=0.0)
        if not K_HALF:
            k = k.to(tl.float32)
        if not V_HALF:
            v = v.to(tl.float32)
        scores = tl.full([q.shape[0], BLOCK_N], 0.0, tl.float32)
        scores = product(q, q_low, tl.trans(k), scores, K_HALF, PRECISION)
        scores = scores * factors[:, None]
        if HAS_CAP:
            scores = cap * tanh(scores)
        is_seen = key[None, :] <= last[:, None]
        if HAS_WINDOW:
            is_seen = is_seen & (key[None, :] >= first[:, None])
        scores = tl.where(is_seen, scores, float("-inf"))
        next_top = tl.maximum(top, largest(scores, 1))
        # of a row that has seen no key yet: -inf - -inf would be NaN
        base = tl.where(next_top == float("-inf"), 0.0, next_top)
        shrink = tl.exp2(top - base)
        weights = tl.exp2(scores - base[:, None]) * WEIGHT_ONE
        norm = norm * shrink + total(weights, 1)
        top = next_top
        high, low = weights, weights
        if V_HALF:
            high, low = halves(weights)
        sums = product(high, low, v, sums * shrink[:, None], V_HALF, PRECISION)
        page = page_ahead
    return top, norm, sums


@triton.jit
def lacks_keys(first, last, begin, end, table, pages, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """How many pages of the keys begin to end - 1 do not exist although rows that see first to last [M] need them."""
    lost = first * 0
    for start in range(begin // PAGE, (end + PAGE - 1) // PAGE, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        page = tl.load(table + at, mask=at * PAGE < end, other=0)
        is_lost = (page < 0) | (page >= pages)
        is_needed = (at[None, :] * PAGE <= last[:, None]) & (first[:, None] - at[None, :] * PAGE < PAGE)
        lost += total((is_lost[None, :] & is_needed).to(tl.int32), 1)
    return lost


@triton.jit
def store(
    y, y_stride, part_tops, part_norms, part_sums, token, query_head, heads, is_padding, mask, is_row,
    top, norm, sums,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """y of the rows (token, query_head) [M], or if there are several parts what attention_merge needs of this one."""
    d = tl.arange(0, BLOCK_D)
    token = token.to(tl.int64)
    if IS_WHOLE:
        result = tl.where(is_padding[:, None], 0.0, sums / norm[:, None])
        tl.store(y + token[:, None] * y_stride + (query_head * HEAD_DIM)[:, None] + d[None, :], result, mask=mask)
    else:
        at = (token * heads + query_head) * tl.num_programs(2) + tl.program_id(2)
        tl.store(part_tops + at, top, mask=is_row)
        tl.store(part_norms + at, norm, mask=is_row)
        tl.store(part_sums + at[:, None] * HEAD_DIM + d[None, :], sums, mask=mask & (norm != 0.0)[:, None])


@triton.jit
def attention_decode(
    q, q_stride, k_pages, k_pages_stride, v_pages, v_pages_stride, block_table, block_table_stride, seq_ids, positions,
    y, y_stride, part_tops, part_norms, part_sums, tokens, sequences, max_pages, pages, kv_heads, factor, cap, window,
    rows, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, K_HALF: tl.constexpr, V_HALF: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, IS_WHOLE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The query heads of (token, kv head) over a part of the keys. [tokens, kv_heads, parts], rows = GROUP."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    i = tl.arange(0, BLOCK_M)
    token_of = token + i * 0
    query_head = head * GROUP + i
    is_row = i < GROUP
    mask = is_row[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    seq = tl.load(seq_ids + token)
    position = tl.load(positions + token)
    query = load_query(q, q_stride, token_of, query_head, mask, HEAD_DIM, BLOCK_D)
    is_known = (seq >= 0) & (seq < sequences) & (position >= 0) & (position // PAGE < max_pages)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(0, position - window + 1)
    begin, end = part_of(first, tl.where(is_known, position + 1, first), BLOCK_N)
    table = block_table + seq.to(tl.int64) * block_table_stride
    # asked for before the query is here: what follows waits for both
    page = load_pages(table, begin + tl.arange(0, BLOCK_N), end, PAGE)
    query, query_low, factors = split_query(query, factor, K_HALF)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.full([BLOCK_M], 0.0, tl.float32)
    sums = tl.full([BLOCK_M, BLOCK_D], 0.0, tl.float32)
    first, last = begin + i * 0, end - 1 + i * 0
    top, norm, sums = over_keys(
        query, query_low, factors, first, last, begin, end, table,
        k_pages, k_pages_stride, v_pages, v_pages_stride, head, pages, cap, page, top, norm, sums,
        HEAD_DIM, PAGE, K_HALF, V_HALF, HAS_CAP, False, BLOCK_D, BLOCK_N, PRECISION,
    )  # fmt: skip
    is_lost = (lacks_keys(first, last, begin, end, table, pages, PAGE, BLOCK_N) > 0) | ((seq >= 0) & (is_known == 0))
    norm = tl.where(is_lost, float("nan"), norm)
    store(
        y, y_stride, part_tops, part_norms, part_sums, token_of, query_head, kv_heads * GROUP, i * 0 + seq < 0,
        mask, is_row, top, norm, sums, HEAD_DIM, BLOCK_D, IS_WHOLE,
    )  # fmt: skip


@triton.jit
def attention_prefill(
    q, q_stride, k_pages, k_pages_stride, v_pages, v_pages_stride, block_table, block_table_stride, seq_ids, positions,
    y, y_stride, part_tops, part_norms, part_sums, tokens, sequences, max_pages, pages, kv_heads, factor, cap, window,
    rows, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, K_HALF: tl.constexpr, V_HALF: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, IS_WHOLE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of `rows` (token, query head of a kv head) over a part of the keys. [tiles, kv_heads, parts]."""
    # the last tile first: it may have the most keys
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    i = tl.arange(0, BLOCK_M)
    token = (tile * rows + i) // GROUP
    query_head = head * GROUP + (tile * rows + i) % GROUP
    is_row = (i < rows) & (token < tokens)
    mask = is_row[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    seq = tl.load(seq_ids + token, mask=is_row, other=-1)
    position = tl.load(positions + token, mask=is_row, other=-1)
    is_known = (seq >= 0) & (seq < sequences) & (position >= 0) & (position // PAGE < max_pages)
    first = tl.where(is_known, 0, NOTHING)
    if HAS_WINDOW:
        first = tl.maximum(first, position - window + 1)
    # Sequence after sequence of those in the tile; the rows of others see none of its keys. First whether they are all
    # there, while there are registers for it.
    lost = tl.where((seq >= 0) & (is_known == 0), 1, 0)
    now = smallest(tl.where(is_known, seq, NOTHING), 0)
    while now < sequences:
        is_now = is_known & (seq == now)
        begin = smallest(tl.where(is_now, first, NOTHING), 0)
        last = tl.where(is_now, position, -1)
        table = block_table + now.to(tl.int64) * block_table_stride
        lost += lacks_keys(first, last, begin, largest(last, 0) + 1, table, pages, PAGE, 16)
        now = smallest(tl.where(is_known & (seq > now), seq, NOTHING), 0)
    query = load_query(q, q_stride, token, query_head, mask, HEAD_DIM, BLOCK_D)
    query, query_low, factors = split_query(query, factor, K_HALF)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.full([BLOCK_M], 0.0, tl.float32)
    sums = tl.full([BLOCK_M, BLOCK_D], 0.0, tl.float32)
    now = smallest(tl.where(is_known, seq, NOTHING), 0)
    while now < sequences:
        is_now = is_known & (seq == now)
        begin = smallest(tl.where(is_now, first, NOTHING), 0)
        end = largest(tl.where(is_now, position, -1), 0) + 1
        begin, end = part_of(begin, end, BLOCK_N)
        last = tl.where(is_now, tl.minimum(position, end - 1), -1)
        table = block_table + now.to(tl.int64) * block_table_stride
        page = load_pages(table, begin + tl.arange(0, BLOCK_N), end, PAGE)
        top, norm, sums = over_keys(
            query, query_low, factors, first, last, begin, end, table,
            k_pages, k_pages_stride, v_pages, v_pages_stride, head, pages, cap, page, top, norm, sums,
            HEAD_DIM, PAGE, K_HALF, V_HALF, HAS_CAP, HAS_WINDOW, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
        now = smallest(tl.where(is_known & (seq > now), seq, NOTHING), 0)
    norm = tl.where(lost > 0, float("nan"), norm)
    store(
        y, y_stride, part_tops, part_norms, part_sums, token, query_head, kv_heads * GROUP, seq < 0, mask, is_row,
        top, norm, sums, HEAD_DIM, BLOCK_D, IS_WHOLE,
    )  # fmt: skip


@triton.jit
def attention_merge(
    y, y_stride, part_tops, part_norms, part_sums, seq_ids, heads, parts,
    HEAD_DIM: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y from the parts that the others left, for (token, query head)."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    part = tl.arange(0, BLOCK_P)
    d = tl.arange(0, BLOCK_D)
    at = (token.to(tl.int64) * heads + head) * parts + part
    is_part = part < parts
    top = tl.load(part_tops + at, mask=is_part, other=float("-inf"))
    norm = tl.load(part_norms + at, mask=is_part, other=0.0)
    # Parts without keys hold anything. To know them first would be to wait twice.
    mask = is_part[:, None] & (d < HEAD_DIM)[None, :]
    sums = tl.load(part_sums + at[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
    sums = tl.where((norm != 0.0)[:, None], sums, 0.0)
    highest = largest(top, 0)
    weights = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest))
    result = total(sums * weights[:, None], 0) / total(norm * weights, 0)
    result = tl.where(tl.load(seq_ids + token) < 0, 0.0, result)
    tl.store(y + token.to(tl.int64) * y_stride + head * HEAD_DIM + d, result, mask=d < HEAD_DIM)
