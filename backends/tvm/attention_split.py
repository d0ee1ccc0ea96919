"""attention for a few tokens: keys are shared out among threads, and a second kernel joins what they found."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .softmax import BLOCK, LOWEST, Add, Problem, add_values, chunk_groups, clear, softmax_step, store_row

if TYPE_CHECKING:
    from .emit import Emitter, Expr, Memory

# Keys ahead of a split's own that are asked for: pages are too short for the CPU to see where reading goes. Without it
# 30 layers at 4096 keys read half as fast.
AHEAD = 64
BYTES = {"float16": 2, "float32": 4}


def attention_split(
    k: Emitter, *, k_dtype: str, v_dtype: str, head_dim: int, page_size: int, rows: int, capped: bool
) -> None:
    """Sums over a share of the keys: an item is (token, kv head, `rows` of its R rows, split). Each split has its own
    largest score, totals and sums, by item and row."""
    T, p = k.T, Problem(k, k_dtype, v_dtype, head_dim, page_size)
    per_head, groups, splits = k.integer(), k.integer(), k.integer()
    largest, totals, sums, scratch = (k.pointer("float32") for _ in range(4))
    weights = scratch.at(k.worker * (rows * BLOCK))
    chunks = p.chunks
    with k.share(p.tokens * p.kv_heads * groups * splits) as item:
        split, rest = k.mod(item, splits), k.div(item, splits)
        group, rest = k.mod(rest, groups), k.div(rest, groups)
        g, t = k.mod(rest, p.kv_heads), k.div(rest, p.kv_heads)
        row = k.let(item * rows)
        clear(k, T.int32(rows), row, largest, totals, sums, chunks)
        seq, position = k.let(p.seq_ids[t]), k.let(p.positions[t])
        table = p.table(seq)
        known = k.let(p.is_known(seq, position))
        position = k.let(T.Select(known, position, T.int32(0)))
        first = p.first_key(position)
        whole = k.let(k.div(first, 16))
        count = k.let(k.wide(k.div(position, 16) + 1 - whole))

        def bound(s: Expr, whole: Expr = whole, count: Expr = count) -> Expr:
            return k.let((whole + k.cast(k.div(count * k.wide(s), k.wide(splits)), "int32")) * 16)

        begin, end = bound(split), bound(split + 1)
        low, stop = k.let(T.max(begin, first)), k.let(T.min(end, position + 1))
        there = k.local("int32", k.cast(known, "int32"))
        with k.when(T.And(known, low < stop)):
            there.set(p.has_pages(table, low, stop).get())
        with k.when(there.get() == 0), k.loop(row, row + rows) as r:
            totals.store(r * 16, k.splat(k.f32(float("nan"))))
        with k.when(T.And(there.get() != 0, low < stop)):
            start_row = k.wide(t) * k.wide(p.q_stride)
            heads = [k.let(T.min(group * rows + r, per_head - 1)) for r in range(rows)]
            queries = [p.q.at(start_row + k.wide((g * per_head + h) * head_dim)) for h in heads]

            def key_rows(pages: Memory, j0: Expr, table: Memory = table, g: Expr = g, low: Expr = low, stop: Expr = stop
                         ) -> Callable[[Expr], Memory]:  # fmt: skip
                """Rows of keys j0 + i, one of them seen; unseen ones may be any that exist."""
                if page_size % 16 == 0:
                    page = table[k.div(j0, page_size)]
                    base = pages.at(p.element(page, g, k.mod(j0, page_size)))
                    return lambda i: base.at(i * head_dim)

                def row_of(i: Expr) -> Memory:
                    j = k.let(T.max(T.min(j0 + i, stop - 1), low))
                    return pages.at(p.element(table[k.div(j, page_size)], g, k.mod(j, page_size)))

                return row_of

            with k.loop(0, k.div(end - begin + (BLOCK - 1), BLOCK)) as block:
                start = k.let(begin + block * BLOCK)
                vectors = k.let(k.div(T.min(end - start, BLOCK), 16))
                with k.loop(0, vectors) as v:
                    j0 = k.let(start + 16 * v)
                    key = key_rows(p.k_pages, j0)
                    if page_size % 16 == 0:
                        later = k.let(T.min(j0 + AHEAD, stop - 1))
                        key = _ahead(key, [key_rows(p.k_pages, later), key_rows(p.v_pages, j0)], head_dim)
                    products = _dots(k, p, key, queries)
                    for r in range(rows):
                        weights.store(r * BLOCK + 16 * v, p.scores(products[r], j0, low, stop, capped))
                with k.loop(0, rows) as r:
                    softmax_step(k, weights, r * BLOCK, T.int32(0), vectors, row + r, largest, totals, sums, chunks)
                for first_chunk, chunk_count in chunk_groups(rows, chunks):

                    def each(add: Add, start: Expr = start,
                             vectors: Expr = vectors, low: Expr = low, stop: Expr = stop) -> None:  # fmt: skip
                        with k.loop(0, vectors) as v:
                            j0 = k.let(start + 16 * v)
                            row_of = key_rows(p.v_pages, j0)
                            with k.loop(T.max(low - j0, 0), T.min(stop - j0, 16)) as i:
                                value = row_of(i)
                                add(lambda c: p.load(value, c), k.let(16 * v + i))

                    add_values(k, rows, sums, row, chunks, each, weights, first_chunk, chunk_count)


def _ahead(
    row_of: Callable[[Expr], Memory], others: list[Callable[[Expr], Memory]], head_dim: int
) -> Callable[[Expr], Memory]:
    """`row_of`, which also asks for row i of the others."""

    def row_and_others(i: Expr) -> Memory:
        for other in others:
            row = other(i)
            line = 64 // BYTES[row.dtype]
            for start in range(0, head_dim, line):
                row.prefetch(start)
        return row_of(i)

    return row_and_others


def _dots(k: Emitter, p: Problem, row_of: Callable[[Expr], Memory], queries: list[Memory]) -> list[Expr]:
    """Products of 16 keys with each query, a key a lane.

    Sums over lanes as a tree of interleaved pairs, 30 shuffles and 15 additions for 16 sums; depth first, so that few
    vectors are alive.
    """

    def tree(first: int, step: int) -> list[Expr]:
        if step == 16:
            key = row_of(k.T.int32(first))
            sums = [k.splat(0.0) for _ in queries]
            for c in range(p.chunks):
                value = p.load(key, c)
                sums = [k.fma(value, p.load(q, c), s) for q, s in zip(queries, sums, strict=True)]
            return sums
        pairs = zip(tree(first, 2 * step), tree(first + step, 2 * step), strict=True)
        return [k.let(low + high) for low, high in (k.interleave(a, b) for a, b in pairs)]

    return tree(0, 1)


def attention_merge(k: Emitter, *, head_dim: int, rows: int) -> None:
    """y from the splits' sums: an item is a row."""
    T, chunks = k.T, -(-head_dim // 16)
    y, y_stride, seq_ids = k.pointer("float32"), k.integer(), k.pointer("int32")
    tokens, kv_heads, per_head, groups, splits = (k.integer() for _ in range(5))
    largest, totals, sums = (k.pointer("float32") for _ in range(3))
    heads = k.let(kv_heads * per_head)
    with k.share(tokens * heads) as item:
        t, h = k.div(item, heads), k.mod(item, heads)
        g, r = k.div(h, per_head), k.mod(h, per_head)
        index = k.let(((t * kv_heads + g) * groups + k.div(r, rows)) * splits)
        r = k.mod(r, rows)
        out = y.at(k.wide(t) * k.wide(y_stride) + k.wide(h * head_dim))
        top = k.local("float32", k.f32(LOWEST))
        with k.loop(index, index + splits) as s:
            top.set(k.max(top.get(), k.let(largest[s * rows + r])))
        total = k.local("float32x16", k.splat(0.0))
        held = [k.local("float32x16", k.splat(0.0)) for _ in range(chunks)]
        with k.loop(index, index + splits) as s:
            row = k.let(s * rows + r)
            weight = k.exp_falling(k.let(k.splat(largest[row] - top.get())))
            total.set(k.fma(totals.load(row * 16), weight, total.get()))
            for c in range(chunks):
                held[c].set(k.fma(sums.load((row * chunks + c) * 16), weight, held[c].get()))
        divisor = k.let(k.splat(k.sum_lanes(total.get())))
        padding = k.let(k.splat(k.cast(seq_ids[t] < 0, "int32")) == k.splat(T.int32(1)))
        for c in range(chunks):
            value = k.let(T.Select(padding, k.splat(0.0), k.let(held[c].get() / divisor)))
            store_row(k, head_dim, out, c, value)
