"""A stand-in for CuPy and an NVIDIA GPU, which cannot be had here: memory of this process, launches in Triton's
interpreter.

It has the names and arguments of CuPy 14 that backends/cuda/gpu.py uses (test_cuda_gpu.py compares them with the
installed CuPy), reads a launch's arguments from the addresses that cuLaunchKernel would be given, and holds launches
back while a stream is captured. "Code" is the pickled spec of a kernel.
"""

from __future__ import annotations

import ctypes
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from polykern.backends.cuda.compiler import Binary
from polykern.backends.cuda.interpreter import HostBuffer, InterpretedDevice
from polykern.backends.cuda.launch import KernelSpec, Launch, Pointer


class CUDARuntimeError(RuntimeError):
    pass


class CUDADriverError(RuntimeError):
    pass


class OutOfMemoryError(MemoryError):
    pass


class _Memory:
    def __init__(self, nbytes: int) -> None:
        self.buffer = HostBuffer(nbytes)
        self.ptr = self.buffer.address


class Stream:
    ptr = 0

    def __init__(self, non_blocking: bool = False) -> None:
        assert non_blocking, "the default stream would wait for every other"
        self.captured: list[Callable[[], None]] | None = None

    def begin_capture(self, mode: Any = None) -> None:
        self.captured = []

    def end_capture(self) -> Any:
        nodes, self.captured = self.captured, None
        assert nodes is not None

        def launch(stream: Stream) -> None:
            for node in nodes:
                node()

        return SimpleNamespace(launch=launch, upload=lambda stream: None, nodes=nodes)

    def synchronize(self) -> None:
        assert self.captured is None, "a stream that is captured cannot be waited for"


class StandIn:
    """The module. `free` bytes of memory are left; `fail` names the error that the next call of the driver raises."""

    __version__ = "14 (stand-in)"

    def __init__(self, capability: tuple[int, int] = (9, 0), free: int = 1 << 30, driver: int = 12090) -> None:
        self.free, self.fail, self.launched = free, "", list[str]()
        self.streams: list[Stream] = []
        self._functions: list[KernelSpec] = []
        self.shared_limits: dict[int, int] = {}  # bytes of dynamic shared memory that a function may ask for
        properties = {
            "name": b"Stand-in GPU", "major": capability[0], "minor": capability[1], "multiProcessorCount": 4,
            "sharedMemPerBlockOptin": 227 << 10, "totalGlobalMem": free,
        }  # fmt: skip
        self.cuda = SimpleNamespace(
            Device=lambda number: SimpleNamespace(use=lambda: None),
            Stream=self._stream,
            MemoryPool=lambda: SimpleNamespace(malloc=self._malloc, free_all_blocks=lambda: None),
            Event=None,
            memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            function=SimpleNamespace(Module=lambda: _Module(self)),
            driver=SimpleNamespace(
                CUDADriverError=CUDADriverError, launchKernel=self._launch, funcSetAttribute=self._set_attribute
            ),
            runtime=SimpleNamespace(
                CUDARuntimeError=CUDARuntimeError,
                driverGetVersion=lambda: driver, runtimeGetVersion=lambda: 12090, getDeviceCount=lambda: 1,
                getDeviceProperties=lambda number: properties, memGetInfo=lambda: (self.free, free),
                memcpyAsync=self._copy, memcpyHostToDevice=1, memcpyDeviceToHost=2, memcpyDeviceToDevice=3,
            ),
        )  # fmt: skip

    def _stream(self, non_blocking: bool = False) -> Stream:
        self.streams.append(Stream(non_blocking))
        return self.streams[-1]

    def _malloc(self, nbytes: int) -> _Memory:
        if nbytes > self.free:
            raise OutOfMemoryError(nbytes)
        self.free -= nbytes
        return _Memory(nbytes)

    def _copy(self, to: int, source: int, nbytes: int, kind: int, stream: int) -> None:
        self._may_fail()
        ctypes.memmove(to, source, nbytes)

    def _may_fail(self) -> None:
        if self.fail:
            raise CUDADriverError(self.fail)

    def add(self, code: bytes) -> int:
        self._functions.append(pickle.loads(code))  # noqa: S301 - our own
        return len(self._functions)

    def _set_attribute(self, function: int, attribute: int, value: int) -> None:
        assert attribute == 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        if value > self.cuda.runtime.getDeviceProperties(0)["sharedMemPerBlockOptin"]:
            raise CUDADriverError("CUDA_ERROR_INVALID_VALUE: invalid argument")
        self.shared_limits[function] = value

    def _launch(
        self, function: int, x: int, y: int, z: int, threads: int, _y: int, _z: int, shared: int, stream: int,
        parameters: int, extra: int,
    ) -> None:  # fmt: skip
        self._may_fail()
        if shared > self.shared_limits.get(function, 48 << 10):
            raise CUDADriverError("CUDA_ERROR_INVALID_VALUE: invalid argument")
        spec = self._functions[function - 1]
        assert threads == 32 * spec.warps
        assert extra == 0
        # Two more than the kernel's own: Triton's scratch memory.
        addresses = (ctypes.c_void_p * (len(spec.params) + 2)).from_address(parameters)
        arguments = {name: _value(kind, address) for (name, kind), address in zip(spec.params, addresses, strict=False)}
        run = InterpretedDevice().bind(Launch(spec, (x, y, z), arguments))
        captured = self.streams[-1].captured
        if captured is None:
            self.launched.append(spec.function)
            run()
        else:
            captured.append(run)


class _Module:
    def __init__(self, owner: StandIn) -> None:
        self._owner, self._function = owner, 0

    def load(self, code: bytes) -> None:
        self._function = self._owner.add(code)

    def get_function(self, symbol: str) -> Any:
        return SimpleNamespace(ptr=self._function)


def _value(kind: str, address: int | None) -> Any:
    assert address
    kind = kind.partition("/")[0]
    if kind.startswith("*"):
        at = ctypes.c_void_p.from_address(address).value or 0
        return Pointer(SimpleNamespace(address=at), 0, kind[1:])
    if kind == "fp32":
        return float(ctypes.c_float.from_address(address).value)
    assert kind == "i32"
    return int(ctypes.c_int32.from_address(address).value)


class StandInCompiler:
    """Instead of compiler.Compiler: its code only says which kernel it is."""

    def __init__(self, target: Any, driver: str = "") -> None:
        self.target = target

    def binaries(self, specs: Any, progress: Any = None) -> list[Binary]:
        return [Binary(pickle.dumps(spec), spec.function, 32 * spec.warps, 0, 32, 0, 0) for spec in specs]

    def close(self) -> None:
        pass


def array_at(buffer: Any, dtype: Any) -> Any:
    """What lies in a buffer of the stand-in."""
    return np.frombuffer(buffer.memory.buffer.array, dtype)
