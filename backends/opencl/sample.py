"""argmax and sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...kernels.op import Numerics, Signature
from ...kernels.spi import BoundCall
from .launch import FUNCTION_ULP, Enqueue, OpKernel, ProgramSpec, place, start

if TYPE_CHECKING:
    from . import OpenCLBackend

PROGRAM = ProgramSpec(("lanes.h", "sample.cl"))


def _argmax(backend: OpenCLBackend, call: BoundCall) -> list[Enqueue]:
    x, ids = call.tensors["x"], call.tensors["ids"]
    args = (*place(x), *start(ids), np.int32(x.shape[1]))
    return [backend.enqueue(PROGRAM, "argmax", (x.shape[0],), (1,), *args)]


def _sample(backend: OpenCLBackend, call: BoundCall) -> list[Enqueue]:
    x, params, rng, ids = (call.tensors[name] for name in ("x", "params", "rng", "ids"))
    rows, vocab = x.shape
    probabilities = backend.scratch("probabilities", rows * vocab * 4)
    args = (*place(x), *place(params), *place(rng), *start(ids), probabilities, np.int32(vocab))
    return [backend.enqueue(PROGRAM, "sample", (rows,), (1,), *args)]


def _numerics(signature: Signature) -> Numerics:
    """The walk through the kept tokens adds one after the other."""
    return Numerics("f32", signature.tensors["x"].shape[1], "f32", FUNCTION_ULP)


KERNELS = [
    OpKernel("argmax", lambda s: [PROGRAM], _numerics, _argmax),
    OpKernel("sample", lambda s: [PROGRAM], _numerics, _sample),
]
