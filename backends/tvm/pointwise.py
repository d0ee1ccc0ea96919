"""Ops on number by number: glu, add, softcap, advance. Rows are shared out among threads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from ...kernels.op import Numerics, Signature
from ...kernels.spi import BoundCall, DeviceTensor
from .launch import FUNCTION_ULP, Launch, OpKernel, address, place, spec

if TYPE_CHECKING:
    from . import TVMBackend
    from .emit import Emitter, Expr

LOG2E = math.log2(math.e)
# Columns of a share: long enough to be worth a loop of its own, short enough that one row has some for each thread.
PART = 256


def activate(k: Emitter, kind: str, g: Expr) -> Expr:
    """The activation of GLU on float32x16."""
    if kind == "silu":
        T, most = k.T, k.splat(126.0)
        power = k.let(g * k.splat(-LOG2E))
        share = k.reciprocal(k.let(k.splat(1.0) + k.exp2(k.let(T.Select(power > most, most, power)))))
        # Beyond, the product is below the error bound's 1e-30; and -infinity times 0 is NaN, as it should be.
        return k.let(g * k.let(T.Select(power > most, k.splat(0.0), share)))
    if kind == "gelu_tanh":
        inner = k.let(k.splat(0.7978845608028654) * g * k.fma(k.let(k.splat(0.044715) * g), g, k.splat(1.0)))
        return k.let(k.splat(0.5) * g * (k.splat(1.0) + by_lane(k, "tanhf", inner)))
    inner = k.let(g * k.splat(0.7071067811865476))
    return k.let(k.splat(0.5) * g * (k.splat(1.0) + by_lane(k, "erff", inner)))


def by_lane(k: Emitter, name: str, v: Expr) -> Expr:
    """A function of the C library on each lane."""
    return k.vector([k.libm(name, k.lane(v, i)) for i in range(16)])


def _each(k: Emitter, tokens: Expr, features: Expr, body: Callable[[Expr, Expr, int], None]) -> None:
    """`body(row, column, lanes)` over all elements, 16 at a time and one by one at the end of a row."""
    parts = k.div(features + (PART - 1), PART)
    with k.share(tokens * parts) as item:
        t, first = k.div(item, parts), k.let(k.mod(item, parts) * PART)
        stop = k.let(k.T.min(first + PART, features))
        whole = k.div(stop - first, 16)
        with k.loop(0, whole) as i:
            body(t, first + 16 * i, 16)
        with k.loop(first + 16 * whole, stop) as i:
            body(t, i, 1)


def glu(k: Emitter, *, kind: str) -> None:
    gate, gate_stride = k.pointer("float32"), k.integer()
    up, up_stride = k.pointer("float32"), k.integer()
    y, y_stride = k.pointer("float32"), k.integer()
    tokens, features = k.integer(), k.integer()

    def body(t: Expr, i: Expr, lanes: int) -> None:
        rows = [m.at(k.wide(t) * k.wide(s)) for m, s in ((gate, gate_stride), (up, up_stride), (y, y_stride))]
        if lanes > 1:
            rows[2].store(i, k.let(activate(k, kind, rows[0].load(i)) * rows[1].load(i)))
        else:
            g = k.let(k.splat(rows[0][i]))
            rows[2][i] = k.let(k.lane(activate(k, kind, g), 0) * rows[1][i])

    _each(k, tokens, features, body)


def add(k: Emitter) -> None:
    x, x_stride, y, y_stride = k.pointer("float32"), k.integer(), k.pointer("float32"), k.integer()
    tokens, features = k.integer(), k.integer()

    def body(t: Expr, i: Expr, lanes: int) -> None:
        sums, addend = x.at(k.wide(t) * k.wide(x_stride)), y.at(k.wide(t) * k.wide(y_stride))
        if lanes > 1:
            sums.store(i, sums.load(i) + addend.load(i))
        else:
            sums[i] = sums[i] + addend[i]

    _each(k, tokens, features, body)


def softcap(k: Emitter) -> None:
    x, x_stride, tokens, features, cap = k.pointer("float32"), k.integer(), k.integer(), k.integer(), k.real()

    def body(t: Expr, i: Expr, lanes: int) -> None:
        row = x.at(k.wide(t) * k.wide(x_stride))
        if lanes > 1:
            wide = k.splat(cap)
            row.store(i, wide * by_lane(k, "tanhf", k.let(row.load(i) / wide)))
        else:
            row[i] = cap * k.libm("tanhf", row[i] / cap)

    _each(k, tokens, features, body)


def advance(k: Emitter) -> None:
    positions, seq_ids, tokens = k.pointer("int32"), k.pointer("int32"), k.integer()
    with k.share(tokens) as t, k.when(seq_ids[t] >= 0):
        positions[t] = positions[t] + 1


def _numerics(backend: TVMBackend, signature: Signature) -> Numerics:
    return Numerics("f32", 2, "f32", FUNCTION_ULP)


def _bind_glu(backend: TVMBackend, call: BoundCall) -> list[Launch]:
    tensors = [call.tensors[name] for name in ("gate", "up", "y")]
    places = [value for tensor in tensors for value in place(tensor)]
    return [backend.launch(spec(glu, kind=call.attrs["kind"]), *places, *tensors[0].shape, held=(call,))]


def bind_halves(
    backend: TVMBackend, call: BoundCall, halves: list[Signature],
    bind: Callable[[TVMBackend, BoundCall], list[Launch]],
) -> list[Launch]:  # fmt: skip
    """Gate and up by themselves, then GLU: where their formats differ."""
    y, launches, outputs = call.tensors["y"], list[Launch](), list[DeviceTensor]()
    for half, name in zip(halves, ("w_gate", "w_up"), strict=True):
        rows, n = y.shape
        out = DeviceTensor(backend.scratch(name, rows * n * 4), y.shape, y.dtype, 0, n)
        tensors = {"x": call.tensors["x"], "weight": call.tensors["weight"], "w": call.tensors[name], "y": out}
        launches += bind(backend, BoundCall(half.op, tensors, half.attrs, call.label))
        outputs.append(out)
    joined = {"gate": outputs[0], "up": outputs[1], "y": y}
    return launches + _bind_glu(backend, BoundCall("glu", joined, {"kind": call.attrs["kind"]}, call.label))


def _bind_add(backend: TVMBackend, call: BoundCall) -> list[Launch]:
    x, y = call.tensors["x"], call.tensors["y"]
    return [backend.launch(spec(add), *place(x), *place(y), *x.shape, held=(call,))]


def _bind_softcap(backend: TVMBackend, call: BoundCall) -> list[Launch]:
    x = call.tensors["x"]
    return [backend.launch(spec(softcap), *place(x), *x.shape, float(call.attrs["cap"]), held=(call,))]


def _bind_advance(backend: TVMBackend, call: BoundCall) -> list[Launch]:
    positions, seq_ids = call.tensors["positions"], call.tensors["seq_ids"]
    arguments = (address(positions), address(seq_ids), *positions.shape)
    return [backend.launch(spec(advance), *arguments, held=(call,))]


KERNELS = [
    OpKernel("glu", lambda b, s: [spec(glu, kind=s.attrs["kind"])], _numerics, _bind_glu),
    OpKernel("add", lambda b, s: [spec(add)], _numerics, _bind_add),
    OpKernel("softcap", lambda b, s: [spec(softcap)], _numerics, _bind_softcap),
    OpKernel("advance", lambda b, s: [spec(advance)], _numerics, _bind_advance),
]
