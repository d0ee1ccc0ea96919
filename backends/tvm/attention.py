"""attention: keys shared out among threads for a few tokens, tiles of tokens for many.

Online softmax (arXiv:1805.02867) over blocks of keys. A row is one query head of one token; the rows of a kv head share
every load of its keys and values. Letters as in kernels/attention.py, R = H / G rows per token and kv head.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from ...kernels.op import Numerics, Signature
from ...kernels.spi import BoundCall
from .emit import DEALT_ROWS
from .launch import FUNCTION_ULP, KernelSpec, Launch, OpKernel, address, place, spec
from .pointwise import by_lane

if TYPE_CHECKING:
    from . import TVMBackend
    from .emit import Emitter, Expr, Local, Memory

BLOCK = 64  # keys whose scores are held at once: 16 KiB of float keys of 64 channels, and as much of values
ROWS = 6  # of a tile per load of keys: 6 rows x 32 keys are 12 sums, enough to hide the 4 cycles of each of 2 FMAs
# Vectors of value sums held while keys go by. 24 would fit the 32 registers of AVX-512, but LLVM keeps the constants of
# exp there too and spills in the inner loop: 2.5 times slower.
SUMS = 12
# Keys ahead of a split's own that are asked for: pages are too short for the CPU to see where reading goes. Without it
# 30 layers at 4096 keys read half as fast.
AHEAD = 64
BYTES = {"float16": 2, "float32": 4}
# From here on tiles pay for turning keys and values into floats: at 1024 keys splits take 0.8 of their time for 32
# tokens, 0.95 for 64, 1.15 for 128.
TILED_FROM = 64
TILE_ROWS = 96  # rows of a tile, if there are enough tokens: twice or three times as many are no faster
LOWEST = -3.4028234663852886e38  # where maxima begin: finite, so that no difference of two is NaN


Add = Callable[[Callable[[int], "Expr"], "Expr"], None]


class Problem:
    """Arguments that both kernels take, in order, and where keys lie."""

    def __init__(self, k: Emitter, keys: str, values: str, head_dim: int, page_size: int) -> None:
        self.k, self.head_dim, self.page_size, self.chunks = k, head_dim, page_size, -(-head_dim // 16)
        self.q, self.q_stride = k.pointer("float32"), k.integer()
        self.k_pages, self.v_pages = k.pointer(keys), k.pointer(values)
        self._table, self._table_stride = k.pointer("int32"), k.integer()
        self.seq_ids, self.positions = k.pointer("int32"), k.pointer("int32")
        self.tokens, self.kv_heads, self.sequences, self.max_pages, self.pages = (k.integer() for _ in range(5))
        self.scale, self.softcap, self.window = k.real(), k.real(), k.integer()

    def table(self, seq: Expr) -> Memory:
        """A sequence's row of the table; any row if there is no such sequence."""
        T = self.k.T
        row = T.max(T.min(seq, self.sequences - 1), 0)
        return self._table.at(self.k.wide(row) * self.k.wide(self._table_stride))

    def exists(self, page: Expr) -> Expr:
        return self.k.T.And(page >= 0, page < self.pages)

    def is_known(self, seq: Expr, position: Expr) -> Expr:
        """Whether the table has such a sequence and such a position."""
        T = self.k.T
        inside = T.And(position >= 0, self.k.div(T.max(position, 0), self.page_size) < self.max_pages)
        return T.And(T.And(seq >= 0, seq < self.sequences), inside)

    def first_key(self, position: Expr) -> Expr:
        return self.k.let(self.k.T.max(position - self.window + 1, 0))

    def has_pages(self, table: Memory, first: Expr, stop: Expr) -> Local:
        """1 if the pages of keys first .. stop - 1 exist, else 0. stop is within the table."""
        k = self.k
        found = k.local("int32", k.T.int32(1))
        pages = [k.div(first, self.page_size), k.div(stop + (self.page_size - 1), self.page_size)]
        with k.loop(*pages) as i, k.when(k.T.Not(self.exists(table[i]))):
            found.set(k.T.int32(0))
        return found

    def element(self, page: Expr, g: Expr, slot: Expr) -> Expr:
        """Where a slot of a page begins in k_pages and v_pages, int64."""
        k, T = self.k, self.k.T
        row = (k.wide(page) * k.wide(self.kv_heads) + k.wide(g)) * T.int64(self.page_size) + k.wide(slot)
        return k.let(row * T.int64(self.head_dim))

    def load(self, row: Memory, chunk: int) -> Expr:
        """16 channels of a row as float32x16; zeros behind the last."""
        k, count = self.k, min(16, self.head_dim - 16 * chunk)
        if count == 16:
            return k.floats(row.load(16 * chunk)) if row.dtype == "float16" else row.load(16 * chunk)
        values = [k.let(k.cast(row[16 * chunk + i], "float32")) for i in range(count)]
        return k.vector(values + [k.f32(0.0)] * (16 - count))

    def scores(self, products: Expr, start: Expr, first: Expr, stop: Expr, capped: bool) -> Expr:
        """The scores of keys start .. start + 15, -infinity outside first .. stop - 1."""
        k = self.k
        s = k.let(products * k.splat(self.scale))
        if capped:
            s = k.let(k.splat(self.softcap) * by_lane(k, "tanhf", k.let(s / k.splat(self.softcap))))
        return self.masked(s, start, first, stop)

    def masked(self, s: Expr, start: Expr, first: Expr, stop: Expr) -> Expr:
        k, T = self.k, self.k.T
        lane, low = k.let(T.ramp(start, 1, 16)), k.splat(k.f32(float("-inf")))
        s = k.let(T.Select(lane < k.splat(stop), s, low))
        return k.let(T.Select(lane >= k.splat(first), s, low))


def softmax_step(
    k: Emitter, weights: Memory, at: Expr, first: Expr, stop: Expr, row: Expr, largest: Memory, totals: Memory,
    sums: Memory, chunks: int,
) -> None:  # fmt: skip
    """Turn vectors first .. stop - 1 of a row's scores, at weights[at], into weights; add them to the row's totals (by
    lane). What is there of totals and sums shrinks where the largest score grows."""
    top = k.local("float32x16", weights.load(at + 16 * first))
    with k.loop(first + 1, stop) as i:
        top.set(k.max(top.get(), weights.load(at + 16 * i)))
    base = raise_top(k, k.max_lanes(top.get()), row, largest, totals, sums, chunks, k.exp_falling)
    total = k.local("float32x16", totals.load(row * 16))
    with k.loop(first, stop) as i:
        weight = k.exp_falling(k.let(weights.load(at + 16 * i) - k.splat(base)))
        weights.store(at + 16 * i, weight)
        total.set(k.let(total.get() + weight))
    totals.store(row * 16, total.get())


# How far a score may be above what weights are relative to. Sums may then be 3000 times as large, which float32 does
# not mind, and hardly ever have to shrink: whether they do is no longer a branch that CPUs guess wrong.
SLACK = 8.0


def raise_top(
    k: Emitter, found: Expr, row: Expr, largest: Memory, totals: Memory, sums: Memory, chunks: int,
    exp: Callable[[Expr], Expr],
) -> Expr:  # fmt: skip
    """What the weights of a row are relative to: its largest score so far, `found` among them, less SLACK at most. When
    it grows, totals and sums shrink. Scores are logarithms that `exp` undoes."""
    before = k.let(largest[row])
    top = k.local("float32", before)
    with k.when(found > before + k.f32(SLACK)):
        top.set(found)
        shrink = exp(k.let(k.splat(before - found)))
        totals.store(row * 16, k.let(totals.load(row * 16) * shrink))
        with k.loop(0, chunks) as c:
            index = k.let((row * chunks + c) * 16)
            sums.store(index, k.let(sums.load(index) * shrink))
        largest[row] = found
    return top.get()


def clear(k: Emitter, rows: Expr, first: Expr, largest: Memory, totals: Memory, sums: Memory, chunks: int) -> None:
    """Begin with rows first .. first + rows - 1."""
    with k.loop(first, first + rows) as row:
        largest[row] = k.f32(LOWEST)
        totals.store(row * 16, k.splat(0.0))
        with k.loop(0, chunks) as c:
            sums.store((row * chunks + c) * 16, k.splat(0.0))


def add_values(
    k: Emitter, rows: int, sums: Memory, row: Expr, chunks: int,
    each: Callable[[Add], None], weights: Memory, first_chunk: int, count: int,
) -> None:  # fmt: skip
    """Add weight times value to `count` chunks of the sums of `rows` rows. They are held in registers while `each` runs
    over keys and calls what it is given with (chunk -> values, index of the key's weight in a row)."""
    start = k.let(k.wide(row) * k.T.int64(16 * chunks))
    where = [[start + k.T.int64(16 * (r * chunks + first_chunk + c)) for c in range(count)] for r in range(rows)]
    held = [[k.local("float32x16", sums.load(index)) for index in line] for line in where]

    def add(value: Callable[[int], Expr], j: Expr) -> None:
        values = [value(first_chunk + c) for c in range(count)]
        for r in range(rows):
            weight = k.let(k.splat(weights[k.wide(j) + k.T.int64(r * BLOCK)]))
            for c in range(count):
                held[r][c].set(k.fma(values[c], weight, held[r][c].get()))

    each(add)
    for r in range(rows):
        for c in range(count):
            sums.store(where[r][c], held[r][c].get())


def chunk_groups(rows: int, chunks: int) -> list[tuple[int, int]]:
    """(first, count) of chunks whose sums fit registers beside each other."""
    size = max(1, min(chunks, SUMS // rows))
    return [(first, min(size, chunks - first)) for first in range(0, chunks, size)]


# A few tokens


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
            _store_row(k, head_dim, out, c, value)


def _store_row(k: Emitter, head_dim: int, row: Memory, chunk: int, value: Expr) -> None:
    count = min(16, head_dim - 16 * chunk)
    if count == 16:
        row.store(16 * chunk, value)
    else:
        for i in range(count):
            row[16 * chunk + i] = k.lane(value, i)


# Many tokens


def attention_tiles(
    k: Emitter, *, k_dtype: str, v_dtype: str, head_dim: int, page_size: int, per_head: int, capped: bool
) -> None:
    """y of a tile of tokens and a kv head: an item. A tile may span sequences; each run of one is done by itself."""
    T, p = k.T, Problem(k, k_dtype, v_dtype, head_dim, page_size)
    y, y_stride, tile_tokens, capacity = k.pointer("float32"), k.integer(), k.integer(), k.integer()
    lasts, scratch = k.pointer("int32"), k.pointer("float32")
    chunks = p.chunks
    width = 16 * chunks
    lasts = lasts.at(k.worker * capacity)
    start = k.local("int64", k.wide(k.worker) * k.wide(_tile_floats(capacity, chunks)))

    def region(size: Expr) -> Memory:
        memory = scratch.at(start.get())
        start.set(start.get() + k.wide(size))
        return memory

    rows_of_keys, keys, values = (region(T.int32(BLOCK * width)) for _ in range(3))
    weights = region(T.int32(ROWS * BLOCK))
    queries, sums, totals, largest = (region(capacity * n) for n in (width, width, 16, 1))

    with each_run(k, p, tile_tokens, per_head) as run:
        _tile_run(k, run, capped, lasts, rows_of_keys, keys, values, weights, queries, sums, totals, largest)
        store_run(k, run, y, y_stride, totals, sums, chunks)


@dataclass(frozen=True)
class Run:
    """Consecutive tokens of one sequence, and a kv head."""

    p: Problem
    g: Expr
    seq: Expr
    begin: Expr
    end: Expr
    per_head: int


@contextmanager
def each_run(k: Emitter, p: Problem, tile_tokens: Expr, per_head: int) -> Generator[Run]:
    """The body for each run of a sequence in this worker's tiles of tokens, for each kv head."""
    T = k.T
    tiles = k.div(p.tokens + (tile_tokens - 1), tile_tokens)
    # Of few tiles there are not enough, unless each kv head of one is an item by itself.
    apart = k.let(T.Select(tiles < 2 * k.workers, p.kv_heads, T.int32(1)))
    with k.dealt(k.let(tiles * apart), T.int32(1)) as item:
        head, tile = k.mod(item, apart), k.let(k.div(item, apart) * tile_tokens)
        with k.loop(head, T.Select(apart > 1, head + 1, p.kv_heads)) as g:
            stop = k.let(T.min(tile + tile_tokens, p.tokens))
            with k.loop(tile, stop) as begin:
                seq = k.let(p.seq_ids[begin])
                before = k.let(p.seq_ids[T.max(begin - 1, 0)])
                with k.when(T.Or(begin == tile, before != seq)):
                    end = k.local("int32", begin)
                    with k.loop(begin, stop) as t, k.when(T.And(end.get() == t, p.seq_ids[t] == seq)):
                        end.set(t + 1)
                    yield Run(p, g, seq, begin, end.get(), per_head)


def load_run(
    k: Emitter, run: Run, group: int, lasts: Memory, put: Callable[[Expr, Memory | None], None]
) -> tuple[Expr, Expr, Expr]:  # fmt: skip
    """The groups of `group` rows of a run, and the first and last key that any of them sees (the last -1 if none).

    lasts holds each row's last key, -1 if it lacks keys or is none. `put` gets each row with its query, those that fill
    the last group with None.
    """
    T, p, per_head = k.T, run.p, run.per_head
    table = p.table(run.seq)
    low, high = k.local("int32", T.int32(2**31 - 1)), k.local("int32", T.int32(-1))
    with k.loop(run.begin, run.end) as t:
        position, last = k.let(p.positions[t]), k.local("int32", T.int32(-1))
        with k.when(p.is_known(run.seq, position)):
            first = p.first_key(position)
            with k.when(p.has_pages(table, first, k.let(position + 1)).get() != 0):
                last.set(position)
                low.set(T.min(low.get(), first))
                high.set(T.max(high.get(), position))
        source = p.q.at(k.wide(t) * k.wide(p.q_stride) + k.wide(run.g * (per_head * p.head_dim)))
        with k.loop(0, per_head) as r:
            row = k.let((t - run.begin) * per_head + r)
            lasts[row] = last.get()
            put(row, source.at(r * p.head_dim))
    rows = k.let((run.end - run.begin) * per_head)
    groups = k.div(rows + (group - 1), group)
    with k.loop(rows, groups * group) as row:
        lasts[row] = T.int32(-1)
        put(row, None)
    return groups, low.get(), high.get()


def keys_seen(
    k: Emitter, p: Problem, lasts: Memory, row: Expr, rows: int, start: Expr, block: int
) -> tuple[Local, Local]:
    """Of keys start .. start + block - 1 the first that any of `rows` rows from `row` on sees, and behind the last."""
    T = k.T
    first, stop = k.local("int32", T.int32(block)), k.local("int32", T.int32(0))
    with k.loop(row, row + rows) as r:
        last = k.let(lasts[r])
        with k.when(last >= 0):
            stop.set(T.max(stop.get(), T.min(last + 1 - start, block)))
            first.set(T.min(first.get(), T.max(p.first_key(last) - start, 0)))
    return first, stop


def store_run(
    k: Emitter, run: Run, y: Memory, y_stride: Expr, totals: Memory, sums: Memory, chunks: int, width: int = 0
) -> None:  # fmt: skip
    """y of a run; `width`: floats of a row of sums (0: 16 for each chunk)."""
    T, per_head = k.T, run.per_head
    width = width or 16 * chunks
    with k.loop(0, (run.end - run.begin) * per_head) as row:
        out = y.at(k.wide(run.begin + k.div(row, per_head)) * k.wide(y_stride)
                   + k.wide((run.g * per_head + k.mod(row, per_head)) * run.p.head_dim))  # fmt: skip
        divisor = k.let(k.splat(k.sum_lanes(totals.load(row * 16))))
        padding = k.let(k.splat(k.cast(run.seq < 0, "int32")) == k.splat(T.int32(1)))
        for c in range(chunks):
            value = k.let(sums.load(row * width + 16 * c) / divisor)
            _store_row(k, run.p.head_dim, out, c, k.let(T.Select(padding, k.splat(0.0), value)))


def tile_floats(rows: int, head_dim: int) -> int:
    """Scratch of a worker."""
    return _tile_floats(rows, -(-head_dim // 16))


def _tile_floats(rows: Any, chunks: int) -> Any:
    return (3 * BLOCK * 16 * chunks + ROWS * BLOCK) + rows * (32 * chunks + 17)


def _tile_run(
    k: Emitter, run: Run, capped: bool, lasts: Memory, rows_of_keys: Memory, keys: Memory, values: Memory,
    weights: Memory, queries: Memory, sums: Memory, totals: Memory, largest: Memory,
) -> None:  # fmt: skip
    """Sums and totals of the rows of a run."""
    p = run.p
    chunks, width = p.chunks, 16 * p.chunks

    def put(row: Expr, query: Memory | None) -> None:
        for c in range(chunks):
            queries.store(row * width + 16 * c, p.load(query, c) if query else k.splat(0.0))

    groups, low, high = load_run(k, run, ROWS, lasts, put)
    clear(k, groups * ROWS, k.T.int32(0), largest, totals, sums, chunks)
    blocks = [k.div(low, BLOCK), k.div(high, BLOCK) + 1]
    with k.when(high >= 0), k.loop(*blocks) as block:
        start = k.let(block * BLOCK)
        _load_block(k, run, p.table(run.seq), start, high, rows_of_keys, keys, values)
        with k.loop(0, groups) as group:
            row = k.let(group * ROWS)
            first, stop = keys_seen(k, p, lasts, row, ROWS, start, BLOCK)
            with k.when(first.get() < stop.get()):
                begin, end = k.div(first.get(), 32), k.div(stop.get() + 31, 32)
                with k.loop(begin, end) as half:
                    products = _products(k, queries, keys, row, k.let(32 * half), width)
                    for r, i in product(range(ROWS), range(2)):
                        last = k.let(lasts[row + r])
                        at = k.let(32 * half + 16 * i)
                        s = p.scores(products[r][i], start + at, p.first_key(last), last + 1, capped)
                        weights.store(r * BLOCK + at, s)
                with k.loop(0, ROWS) as r:
                    softmax_step(k, weights, r * BLOCK, begin * 2, end * 2, row + r, largest, totals, sums, chunks)
                for first_chunk, count in chunk_groups(ROWS, chunks):

                    def each(add: Add, first: Local = first, stop: Local = stop) -> None:
                        with k.loop(first.get(), stop.get()) as j:
                            channel = k.let(k.wide(j) * k.T.int64(width))
                            add(lambda c: values.load(channel + k.T.int64(16 * c)), j)

                    add_values(k, ROWS, sums, row, chunks, each, weights, first_chunk, count)


def load_keys(
    k: Emitter, run: Run, table: Memory, start: Expr, count: int, high: Expr,
    put: Callable[[Expr, Memory | None, Memory | None], None],
) -> None:  # fmt: skip
    """Call `put` with i, key and value of each slot start + i, i < count; with None, for zeros, where there is none.

    Slots past the run's last query hold whatever was there before, and between the windows of two queries there need
    not be a page: zeros, so that 0 * value is 0.
    """
    p = run.p
    with k.loop(0, count) as i:
        j = k.let(start + i)
        page = k.local("int32", k.T.int32(-1))
        with k.when(j <= high):
            page.set(table[k.div(j, p.page_size)])
        with k.branches(p.exists(page.get())) as (yes, no):
            with yes:
                element = p.element(page.get(), run.g, k.mod(j, p.page_size))
                put(i, p.k_pages.at(element), p.v_pages.at(element))
            with no:
                put(i, None, None)


def _load_block(
    k: Emitter, run: Run, table: Memory, start: Expr, high: Expr, rows: Memory, keys: Memory, values: Memory
) -> None:
    """Keys start .. start + BLOCK - 1 as floats, a key a lane: keys[channel * BLOCK + key]; values[key, channel]."""
    p = run.p
    width = 16 * p.chunks

    def put(i: Expr, key: Memory | None, value: Memory | None) -> None:
        for memory, source in ((rows, key), (values, value)):
            for c in range(p.chunks):
                memory.store(i * width + 16 * c, p.load(source, c) if source else k.splat(0.0))

    load_keys(k, run, table, start, BLOCK, high, put)
    with k.loop(0, BLOCK // 16) as part, k.loop(0, p.chunks) as c:
        lanes = k.transpose([rows.load((16 * part + i) * width + 16 * c) for i in range(16)])
        for i, lane in enumerate(lanes):
            keys.store((16 * c + i) * BLOCK + 16 * part, lane)


def _products(k: Emitter, queries: Memory, keys: Memory, row: Expr, first: Expr, width: int) -> list[list[Expr]]:
    """Of ROWS queries with 32 keys from `first` on in a block."""
    held = [[k.local("float32x16", k.splat(0.0)) for _ in range(2)] for _ in range(ROWS)]
    with k.loop(0, width // 4) as step:
        key = k.let(k.wide(step) * k.T.int64(4 * BLOCK) + k.wide(first))
        query_row = k.let(k.wide(row) * k.T.int64(width) + k.wide(step) * k.T.int64(4))
        for i in range(4):
            halves = [keys.load(key + k.T.int64(i * BLOCK + 16 * h)) for h in range(2)]
            for r in range(ROWS):
                query = k.let(k.splat(queries[query_row + k.T.int64(r * width + i)]))
                for h in range(2):
                    held[r][h].set(k.fma(halves[h], query, held[r][h].get()))
    return [[half.get() for half in line] for line in held]


# From calls to kernels


def _shape(signature: Signature) -> dict[str, Any]:
    dtypes = {"f16": "float16", "f32": "float32"}
    kinds = {f"{name[0]}_dtype": dtypes[signature.tensors[name].dtype] for name in ("k_pages", "v_pages")}
    _, _, page_size, head_dim = signature.tensors["k_pages"].shape
    return {**kinds, "head_dim": head_dim, "page_size": page_size, "capped": signature.attrs["softcap"] > 0}


def _per_head(signature: Signature) -> int:
    return signature.tensors["q"].shape[1] // signature.tensors["k_pages"].shape[1]


def _split_rows(signature: Signature) -> int:
    """Rows of an item: those of a kv head in equal parts of at most 8."""
    per_head = _per_head(signature)
    return -(-per_head // -(-per_head // 8))


def _is_tiled(signature: Signature) -> bool:
    return signature.tensors["q"].shape[0] >= TILED_FROM


def _is_amx(backend: TVMBackend, signature: Signature) -> bool:
    halves = all(signature.tensors[name].dtype == "f16" for name in ("k_pages", "v_pages"))
    return _is_tiled(signature) and backend.target.amx and halves


def kernels(backend: TVMBackend, signature: Signature) -> list[KernelSpec]:
    from .attention_amx import attention_amx

    shape = _shape(signature)
    if _is_amx(backend, signature):
        shape = {name: value for name, value in shape.items() if not name.endswith("_dtype")}
        return [spec(attention_amx, per_head=_per_head(signature), **shape)]
    if _is_tiled(signature):
        return [spec(attention_tiles, per_head=_per_head(signature), **shape)]
    rows = _split_rows(signature)
    return [spec(attention_split, rows=rows, **shape), spec(attention_merge, head_dim=shape["head_dim"], rows=rows)]


def numerics(backend: TVMBackend, signature: Signature) -> Numerics:
    """Longest chain: a score's head_dim, or the keys of a value's sum one by one, rescaled once per block."""
    table, pages = signature.tensors["block_table"].shape, signature.tensors["k_pages"].shape
    keys = table[1] * pages[2]
    depth = max(pages[3], keys + -(-keys // BLOCK) + backend.threads)
    if _is_amx(backend, signature):
        from .attention_amx import ROUNDINGS

        depth = 3 * depth + ROUNDINGS
    return Numerics("f32", depth, "f32", FUNCTION_ULP)


def bind(backend: TVMBackend, call: BoundCall) -> list[Launch]:
    from . import attention_amx

    signature, attrs, tensors = call.signature, call.attrs, call.tensors
    tokens, _, head_dim = tensors["q"].shape
    pages, kv_heads, _, _ = tensors["k_pages"].shape
    sequences, max_pages = tensors["block_table"].shape
    per_head, chunks = _per_head(signature), -(-head_dim // 16)
    specs = kernels(backend, signature)
    problem = [
        *place(tensors["q"]), address(tensors["k_pages"]), address(tensors["v_pages"]), *place(tensors["block_table"]),
        address(tensors["seq_ids"]), address(tensors["positions"]), tokens, kv_heads, sequences, max_pages, pages,
        float(attrs["scale"] or head_dim**-0.5), float(attrs["softcap"]), attrs["window"] or 2**31 - 1,
    ]  # fmt: skip
    if _is_tiled(signature):
        # Smaller tiles where there would not be a few for each worker.
        most, group, words = TILE_ROWS, ROWS, tile_floats
        if _is_amx(backend, signature):
            most, group, words = attention_amx.TILE_ROWS, attention_amx.ROWS, attention_amx.scratch_words
        tile = max(1, min(DEALT_ROWS, most // per_head, -(-tokens * kv_heads // (4 * backend.threads))))
        capacity = -(-tile * per_head // group) * group
        lasts = backend.scratch("attention rows", backend.threads * capacity * 4)
        scratch = backend.scratch("attention tiles", backend.threads * words(capacity, head_dim) * 4)
        tiles = backend.launch(
            specs[0], *problem, *place(tensors["y"]), tile, capacity, lasts.address, scratch.address,
            held=(call, lasts, scratch),
        )  # fmt: skip
        return [tiles]
    rows = _split_rows(signature)
    groups, splits = -(-per_head // rows), backend.threads
    lines = tokens * kv_heads * groups * splits * rows
    largest = backend.scratch("attention largest", lines * 4)
    totals = backend.scratch("attention totals", lines * 64)
    sums = backend.scratch("attention sums", lines * 64 * chunks)
    scratch = backend.scratch("attention weights", backend.threads * rows * BLOCK * 4)
    partial = [buffer.address for buffer in (largest, totals, sums)]
    held = (call, largest, totals, sums, scratch)
    split = backend.launch(specs[0], *problem, per_head, groups, splits, *partial, scratch.address, held=held)
    merge = backend.launch(
        specs[1], *place(tensors["y"]), address(tensors["seq_ids"]), tokens, kv_heads, per_head, groups, splits,
        *partial, held=held,
    )  # fmt: skip
    return [split, merge]


KERNELS = [OpKernel("attention", kernels, numerics, bind)]
