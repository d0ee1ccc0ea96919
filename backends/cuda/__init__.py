"""The `cuda` backend: NVIDIA GPUs, with kernels in Triton and CUDA C++, run through CuPy.

One file per op: its arithmetic, and how a call becomes launches (launch.py); device code in triton/ and *.cu. Weights
lie as formats.py says. compiler.py makes cubins of kernels, with or without a GPU; gpu.py runs them, interpreter.py
runs the Triton source itself where there is no GPU (`--device interpret`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from typing import Any

import numpy as np

from ...kernels.errors import BackendUnavailable, ContractError
from ...kernels.op import NUMPY_DTYPES, Signature, TensorType
from ...kernels.quant import FORMATS, Array, Weight
from ...kernels.spi import SPI_VERSION, BoundCall, DeviceInfo, Kernel, OpenOptions, Progress, Unsupported
from ...kernels.spi import Launch as Runnable
from ..checks import check_axes, check_call, check_memory, check_signature, check_transfer
from . import formats
from .launch import Captured, Launch, OpKernel, PackedWeight, Sketch, Target, sketch_of

LONGEST_AXIS = 2**31 - 64  # kernels count in int32, in steps of up to a tile
MOST_PROGRAMS = 65535  # on y and z (CUDA C++ Programming Guide 12.9, table 27)
INTERPRET = "interpret"


@cache
def op_kernels() -> dict[str, OpKernel]:
    from . import attention, gemm, pointwise, rms_norm, rope, rows, sample

    modules = (attention, gemm, pointwise, rms_norm, rope, rows, sample)
    return {kernel.op: kernel for module in modules for kernel in module.KERNELS}


def _packed_bytes(fmt: str, shape: tuple[int, ...]) -> int:
    return formats.packed_bytes(FORMATS[fmt], *shape)


def supports(target: Target, signature: Signature) -> Kernel | Unsupported:
    """Kernel if there is one for this call on this target, else why not."""
    found = check_signature(signature)
    if isinstance(found, Unsupported):
        return found
    kernel = op_kernels().get(signature.op)
    if kernel is None:
        return Unsupported(signature.op, f"no CUDA kernel for {signature.op} yet")
    too_long = check_axes(found, signature, LONGEST_AXIS)
    if too_long:
        return too_long
    launches = kernel.bind(Sketch(target), sketch_of(signature))
    for launch in launches:
        if max(launch.grid[1:], default=1) > MOST_PROGRAMS and not target.is_interpreted:
            grid = " x ".join(map(str, launch.grid))
            return Unsupported(
                signature.op, f"its grid of {grid} programs is too large: {MOST_PROGRAMS} on all axes but the first"
            )
    return Kernel(f"cuda.{launches[0].spec.label}", kernel.numerics(target, signature))


class CudaBackend:
    """A GPU, or Triton's interpreter in its place: `hardware` is of gpu.py or of interpreter.py."""

    name = "cuda"
    page_size = 32

    def __init__(self, device: DeviceInfo, hardware: Any, progress: Progress | None = None) -> None:
        self.device, self.hardware = device, hardware
        self.target: Target = hardware.target
        self._progress = progress
        self._kernels = op_kernels()
        self._scratch: dict[str, Any] = {}

    def supports(self, signature: Signature) -> Kernel | Unsupported:
        return supports(self.target, signature)

    def prepare(self, signatures: Sequence[Signature]) -> None:
        """Compile what these calls will need, if their tensors are aligned; `bind` compiles what they turn out to."""
        sketch = Sketch(self.target, every=True)
        wanted = [
            x for s in signatures if s.op in self._kernels for x in self._kernels[s.op].bind(sketch, sketch_of(s))
        ]
        report = self._progress
        self.hardware.load(wanted, (lambda done, total: report("compile", done, total)) if report else None)

    def alloc(self, kind: TensorType) -> Any:
        return self.hardware.alloc(math.prod(kind.shape) * np.dtype(NUMPY_DTYPES[kind.dtype]).itemsize, str(kind))

    def write(self, buffer: Any, array: Array, offset: int = 0) -> None:
        check_transfer(buffer.nbytes // array.itemsize, array.dtype, array.size, array.dtype, offset)
        if array.size:
            self.hardware.write(buffer, array, offset * array.itemsize)

    def read(self, buffer: Any, kind: TensorType, offset: int = 0) -> Array:
        dtype, count = np.dtype(NUMPY_DTYPES[kind.dtype]), math.prod(kind.shape)
        check_transfer(buffer.nbytes // dtype.itemsize, dtype, count, dtype, offset)
        return self.hardware.read(buffer, kind.shape, dtype, offset * dtype.itemsize)

    def pack(self, weight: Weight) -> PackedWeight:
        """Planes of formats.py; as many bytes as in the file but for K-quants' subscales."""
        packed = formats.pack(weight)
        buffer = self.hardware.alloc(packed.nbytes, f"weight {weight.format.name} {list(weight.shape)}")
        self.hardware.write(buffer, packed, 0)
        return PackedWeight(buffer, weight.format, weight.shape)

    def bind(self, call: BoundCall) -> Captured:
        op = check_call(call)
        call = BoundCall(call.op, call.tensors, op.with_defaults(call.attrs), call.label)
        check_memory(call, lambda x: x.buffer.nbytes if isinstance(x, PackedWeight) else x.nbytes, _packed_bytes)
        return self._bound(self._kernels[call.op].bind(self, call))

    def capture(self, launches: Sequence[Runnable]) -> Runnable:
        """On a GPU, one CUDA graph: nothing of a step's arguments changes from token to token."""
        parts: list[Runnable] = []
        for launch in launches:
            if not isinstance(launch, Captured):
                raise ContractError("a step of the cuda backend can only hold what its bind() returned")
            parts += launch.parts
        return self.hardware.capture(parts)

    def synchronize(self) -> None:
        self.hardware.synchronize()

    def close(self) -> None:
        self._scratch.clear()
        self.hardware.close()

    def peaks(self) -> Mapping[str, float]:
        """GB/s and Gop/s that this GPU can reach, measured now; nothing in the interpreter."""
        from . import peak

        return {} if self.target.is_interpreted else peak.measure(self.hardware)

    # What the op files use: launch.Planner

    def scratch(self, name: str, nbytes: int) -> Any:
        buffer = self._scratch.get(name)
        if buffer is None or buffer.nbytes < nbytes:
            buffer = self._scratch[name] = self.hardware.alloc(nbytes, f"scratch {name}")
        return buffer

    def choose(self, key: tuple[Any, ...], candidates: Sequence[Sequence[Launch]]) -> Sequence[Launch]:
        return self.hardware.fastest(key, candidates) if len(candidates) > 1 else candidates[0]

    def _bound(self, launches: Sequence[Launch]) -> Captured:
        self.hardware.load(launches)
        return Captured(tuple(self.hardware.bind(launch) for launch in launches), tuple(launches))


class CudaProvider:
    """GPUs through CuPy, imported when they are asked for; `--device interpret` needs Triton alone."""

    spi_version = SPI_VERSION
    order: int | None = 5

    def devices(self) -> Sequence[DeviceInfo]:
        from .gpu import list_devices

        return list_devices()

    def open(self, options: OpenOptions) -> CudaBackend:
        if options.device == INTERPRET:
            from .interpreter import InterpretedDevice
            from .sources import triton_version

            device = DeviceInfo("Triton interpreter", "Triton", triton_version(), 0, {"arch": INTERPRET, "type": "cpu"})
            return CudaBackend(device, InterpretedDevice(), options.progress)
        from .gpu import open_device

        device, hardware = open_device(options.device)
        return CudaBackend(device, hardware, options.progress)

    def describe(self) -> Mapping[str, Any]:
        from . import aot, compiler, tuning

        report: dict[str, Any] = {}
        try:
            report["devices"] = [f"{x.name} ({x.detail['compute_capability']}, {x.driver})" for x in self.devices()]
        except BackendUnavailable as error:
            report["devices"] = str(error)
        report |= {"cache": compiler.CACHE.info(), "choices": tuning.CACHE.info(), "ahead_of_time": aot.describe()}
        report["cache_key"] = {"sources": compiler.sources()[:16], "format": compiler.FORMAT, **compiler.compilers()}
        for name in ("triton", "cupy-cuda12x", "cupy-cuda13x", *compiler.PACKAGES[1:], "torch"):
            try:
                report[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                report[name] = "not installed"
        return report


provider = CudaProvider()
