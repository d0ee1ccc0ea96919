"""rope, kv_append, and both in one kernel. An item of work is a head of a token."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from ...kernels.op import NUMPY_DTYPES, Numerics, Signature
from ...kernels.spi import BoundCall
from .launch import KernelSpec, Launch, OpKernel, address, place, spec

if TYPE_CHECKING:
    from . import TVMBackend
    from .emit import Emitter, Expr, Memory


class _Heads:
    """Arguments of a matrix [tokens, heads, head_dim] whose rows may be apart."""

    def __init__(self, k: Emitter) -> None:
        self.k, self.memory, self.stride = k, k.pointer("float32"), k.integer()

    def head(self, t: Expr, h: Expr, head_dim: Expr) -> Memory:
        return self.memory.at(self.k.wide(t) * self.k.wide(self.stride) + self.k.wide(h) * self.k.wide(head_dim))


class _Angles:
    """Arguments of the table of cosines and sines [length, rot_dim]; how pairs lie in a head."""

    def __init__(self, k: Emitter, pairing: str) -> None:
        self.k, self.interleaved = k, pairing == "interleaved"
        self.table, self.stride = k.pointer("float32"), k.integer()
        self.length, self.rot_dim = k.integer(), k.integer()

    def rotate(self, x: Memory, out: Memory, position: Expr) -> None:
        """out[:rot_dim] = x[:rot_dim] rotated, for a position in the table; `out` may be `x` itself."""
        k = self.k
        row = self.table.at(k.wide(position) * k.wide(self.stride))
        half = k.div(self.rot_dim, 2)
        whole = k.div(half, 16)

        def turned(pair: list[Expr], cos: Expr, sin: Expr) -> list[Expr]:
            a, b = pair
            return [k.let(a * cos - b * sin), k.let(b * cos + a * sin)]

        with k.loop(0, whole) as i:
            places = (32 * i, 32 * i + 16) if self.interleaved else (16 * i, half + 16 * i)
            pair = [x.load(place) for place in places]
            if self.interleaved:
                pair = [k.shuffle(pair, range(first, 32, 2)) for first in (0, 1)]
            pair = turned(pair, row.load(16 * i), row.load(half + 16 * i))
            if self.interleaved:
                pair = [k.shuffle(pair, [first + j // 2 + 16 * (j % 2) for j in range(16)]) for first in (0, 8)]
            for place, value in zip(places, pair, strict=True):
                out.store(place, k.cast(value, f"{out.dtype}x16"))
        with k.loop(16 * whole, half) as i:
            places = (2 * i, 2 * i + 1) if self.interleaved else (i, half + i)
            pair = turned([k.let(x[place]) for place in places], k.let(row[i]), k.let(row[half + i]))
            for place, value in zip(places, pair, strict=True):
                out[place] = k.cast(value, out.dtype)


class _Cache:
    """Arguments of a paged cache and of the tokens that go into it."""

    def __init__(self, k: Emitter, pages: str) -> None:
        self.k = k
        self.block_table, self.stride = k.pointer("int32"), k.integer()
        self.seq_ids, self.positions = k.pointer("int32"), k.pointer("int32")
        self.keys, self.values = k.pointer(pages), k.pointer(pages)
        self.sequences, self.max_pages, self.pages = k.integer(), k.integer(), k.integer()
        self.kv_heads, self.page_size, self.head_dim = k.integer(), k.integer(), k.integer()

    @contextmanager
    def slot(self, t: Expr, g: Expr) -> Generator[tuple[Memory, Memory]]:
        """Where key and value of head g of token t go; nothing is done for a token without a slot."""
        k = self.k
        seq, position = k.let(self.seq_ids[t]), k.let(self.positions[t])
        number = k.div(position, self.page_size)  # above -1 for what the next line rules out
        known = k.all(seq >= 0, seq < self.sequences, position >= 0, number < self.max_pages)
        with k.when(known):
            page = k.let(self.block_table.at(k.wide(seq) * k.wide(self.stride))[number])
            with k.when(k.all(page >= 0, page < self.pages)):
                row = (k.wide(page) * k.wide(self.kv_heads) + k.wide(g)) * k.wide(self.page_size)
                start = k.let((row + k.wide(k.mod(position, self.page_size))) * k.wide(self.head_dim))
                yield self.keys.at(start), self.values.at(start)


def rope(k: Emitter, *, pairing: str) -> None:
    x, angles, positions = _Heads(k), _Angles(k, pairing), k.pointer("int32")
    tokens, heads, head_dim = k.integer(), k.integer(), k.integer()
    with k.share(tokens * heads) as item:
        t, h = k.div(item, heads), k.mod(item, heads)
        position = k.let(positions[t])
        with k.when(k.all(position >= 0, position < angles.length)):
            row = x.head(t, h, head_dim)
            angles.rotate(row, row, position)


def kv_append(k: Emitter, *, pages: str) -> None:
    keys, values, cache, tokens = _Heads(k), _Heads(k), _Cache(k, pages), k.integer()
    with k.share(tokens * cache.kv_heads) as item:
        t, g = k.div(item, cache.kv_heads), k.mod(item, cache.kv_heads)
        with cache.slot(t, g) as slots:
            for source, slot in zip((keys, values), slots, strict=True):
                k.copy(source.head(t, g, cache.head_dim), slot, 0, cache.head_dim)


def rope_kv_append(k: Emitter, *, pairing: str, pages: str) -> None:
    """Of each token the heads of q first, then those of k, each with its value. Past the table: stored as it is."""
    q, keys, values, angles, cache = _Heads(k), _Heads(k), _Heads(k), _Angles(k, pairing), _Cache(k, pages)
    tokens, heads, head_dim = k.integer(), k.integer(), cache.head_dim
    each = k.let(heads + cache.kv_heads)
    at_once = k.let(k.T.Select(tokens > 1, k.rows_at_once(tokens) * each, k.div(each + k.workers - 1, k.workers)))
    with k.dealt(k.let(tokens * each), at_once) as item:
        t, h = k.div(item, each), k.mod(item, each)
        position = k.let(cache.positions[t])
        is_rotated = k.let(k.all(position >= 0, position < angles.length))
        with k.branches(h < heads) as (query, key):
            with query, k.when(is_rotated):
                row = q.head(t, h, head_dim)
                angles.rotate(row, row, position)
            with key:
                g = k.let(h - heads)
                with cache.slot(t, g) as (key_slot, value_slot):
                    row = keys.head(t, g, head_dim)
                    with k.when(is_rotated):
                        angles.rotate(row, key_slot, position)
                    begin = k.let(k.T.Select(is_rotated, angles.rot_dim, k.T.int32(0)))
                    k.copy(row, key_slot, begin, head_dim)
                    k.copy(values.head(t, g, head_dim), value_slot, 0, head_dim)


def _spec(signature: Signature) -> KernelSpec:
    options: dict[str, str] = {}
    if "cos_sin" in signature.tensors:
        options["pairing"] = signature.attrs["pairing"]
    if "k_pages" in signature.tensors:
        options["pages"] = np.dtype(NUMPY_DTYPES[signature.tensors["k_pages"].dtype]).name
    emit: Callable[..., None] = {"rope": rope, "kv_append": kv_append, "rope_kv_append": rope_kv_append}[signature.op]
    return spec(emit, **options)


def _arguments(call: BoundCall, names: Sequence[str]) -> list[int]:
    return [value for name in names for value in place(call.tensors[name])]


def _angles(call: BoundCall) -> list[int]:
    return [*_arguments(call, ["cos_sin"]), *call.tensors["cos_sin"].shape]


def _cache(call: BoundCall) -> list[int]:
    pages, kv_heads, page_size, head_dim = call.tensors["k_pages"].shape
    where = [address(call.tensors[name]) for name in ("seq_ids", "positions", "k_pages", "v_pages")]
    sizes = [*call.tensors["block_table"].shape, pages, kv_heads, page_size, head_dim]
    return [*_arguments(call, ["block_table"]), *where, *sizes]


def _bind(backend: TVMBackend, call: BoundCall) -> list[Launch]:
    if call.op == "rope":
        positions = address(call.tensors["positions"])
        arguments = [*_arguments(call, ["x"]), *_angles(call), positions, *call.tensors["x"].shape]
    elif call.op == "kv_append":
        arguments = [*_arguments(call, ["k", "v"]), *_cache(call), call.tensors["k"].shape[0]]
    else:
        sizes = call.tensors["q"].shape[:2]
        arguments = [*_arguments(call, ["q", "k", "v"]), *_angles(call), *_cache(call), *sizes]
    return [backend.launch(_spec(call.signature), *arguments, held=(call,))]


def _numerics(backend: TVMBackend, signature: Signature) -> Numerics:
    return Numerics("f32", 2, "f32", 1.0)


KERNELS = [
    OpKernel(op, lambda backend, signature: [_spec(signature)], _numerics, _bind)
    for op in ("rope", "kv_append", "rope_kv_append")
]
