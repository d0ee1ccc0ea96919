"""Element-wise ops: add, softcap, glu, gather, advance."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ...kernels.op import Numerics, Signature
from ...kernels.spi import BoundCall
from .gemm import GLU_KINDS, POINTWISE
from .launch import ERF_ULP, FUNCTION_ULP, Enqueue, OpKernel, place, start

if TYPE_CHECKING:
    from . import OpenCLBackend


def _numerics(signature: Signature) -> Numerics:
    return Numerics("f32", 1, "f32", ERF_ULP if signature.attrs.get("kind") == "gelu_erf" else FUNCTION_ULP)


def _add(backend: OpenCLBackend, call: BoundCall) -> list[Enqueue]:
    x, y = call.tensors["x"], call.tensors["y"]
    return [backend.enqueue(POINTWISE, "add", x.shape[::-1], None, *place(x), *place(y))]


def _softcap(backend: OpenCLBackend, call: BoundCall) -> list[Enqueue]:
    x = call.tensors["x"]
    return [backend.enqueue(POINTWISE, "softcap", x.shape[::-1], None, *place(x), np.float32(call.attrs["cap"]))]


def _glu(backend: OpenCLBackend, call: BoundCall) -> list[Enqueue]:
    gate, up, y = (call.tensors[name] for name in ("gate", "up", "y"))
    args = (*place(gate), *place(up), *place(y), np.int32(GLU_KINDS[call.attrs["kind"]]))
    return [backend.enqueue(POINTWISE, "glu", y.shape[::-1], None, *args)]


def _gather(backend: OpenCLBackend, call: BoundCall) -> list[Enqueue]:
    x, rows, y = (call.tensors[name] for name in ("x", "rows", "y"))
    args = (*place(x), *start(rows), *place(y), np.int32(x.shape[0]))
    return [backend.enqueue(POINTWISE, "gather", y.shape[::-1], None, *args)]


def _advance(backend: OpenCLBackend, call: BoundCall) -> list[Enqueue]:
    positions, seq_ids = call.tensors["positions"], call.tensors["seq_ids"]
    return [backend.enqueue(POINTWISE, "advance", positions.shape, None, *start(positions), *start(seq_ids))]


BINDERS: dict[str, Callable[[OpenCLBackend, BoundCall], list[Enqueue]]] = {
    "add": _add,
    "softcap": _softcap,
    "glu": _glu,
    "gather": _gather,
    "advance": _advance,
}
KERNELS = [OpKernel(op, lambda s: [POINTWISE], _numerics, bind) for op, bind in BINDERS.items()]
