"""The `opencl-tvm` backend: the devices, memory and launches of `opencl`, with the kernels that TVM generates.

Two compilers, one device, one suite: where the two differ, one of them is wrong. Weights stay as they are in the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from ...kernels.op import NUMPY_DTYPES, Signature
from ...kernels.quant import FORMATS, Weight
from ...kernels.spi import BoundCall, DeviceInfo, Kernel, OpenOptions, Unsupported
from ..opencl import OpenCLBackend, OpenCLProvider
from ..opencl.launch import Enqueue, OpKernel
from .portable import emit, names, targets
from .portable.machine import MACHINES

MACHINE = MACHINES["opencl"]


@dataclass(frozen=True)
class Generated:
    """A program of one kernel, in the place of a ProgramSpec: `label` names it, `source` generates it."""

    label: str
    signature: Signature = field(compare=False)

    @property
    def emitted(self) -> emit.Emitted:
        return _emitted(self)

    def source(self) -> tuple[str, list[str]]:
        return self.emitted.code.decode(), ["-cl-std=CL1.2"]


@cache
def _emitted(program: Generated) -> emit.Emitted:
    from tvm.target import Target

    return emit.emit(program.signature, Target(MACHINE.kind), program.label)


def _program(signature: Signature) -> Generated:
    return Generated(names.symbol(signature), signature)


def _bind(backend: OpenCLBackend, call: BoundCall) -> list[Enqueue]:
    program = _program(call.signature)
    emitted, args = program.emitted, list[Any]()
    for parameter in emitted.parameters:
        if parameter.role == "scratch":
            nbytes = int(np.prod(parameter.shape)) * np.dtype(NUMPY_DTYPES[parameter.stored]).itemsize
            args.append(backend.scratch(parameter.name, nbytes))
        elif parameter.kind == "pointer":
            args.append(call.tensors[parameter.name].buffer)
        else:
            args.append(np.int64(getattr(call.tensors[parameter.name], parameter.kind)))
    size = (emitted.grid * emitted.block,)
    return [backend.enqueue(program, emitted.symbol, size, (emitted.block,), *args)]  # type: ignore[arg-type]


def _kernel(op: str) -> OpKernel:
    def programs(signature: Signature) -> Sequence[Any]:
        return [_program(signature)]

    return OpKernel(op, programs, lambda signature: emit.numerics(signature, MACHINE), _bind)


class TVMOpenCLBackend(OpenCLBackend):
    """An OpenCL device running TVM's code."""

    name = "opencl-tvm"

    def kernels(self) -> dict[str, OpKernel]:
        return {op: _kernel(op) for op in emit.kernels()}

    def supports(self, signature: Signature) -> Kernel | Unsupported:
        reason = emit.refusal(signature, MACHINE)
        return Unsupported(signature.op, reason) if reason else super().supports(signature)

    def pack(self, weight: Weight) -> Any:
        buffer = self._buffer(weight.nbytes, f"{weight.format.name} {list(weight.shape)}")
        self.write(buffer, weight.data.reshape(-1))
        return buffer

    def packed_bytes(self, fmt: str, shape: tuple[int, ...]) -> int:
        return shape[0] * FORMATS[fmt].row_bytes(shape[1])


class TVMOpenCLProvider(OpenCLProvider):
    """Never chosen by itself: it is for comparing, `opencl` is faster."""

    order: int | None = None

    def devices(self) -> Sequence[DeviceInfo]:
        targets.require_tvm()
        return super().devices()

    def open(self, options: OpenOptions) -> TVMOpenCLBackend:
        from ..opencl.device import open_device

        targets.require_tvm()
        return TVMOpenCLBackend(open_device(options.device, options.threads), options.progress)

    def describe(self) -> Mapping[str, Any]:
        return {**super().describe(), "tvm": targets.version()}


provider = TVMOpenCLProvider()
