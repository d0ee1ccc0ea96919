"""The most operations a second that this CPU can do: the instructions of gemm.py and amx.py on registers alone.

What a kernel waits for besides its arithmetic (memory, scales, conversions) is left out, so that `pytest bench` can
hold int8 kernels against int8 dot products and bfloat16 kernels against tiles.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from . import amx
from .dot import BYTES, dot
from .emit import LANES
from .launch import HostBuffer, KernelSpec, Launches, spec
from .target import VNNI512

if TYPE_CHECKING:
    from . import TVMBackend
    from .emit import Emitter

WORDS = 64  # activations of a round of `dots`, in the first-level cache
LEAST_S = 3e-3  # of one timing: starting the threads takes some us
REPEATS = 7

DOT_OPS, FMA_OPS, TILE_OPS = 2 * BYTES, 2 * LANES, 2 * 16 * 16 * 32
SOURCE_BYTES, SINK_BYTES = 4096, 4096  # what a kernel reads, and what each thread writes


def dots(k: Emitter, *, chains: int) -> None:
    """Int8 dot products. Each has weights and a sum of its own and all share a word, which changes: of equal products
    LLVM would compute one, where a dot product is more than one instruction."""
    source, sink, rounds = k.pointer("int8"), k.pointer("int32"), k.integer()
    words = source.as_dtype("int32")
    weights = [source.load(BYTES * c, BYTES) for c in range(chains)]
    sums = [k.local(f"int32x{LANES}", k.splat(k.T.int32(0))) for _ in range(chains)]
    with k.loop(0, rounds), k.loop(0, WORDS) as i:
        word = k.let(k.splat(words[i]))
        for w, total in zip(weights, sums, strict=True):
            total.set(dot(k, total.get(), w, word, 4))
    for c, total in enumerate(sums):
        sink.store(k.worker * (SINK_BYTES // 4) + LANES * c, total.get())


def fmas(k: Emitter, *, chains: int) -> None:
    """s = s * a + b of float32, in independent chains."""
    source, sink, rounds = k.pointer("float32"), k.pointer("float32"), k.integer()
    a, b = source.load(0), source.load(LANES)
    sums = [k.local(f"float32x{LANES}", source.load(LANES * c)) for c in range(chains)]
    with k.loop(0, rounds), k.loop(0, WORDS):
        for total in sums:
            total.set(k.fma(total.get(), a, b))
    for c, total in enumerate(sums):
        sink.store(k.worker * (SINK_BYTES // 4) + LANES * c, total.get())


def tiles(k: Emitter) -> None:
    """AMX products of bfloat16, in the four sums of `amx.multiply`."""
    T = k.T
    source, sink, rounds = k.pointer("uint32"), k.pointer("float32"), k.integer()
    amx.configure(k)
    for tile in range(4):
        amx.call(k, "tilezero", T.int8(tile))
        amx.call(k, "tileloadd64", T.int8(4 + tile), T.address_of(source[256 * tile]), T.int64(64))
    with k.loop(0, rounds), k.loop(0, WORDS):
        for i in range(2):
            for half in range(2):
                amx.call(k, "tdpbf16ps", T.int8(2 * i + half), T.int8(4 + i), T.int8(6 + half))
    own = sink.at(k.worker * (SINK_BYTES // 4))
    for tile in range(4):
        amx.call(k, "tilestored64", T.int8(tile), T.address_of(own[256 * tile]), T.int64(64))
    amx.release(k)


def measure(backend: TVMBackend) -> dict[str, float]:
    """Gop/s on all threads by unit, a multiply-add counting as two: "int8", "f32", and "bf16" where there are tiles."""
    # A dot product or an fma takes 4 or 5 cycles and two start in each: 10 chains at least, of vectors as long as the
    # CPU's. AVX-512 has 32 registers for them and their operands; half as long, each of ours is two of the CPU's.
    chains = 12 if backend.target.dot == VNNI512 else 6
    random = np.random.default_rng(1)
    source, sink = (backend.scratch(f"peak {n}", SINK_BYTES * backend.threads) for n in ("source", "sink"))

    def timed(kernel: KernelSpec, data: np.ndarray, ops: int) -> float:
        source.array[:SOURCE_BYTES] = data.view(np.uint8)[:SOURCE_BYTES]
        return _best(backend, kernel, source, sink, ops * WORDS * backend.threads)

    floats = random.uniform(0.1, 0.9, SOURCE_BYTES // 4).astype(np.float32)
    found = {
        "int8": timed(spec(dots, chains=chains), random.integers(0, 16, SOURCE_BYTES, np.uint8), DOT_OPS * chains),
        "f32": timed(spec(fmas, chains=chains), floats, FMA_OPS * chains),
    }
    if backend.target.amx:
        upper = (random.uniform(-1, 1, SOURCE_BYTES // 2).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        found["bf16"] = timed(spec(tiles), upper, 4 * TILE_OPS)
    return found


def _best(backend: TVMBackend, kernel: KernelSpec, source: HostBuffer, sink: HostBuffer, ops: int) -> float:
    """Gop/s of the fastest of REPEATS runs; `ops` are those of one round on all threads."""

    def seconds(rounds: int) -> float:
        launch = backend.launch(kernel, source.address, sink.address, rounds, held=(source, sink))
        run = backend.capture([Launches((launch,))])
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    seconds(1)
    rounds = 16
    while seconds(rounds) < LEAST_S:
        rounds *= 2
    return ops * rounds / min(seconds(rounds) for _ in range(REPEATS)) / 1e9
