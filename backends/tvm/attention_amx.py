"""attention for many tokens on AMX: tiles of 32 rows by 32 keys, as accurate as in float32.

A tile instruction takes bfloat16, 8 bits of a number. So a number is two of them, its first 8 bits and the next 8, and
a product three: first by first, first by next, next by first. What that leaves out is below 2**-17 of it; keys and
values, float16, are two parts exactly. Three products on tiles take a fifth of the time of one in float32 (3400 G
multiply-adds a second on two cores against 210 G).

Tiles add up columns in pairs. Of 32 these are (c, c + 16), so that two vectors of 16 make a row without a shuffle.
Otherwise this is attention_tiles.py with its letters and its tiles of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import amx
from .attention_tiles import each_run, keys_seen, load_keys, load_run, store_run
from .emit import LANES
from .pointwise import LOG2E, by_lane
from .softmax import Problem, clear, raise_top

if TYPE_CHECKING:
    from .attention_tiles import Run
    from .emit import Emitter, Expr, Memory

TILE_ROWS = 512  # rows of a tile of tokens, if there are enough: turning keys and values into tiles is a tenth then
ROWS = amx.GROUP_ROWS
KEYS = 64  # whose scores are held at once
WORDS = 256  # words (uint32) of a tile: 16 rows of 16 pairs
ROUNDINGS = 160  # of float32, as much as the products left out of a score and of a sum of values


def pairs_of(head_dim: int) -> int:
    """Tiles that hold the channels of 16 rows."""
    return -(-head_dim // 32)


def _block_words(pairs: int) -> int:
    """Keys and values as rows and as tiles, scores and weights."""
    return 4 * KEYS * 32 * pairs + 2 * ROWS * KEYS


def scratch_words(rows: Any, head_dim: int) -> Any:
    """32-bit words of a worker whose tiles have `rows` rows: beside a block of keys queries, sums, totals, largest."""
    return _block_words(pairs_of(head_dim)) + rows * (64 * pairs_of(head_dim) + 17)


@dataclass(frozen=True)
class _Scratch:
    """Of a worker. Tiles are [row, pair]; words are two bfloat16.

    key_words    [key, part, 16 channels by 16 others], rows before they are turned
    value_rows   [key, channel] float32
    keys         tiles [16 keys, 32 channels, part]: rows are pairs of channels, columns keys
    values       tiles [32 keys, 16 channels, part]: rows are pairs of keys, columns channels
    scores       [row, key] float32
    weights      tiles [16 rows, 32 keys, part]
    queries      tiles [16 rows, 32 channels, part]
    sums         [row, channel] float32; totals [row, lane]; largest [row]
    """

    key_words: Memory
    value_rows: Memory
    keys: Memory
    values: Memory
    scores: Memory
    weights: Memory
    queries: Memory
    sums: Memory
    totals: Memory
    largest: Memory


def attention_amx(k: Emitter, *, head_dim: int, page_size: int, per_head: int, capped: bool) -> None:
    """y of a tile of tokens and a kv head: an item."""
    T, p, pairs = k.T, Problem(k, "float16", "float16", head_dim, page_size), pairs_of(head_dim)
    y, y_stride, tile_tokens, capacity = k.pointer("float32"), k.integer(), k.integer(), k.integer()
    lasts, memory = k.pointer("int32"), k.pointer("uint32")
    lasts = lasts.at(k.worker * capacity)
    place = k.let(k.wide(k.worker) * k.wide(scratch_words(capacity, head_dim)))
    regions: list[Memory] = []
    sizes = [T.int32(n) for n in (*[KEYS * 32 * pairs] * 4, ROWS * KEYS, ROWS * KEYS)]
    sizes += [capacity * n for n in (32 * pairs, 32 * pairs, 16, 1)]
    for number, size in enumerate(sizes):
        regions.append(memory.at(place).as_dtype("float32" if number in (1, 4, 7, 8, 9) else "uint32"))
        place = k.let(place + k.wide(size))
    at = _Scratch(*regions)
    amx.configure(k)
    with each_run(k, p, tile_tokens, per_head) as run:
        _run(k, run, capped, lasts, at)
        store_run(k, run, y, y_stride, at.totals, at.sums, p.chunks, 32 * pairs)
    amx.release(k)


def _run(k: Emitter, run: Run, capped: bool, lasts: Memory, at: _Scratch) -> None:
    """Sums and totals of the rows of a run."""
    p, pairs = run.p, pairs_of(run.p.head_dim)
    # Scores are binary logarithms, a power of two takes fewer instructions than one of e; with softcap what tanh takes.
    factor = k.let(p.scale / p.softcap if capped else p.scale * k.f32(LOG2E))

    def put(row: Expr, query: Memory | None) -> None:
        for pair in range(pairs):
            channels = [k.let(_channels(k, p, query, 2 * pair + i) * k.splat(factor)) for i in range(2)]
            words = _split(k, channels[0], channels[1])
            tile = k.let((k.div(row, 16) * pairs + pair) * 2)
            for part, word in enumerate(words):
                at.queries.store((tile + part) * WORDS + k.mod(row, 16) * LANES, word)

    groups, low, high = load_run(k, run, ROWS, lasts, put)
    clear(k, groups * ROWS, k.T.int32(0), at.largest, at.totals, at.sums, 2 * pairs)
    with k.when(high >= 0), k.loop(k.div(low, KEYS), k.div(high, KEYS) + 1) as block:
        start = k.let(block * KEYS)
        _load_block(k, run, start, high, at)
        with k.loop(0, groups) as group:
            row = k.let(group * ROWS)
            first, stop = keys_seen(k, p, lasts, row, ROWS, start, KEYS)
            with k.when(first.get() < stop.get()):
                _products(k, pairs, group, at)
                with k.branches(_is_whole(k, p, lasts, row, start)) as ways:
                    for way, is_whole in zip(ways, (True, False), strict=True):
                        with way, k.loop(0, ROWS) as r:
                            _weigh(k, p, capped, lasts, row, r, start, pairs, at, is_whole)
                _add_values(k, pairs, row, at)


def _is_whole(k: Emitter, p: Problem, lasts: Memory, row: Expr, start: Expr) -> Expr:
    """Whether each row of a group sees every key of the block."""
    whole = k.local("int32", k.T.int32(1))
    with k.loop(row, row + ROWS) as r:
        last = k.let(lasts[r])
        with k.when(k.T.Or(last < start + (KEYS - 1), p.first_key(last) > start)):
            whole.set(k.T.int32(0))
    return whole.get() == 1


def _channels(k: Emitter, p: Problem, row: Memory | None, chunk: int) -> Expr:
    return p.load(row, chunk) if row and chunk < p.chunks else k.splat(0.0)


def _split(k: Emitter, low: Expr, high: Expr, is_exact: bool = False) -> list[Expr]:
    """Two vectors of float32 as words of their first parts, and of what these leave (`is_exact`: what fits the second
    part as it is)."""
    T = k.T
    upper, half = k.splat(T.uint32(0xFFFF0000)), k.splat(T.uint32(0 if is_exact else 0x8000))
    firsts: list[Expr] = []
    nexts: list[Expr] = []
    for value in (low, high):
        bits = k.let(k.bits(value, "uint32x16"))
        first = k.let(T.bitwise_and(bits if is_exact else bits + half, upper))
        firsts.append(first)
        left = k.let(k.bits(k.let(value - k.bits(first, "float32x16")), "uint32x16"))
        nexts.append(left if is_exact else k.let(left + half))
    return [k.upper_halves(one, other) for one, other in (firsts, nexts)]


def _load_block(k: Emitter, run: Run, start: Expr, high: Expr, at: _Scratch) -> None:
    """Keys and values start .. start + KEYS - 1 as tiles."""
    p, pairs = run.p, pairs_of(run.p.head_dim)

    def put(i: Expr, key: Memory | None, value: Memory | None) -> None:
        for pair in range(pairs):
            words = _split(k, *(_channels(k, p, key, 2 * pair + n) for n in range(2)), is_exact=True)
            for part, word in enumerate(words):
                at.key_words.store(((i * pairs + pair) * 2 + part) * LANES, word)
            for n in range(2):
                at.value_rows.store((i * pairs + pair) * 32 + LANES * n, _channels(k, p, value, 2 * pair + n))

    load_keys(k, run, p.table(run.seq), start, KEYS, high, put)
    with k.loop(0, KEYS // 16) as some, k.loop(0, 2 * pairs) as column:  # of words: (pair, part)
        rows = [at.key_words.load(((16 * some + i) * 2 * pairs + column) * LANES) for i in range(16)]
        for i, row in enumerate(k.transpose(rows)):
            at.keys.store((some * 2 * pairs + column) * WORDS + LANES * i, row)
    with k.loop(0, KEYS // 32) as some, k.loop(0, 2 * pairs) as chunk:
        for i in range(16):
            row = [at.value_rows.load((32 * some + i + 16 * n) * 32 * pairs + LANES * chunk) for n in range(2)]
            for part, word in enumerate(_split(k, row[0], row[1], is_exact=True)):
                at.values.store(((some * 2 * pairs + chunk) * 2 + part) * WORDS + LANES * i, word)


def _multiply(k: Emitter, rows: list[list[Expr]], columns: list[list[Expr]]) -> None:
    """Add to the sums in tiles 0 .. 3 the three products of two tiles of rows with two of columns, addresses
    [tile][part]: each part is loaded once."""
    T = k.T
    line = T.int64(64)

    def load(first: int, tiles: list[list[Expr]], part: int) -> None:
        for i, tile in enumerate(tiles):
            amx.call(k, "tileloadd64", T.int8(first + i), tile[part], line)

    def add() -> None:
        for i in range(2):
            for j in range(2):
                amx.call(k, "tdpbf16ps", T.int8(2 * i + j), T.int8(4 + i), T.int8(6 + j))

    load(4, rows, 0)
    load(6, columns, 1)
    add()
    load(6, columns, 0)
    add()
    load(4, rows, 1)
    add()


def _parts(k: Emitter, memory: Memory, tile: Expr) -> list[Expr]:
    """Addresses of the two parts of a tile."""
    return [k.T.address_of(memory[(tile * 2 + part) * WORDS]) for part in range(2)]


def _products(k: Emitter, pairs: int, group: Expr, at: _Scratch) -> None:
    """scores = queries of a group times all keys of the block."""
    T = k.T
    with k.loop(0, KEYS // 32) as some:
        for tile in range(4):
            amx.call(k, "tilezero", T.int8(tile))
        with k.loop(0, pairs) as pair:
            queries = [_parts(k, at.queries, k.let((group * 2 + i) * pairs + pair)) for i in range(2)]
            keys = [_parts(k, at.keys, k.let((some * 2 + j) * pairs + pair)) for j in range(2)]
            _multiply(k, queries, keys)
        for i in range(2):
            for j in range(2):
                place = T.address_of(at.scores[16 * i * KEYS + 32 * some + 16 * j])
                amx.call(k, "tilestored64", T.int8(2 * i + j), place, T.int64(4 * KEYS))


def _weigh(
    k: Emitter, p: Problem, capped: bool, lasts: Memory, row: Expr, r: Expr, start: Expr, pairs: int, at: _Scratch,
    is_whole: bool,
) -> None:  # fmt: skip
    """Turn row r of the scores into weights, and add them to the row's total. `is_whole`: it sees all keys."""
    scores: list[Expr] = []
    for v in range(KEYS // 16):
        score = at.scores.load(r * KEYS + 16 * v)
        if capped:
            score = k.let(k.splat(p.softcap * k.f32(LOG2E)) * by_lane(k, "tanhf", score))
        if not is_whole:
            last = k.let(lasts[row + r])
            score = p.masked(score, start + 16 * v, p.first_key(last), last + 1)
        scores.append(score)
    tops = scores
    while len(tops) > 1:  # of NaN or not: with a score that is NaN all of the row is
        tops = [k.larger(a, b) for a, b in zip(tops[0::2], tops[1::2], strict=True)]
    found = k.max_lanes(tops[0], k.larger)
    base = raise_top(k, found, row + r, at.largest, at.totals, at.sums, 2 * pairs, k.exp2)
    weights = [k.exp2(k.let(score - k.splat(base))) for score in scores]
    total = at.totals.load((row + r) * 16)
    for weight in weights:
        total = k.let(total + weight)
    at.totals.store((row + r) * 16, total)
    for some in range(KEYS // 32):
        tile = k.let((k.div(r, 16) * (KEYS // 32) + some) * 2)
        for part, word in enumerate(_split(k, weights[2 * some], weights[2 * some + 1])):
            at.weights.store((tile + part) * WORDS + k.mod(r, 16) * LANES, word)


def _add_values(k: Emitter, pairs: int, row: Expr, at: _Scratch) -> None:
    """sums += weights of a group times all values of the block."""
    T, stride = k.T, 32 * pairs
    with k.loop(0, pairs) as pair:
        places = [
            T.address_of(at.sums[(row + 16 * i) * stride + 32 * pair + 16 * j]) for i in range(2) for j in range(2)
        ]
        for tile, place in enumerate(places):
            amx.call(k, "tileloadd64", T.int8(tile), place, T.int64(4 * stride))
        for some in range(KEYS // 32):
            weights = [_parts(k, at.weights, k.T.int32(i * (KEYS // 32) + some)) for i in range(2)]
            values = [_parts(k, at.values, k.let(some * 2 * pairs + 2 * pair + j)) for j in range(2)]
            _multiply(k, weights, values)
        for tile, place in enumerate(places):
            amx.call(k, "tilestored64", T.int8(tile), place, T.int64(4 * stride))
