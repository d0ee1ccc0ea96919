"""embedding and dequantize: rows of a packed weight as floats."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...kernels.op import Numerics, Signature
from ...kernels.quant import FORMATS
from ...kernels.spi import BoundCall
from .formats import tiles_of, weight_program
from .launch import Enqueue, OpKernel, ProgramSpec, place, start

if TYPE_CHECKING:
    from . import OpenCLBackend


def _program(signature: Signature) -> ProgramSpec:
    return weight_program(FORMATS[signature.tensors["w"].dtype], "rows.cl")


def _groups(call: BoundCall) -> int:
    weight = call.tensors["w"]
    return weight.shape[1] // FORMATS[weight.dtype].group_length


def _embedding(backend: OpenCLBackend, call: BoundCall) -> list[Enqueue]:
    ids, weight, y = (call.tensors[name] for name in ("token_ids", "w", "y"))
    sizes = (*map(np.int32, weight.shape), np.float32(call.attrs["scale"]))
    args = (*start(ids), weight.buffer, *place(y), *sizes)
    return [backend.enqueue(_program(call.signature), "embedding", (_groups(call), ids.shape[0]), (1, 1), *args)]


def _dequantize(backend: OpenCLBackend, call: BoundCall) -> list[Enqueue]:
    weight, y = call.tensors["w"], call.tensors["y"]
    size = (_groups(call), tiles_of(weight.shape[0]))
    args = (weight.buffer, *place(y), *map(np.int32, weight.shape))
    return [backend.enqueue(_program(call.signature), "dequantize", size, (1, 1), *args)]


def _numerics(signature: Signature) -> Numerics:
    return Numerics("f32", 2, "f32", 1.0)


KERNELS = [
    OpKernel("embedding", lambda s: [_program(s)], _numerics, _embedding),
    OpKernel("dequantize", lambda s: [_program(s)], _numerics, _dequantize),
]
