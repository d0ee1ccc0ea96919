"""argmax and sample. Each thread looks at a part of a row; a second kernel puts the parts together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...kernels.op import Numerics, Signature
from ...kernels.spi import BoundCall
from .launch import FUNCTION_ULP, HostBuffer, Launch, OpKernel, address, place, spec

if TYPE_CHECKING:
    from . import TVMBackend
    from .emit import Emitter, Expr, Local, Memory

CHAINS = 4  # of comparisons or sums, each of which waits for the one before: 4 cycles, two can start in each
STEP = 16 * CHAINS
ONE = 0x3F800000  # the bits of 1.0


def largest(k: Emitter, x: Memory, start: Expr, stop: Expr) -> tuple[Expr, Expr]:
    """(value, lowest index) of the largest of x[start:stop]; (-infinity, `start`) if nothing is larger than that."""
    lanes, vector, lowest = k.T.ramp(k.T.int32(0), 1, 16), "float32x16", k.f32(float("-inf"))
    best = [k.local(vector, k.splat(lowest)) for _ in range(CHAINS)]
    where = [k.local("int32x16", k.splat(start)) for _ in range(CHAINS)]
    whole = k.div(stop - start, STEP)
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
    with k.loop(start + whole * STEP, stop) as i:
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


def largest_part(k: Emitter, values: Memory, places: Memory, t: Expr, parts: Expr) -> tuple[Expr, Expr]:
    """(value, index) of the largest of a row, from what `argmax` wrote; (-infinity, 0) if there is none."""
    value, index = k.local("float32", k.f32(float("-inf"))), k.local("int32", k.T.int32(0))
    with k.loop(t * parts, t * parts + parts) as i, k.when(values[i] > value.get()):
        value.set(values[i])
        index.set(places[i])
    return value.get(), index.get()


def merge(k: Emitter) -> None:
    """ids [tokens]: the place of the largest part, of the first of several."""
    values, places, ids = k.pointer("float32"), k.pointer("int32"), k.pointer("int32")
    tokens, parts = k.integer(), k.integer()
    with k.share(tokens) as t:
        ids[t] = largest_part(k, values, places, t, parts)[1]


def probabilities(k: Emitter) -> None:
    """p [tokens, width]: exp((x - largest) / temperature), 0 for NaN; -1 past the vocabulary, which no threshold keeps.

    Rows without a largest number or without a temperature are drawn without it: what is written there is not read.
    """
    x, x_stride, params, params_stride = k.pointer("float32"), k.integer(), k.pointer("float32"), k.integer()
    values, places, p = k.pointer("float32"), k.pointer("int32"), k.pointer("float32")
    tokens, vocab, width, parts = k.integer(), k.integer(), k.integer(), k.integer()
    vectors = k.div(vocab, 16)
    with k.share(tokens * parts) as item:
        t, part = k.div(item, parts), k.mod(item, parts)
        row, out = x.at(k.wide(t) * k.wide(x_stride)), p.at(k.wide(t) * k.wide(width))
        temperature = k.let(k.splat(params.at(k.wide(t) * k.wide(params_stride))[0]))
        top = k.let(k.splat(largest_part(k, values, places, t, parts)[0]))

        def probability(v: Expr) -> Expr:
            e = k.exp(k.let((v - top) / temperature))
            return k.let(k.T.Select(e >= k.splat(0.0), e, k.splat(0.0)))

        with k.loop(k.div(vectors * part, parts), k.div(vectors * (part + 1), parts)) as i:
            out.store(16 * i, probability(row.load(16 * i)))
        with k.when(part == parts - 1):
            with k.loop(16 * vectors, vocab) as i:
                out[i] = k.lane(probability(k.let(k.splat(row[i]))), 0)
            with k.loop(vocab, width) as i:
                out[i] = k.f32(-1.0)


def philox(k: Emitter, counter: Expr, seed: Expr) -> Expr:
    """First of the four words of Philox4x32-10 (Salmon et al., SC'11, doi 10.1145/2063384.2063405), uint32."""
    T = k.T
    words: list[Expr] = [counter, *[T.uint32(0)] * 3]

    def product(factor: int, word: Expr) -> tuple[Expr, Expr]:
        whole = k.let(T.Cast("uint64", word) * T.uint64(factor))
        return k.let(T.Cast("uint32", T.shift_right(whole, T.uint64(32)))), k.let(T.Cast("uint32", whole))

    for r in range(10):
        key = (k.let(seed + T.uint32(r * 0x9E3779B9 % 2**32)), T.uint32(r * 0xBB67AE85 % 2**32))
        high0, low0 = product(0xD2511F53, words[0])
        high1, low1 = product(0xCD9E8D57, words[2])
        words = [
            k.let(T.bitwise_xor(T.bitwise_xor(high1, words[1]), key[0])), low1,
            k.let(T.bitwise_xor(T.bitwise_xor(high0, words[3]), key[1])), low0,
        ]  # fmt: skip
    return words[0]


def mass(k: Emitter, p: Memory, width: Expr, threshold: Expr, *, counted: bool = False) -> Expr:
    """The sum (float32), or if `counted` the number (int32), of the probabilities >= threshold."""
    dtype = "int32" if counted else "float32"
    zero = k.splat(k.T.int32(0) if counted else 0.0)
    limit = k.let(k.splat(threshold))
    sums = [k.local(f"{dtype}x16", zero) for _ in range(CHAINS)]
    with k.loop(0, k.div(width, STEP)) as i:
        for j, total in enumerate(sums):
            v = p.load(i * STEP + 16 * j)
            total.set(total.get() + k.T.Select(v >= limit, k.splat(k.T.int32(1)) if counted else v, zero))
    a, b, c, d = (total.get() for total in sums)
    return k.sum_lanes(k.let(a + b + (c + d)), dtype)


def raise_threshold(k: Emitter, p: Memory, width: Expr, least: Local, enough: Expr, *, counted: bool) -> None:
    """least = the largest threshold from `least` up to 1 that still keeps `enough`, by mass or by number.

    Bisection over the bits of a float that is not negative, whose order is that of the numbers; 30 passes from 0 on.
    """
    T = k.T
    low, high = k.local("int32", k.bits(least.get(), "int32")), k.local("int32", T.int32(ONE + 1))
    with k.loop(0, 30), k.when(high.get() - low.get() > 1):
        middle = k.let(low.get() + k.div(high.get() - low.get(), 2))
        kept = mass(k, p, width, k.bits(middle, "float32"), counted=counted)
        with k.branches(kept >= enough) as (yes, no):
            with yes:
                low.set(middle)
                if counted:
                    with k.when(kept <= enough):
                        high.set(middle + 1)
            with no:
                high.set(middle)
    least.set(k.bits(low.get(), "float32"))


def draw(k: Emitter, p: Memory, width: Expr, least: Expr, goal: Expr) -> Expr:
    """The first token at which the sum of those kept exceeds `goal`; the last one kept if none does, which rounding
    can bring about. -1: nothing is kept."""
    T = k.T
    total, found, last = k.local("float32", k.f32(0.0)), k.local("int32", T.int32(-1)), k.local("int32", T.int32(-1))
    limit = k.let(k.splat(least))
    with k.loop(0, k.div(width, 16)) as i, k.when(found.get() < 0):
        v = p.load(16 * i)
        kept = k.sum_lanes(k.let(T.Select(v >= limit, v, k.splat(0.0))))
        # One by one only where the goal may lie.
        with k.when(kept > 0), k.branches(k.let(total.get() + kept) > goal) as (near, far):
            with near, k.loop(16 * i, 16 * i + 16) as j:
                one = k.let(p[j])
                with k.when(k.all(found.get() < 0, one >= least, one > 0)):
                    total.set(total.get() + one)
                    last.set(j)
                    with k.when(total.get() > goal):
                        found.set(j)
            with far:
                total.set(total.get() + kept)
                last.set(16 * i + 15)
    with k.when(k.all(found.get() < 0, last.get() >= 0)):
        begin = k.let(k.div(last.get(), 16) * 16)
        with k.loop(begin, begin + 16) as j:
            one = k.let(p[j])
            with k.when(k.all(one >= least, one > 0)):
                found.set(j)
    return found.get()


def sample(k: Emitter) -> None:
    """ids [tokens], from what `argmax` and `probabilities` wrote; every row's counter goes up."""
    T = k.T
    values, places, p = k.pointer("float32"), k.pointer("int32"), k.pointer("float32")
    params, params_stride, rng, rng_stride = k.pointer("float32"), k.integer(), k.pointer("uint32"), k.integer()
    ids, tokens, vocab, width, parts = k.pointer("int32"), k.integer(), k.integer(), k.integer(), k.integer()
    with k.share(tokens) as t:
        row = p.at(k.wide(t) * k.wide(width))
        settings, state = params.at(k.wide(t) * k.wide(params_stride)), rng.at(k.wide(t) * k.wide(rng_stride))
        temperature, top_k, top_p, min_p = (k.let(settings[i]) for i in range(4))
        seed, counter = k.let(state[0]), k.let(state[1])
        state[1] = counter + T.uint32(1)
        top, best = largest_part(k, values, places, t, parts)
        infinity = k.f32(float("inf"))
        chosen = k.local("int32", best)
        with k.when(k.all(temperature > 0, temperature < infinity, top < infinity, top > k.f32(float("-inf")))):
            least = k.local("float32", k.f32(0.0))
            with k.when(k.all(top_k >= k.f32(1.0), top_k < k.cast(vocab, "float32"))):
                raise_threshold(k, row, width, least, k.let(k.cast(top_k, "int32")), counted=True)
            with k.when(top_p < k.f32(1.0)):
                enough = k.let(top_p * mass(k, row, width, least.get()))
                raise_threshold(k, row, width, least, enough, counted=False)
            with k.when(min_p > 0):
                # The largest probability is exp(0) = 1, so that a threshold above 1 would keep nothing.
                least.set(k.max(least.get(), k.let(T.min(min_p, k.f32(1.0)))))
            u = k.let(k.cast(T.shift_right(philox(k, counter, seed), T.uint32(8)), "float32") * k.f32(2.0**-24))
            drawn = draw(k, row, width, least.get(), k.let(u * mass(k, row, width, least.get())))
            with k.when(drawn >= 0):
                chosen.set(drawn)
        ids[t] = chosen.get()


def _largest_parts(backend: TVMBackend, call: BoundCall) -> tuple[Launch, HostBuffer, HostBuffer, int]:
    """The first kernel of both ops, where it writes, and into how many parts a row is split."""
    x = call.tensors["x"]
    parts = 1 if x.shape[0] >= backend.threads else backend.threads
    values, places = (backend.scratch(f"argmax {name}", x.shape[0] * parts * 4) for name in ("values", "places"))
    arguments = (*place(x), values.address, places.address, *x.shape, parts)
    return backend.launch(spec(argmax), *arguments, held=(call, values, places)), values, places, parts


def _bind_argmax(backend: TVMBackend, call: BoundCall) -> list[Launch]:
    first, values, places, parts = _largest_parts(backend, call)
    ids = call.tensors["ids"]
    arguments = (values.address, places.address, address(ids), ids.shape[0], parts)
    return [first, backend.launch(spec(merge), *arguments, held=(call, values, places))]


def _bind_sample(backend: TVMBackend, call: BoundCall) -> list[Launch]:
    x, params, rng, ids = (call.tensors[name] for name in ("x", "params", "rng", "ids"))
    tokens, vocab = x.shape
    width = -(-vocab // STEP) * STEP
    first, values, places, parts = _largest_parts(backend, call)
    p = backend.scratch("probabilities", tokens * width * 4)
    where, sizes, held = (values.address, places.address, p.address), (tokens, vocab, width, parts), (call, values, p)
    return [
        first,
        backend.launch(spec(probabilities), *place(x), *place(params), *where, *sizes, held=(*held, places)),
        backend.launch(
            spec(sample), *where, *place(params), *place(rng), address(ids), *sizes, held=(*held, places)
        ),
    ]  # fmt: skip


def _numerics(backend: TVMBackend, signature: Signature) -> Numerics:
    """The walk through the kept tokens adds them up 16 at a time, and the last 16 one by one."""
    return Numerics("f32", signature.tensors["x"].shape[1] // 16 + 32, "f32", FUNCTION_ULP)


KERNELS = [
    OpKernel("argmax", lambda backend, signature: [spec(argmax), spec(merge)], _numerics, _bind_argmax),
    OpKernel(
        "sample", lambda backend, signature: [spec(sample), spec(argmax), spec(probabilities)], _numerics, _bind_sample
    ),
]
