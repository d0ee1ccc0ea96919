"""The `opencl` backend: CPUs (Intel's runtime, PoCL) and whatever else has an OpenCL 1.2 driver, through PyOpenCL.

One file per op beside its `.cl`; `runtimes.py` finds drivers, `device.py` chooses, `program.py` compiles and caches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...kernels.errors import BackendUnavailable, DeviceError
from ...kernels.op import NUMPY_DTYPES, Signature, TensorType
from ...kernels.quant import FORMATS, Array, Weight
from ...kernels.spi import SPI_VERSION, BoundCall, DeviceInfo, Kernel, Launch, OpenOptions, Progress, Unsupported
from ..checks import check_axes, check_call, check_memory, check_signature, check_transfer
from ..replay import launch_list
from . import environment
from .formats import TILE_ROWS, pack, packed_bytes, tiles_of
from .launch import Enqueue, Launches, OpKernel, ProgramSpec

if TYPE_CHECKING:
    from .device import OpenedDevice

# Kernels count in int, in steps of up to a tile.
LONGEST_AXIS = 2**31 - 64


# Columns that a work-group of `gemm` unpacks at a time, multiples of CHAIN: the most that fit its local memory. A GLU
# has four panels (gemm.cl) of at most 64 bytes a column. Between slices sums wait in memory, so that few are best.
DEPTHS = (768, 512, 256, 128, 64)
BYTES_PER_COLUMN = 4 * 64


# How many bytes ahead `gemv` asks for weights. Processors do so by themselves, but not past the end of a page of 4096
# bytes. A step took 15.1 ms without, 12.1, 11.3, 11.1 and 11.2 with 1024, 2048, 4096 and 8192: medians, Intel's
# runtime, a busy machine.
PREFETCH = 4096


def device_options(opened: OpenedDevice) -> list[str]:
    """Compiler options that depend on the device: see lanes.h and gemm.cl."""
    if opened.info.runtime == "oclgrind":  # counts the local memory of all kernels of a program together
        return ["-DNO_SHUFFLES", f"-DDEPTH={DEPTHS[-1]}", "-DROWS=3"]
    local = opened.device.local_mem_size
    depth = next((depth for depth in DEPTHS if depth * BYTES_PER_COLUMN <= local), DEPTHS[-1])
    # 6 rows keep 24 vectors of sums; with the 16 short registers of AVX2, 3 rows are 1.3 times as fast.
    rows = 6 if "avx512bw" in environment.processor_flags() else 3
    return [f"-DDEPTH={depth}", f"-DROWS={rows}", f"-DPREFETCH={PREFETCH if opened.info.type == 'cpu' else 0}"]


def _kernels() -> dict[str, OpKernel]:
    from . import attention, gemm, pointwise, rope, rows, sample

    modules = (gemm, attention, rope, rows, pointwise, sample)
    return {kernel.op: kernel for module in modules for kernel in module.KERNELS}


class OpenCLBackend:
    """One OpenCL device with an in-order queue: launches run in the order they were enqueued."""

    name = "opencl"
    page_size = 16  # one block of keys of attention.cl

    def __init__(self, opened: OpenedDevice, progress: Progress | None = None) -> None:
        import pyopencl as cl

        self._cl = cl
        self._progress = progress
        self._kernels = self.kernels()
        self._programs: dict[ProgramSpec, Any] = {}
        self._scratch: dict[str, Any] = {}
        self._kept: list[Any] = []
        self.opened = opened
        info = opened.info
        self._options = device_options(opened)
        self.device = DeviceInfo(
            info.label, info.vendor, info.driver, info.memory_bytes,
            {"opencl_c": info.opencl_c, "type": info.type, "threads": opened.threads},
        )  # fmt: skip

    def supports(self, signature: Signature) -> Kernel | Unsupported:
        found = check_signature(signature)
        if isinstance(found, Unsupported):
            return found
        kernel = self._kernels.get(signature.op)
        if kernel is None:
            return Unsupported(signature.op, f"no OpenCL kernel for {signature.op} yet")
        too_long = check_axes(found, signature, LONGEST_AXIS)
        if too_long:
            return too_long
        return Kernel(f"{self.name}.{kernel.programs(signature)[0].label}", kernel.numerics(signature))

    def prepare(self, signatures: Sequence[Signature]) -> None:
        """Build every program these calls need, in one child process if any is not in the cache yet."""
        wanted = {spec for s in signatures if s.op in self._kernels for spec in self._kernels[s.op].programs(s)}
        missing = sorted(wanted - self._programs.keys(), key=lambda spec: spec.label)
        if not missing:
            return
        report = self._progress

        def progress(label: str, done: int, total: int) -> None:
            if report:
                report("compile", done, total)

        built = self.opened.build_many({spec.label: self.source(spec) for spec in missing}, progress=progress)
        self._programs.update((spec, built[spec.label]) for spec in missing)

    def alloc(self, kind: TensorType) -> Any:
        return self._buffer(math.prod(kind.shape) * np.dtype(NUMPY_DTYPES[kind.dtype]).itemsize, str(kind))

    def write(self, buffer: Any, array: Array, offset: int = 0) -> None:
        check_transfer(buffer.size // array.itemsize, array.dtype, array.size, array.dtype, offset)
        if array.size:
            with self._errors("writing a buffer"):
                self._cl.enqueue_copy(
                    self.opened.queue, buffer, np.ascontiguousarray(array), dst_offset=offset * array.itemsize
                )

    def read(self, buffer: Any, kind: TensorType, offset: int = 0) -> Array:
        array = np.empty(kind.shape, NUMPY_DTYPES[kind.dtype])
        check_transfer(buffer.size // array.itemsize, array.dtype, array.size, array.dtype, offset)
        if array.size:
            with self._errors("reading a buffer"):
                self._cl.enqueue_copy(self.opened.queue, array, buffer, src_offset=offset * array.itemsize)
        return array

    def pack(self, weight: Weight) -> Any:
        """Tiles of 32 rows, words of the rows' blocks transposed (formats.h); as many bytes as in the file."""
        fmt, (rows, columns) = weight.format, weight.shape
        buffer = self._buffer(packed_bytes(fmt, rows, columns), f"{fmt.name} [{rows}, {columns}]")
        with self._errors("packing a weight"):
            flags, shape = self._cl.map_flags.WRITE, (tiles_of(rows), TILE_ROWS * fmt.row_bytes(columns))
            packed, _ = self._cl.enqueue_map_buffer(self.opened.queue, buffer, flags, 0, shape, np.dtype(np.uint8))
            pack(weight, packed)
            packed.base.release(self.opened.queue)
        return buffer

    def bind(self, call: BoundCall) -> Launch:
        op = check_call(call)
        call = BoundCall(call.op, call.tensors, op.with_defaults(call.attrs), call.label)
        kernel = self._kernels[call.op]
        check_memory(call, lambda buffer: buffer.size, self.packed_bytes)
        self.prepare([call.signature])
        with self._errors(f"binding {call.label or call.op}"):
            return Launches(tuple(kernel.bind(self, call)))

    def capture(self, launches: Sequence[Launch]) -> Launch:
        flat: list[Launch] = []
        for launch in launches:
            flat.extend(launch.parts if isinstance(launch, Launches) else [launch])
        replay, errors = launch_list(flat), self._errors

        def run() -> None:
            with errors("running a step"):
                replay()

        return run

    def synchronize(self) -> None:
        with self._errors("waiting for the device"):
            self.opened.queue.finish()

    def close(self) -> None:
        self.opened.close()
        self._programs.clear()
        self._scratch.clear()
        self._kept.clear()

    # What a backend with other kernels for the same devices replaces, with `pack` (backends/tvm/opencl.py)

    def kernels(self) -> dict[str, OpKernel]:
        return _kernels()

    def packed_bytes(self, fmt: str, shape: tuple[int, ...]) -> int:
        """Size of what `pack` returns for a weight."""
        return packed_bytes(FORMATS[fmt], *shape)

    def source(self, spec: ProgramSpec) -> tuple[str, list[str]]:
        """Whole source and options of a program, with what depends on the device."""
        text, options = spec.source()
        return text, [*options, *self._options]

    # What the op files use

    def scratch(self, name: str, nbytes: int) -> Any:
        """Device memory that holds nothing between launches; shared by all calls, since they run one after another."""
        buffer = self._scratch.get(name)
        if buffer is None or buffer.size < nbytes:
            buffer = self._scratch[name] = self._buffer(nbytes, f"scratch {name}")
        return buffer

    def enqueue(
        self, spec: ProgramSpec, name: str, size: tuple[int, ...], local: tuple[int, ...] | None, *args: Any
    ) -> Enqueue:
        """A launch of kernel `name` with its arguments set. Each has a kernel object of its own, so they stay set."""
        kernel = self._cl.Kernel(self._programs[spec], name)
        kernel.set_args(*args)
        return Enqueue(self.opened.queue, kernel, size, local, self._cl.enqueue_nd_range_kernel, args)

    def _buffer(self, nbytes: int, what: str) -> Any:
        info = self.opened.info
        if nbytes > self.opened.device.max_mem_alloc_size:
            limit = self.opened.device.max_mem_alloc_size
            raise DeviceError(f"{what} needs {nbytes} bytes in one buffer; {info.label} allows {limit}")
        with self._errors(f"allocating {nbytes} bytes for {what}"):
            buffer = self._cl.Buffer(self.opened.context, self._cl.mem_flags.READ_WRITE, max(1, nbytes))
        if info.runtime == "oclgrind":
            # Its check for uninitialised memory (21.10) forgets no released buffer: the next one at that address, if
            # larger, was reported beyond the size of the old.
            self._kept.append(buffer)
        return buffer

    @staticmethod
    def _errors(what: str) -> Any:
        from .device import named_errors

        return named_errors(what)


class OpenCLProvider:
    """Devices through PyOpenCL, imported when they are asked for."""

    spi_version = SPI_VERSION
    order: int | None = 20

    def devices(self) -> Sequence[DeviceInfo]:
        from .device import list_devices

        return [
            DeviceInfo(d.label, d.vendor, d.driver, d.memory_bytes, {"opencl_c": d.opencl_c, "type": d.type})
            for d in list_devices()
        ]

    def open(self, options: OpenOptions) -> OpenCLBackend:
        from . import fpga
        from .device import open_device

        if any(fpga.parse(options.device)):
            return fpga.open_fpga(options)
        return OpenCLBackend(open_device(options.device, options.threads), options.progress)

    def describe(self) -> Mapping[str, Any]:
        from . import cache, runtimes
        from .fpga import emulator

        report: dict[str, Any] = {
            "runtimes": runtimes.describe(), "fpga_emulator": emulator.describe(), "cache": cache.cache_info()
        }  # fmt: skip
        try:
            report["devices"] = [device.name for device in self.devices()]
        except BackendUnavailable as error:
            report["devices"] = str(error)
        return report


provider = OpenCLProvider()
