"""gemm and the ops fused with it: norm before it, residual or GLU after it.

Two kernels a call. `prepare` turns rows of x into what dot products want, normalised if asked: int8 with a step for
each block of 32 (`fast`, quantised weights), else floats. `gemm` walks the tiles of the weight (formats.py); each
thread has a run of tiles, and every load of weights serves up to ROWS rows of x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ...kernels.op import Numerics, Signature
from ...kernels.quant import FORMATS, QuantFormat
from ...kernels.spi import BoundCall
from ..products import halves_of, weight_of
from . import amx
from .dot import dot, is_signed
from .emit import DEALT_ROWS
from .formats import (
    BLOCK,
    LEVELS,
    TILE_ROWS,
    Block,
    float_column,
    layout_of,
    memory_dtype,
    tile_bytes,
)
from .launch import FUNCTION_ULP, KernelSpec, Launch, OpKernel, address, place, spec
from .pointwise import activate
from .target import VNNI512

if TYPE_CHECKING:
    from . import TVMBackend
    from .emit import Emitter, Expr, Memory

# Rows of x per load of weights: 6 rows x 2 halves are 12 sums of integers and 12 of floats in AVX-512's 32 registers.
# Where 16 lanes take two registers or four there is room for 2; with 6, LLVM 22 needed 23 GB for NEON's sdot.
ROWS, ROWS_OF_SHORT_VECTORS = 6, 2

# A single row is rounded a second time, in steps this much finer. Its product mostly waits for memory, so the second
# dot product costs 5% of a decode step's products (bench/results/products-tvm.json), and mean |change of nll| per token
# on the golden text falls from 0.068 (rounded once, by steps) to 0.0012; llama.cpp's is 0.067.
LOW_STEPS = 254

# Bytes that a single row's product asks for ahead of time. The processors' own prefetching stops at a page of 4 KiB:
# all products of a decode step of SmolLM2-135M take 1.91 ms, without 2.94 (2 threads, bench/results/products-tvm.json).
AHEAD = 8192


def has_norm(signature: Signature) -> bool:
    return "weight" in signature.tensors


def is_int8(signature: Signature, fmt: QuantFormat) -> bool:
    return signature.attrs["precision"] == "fast" and not fmt.is_float


# Kernels


def prepare(k: Emitter, *, normed: bool, group: int, offset: int, summed: bool, fine: bool) -> None:
    """Rows of x [T, K], normalised if `normed`, as rows of `values` [T, K].

    group   columns per sum (32 or 16) for int8, 0: values stay floats
    summed  floats: `sums` [T, K / 32] holds the sum of each block, what a format's minimum is multiplied with
    offset  int8: `sums` [T, K / group] are int32, -offset * the sum of a group's integers, where dot products begin;
            -1: they are float32, step * sum, what a format's minimum is multiplied with. `steps` [T, K / 32]
    fine    int8: what rounding leaves goes into `lows`, int8 in steps of 1 / LOW_STEPS of a step, with `low_sums` like
            `sums` where these are int32 (else in `sums`)
    """
    x, x_stride = k.pointer("float32"), k.integer()
    weight, eps, weight_offset = k.pointer("float32"), k.real(), k.real()
    values = k.pointer("int8" if group else "float32")
    steps, sums = k.pointer("float32"), k.pointer("float32" if offset < 0 or summed else "int32")
    lows, low_sums = k.pointer("int8"), k.pointer("int32")
    tokens, columns, parts = k.integer(), k.integer(), k.integer()
    whole = k.let(k.div(columns, 2 * 16) * 2)  # vectors; a float format may have columns behind them
    with k.share(tokens * parts) as item:
        t, part = k.div(item, parts), k.mod(item, parts)
        row = x.at(k.wide(t) * k.wide(x_stride))
        out = values.at(k.wide(t) * k.wide(columns))
        factor = k.let(inverse_rms(k, row, columns, eps)) if normed else k.f32(1.0)

        def number(i: Expr, lanes: int) -> Expr:
            value = row.load(i, lanes) if lanes > 1 else row[i]
            if not normed:
                return k.let(value)
            scale = weight.load(i, lanes) if lanes > 1 else weight[i]
            splat = (lambda v: k.splat(v, lanes)) if lanes > 1 else (lambda v: v)
            return k.let(value * splat(factor) * (scale + splat(weight_offset)))

        blocks = k.div(whole, 2)
        with k.loop(k.div(blocks * part, parts), k.div(blocks * (part + 1), parts)) as b:
            halves = [number(b * BLOCK + 16 * h, 16) for h in range(2)]
            if not group:
                for h, half in enumerate(halves):
                    out.store(b * BLOCK + 16 * h, half)
                if summed:
                    sums[t * blocks + b] = k.sum_lanes(k.let(halves[0] + halves[1]))
            else:
                index = k.let(t * blocks + b)
                left = _round_block(k, halves, b, index, group, offset, out, steps, sums, fine)
                if fine:
                    small = lows.at(k.wide(t) * k.wide(columns))
                    _store_block(k, left, b, index, group, offset, small, low_sums)
        if not group:
            with k.when(part == parts - 1), k.loop(16 * whole, columns) as i:
                out[i] = number(i, 1)


def _round_block(
    k: Emitter, halves: list[Expr], b: Expr, index: Expr, group: int, offset: int, out: Memory, steps: Memory,
    sums: Memory, fine: bool,
) -> list[Expr]:  # fmt: skip
    """One block of 32 columns as int8 with its step and sums; what rounding left, in steps of 1 / LOW_STEPS.

    A NaN has no integer, and maxnum passes over it; an infinity makes the inverse 0. Both make the sum of the rounded
    floats NaN, and it the step, so that no finite number comes out. Numbers too small for an inverse count as zeros:
    the error bound allows 1e-30.
    """
    T = k.T
    largest = k.max_lanes(k.max(k.abs(halves[0]), k.abs(halves[1])))
    inverse = k.let(T.Select(largest > k.f32(1e-35), k.f32(float(LEVELS)) / largest, k.f32(0.0)))
    scaled = [k.let(half * k.splat(inverse)) for half in halves]
    rounded = [k.let(k.rint(value)) for value in scaled]
    left = [k.let(k.rint((v - r) * k.splat(float(LOW_STEPS)))) for v, r in zip(scaled, rounded, strict=True)]
    total = k.sum_lanes(k.let(rounded[0] + rounded[1]))
    # fma, because TVM itself makes 0 * total a 0.
    step = k.fma(total, k.f32(0.0), k.let(largest * k.f32(1.0 / LEVELS)))
    steps[index] = step
    _store_block(k, rounded, b, index, group, offset, out, sums)
    if offset < 0:
        if fine:
            total = k.fma(k.sum_lanes(k.let(left[0] + left[1])), k.f32(1.0 / LOW_STEPS), total)
        sums[index] = k.let(step * total)
    return left


def _store_block(
    k: Emitter, rounded: list[Expr], b: Expr, index: Expr, group: int, offset: int, out: Memory, sums: Memory
) -> None:
    """The integers of a block, and the sums where dot products begin."""
    T = k.T
    integers = [k.let(k.cast(r, "int32x16")) for r in rounded]
    for h, integer in enumerate(integers):
        out.store(b * BLOCK + 16 * h, k.cast(integer, "int8x16"))
    if offset < 0:
        return
    if group == BLOCK:
        sums[index] = k.sum_lanes(k.let(integers[0] + integers[1]), "int32") * T.int32(-offset)
    else:
        for h, integer in enumerate(integers):
            sums[2 * index + h] = k.sum_lanes(integer, "int32") * T.int32(-offset)


def inverse_rms(k: Emitter, row: Memory, columns: Expr, eps: Expr) -> Expr:
    """1 / sqrt(mean(row**2) + eps), summed in four chains of 16 lanes."""
    T = k.T
    squares = [k.local("float32x16", k.splat(0.0)) for _ in range(4)]
    with k.loop(0, k.div(columns, 64)) as i:
        for j, chain in enumerate(squares):
            v = row.load(64 * i + 16 * j)
            chain.set(k.fma(v, v, chain.get()))
    total = k.local(
        "float32", k.sum_lanes(k.let(squares[0].get() + squares[1].get() + (squares[2].get() + squares[3].get())))
    )
    with k.loop(k.div(columns, 64) * 64, columns) as i:
        total.set(k.fma(row[i], row[i], total.get()))
    return k.f32(1.0) / T.sqrt(total.get() / k.cast(columns, "float32") + eps)


def gemm(k: Emitter, *, fmt: str, int8: bool, fine: bool, rows: int, kind: str, add: bool, bias: bool) -> None:
    """y [T, N] from prepared rows and a packed weight, or from two of them (`kind` of GLU) tile by tile.

    `rows` rows of x share a load of weights; the last group repeats row T - 1 and stores it once. `fine`: as in
    `prepare`.
    """
    T = k.T
    weights = [k.pointer(memory_dtype(fmt)) for _ in range(2 if kind else 1)]
    scales = [k.pointer("float16") for _ in weights]  # the same addresses
    values, steps = k.pointer("int32" if int8 else "float32"), k.pointer("float32")
    sums = k.pointer("float32" if not int8 or layout_of(fmt).has_min else "int32")
    lows, low_sums = k.pointer("int32"), k.pointer("int32")
    y, y_stride, addend = k.pointer("float32"), k.integer(), k.pointer("float32")
    tokens, features, columns, size = (k.integer() for _ in range(4))
    small = (lows, low_sums) if fine else None
    tiles = k.div(features + (TILE_ROWS - 1), TILE_ROWS)
    multiply = _int8_rows if int8 else _float_rows if FORMATS[fmt].is_float else _exact_rows
    with k.share(tiles) as tile:
        start = k.wide(tile) * k.wide(size)
        unit = 2 if memory_dtype(fmt) in ("float16", "uint16") else 4 if fmt == "F32" else 1
        parts = [
            (w.at(k.div(start, T.int64(unit))), h.at(k.div(start, T.int64(2))))
            for w, h in zip(weights, scales, strict=True)
        ]
        with k.loop(0, k.div(tokens + (rows - 1), rows)) as group:
            which = [k.let(T.min(group * rows + r, tokens - 1)) for r in range(rows)]
            found = [multiply(k, fmt, w, h, values, steps, sums, columns, which, small) for w, h in parts]
            for r in range(rows):
                pair = found[0][r]
                if kind:
                    pair = [k.let(activate(k, kind, g) * u) for g, u in zip(pair, found[1][r], strict=True)]
                with k.when(group * rows + r < tokens):
                    out = y.at(k.wide(which[r]) * k.wide(y_stride))
                    _store(k, pair, out, addend, tile * TILE_ROWS, features, add, bias)


Rows = list[list["Expr"]]  # [row of x][half of the tile] -> float32x16


def _int8_rows(
    k: Emitter, fmt: str, w: Memory, heads: Memory, values: Memory, steps: Memory, sums: Memory, columns: Expr,
    which: list[Expr], small: tuple[Memory, Memory] | None,
) -> Rows:  # fmt: skip
    """Integer dot products over blocks of 32, exact within a group, then scaled into float sums."""
    layout, T = layout_of(fmt), k.T
    signed = is_signed(k, layout.bits)
    totals = [[k.local("float32x16", k.splat(0.0)) for _ in range(2)] for _ in which]
    blocks = k.div(columns, BLOCK)
    groups = BLOCK // layout.group

    def super_block(s: Expr) -> None:
        base = k.let(s * layout.super_bytes)
        with k.loop(0, layout.blocks) if layout.blocks > 1 else _once() as number:
            b = s * layout.blocks + number if layout.blocks > 1 else s
            words = [k.let((t * blocks + b) * 8) for t in which]
            if len(which) == 1:
                for line in range(0, layout.block_bytes + layout.head_bytes // layout.blocks, 64):
                    w.prefetch(base + (number * layout.block_bytes if layout.blocks > 1 else 0) + line + AHEAD)
            for half in range(2):
                block = Block(k, fmt, w, heads, base, number if layout.blocks > 1 else T.int32(0), half)
                vectors = block.vectors()
                scales = [block.scale(g) for g in range(groups)]
                minimum = block.minimum() if layout.has_min else None
                for r, t in enumerate(which):
                    index = t * blocks + b
                    step = k.let(k.splat(steps[index]))
                    value = totals[r][half].get()
                    for g in range(groups):
                        zero = layout.has_min or signed or not layout.offset
                        chosen = range(8) if groups == 1 else range(4 * g, 4 * g + 4)

                        def product(x: Memory, begins: Memory) -> Expr:
                            begin = T.int32(0) if zero else begins[index * groups + g]  # noqa: B023 - called at once
                            # Two chains where one row is all there is: a dot product takes 5 cycles, two start in each.
                            chains = [k.let(k.splat(begin)), k.let(k.splat(T.int32(0)))]
                            for j in chosen:  # noqa: B023
                                chain = j % 2 if len(which) == 1 else 0
                                word = k.splat(x[words[r] + j])  # noqa: B023
                                chains[chain] = dot(k, chains[chain], vectors[j], word, layout.bits)  # noqa: B023
                            return k.floats(chains[0] + chains[1] if len(which) == 1 else chains[0])

                        total = product(values, sums)
                        if small:
                            total = k.fma(product(*small), k.splat(1.0 / LOW_STEPS), total)
                        value = k.fma(total, k.let(scales[g] * step), value)
                    if minimum is not None:
                        value = k.fma(minimum, k.splat(sums[index]), value)
                    totals[r][half].set(value)

    with k.loop(0, k.div(blocks, layout.blocks)) as s:
        super_block(s)
    return [[half.get() for half in row] for row in totals]


class _once:
    """`with _once() as number:` the body, without a loop."""

    def __enter__(self) -> Expr:
        return None

    def __exit__(self, *_: object) -> None:
        pass


def _exact_rows(
    k: Emitter, fmt: str, w: Memory, heads: Memory, values: Memory, steps: Memory, sums: Memory, columns: Expr,
    which: list[Expr], small: tuple[Memory, Memory] | None,
) -> Rows:  # fmt: skip
    """Float activations: quants become floats in registers, without their scale until a group is summed."""
    layout, T = layout_of(fmt), k.T
    totals = [[k.local("float32x16", k.splat(0.0)) for _ in range(2)] for _ in which]
    with k.loop(0, k.div(columns, BLOCK * layout.blocks)) as s, k.loop(0, layout.blocks) as number:
        base = k.let(s * layout.super_bytes)
        column = k.let((s * layout.blocks + number) * BLOCK)
        starts = [k.let(k.wide(t) * k.wide(columns) + k.wide(column)) for t in which]
        for half in range(2):
            block = Block(k, fmt, w, heads, base, number, half)
            vectors = [k.let(k.bits(v, "int32x16")) for v in block.vectors()]
            for g in range(BLOCK // layout.group):
                products: list[Expr] = [k.splat(0.0) for _ in which]
                for j in range(8) if layout.group == BLOCK else range(4 * g, 4 * g + 4):
                    for i in range(4):
                        quant = T.bitwise_and(T.shift_right(vectors[j], k.splat(T.int32(8 * i))), k.splat(T.int32(255)))
                        number_ = k.floats(quant - k.splat(T.int32(layout.offset)))
                        for r in range(len(which)):
                            x = k.splat(values[starts[r] + T.int64(4 * j + i)])
                            products[r] = k.fma(number_, x, products[r])
                scale = block.scale(g)
                for r in range(len(which)):
                    totals[r][half].set(k.fma(products[r], scale, totals[r][half].get()))
            if layout.has_min:
                minimum = block.minimum()
                for r, t in enumerate(which):
                    total = k.splat(sums[t * k.div(columns, BLOCK) + k.div(column, BLOCK)])
                    totals[r][half].set(k.fma(minimum, total, totals[r][half].get()))
    return [[half.get() for half in row] for row in totals]


def _float_rows(
    k: Emitter, fmt: str, w: Memory, heads: Memory, values: Memory, steps: Memory, sums: Memory, columns: Expr,
    which: list[Expr], small: tuple[Memory, Memory] | None,
) -> Rows:  # fmt: skip
    """Weights without blocks. One row has two sums per half: one FMA chain would wait for itself."""
    chains = 2 if len(which) == 1 else 1
    totals = [[[k.local("float32x16", k.splat(0.0)) for _ in range(chains)] for _ in range(2)] for _ in which]
    starts = [k.let(k.wide(t) * k.wide(columns)) for t in which]

    def column(c: Expr, chain: int) -> None:
        for half in range(2):
            weight = float_column(k, fmt, w, c * TILE_ROWS, half)
            for r in range(len(which)):
                total = totals[r][half][chain]
                total.set(k.fma(weight, k.splat(values[starts[r] + k.wide(c)]), total.get()))

    with k.loop(0, k.div(columns, chains)) as i:
        for chain in range(chains):
            column(i * chains + chain, chain)
    if chains > 1:
        with k.loop(k.div(columns, chains) * chains, columns) as c:
            column(c, 0)
    return [[half[0].get() if chains == 1 else k.let(half[0].get() + half[1].get()) for half in r] for r in totals]


def _store(
    k: Emitter, pair: list[Expr], out: Memory, addend: Memory, first: Expr, features: Expr, add: bool, bias: bool
) -> None:
    """Add bias and y where asked, store what lies inside N."""
    for half, value in enumerate(pair):
        start = k.let(first + 16 * half)
        with k.branches(start + 16 <= features) as (inside, edge):
            with inside:
                whole = value
                if bias:
                    whole = k.let(whole + addend.load(start))
                if add:
                    whole = k.let(whole + out.load(start))
                out.store(start, whole)
            with edge:
                lanes = k.spill(value)
                with k.loop(0, features - start) as i:
                    one = k.local("float32", lanes[i])
                    if bias:
                        one.set(one.get() + addend[start + i])
                    if add:
                        one.set(one.get() + out[start + i])
                    out[start + i] = one.get()


def prepare_bf16(k: Emitter, *, normed: bool) -> None:
    """Rows of x [T, K], normalised if `normed`, as bfloat16 (amx.py). K is whole blocks of 32."""
    x, x_stride = k.pointer("float32"), k.integer()
    weight, eps, weight_offset = k.pointer("float32"), k.real(), k.real()
    values, tokens, columns = k.pointer("uint16"), k.integer(), k.integer()
    with k.dealt(tokens, k.rows_at_once(tokens)) as t:
        row, out = x.at(k.wide(t) * k.wide(x_stride)), values.at(amx.place_of(k, t, columns))
        factor = k.splat(inverse_rms(k, row, columns, eps)) if normed else None
        with k.loop(0, k.div(columns, BLOCK)) as b:
            halves = [row.load(b * BLOCK + 16 * i) for i in range(2)]
            if factor is not None:
                scales = [weight.load(b * BLOCK + 16 * i) + k.splat(weight_offset) for i in range(2)]
                halves = [k.let(half * factor * scale) for half, scale in zip(halves, scales, strict=True)]
            for i, half in enumerate(halves):
                upper = k.T.shift_right(amx.to_bf16(k, half), k.splat(k.T.uint32(16)))
                out.store(b * 16 * BLOCK + 16 * i, k.cast(upper, "uint16x16"))


def gemm_bf16(k: Emitter, *, fmt: str, kind: str, add: bool, bias: bool) -> None:
    """`gemm` on AMX tiles. A panel is 32 rows of the weight, of gate and up 16 each, or a slice of their columns. Some
    panels are unpacked, then all rows of x go past them, 32 at a time, while the rows before are stored.
    """
    T = k.T
    weights = [k.pointer(memory_dtype(fmt)) for _ in range(2 if kind else 1)]
    scales = [k.pointer("float16") for _ in weights]
    values, room, room_bytes = k.pointer("uint16"), k.pointer("uint32"), k.integer()
    y, y_stride, addend = k.pointer("float32"), k.integer(), k.pointer("float32")
    tokens, features, columns, size, row_parts = (k.integer() for _ in range(5))
    amx.configure(k)
    room = room.at(k.wide(k.worker) * k.wide(k.div(room_bytes, 4)))
    blocks = k.div(columns, BLOCK)
    slices = k.div(columns + (amx.SLICE - 1), amx.SLICE)
    most = k.let(k.div(blocks + slices - 1, slices))
    panel_size = k.let(most * (BLOCK * TILE_ROWS // 2))
    all_sums = room.at(amx.PANELS * panel_size).as_dtype("float32")
    groups = k.div(tokens + (amx.GROUP_ROWS - 1), amx.GROUP_ROWS)
    at_once = k.let(T.Select(row_parts > 1, T.int32(DEALT_ROWS // amx.GROUP_ROWS), groups))
    halves = 2 if kind else 1  # panels of a tile

    row_part, column_part, column_parts = (
        k.mod(k.worker, row_parts), k.div(k.worker, row_parts), k.div(k.workers, row_parts)
    )  # fmt: skip
    begin, end = k.part(k.div(features + (TILE_ROWS - 1), TILE_ROWS), column_part, column_parts)
    with k.loop(0, k.div((end - begin) * halves + (amx.PANELS - 1), amx.PANELS)) as number:
        tile = k.let(begin + number * (amx.PANELS // halves))
        panels = k.let(T.min((end - tile) * halves, amx.PANELS))
        with k.loop(0, slices) as part:
            first = k.let(part * most)
            count = k.let(T.min(most, blocks - first))
            with k.loop(0, panels) as panel:
                start = k.let(k.wide(tile + k.div(panel, halves)) * k.wide(size))
                tiles = [
                    (w.at(k.div(start, T.int64(2 if fmt == "BF16" else 1))), h.at(k.div(start, T.int64(2))))
                    for w, h in zip(weights, scales, strict=True)
                ]
                sides = [k.mod(panel, 2)] * 2 if kind else [0, 1]
                pair = [amx.Half(*tiles[0], sides[0]), amx.Half(*tiles[-1], sides[1])]
                amx.unpack(k, fmt, pair, first, count, room, k.let(panel * panel_size))

            def store(
                group: Expr, panel: Expr, place: Expr, start: Expr, stop: Expr, tile: Expr = tile
            ) -> None:  # fmt: skip
                """Rows start .. stop - 1 of a group, whose sums are at `place`."""
                sums, row = all_sums.at(place), k.let(group * amx.GROUP_ROWS)
                feature = k.let(tile * TILE_ROWS + panel * (TILE_ROWS // halves))
                with k.loop(start, T.min(stop, tokens - row)) as r:
                    found = amx.sums_of(k, sums, r)
                    if kind:
                        found = [k.let(activate(k, kind, found[0]) * found[1])]
                    out = y.at(k.wide(row + r) * k.wide(y_stride))
                    _store(k, found, out, addend, feature, features, add, bias)

            before, before_panel, before_sums = (k.local("int32", T.int32(n)) for n in (-1, 0, 0))
            ending = k.let(k.cast(part == slices - 1, "int32") * amx.GROUP_ROWS)
            with k.dealt(groups, at_once, row_part, row_parts) as group, k.loop(0, panels) as panel:
                due = k.let(T.Select(before.get() >= 0, ending, 0))
                held = [before.get(), before_panel.get(), before_sums.get()]

                def store_some(
                    b: Expr, held: list[Expr] = held, due: Expr = due, count: Expr = count,
                    store: Callable[..., None] = store,
                ) -> None:  # fmt: skip
                    store(*held, k.div(due * b, count), k.div(due * (b + 1), count))

                # Two take turns, unless all have to wait for the next slice.
                own = T.Select(slices > 1, group * amx.PANELS + panel, T.Select(held[2] > 0, 0, 1))
                own = k.let(own * (amx.SUMS_BYTES // 4))
                place = k.let(panel * panel_size)
                amx.multiply(
                    k, values, group, columns, first, count, room, place, all_sums.at(own), part == 0, store_some
                )
                before.set(group)
                before_panel.set(panel)
                before_sums.set(own)
            with k.when(before.get() >= 0):
                store(before.get(), before_panel.get(), before_sums.get(), T.int32(0), ending)
    amx.release(k)


# From calls to kernels


def is_bf16(backend: TVMBackend, signature: Signature) -> bool:
    """Whether the call goes through AMX tiles, activations and weights rounded to bfloat16."""
    fmt, _, columns = weight_of(signature)
    rows = signature.tensors["x"].shape[0]
    return backend.target.amx and signature.attrs["precision"] == "fast" and amx.takes(fmt.name, columns, rows)


def _bf16_specs(signature: Signature) -> tuple[KernelSpec, KernelSpec]:
    product = spec(
        gemm_bf16, fmt=weight_of(signature)[0].name, kind=signature.attrs.get("kind", ""),
        add=signature.op == "gemm_add", bias="bias" in signature.tensors,
    )  # fmt: skip
    return product, spec(prepare_bf16, normed=has_norm(signature))


def rows_of(backend: TVMBackend) -> int:
    return ROWS if backend.target.dot == VNNI512 else ROWS_OF_SHORT_VECTORS


def is_fine(signature: Signature) -> bool:
    return signature.tensors["x"].shape[0] == 1


def _prepare_spec(signature: Signature, int8: bool, fmt: QuantFormat) -> KernelSpec:
    if not int8:
        summed = not fmt.is_float and layout_of(fmt.name).has_min
        return spec(prepare, normed=has_norm(signature), group=0, offset=0, summed=summed, fine=False)
    layout = layout_of(fmt.name)
    offset = -1 if layout.has_min else layout.offset
    return spec(
        prepare, normed=has_norm(signature), group=layout.group, offset=offset, summed=False,
        fine=is_fine(signature),
    )  # fmt: skip


def _gemm_spec(backend: TVMBackend, signature: Signature, fmt: QuantFormat, kind: str, tokens: int) -> KernelSpec:
    int8, rows = is_int8(signature, fmt), 1 if tokens == 1 else rows_of(backend)
    return spec(
        gemm, fmt=fmt.name, int8=int8, fine=int8 and is_fine(signature), rows=rows, kind=kind,
        add=signature.op == "gemm_add", bias="bias" in signature.tensors,
    )  # fmt: skip


def kernels(backend: TVMBackend, signature: Signature) -> Sequence[KernelSpec]:
    from .pointwise import glu

    halves = halves_of(signature)
    if halves:
        return [s for half in halves for s in kernels(backend, half)] + [spec(glu, kind=signature.attrs["kind"])]
    if is_bf16(backend, signature):
        return _bf16_specs(signature)
    fmt = weight_of(signature)[0]
    kind, tokens = signature.attrs.get("kind", ""), signature.tensors["x"].shape[0]
    return [
        _gemm_spec(backend, signature, fmt, kind, tokens),
        _prepare_spec(signature, is_int8(signature, fmt), fmt),
    ]


def numerics(backend: TVMBackend, signature: Signature) -> Numerics:
    halves = [numerics(backend, half) for half in halves_of(signature)]
    if halves:
        return max(halves, key=lambda half: (half.activations == "int8", half.activations == "bf16", half.depth))
    fmt, _, k = weight_of(signature)
    norm = k // 64 + 64 + 8 if has_norm(signature) else 0
    if is_bf16(backend, signature):
        return Numerics("f32", max(norm, k + 2), "bf16", FUNCTION_ULP)
    levels = LEVELS * LOW_STEPS if is_fine(signature) else LEVELS
    if is_int8(signature, fmt):  # sums of a group are exact integers; two additions per group
        return Numerics("f32", max(norm, 2 * k // fmt.group_length + 8), "int8", FUNCTION_ULP, levels)
    chain = k + 2 if fmt.is_float else fmt.group_length + 2 * k // fmt.group_length + 8
    return Numerics("f32", max(norm, chain), "f32", FUNCTION_ULP)


def bind(backend: TVMBackend, call: BoundCall) -> list[Launch]:
    from .pointwise import bind_halves

    signature = call.signature
    if halves_of(signature):
        return bind_halves(backend, call, halves_of(signature), bind)
    fmt, n, columns = weight_of(signature)
    int8, kind = is_int8(signature, fmt), call.attrs.get("kind", "")
    x, y = call.tensors["x"], call.tensors["y"]
    if is_bf16(backend, signature):
        return _bind_bf16(backend, call)
    tokens = x.shape[0]
    values = backend.scratch("values", tokens * columns * (1 if int8 else 4))
    steps = backend.scratch("steps", tokens * (columns // BLOCK) * 4)
    sums = backend.scratch("sums", tokens * (columns // BLOCK) * 8)
    lows = backend.scratch("lows", tokens * columns)
    low_sums = backend.scratch("low_sums", tokens * (columns // BLOCK) * 8)
    rounded = (values.address, steps.address, sums.address, lows.address, low_sums.address)
    held = (call, values, steps, sums, lows, low_sums)
    norm = call.tensors.get("weight")
    parts = 1 if tokens >= backend.threads else backend.threads
    first = backend.launch(
        _prepare_spec(signature, int8, fmt), *place(x), address(norm) if norm else 0,
        float(call.attrs.get("eps", 0.0)), float(call.attrs.get("weight_offset", 0.0)), *rounded, tokens,
        columns, parts, held=held,
    )  # fmt: skip
    names = ("w_gate", "w_up") if kind else ("w",)
    weights = [call.tensors[name].buffer.address for name in names]
    bias = call.tensors.get("bias")
    second = backend.launch(
        _gemm_spec(backend, signature, fmt, kind, tokens), *weights, *weights, *rounded, *place(y),
        address(bias) if bias else 0, tokens, n, columns, tile_bytes(fmt, columns), held=held,
    )  # fmt: skip
    return [first, second]


def _bind_bf16(backend: TVMBackend, call: BoundCall) -> list[Launch]:
    product, first = _bf16_specs(call.signature)
    fmt, n, columns = weight_of(call.signature)
    x, y, norm, bias = (call.tensors.get(name) for name in ("x", "y", "weight", "bias"))
    assert x is not None
    assert y is not None
    names = ("w_gate", "w_up") if call.attrs.get("kind") else ("w",)
    # Rows behind the last are multiplied too, whatever they hold, and not stored.
    values = backend.scratch("bf16", amx.padded(x.shape[0]) * columns * 2)
    own = amx.room_bytes(columns, x.shape[0])
    room = backend.scratch("panels", own * backend.threads)
    weights = [call.tensors[name].buffer.address for name in names]
    numbers = (float(call.attrs.get("eps", 0.0)), float(call.attrs.get("weight_offset", 0.0)))
    return [
        backend.launch(
            first, *place(x), address(norm) if norm else 0, *numbers, values.address, x.shape[0], columns,
            held=(call, values),
        ),
        backend.launch(
            product, *weights, *weights, values.address, room.address, own, *place(y), address(bias) if bias else 0,
            x.shape[0], n, columns, tile_bytes(fmt, columns), amx.row_parts(x.shape[0], backend.threads),
            held=(call, values, room),
        ),
    ]  # fmt: skip


KERNELS = [OpKernel(op, kernels, numerics, bind) for op in ("gemm", "rms_norm_gemm", "gemm_add", "rms_norm_gemm_glu")]
