"""GPUs through CuPy: memory, one stream, launches through the driver, CUDA graphs.

CuPy is imported when devices are asked for, after the driver has been found: both can be missing, and say so.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import numpy as np

from ...kernels.errors import BackendUnavailable, DeviceError, DoesNotFit
from ...kernels.quant import Array
from ...kernels.spi import DeviceInfo
from .aot import fitting
from .compiler import Binary, Compiler
from .launch import KernelSpec, Launch, Pointer, Target

LEAST = (7, 5)  # compute capability: the first with the integer and half-precision instructions kernels use
WITHOUT = "`--device interpret` runs the kernels without a GPU"
STATIC_LIMIT = 48 << 10  # bytes of dynamic shared memory beyond which a function has to be told (cuFuncSetAttribute)
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, cuda.h
# After these nothing in the process can use the GPU again (CUDA Runtime API, "sticky" errors).
LOST = (
    "IllegalAddress", "LaunchFailure", "ILLEGAL_ADDRESS", "LAUNCH_FAILED", "EccUncorrectable", "ECC_UNCORRECTABLE",
    "HardwareStackError", "MisalignedAddress", "MISALIGNED_ADDRESS", "IllegalInstruction", "DevicesUnavailable",
)  # fmt: skip
FLUSHED = 256 << 20  # bytes written before each timed run, more than any L2 holds


def _driver() -> None:
    """Refuses where there is no NVIDIA driver at all."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendUnavailable(f"no NVIDIA driver found (libcuda.so.1): install one; {WITHOUT}") from error


def _cupy() -> Any:
    """CuPy with a driver that it can use."""
    _driver()
    try:
        import cupy
    except ImportError as error:
        raise BackendUnavailable(f"CuPy is not installed ({error}): pip install 'polykern[cuda]'") from error
    runtime = cupy.cuda.runtime
    driver, built = int(runtime.driverGetVersion()), int(runtime.runtimeGetVersion())
    if driver == 0:
        raise BackendUnavailable(f"the NVIDIA driver does not answer (libcuda.so.1 is there, no GPU is); {WITHOUT}")
    if driver // 1000 < built // 1000:
        raise BackendUnavailable(
            f"the NVIDIA driver supports CUDA {_version(driver)}, CuPy {cupy.__version__} was built for"
            f" {_version(built)}: update the driver, or install cupy-cuda{driver // 1000}x"
        )
    return cupy


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def list_devices() -> list[DeviceInfo]:
    """Every GPU, also those too old to be opened. Raises BackendUnavailable where there is none."""
    cupy = _cupy()
    try:
        return [_info(cupy, number) for number in range(int(cupy.cuda.runtime.getDeviceCount()))]
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise BackendUnavailable(f"{_named(error)}; {WITHOUT}") from error


def _info(cupy: Any, number: int) -> DeviceInfo:
    properties = cupy.cuda.runtime.getDeviceProperties(number)
    name = properties["name"].decode() if isinstance(properties["name"], bytes) else str(properties["name"])
    detail = {
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "multiprocessors": int(properties["multiProcessorCount"]),
        "shared_bytes": int(properties["sharedMemPerBlockOptin"]),
        "number": number,
        "type": "gpu",
    }
    driver = f"CUDA {_version(int(cupy.cuda.runtime.driverGetVersion()))}"
    return DeviceInfo(name, "NVIDIA", driver, int(properties["totalGlobalMem"]), detail)


def open_device(device: str | None) -> tuple[DeviceInfo, GpuDevice]:
    """The GPU named by its number or a part of its name; the first where None."""
    devices = list_devices()
    if not devices:
        raise BackendUnavailable(f"no NVIDIA GPU found; {WITHOUT}")
    if device is None:
        found = devices[0]
    else:
        matching = [
            info for number, info in enumerate(devices) if device == str(number) or device.lower() in info.name.lower()
        ]
        if not matching or (device.isdigit() and int(device) >= len(devices)):
            known = ", ".join(f"{number} ({info.name})" for number, info in enumerate(devices))
            raise BackendUnavailable(f"no GPU {device!r}: there is {known}, and `interpret`")
        found = devices[int(device)] if device.isdigit() else matching[0]
    capability = tuple(map(int, found.detail["compute_capability"].split(".")))
    if capability < LEAST:
        least = ".".join(map(str, LEAST))
        raise BackendUnavailable(
            f"{found.name} has compute capability {found.detail['compute_capability']}; kernels need {least} or more"
        )
    return found, GpuDevice(_cupy(), found)


def _named(error: Exception) -> str:
    return " ".join(str(error).split())


class GpuBuffer:
    """Device memory; it goes with the last reference."""

    def __init__(self, memory: Any, nbytes: int) -> None:
        self.memory, self.nbytes = memory, nbytes
        self.address = int(memory.ptr)


class GpuDevice:
    """One GPU and one stream: launches run in the order of their calls."""

    def __init__(self, cupy: Any, info: DeviceInfo) -> None:
        self._cupy, self.info = cupy, info
        detail = info.detail
        arch = str(detail["compute_capability"]).replace(".", "")
        self.target = fitting(Target("cuda", arch, detail["multiprocessors"], detail["shared_bytes"]))
        self._compiler = Compiler(self.target, info.driver)
        self._functions: dict[KernelSpec, tuple[Any, Binary]] = {}
        self._modules: list[Any] = []
        self._dynamic_shared: dict[KernelSpec, int] = {}
        self._pool = cupy.cuda.MemoryPool()
        with self._errors("opening the GPU"):
            cupy.cuda.Device(detail["number"]).use()
            self._stream = cupy.cuda.Stream(non_blocking=True)

    def alloc(self, nbytes: int, what: str) -> GpuBuffer:
        try:
            with self._errors(f"allocating {nbytes} bytes for {what}"):
                return GpuBuffer(self._pool.malloc(max(1, nbytes)), nbytes)
        except self._cupy.cuda.memory.OutOfMemoryError as error:
            free, total = self._cupy.cuda.runtime.memGetInfo()
            raise DoesNotFit(
                f"{self.info.name} is out of memory: {what} needs {nbytes} bytes, {free} of {total} are free; take a"
                " smaller --ctx or a model of fewer bits"
            ) from error

    def write(self, buffer: GpuBuffer, array: Array, offset: int) -> None:
        data = np.ascontiguousarray(array)
        runtime = self._cupy.cuda.runtime
        with self._errors("writing a buffer"):
            # On our stream and waited for: a plain copy may return before the last of it has arrived.
            runtime.memcpyAsync(
                buffer.address + offset, data.ctypes.data, data.nbytes, runtime.memcpyHostToDevice, self._stream.ptr
            )
            self._stream.synchronize()

    def read(self, buffer: GpuBuffer, shape: tuple[int, ...], dtype: Any, offset: int) -> Array:
        data, runtime = np.empty(shape, dtype), self._cupy.cuda.runtime
        if math.prod(shape):
            with self._errors("reading a buffer"):
                runtime.memcpyAsync(
                    data.ctypes.data, buffer.address + offset, data.nbytes, runtime.memcpyDeviceToHost, self._stream.ptr
                )
                self._stream.synchronize()
        return data

    def copy(self, buffer: GpuBuffer) -> GpuBuffer:
        """Another buffer with the same content."""
        found, runtime = self.alloc(buffer.nbytes, "a copy"), self._cupy.cuda.runtime
        with self._errors("copying a buffer"):
            runtime.memcpyAsync(
                found.address, buffer.address, buffer.nbytes, runtime.memcpyDeviceToDevice, self._stream.ptr
            )
        return found

    def load(self, launches: Sequence[Launch], progress: Callable[[int, int], None] | None = None) -> None:
        """Code of every kernel onto the GPU."""
        missing = [spec for spec in dict.fromkeys(x.spec for x in launches) if spec not in self._functions]
        for spec, binary in zip(missing, self._compiler.binaries(missing, progress), strict=True):
            with self._errors(f"loading {spec.label}"):
                module = self._cupy.cuda.function.Module()
                module.load(binary.code)
                self._modules.append(module)
                self._functions[spec] = (module.get_function(binary.symbol), binary)

    def bind(self, launch: Launch) -> Callable[[], None]:
        """A launch with its arguments where the driver looks for them; it is called thousands of times."""
        function, binary = self._functions[launch.spec]
        shared = launch.shared or binary.shared
        driver = self._cupy.cuda.driver
        self._allow_shared(launch.spec, shared)
        values = [_c_value(value) for value in launch.arguments.values()]
        values += [
            ctypes.c_void_p(0),
            ctypes.c_void_p(0),
        ]  # Triton's own: scratch memory, which no kernel of ours wants
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        x, y, z = (*launch.grid, 1, 1)[:3]
        held, stream, at = (values, pointers, launch), self._stream.ptr, ctypes.addressof(pointers)

        errors, label = self._errors, launch.spec.label

        def run(held: Any = held) -> None:
            try:
                driver.launchKernel(function.ptr, x, y, z, binary.threads, 1, 1, shared, stream, at, 0)
            except Exception:
                with errors(f"running {label}"):
                    raise

        return run

    def _allow_shared(self, spec: KernelSpec, nbytes: int) -> None:
        """Launches of one kernel share its limit: a smaller launch that is bound later must not lower it."""
        if nbytes > self._dynamic_shared.get(spec, STATIC_LIMIT):
            function, _ = self._functions[spec]
            with self._errors(f"asking for {nbytes} bytes of shared memory for {spec.label}"):
                self._cupy.cuda.driver.funcSetAttribute(function.ptr, MAX_DYNAMIC_SHARED, nbytes)
            self._dynamic_shared[spec] = nbytes

    def capture(self, parts: Sequence[Callable[[], None]]) -> Callable[[], None]:
        """One CUDA graph. A replay runs exactly these launches with these arguments."""
        frozen = tuple(parts)
        if not frozen:
            return lambda: None
        with self._errors("recording a step"):
            self._stream.begin_capture()
            try:
                for part in frozen:
                    part()
            finally:
                graph = self._stream.end_capture()
            graph.upload(self._stream)
        stream, errors = self._stream, self._errors

        def replay(held: Any = frozen) -> None:
            with errors("running a step"):
                graph.launch(stream)

        return replay

    def fastest(self, key: tuple[Any, ...], candidates: Sequence[Sequence[Launch]]) -> Sequence[Launch]:
        from .tuning import fastest

        return fastest(self, self.info, key, candidates)

    def time(self, run: Callable[[], None], repeats: int = 5) -> float:
        """Median milliseconds of `run`, with nothing of its data in L2."""
        event = self._cupy.cuda.Event
        flushed = self.alloc(FLUSHED, "a flush of L2")
        times: list[float] = []
        with self._errors("timing a kernel"):
            run()
            for _ in range(repeats):
                self._cupy.cuda.runtime.memsetAsync(flushed.address, 1, FLUSHED, self._stream.ptr)
                begin, end = event(), event()
                begin.record(self._stream)
                run()
                end.record(self._stream)
                end.synchronize()
                times.append(float(self._cupy.cuda.get_elapsed_time(begin, end)))
        return median(times)

    def copy_bandwidth(self) -> float:
        """GB/s that a copy of 1 GiB (or an eighth of the free memory) reads and writes, together."""
        free, _ = self._cupy.cuda.runtime.memGetInfo()
        nbytes = min(1 << 30, free // 8)
        source, target, runtime = self.alloc(nbytes, "a copy"), self.alloc(nbytes, "a copy"), self._cupy.cuda.runtime

        def run() -> None:
            runtime.memcpyAsync(target.address, source.address, nbytes, runtime.memcpyDeviceToDevice, self._stream.ptr)

        return 2 * nbytes / self.time(run, 9) / 1e6

    def synchronize(self) -> None:
        with self._errors("waiting for the GPU"):
            self._stream.synchronize()

    def close(self) -> None:
        self._compiler.close()
        self._functions.clear()
        self._modules.clear()
        self._pool.free_all_blocks()

    @contextmanager
    def _errors(self, what: str) -> Generator[None]:
        """Whatever the driver says, as one line."""
        try:
            yield
        except (self._cupy.cuda.runtime.CUDARuntimeError, self._cupy.cuda.driver.CUDADriverError) as error:
            text = _named(error)
            lost = "; the GPU is lost to this process: start it again" if any(name in text for name in LOST) else ""
            raise DeviceError(f"{self.info.name}: {what}: {text}{lost}") from error


def _c_value(value: Pointer | int | float) -> Any:
    if isinstance(value, Pointer):
        return ctypes.c_void_p(value.buffer.address + value.offset)
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int32(value)
