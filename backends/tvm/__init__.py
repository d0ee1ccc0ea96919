"""The `tvm` backend: this machine's CPU, with kernels written in TVM's TIR and compiled by LLVM for its instructions.

One file per op: how its kernels are written (emit.py) and how a call becomes launches of them (launch.py). compiler.py
makes object code of them, in a child process or from the cache; library.py loads it; driver.py runs many kernels in one
call. Weights lie as formats.py says, dot products of integers are dot.py's, and target.py knows the CPUs.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np

from ...kernels.errors import BackendUnavailable, ContractError, DeviceError
from ...kernels.op import NUMPY_DTYPES, Signature, TensorType
from ...kernels.quant import FORMATS, Array, Weight
from ...kernels.spi import SPI_VERSION, BoundCall, DeviceInfo, Kernel, Launch, OpenOptions, Progress, Unsupported
from ..checks import check_axes, check_call, check_memory, check_signature, check_transfer
from . import formats, library
from .compiler import CACHE, Compiler
from .launch import HostBuffer, KernelSpec, Launches, OpKernel, slots
from .launch import Launch as KernelLaunch
from .library import Run
from .target import BY_NAME, LEVEL_OF_CPU, HostTarget, host_flags, host_name, processors, usable

LONGEST_AXIS = 2**31 - 64  # kernels count in int32, in steps of up to a tile
ALIGNMENT = 64
ARENA_BYTES = 32 << 20
LARGE = 1 << 20  # buffers that share huge pages: caches are read in small scattered pieces


def _kernels() -> dict[str, OpKernel]:
    from . import attention, gemm, pointwise, rms_norm, rope, rows, sample

    modules = (attention, gemm, pointwise, rms_norm, rope, rows, sample)
    return {kernel.op: kernel for module in modules for kernel in module.KERNELS}


def _packed_bytes(fmt: str, shape: tuple[int, ...]) -> int:
    return formats.packed_bytes(FORMATS[fmt], *shape)


class TVMBackend:
    """The host CPU. A launch has ended when it returns; `capture` makes one call of many."""

    name = "tvm"
    page_size = 32

    def __init__(self, device: DeviceInfo, target: HostTarget, threads: int, progress: Progress | None = None) -> None:
        self.device, self.target, self.threads = device, target, threads
        self._progress = progress
        self._kernels = _kernels()
        self._compiler = Compiler(target)
        self._runs: dict[tuple[KernelSpec, ...], Run] = {}
        self._scratch: dict[str, HostBuffer] = {}
        self._arena = np.empty(0, np.uint8)

    def supports(self, signature: Signature) -> Kernel | Unsupported:
        found = check_signature(signature)
        if isinstance(found, Unsupported):
            return found
        kernel = self._kernels.get(signature.op)
        if kernel is None:
            return Unsupported(signature.op, f"no TVM kernel for {signature.op} yet")
        too_long = check_axes(found, signature, LONGEST_AXIS)
        if too_long:
            return too_long
        return Kernel(f"tvm.{kernel.kernels(self, signature)[0].label}", kernel.numerics(self, signature))

    def prepare(self, signatures: Sequence[Signature]) -> None:
        """Object code of every kernel these calls need."""
        wanted = [spec for s in signatures if s.op in self._kernels for spec in self._kernels[s.op].kernels(self, s)]
        self._compiler.kernels(wanted, self._progress)

    def alloc(self, kind: TensorType) -> HostBuffer:
        nbytes = math.prod(kind.shape) * np.dtype(NUMPY_DTYPES[kind.dtype]).itemsize
        return HostBuffer(self._from_arena(nbytes, str(kind))) if nbytes >= LARGE else self._buffer(nbytes, str(kind))

    def write(self, buffer: HostBuffer, array: Array, offset: int = 0) -> None:
        check_transfer(buffer.nbytes // array.itemsize, array.dtype, array.size, array.dtype, offset)
        start = offset * array.itemsize
        buffer.array[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def read(self, buffer: HostBuffer, kind: TensorType, offset: int = 0) -> Array:
        dtype, count = np.dtype(NUMPY_DTYPES[kind.dtype]), math.prod(kind.shape)
        check_transfer(buffer.nbytes // dtype.itemsize, dtype, count, dtype, offset)
        start = offset * dtype.itemsize
        return buffer.array[start : start + count * dtype.itemsize].view(dtype).reshape(kind.shape).copy()

    def pack(self, weight: Weight) -> HostBuffer:
        nbytes = formats.packed_bytes(weight.format, *weight.shape)
        packed = HostBuffer(self._from_arena(nbytes, f"weight {weight.shape}"))
        formats.pack(weight, packed.array)
        return packed

    def bind(self, call: BoundCall) -> Launch:
        op = check_call(call)
        call = BoundCall(call.op, call.tensors, op.with_defaults(call.attrs), call.label)
        check_memory(call, lambda buffer: buffer.nbytes, _packed_bytes)
        return Launches(tuple(self._kernels[call.op].bind(self, call)))

    def capture(self, launches: Sequence[Launch]) -> Launch:
        """One call of the driver for the whole step: threads start once and meet at a barrier between two kernels."""
        flat: list[KernelLaunch] = []
        for launch in launches:
            if not isinstance(launch, Launches):
                raise ContractError("a step of the tvm backend can only hold what its bind() returned")
            flat += launch.parts
        if not flat:
            return lambda: None
        run, tape = self._tape(flat)
        address, count, threads = tape.ctypes.data, len(flat), self.threads

        def replay(held: tuple[Any, ...] = (flat, tape)) -> None:
            run(address, count, threads)

        return replay

    def synchronize(self) -> None:
        """Every launch has ended when it returns."""

    def close(self) -> None:
        self._compiler.close()
        self._runs.clear()
        self._scratch.clear()
        self._arena = np.empty(0, np.uint8)

    def peaks(self) -> Mapping[str, float]:
        """Gop/s of the units that kernels use, measured now: "int8", "f32", and "bf16" on tiles."""
        from . import peak

        return peak.measure(self)

    # What the op files use

    def scratch(self, name: str, nbytes: int) -> HostBuffer:
        """Memory that holds nothing between calls; shared by all, since they run one after another."""
        buffer = self._scratch.get(name)
        if buffer is None or buffer.nbytes < nbytes:
            buffer = self._scratch[name] = HostBuffer(self._from_arena(nbytes, f"scratch {name}"))
        return buffer

    def launch(self, spec: KernelSpec, *arguments: int | float, held: tuple[Any, ...]) -> KernelLaunch:
        return KernelLaunch(self, spec, slots(arguments), held)

    def run_now(self, launches: Sequence[KernelLaunch]) -> None:
        run, tape = self._tape(launches)
        run(tape.ctypes.data, len(launches), self.threads)

    def _tape(self, launches: Sequence[KernelLaunch]) -> tuple[Run, Array]:
        specs = tuple(dict.fromkeys(launch.spec for launch in launches))
        run = self._runs.get(specs)
        if run is None:
            objects = self._compiler.kernels(specs, self._progress)
            driver = self._compiler.driver([spec.symbol for spec in specs])
            run = self._runs[specs] = library.load([driver, *objects])
        number = {spec: i for i, spec in enumerate(specs)}
        return run, np.array([(number[x.spec], x.arguments.ctypes.data) for x in launches], np.int64)

    def _buffer(self, nbytes: int, what: str) -> HostBuffer:
        try:
            raw = np.empty(max(1, nbytes) + ALIGNMENT, np.uint8)
        except MemoryError as error:
            raise DeviceError(f"no memory for {what}: {nbytes} bytes") from error
        start = -raw.ctypes.data % ALIGNMENT
        return HostBuffer(raw[start : start + nbytes])

    def _from_arena(self, nbytes: int, what: str) -> Array:
        """Memory that steps read all of: out of larger pieces that may have huge pages. With pages of 4 KiB products of
        512 rows on AMX take a fifth longer."""
        nbytes = -(-nbytes // ALIGNMENT) * ALIGNMENT
        if self._arena.nbytes < nbytes:
            size = -(-max(nbytes, ARENA_BYTES) // (2 << 20)) * (2 << 20)
            try:
                piece = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except (OSError, ValueError) as error:
                raise DeviceError(f"no memory for {what}: {nbytes} bytes") from error
            if hasattr(mmap, "MADV_HUGEPAGE"):
                piece.madvise(mmap.MADV_HUGEPAGE)
            self._arena = np.frombuffer(piece, np.uint8)
        taken, self._arena = self._arena[:nbytes], self._arena[nbytes:]
        return taken


class TVMProvider:
    """The host CPU through LLVM. `--device` takes a TVM target: `llvm`, or `llvm -mcpu=LEVEL` for a lesser CPU."""

    spi_version = SPI_VERSION
    order: int | None = 10

    def devices(self) -> Sequence[DeviceInfo]:
        library.find_runtime()
        return [self._device(self._target(None))]

    def open(self, options: OpenOptions) -> TVMBackend:
        library.find_runtime()
        target = self._target(options.device)
        threads = options.threads or processors()
        library.start(threads)
        return TVMBackend(self._device(target), target, threads, options.progress)

    def describe(self) -> Mapping[str, Any]:
        report: dict[str, Any] = {"levels": [level.name for level in usable()], "cache": CACHE.info()}
        for name in ("apache-tvm", "apache-tvm-ffi", "apache-tvm-ffi-orcjit"):
            try:
                report[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                report[name] = "not installed"
        return report

    @staticmethod
    def _device(target: HostTarget) -> DeviceInfo:
        return DeviceInfo(
            f"llvm {target.name} / {host_name()}", "Apache TVM", metadata.version("apache-tvm"), 0,
            {"mcpu": target.mcpu, "dot": target.dot},
        )  # fmt: skip

    @staticmethod
    def _target(device: str | None) -> HostTarget:
        levels = usable()
        if not levels:
            raise BackendUnavailable(f"no kernels for this CPU, {host_name()}: known are {', '.join(BY_NAME)}")
        if device is None or device in ("0", "llvm", "llvm -mcpu=native"):
            return levels[0]
        name = device.removeprefix("llvm -mcpu=")
        level = BY_NAME.get(name) or LEVEL_OF_CPU.get(name)
        if level and level not in levels:
            is_alien = level.machine != levels[0].machine
            what = f"is no {level.machine}" if is_alien else f"lacks {', '.join(level.missing(host_flags()))}"
            raise BackendUnavailable(f"{device}: this CPU, {host_name()}, {what}; try {levels[0].name}")
        if level:
            return level
        kind = device.strip().lower().partition(" ")[0]
        if kind in ("cuda", "rocm", "metal", "webgpu", "opencl", "vulkan", "c"):
            raise BackendUnavailable(
                f"no device {device!r}: this backend runs on the CPU; `runtime compile --target {kind}` generates"
                " kernels for others, --backend opencl-tvm runs those of OpenCL"
            )
        if kind and device.strip().lower() in f"llvm {levels[0].name} / {host_name()}".lower():
            return levels[0]
        known = ", ".join(level.name for level in levels)
        raise BackendUnavailable(
            f"no device {device!r}: this CPU is `llvm`, or `llvm -mcpu=LEVEL` with one of {known}, or LLVM's name of"
            " a CPU"
        )


provider = TVMProvider()
