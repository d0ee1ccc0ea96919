"""attention for many tokens: tiles of tokens, whose rows see each block of keys together.

Runs, keys and values are found here for attention_amx.py too.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from .softmax import BLOCK, Add, Problem, add_values, chunk_groups, clear, softmax_step, store_row

if TYPE_CHECKING:
    from .emit import Emitter, Expr, Local, Memory

ROWS = 6  # of a tile per load of keys: 6 rows x 32 keys are 12 sums, enough to hide the 4 cycles of each of 2 FMAs
TILE_ROWS = 96  # rows of a tile, if there are enough tokens: twice or three times as many are no faster


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
            store_row(k, run.p.head_dim, out, c, k.let(T.Select(padding, k.splat(0.0), value)))


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
