"""argmax and sample. Each thread looks at a part of a row; a second kernel puts the parts together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...kernels.op import Numerics, Signature
from ...kernels.spi import BoundCall
from .launch import FUNCTION_ULP, Launch, OpKernel, address, place, spec

if TYPE_CHECKING:
    from . import TVMBackend
    from .emit import Emitter, Expr, Memory

CHAINS = 4  # of comparisons, each of which waits for the one before: 4 cycles, two can start in each


def largest(k: Emitter, x: Memory, start: Expr, stop: Expr) -> tuple[Expr, Expr]:
    """(value, lowest index) of the largest of x[start:stop]; (-infinity, `start`) if nothing is larger than that."""
    lanes, vector, lowest = k.T.ramp(k.T.int32(0), 1, 16), "float32x16", k.f32(float("-inf"))
    best = [k.local(vector, k.splat(lowest)) for _ in range(CHAINS)]
    where = [k.local("int32x16", k.splat(start)) for _ in range(CHAINS)]
    whole = k.div(stop - start, 16 * CHAINS)
    with k.loop(0, whole) as i:
        for j in range(CHAINS):
            at = k.let(start + (i * CHAINS + j) * 16)
            value, old = x.load(at), best[j].get()
            better = value > old  # not for a NaN
            where[j].set(k.T.Select(better, k.splat(at), where[j].get()))
            best[j].set(k.T.Select(better, value, old))
    top = best[0].get()
    for other in best[1:]:
        top = k.max(top, other.get())
    highest = k.max_lanes(top)
    found = k.splat(k.T.int32(2**31 - 1))
    for values, places in zip(best, where, strict=True):
        index = k.let(places.get() + lanes)
        is_top = values.get() >= k.splat(highest)
        found = k.let(k.T.min(found, k.T.Select(is_top, index, k.splat(k.T.int32(2**31 - 1)))))
    value, index = k.local("float32", highest), k.local("int32", k.min_lanes(found))
    with k.loop(start + whole * (16 * CHAINS), stop) as i:
        one = k.let(x[i])
        with k.when(one > value.get()):
            value.set(one)
            index.set(i)
    return value.get(), k.let(k.T.Select(value.get() > lowest, index.get(), start))


def argmax(k: Emitter) -> None:
    """values and places [tokens, parts] of the largest of each part of a row."""
    x, x_stride, values, places = k.pointer("float32"), k.integer(), k.pointer("float32"), k.pointer("int32")
    tokens, vocab, parts = k.integer(), k.integer(), k.integer()
    step = k.div(vocab + parts - 1, parts)
    with k.share(tokens * parts) as item:
        t, start = k.div(item, parts), k.let(k.T.min(k.mod(item, parts) * step, vocab))
        row = x.at(k.wide(t) * k.wide(x_stride))
        value, index = largest(k, row, start, k.let(k.T.min(start + step, vocab)))
        values[item], places[item] = value, index


def merge(k: Emitter) -> None:
    """ids [tokens]: the place of the largest part, of the first of several."""
    values, places, ids = k.pointer("float32"), k.pointer("int32"), k.pointer("int32")
    tokens, parts = k.integer(), k.integer()
    with k.share(tokens) as t:
        value, index = k.local("float32", k.f32(float("-inf"))), k.local("int32", k.T.int32(0))
        with k.loop(t * parts, t * parts + parts) as i, k.when(values[i] > value.get()):
            value.set(values[i])
            index.set(places[i])
        ids[t] = index.get()


def _bind_argmax(backend: TVMBackend, call: BoundCall) -> list[Launch]:
    x, ids = call.tensors["x"], call.tensors["ids"]
    tokens, vocab = x.shape
    parts = 1 if tokens >= backend.threads else backend.threads
    values, places = (backend.scratch(name, tokens * parts * 4) for name in ("argmax values", "argmax places"))
    return [
        backend.launch(
            spec(argmax), *place(x), values.address, places.address, tokens, vocab, parts, held=(call, values, places)
        ),
        backend.launch(
            spec(merge), values.address, places.address, address(ids), tokens, parts, held=(call, values, places)
        ),
    ]


def _numerics(backend: TVMBackend, signature: Signature) -> Numerics:
    return Numerics("f32", signature.tensors["x"].shape[1], "f32", FUNCTION_ULP)


KERNELS = [OpKernel("argmax", lambda backend, signature: [spec(argmax), spec(merge)], _numerics, _bind_argmax)]
