"""embedding, dequantize and gather: rows of a packed weight or of a matrix as float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...kernels.op import Numerics, Signature
from ...kernels.quant import FORMATS
from ...kernels.spi import BoundCall
from .formats import BLOCK, TILE_ROWS, layout_of, memory_dtype, row_block, row_element, tile_bytes
from .launch import KernelSpec, Launch, OpKernel, address, place, spec

if TYPE_CHECKING:
    from . import TVMBackend
    from .emit import Emitter, Expr, Memory

# Columns of a share: long enough that a chunk is worth a loop, short enough that a row has some for each thread.
PART = 256


class _Packed:
    """Rows of a packed weight, as a kernel reads them: 32 columns at a time, or one by one where it holds floats."""

    def __init__(self, k: Emitter, fmt: str) -> None:
        self.k, self.fmt = k, fmt
        self.w, self.heads, self.words = k.pointer(memory_dtype(fmt)), k.pointer("float16"), k.pointer("uint32")
        self.rows, self.columns, self.size = k.integer(), k.integer(), k.integer()

    def parts(self) -> Expr:
        """In how many parts of 32 columns a row is written."""
        return self.k.div(self.columns + (BLOCK - 1), BLOCK)

    def write(self, row: Expr, part: Expr, out: Memory, scale: Expr | None = None) -> None:
        """out [columns] from 32 * part on = those of the weight's row, times `scale`."""
        k = self.k
        tile, r = k.div(row, TILE_ROWS), k.mod(row, TILE_ROWS)
        start = k.wide(tile) * k.wide(self.size)
        first = k.let(part * BLOCK)
        if FORMATS[self.fmt].is_float:
            unit = 4 if self.fmt == "F32" else 2
            w = self.w.at(k.div(start, k.T.int64(unit)))
            with k.loop(first, k.let(k.T.min(first + BLOCK, self.columns))) as c:
                value = row_element(k, self.fmt, w, c * TILE_ROWS + r)
                out[c] = value if scale is None else value * scale
            return
        blocks = layout_of(self.fmt).blocks
        memories = (
            self.w.at(start),
            self.heads.at(k.div(start, k.T.int64(2))),
            self.words.at(k.div(start, k.T.int64(4))),
        )
        pair = row_block(k, self.fmt, *memories, k.div(part, blocks), k.mod(part, blocks), r)
        for i, value in enumerate(pair):
            out.store(first + 16 * i, value if scale is None else k.let(value * k.splat(scale)))


def embedding(k: Emitter, *, fmt: str) -> None:
    weight = _Packed(k, fmt)
    ids, y, y_stride, tokens, scale = k.pointer("int32"), k.pointer("float32"), k.integer(), k.integer(), k.real()
    parts = weight.parts()
    with k.share(tokens * parts) as item:
        t, part = k.div(item, parts), k.mod(item, parts)
        row, out = k.let(ids[t]), y.at(k.wide(t) * k.wide(y_stride))
        with k.branches(k.T.And(row >= 0, row < weight.rows)) as (known, unknown):
            with known:
                weight.write(row, part, out, scale)
            with unknown, k.loop(part * BLOCK, k.let(k.T.min(part * BLOCK + BLOCK, weight.columns))) as c:
                out[c] = k.f32(0.0)


def dequantize(k: Emitter, *, fmt: str) -> None:
    weight = _Packed(k, fmt)
    y, y_stride = k.pointer("float32"), k.integer()
    parts = weight.parts()
    with k.share(weight.rows) as row:
        out = y.at(k.wide(row) * k.wide(y_stride))
        with k.loop(0, parts) as part:
            weight.write(row, part, out)


def gather(k: Emitter) -> None:
    x, x_stride, numbers = k.pointer("float32"), k.integer(), k.pointer("int32")
    y, y_stride, tokens, rows, features = k.pointer("float32"), k.integer(), k.integer(), k.integer(), k.integer()
    parts = k.div(features + (PART - 1), PART)
    with k.share(rows * parts) as item:
        r, first = k.div(item, parts), k.let(k.mod(item, parts) * PART)
        stop = k.let(k.T.min(first + PART, features))
        number, out = k.let(numbers[r]), y.at(k.wide(r) * k.wide(y_stride))
        with k.branches(k.T.And(number >= 0, number < tokens)) as (known, unknown):
            with known:
                k.copy(x.at(k.wide(number) * k.wide(x_stride)), out, first, stop)
            with unknown, k.loop(first, stop) as c:
                out[c] = k.f32(0.0)


def _packed(call: BoundCall) -> tuple[int, ...]:
    w = call.tensors["w"]
    where = w.buffer.address
    return (where, where, where, *w.shape, tile_bytes(FORMATS[w.dtype], w.shape[1]))


def _spec(signature: Signature) -> KernelSpec:
    if signature.op == "gather":
        return spec(gather)
    return spec({"embedding": embedding, "dequantize": dequantize}[signature.op], fmt=signature.tensors["w"].dtype)


def _bind_embedding(backend: TVMBackend, call: BoundCall) -> list[Launch]:
    ids, y = call.tensors["token_ids"], call.tensors["y"]
    arguments = (*_packed(call), address(ids), *place(y), ids.shape[0], float(call.attrs["scale"]))
    return [backend.launch(_spec(call.signature), *arguments, held=(call,))]


def _bind_dequantize(backend: TVMBackend, call: BoundCall) -> list[Launch]:
    return [backend.launch(_spec(call.signature), *_packed(call), *place(call.tensors["y"]), held=(call,))]


def _bind_gather(backend: TVMBackend, call: BoundCall) -> list[Launch]:
    x, rows, y = (call.tensors[name] for name in ("x", "rows", "y"))
    arguments = (*place(x), address(rows), *place(y), x.shape[0], *y.shape)
    return [backend.launch(_spec(call.signature), *arguments, held=(call,))]


def _kernels(backend: TVMBackend, signature: Signature) -> Sequence[KernelSpec]:
    return [_spec(signature)]


def _numerics(backend: TVMBackend, signature: Signature) -> Numerics:
    return Numerics("f32", 2, "f32", 1.0)


KERNELS = [
    OpKernel("embedding", _kernels, _numerics, _bind_embedding),
    OpKernel("dequantize", _kernels, _numerics, _bind_dequantize),
    OpKernel("gather", _kernels, _numerics, _bind_gather),
]
