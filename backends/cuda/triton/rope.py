"""rope, kv_append, and both in one launch: a program does some heads of one token.

What holds for a whole token is a number (of pairs, of heads) that is 0 where it does not: the interpreter cannot make
masks of a scalar condition.
"""

import triton
import triton.language as tl


@triton.jit
def rotate(
    x, to, angles, known_pairs, mask,
    ROT_DIM: tl.constexpr, IS_INTERLEAVED: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """All pairs of the heads at `x` [H, 1], the first `known_pairs` rotated, to the heads at `to`, which may be `x`."""
    pair = tl.arange(0, BLOCK_P)[None, :]
    is_rotated = pair < known_pairs
    if IS_INTERLEAVED:
        first = 2 * pair
        second = first + 1
    else:
        first = pair
        second = pair + ROT_DIM // 2
    here = mask & (pair < ROT_DIM // 2)
    a = tl.load(x + first, mask=here, other=0.0)
    b = tl.load(x + second, mask=here, other=0.0)
    cos = tl.load(angles + pair, mask=is_rotated, other=1.0)
    sin = tl.load(angles + ROT_DIM // 2 + pair, mask=is_rotated, other=0.0)
    c = tl.where(is_rotated, a * cos - b * sin, a)
    d = tl.where(is_rotated, a * sin + b * cos, b)
    tl.store(to + first, c.to(to.dtype.element_ty), mask=here)
    tl.store(to + second, d.to(to.dtype.element_ty), mask=here)


@triton.jit
def angles_of(cos_sin, cos_sin_stride, position, table_length, ROT_DIM: tl.constexpr):
    """Row of the table, and how many pairs it has angles for: none past its end."""
    is_known = (position >= 0) & (position < table_length)
    row = cos_sin + tl.where(is_known, position, 0).to(tl.int64) * cos_sin_stride
    return row, tl.where(is_known, ROT_DIM // 2, 0)


@triton.jit
def slot_of(block_table, block_table_stride, seq_ids, token, position, sequences, max_pages, pages, page_size):
    """(page, slot in it) of a token; page -1 if it has none."""
    seq = tl.load(seq_ids + token)
    column = position // page_size
    is_known = (seq >= 0) & (seq < sequences) & (position >= 0) & (column < max_pages)
    page = tl.load(block_table + seq.to(tl.int64) * block_table_stride + column, mask=is_known, other=-1)
    return tl.where(page < pages, page, -1).to(tl.int64), position % page_size


@triton.jit
def copied(x, to, mask, FROM: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Numbers FROM.. of the heads at `x` [H, 1] stored at `to` [H, 1], rounded to its dtype."""
    i = tl.arange(0, BLOCK_D)[None, :]
    here = mask & (i >= FROM) & (i < HEAD_DIM)
    tl.store(to + i, tl.load(x + i, mask=here, other=0.0).to(to.dtype.element_ty), mask=here)


@triton.jit
def rope(
    x, x_stride, cos_sin, cos_sin_stride, positions, heads, table_length,
    HEAD_DIM: tl.constexpr, ROT_DIM: tl.constexpr, IS_INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    angles, known = angles_of(cos_sin, cos_sin_stride, tl.load(positions + token), table_length, ROT_DIM)
    at = x + token * x_stride + head * HEAD_DIM
    rotate(at, at, angles, known, head < heads, ROT_DIM, IS_INTERLEAVED, BLOCK_P)


@triton.jit
def kv_append(
    k, k_stride, v, v_stride, block_table, block_table_stride, seq_ids, positions,
    k_pages, k_pages_stride, v_pages, v_pages_stride, kv_heads, sequences, max_pages, pages, page_size,
    HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    page, slot = slot_of(
        block_table, block_table_stride, seq_ids, token, tl.load(positions + token), sequences, max_pages, pages,
        page_size,
    )  # fmt: skip
    mask = head < tl.where(page >= 0, kv_heads, 0)
    inside = (head * page_size + slot) * HEAD_DIM
    copied(k + token * k_stride + head * HEAD_DIM, k_pages + page * k_pages_stride + inside, mask, 0, HEAD_DIM, BLOCK_D)
    copied(v + token * v_stride + head * HEAD_DIM, v_pages + page * v_pages_stride + inside, mask, 0, HEAD_DIM, BLOCK_D)


@triton.jit
def rope_kv_append(
    q, q_stride, k, k_stride, v, v_stride, cos_sin, cos_sin_stride, block_table, block_table_stride, seq_ids, positions,
    k_pages, k_pages_stride, v_pages, v_pages_stride, heads, table_length, kv_heads, sequences, max_pages, pages,
    page_size,
    HEAD_DIM: tl.constexpr, ROT_DIM: tl.constexpr, IS_INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The first programs of a token rotate its queries, the others store its keys, rotated, and its values."""
    token = tl.program_id(0).to(tl.int64)
    query_blocks = (heads + BLOCK_H - 1) // BLOCK_H
    block = tl.program_id(1)
    position = tl.load(positions + token)
    angles, known = angles_of(cos_sin, cos_sin_stride, position, table_length, ROT_DIM)
    if block < query_blocks:
        head = block * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        at = q + token * q_stride + head * HEAD_DIM
        rotate(at, at, angles, known, head < heads, ROT_DIM, IS_INTERLEAVED, BLOCK_P)
    else:
        head = (block - query_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        page, slot = slot_of(
            block_table, block_table_stride, seq_ids, token, position, sequences, max_pages, pages, page_size
        )
        mask = head < tl.where(page >= 0, kv_heads, 0)
        inside = (head * page_size + slot) * HEAD_DIM
        at = k + token * k_stride + head * HEAD_DIM
        to = k_pages + page * k_pages_stride + inside
        rotate(at, to, angles, known, mask, ROT_DIM, IS_INTERLEAVED, BLOCK_P)
        if ROT_DIM < HEAD_DIM:
            copied(at, to, mask, ROT_DIM, HEAD_DIM, BLOCK_D)
        at = v + token * v_stride + head * HEAD_DIM
        copied(at, v_pages + page * v_pages_stride + inside, mask, 0, HEAD_DIM, BLOCK_D)
