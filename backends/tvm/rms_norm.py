"""rms_norm by itself: norms over the heads of q and k, and where no product follows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...kernels.op import Numerics, Signature
from ...kernels.spi import BoundCall
from .gemm import inverse_rms
from .launch import FUNCTION_ULP, Launch, OpKernel, address, place, spec

if TYPE_CHECKING:
    from . import TVMBackend
    from .emit import Emitter


def rms_norm(k: Emitter) -> None:
    """A share is a part of a row; each sums all of its row."""
    x, x_stride, weight, y, y_stride = (
        k.pointer("float32"), k.integer(), k.pointer("float32"), k.pointer("float32"), k.integer()
    )  # fmt: skip
    tokens, columns, parts, eps, weight_offset = k.integer(), k.integer(), k.integer(), k.real(), k.real()
    vectors = k.div(columns, 16)
    with k.share(tokens * parts) as item:
        t, part = k.div(item, parts), k.mod(item, parts)
        row, out = x.at(k.wide(t) * k.wide(x_stride)), y.at(k.wide(t) * k.wide(y_stride))
        factor = k.let(inverse_rms(k, row, columns, eps))
        with k.loop(k.div(vectors * part, parts), k.div(vectors * (part + 1), parts)) as i:
            scale = k.let(weight.load(16 * i) + k.splat(weight_offset))
            out.store(16 * i, k.let(row.load(16 * i) * k.splat(factor)) * scale)
        with k.when(part == parts - 1), k.loop(16 * vectors, columns) as i:
            out[i] = row[i] * factor * (weight[i] + weight_offset)


def _bind(backend: TVMBackend, call: BoundCall) -> list[Launch]:
    x, weight, y = (call.tensors[name] for name in ("x", "weight", "y"))
    parts = 1 if x.shape[0] >= backend.threads else backend.threads
    factors = float(call.attrs["eps"]), float(call.attrs["weight_offset"])
    return [
        backend.launch(spec(rms_norm), *place(x), address(weight), *place(y), *x.shape, parts, *factors, held=(call,))
    ]


def _numerics(backend: TVMBackend, signature: Signature) -> Numerics:
    """Four chains of 16 lanes, and up to 63 columns behind them one by one."""
    return Numerics("f32", signature.tensors["x"].shape[1] // 64 + 64 + 8, "f32", FUNCTION_ULP)


KERNELS = [OpKernel("rms_norm", lambda backend, signature: [spec(rms_norm)], _numerics, _bind)]
