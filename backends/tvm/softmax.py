"""What attention's kernels share: their arguments, and online softmax (arXiv:1805.02867) over blocks of keys.

A row is one query head of one token; the rows of a kv head share every load of its keys and values. Letters as in
kernels/attention.py, R = H / G rows per token and kv head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .pointwise import by_lane

if TYPE_CHECKING:
    from .emit import Emitter, Expr, Local, Memory

BLOCK = 64  # keys whose scores are held at once: 16 KiB of float keys of 64 channels, and as much of values
# Vectors of value sums held while keys go by. 24 would fit the 32 registers of AVX-512, but LLVM keeps the constants of
# exp there too and spills in the inner loop: 2.5 times slower.
SUMS = 12
LOWEST = -3.4028234663852886e38  # where maxima begin: finite, so that no difference of two is NaN

Add = Callable[[Callable[[int], "Expr"], "Expr"], None]


class Problem:
    """Arguments that all of them take, in order, and where keys lie."""

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


def store_row(k: Emitter, head_dim: int, row: Memory, chunk: int, value: Expr) -> None:
    count = min(16, head_dim - 16 * chunk)
    if count == 16:
        row.store(16 * chunk, value)
    else:
        for i in range(count):
            row[16 * chunk + i] = k.lane(value, i)
