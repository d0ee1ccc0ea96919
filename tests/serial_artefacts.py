"""Artefacts for `c` and `llvm`, run through ctypes with their manifest alone; and a backend made of such kernels."""

from __future__ import annotations

import ctypes
import math
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from polykern.backends.replay import launch_list
from polykern.backends.tvm.portable import emit, names
from polykern.backends.tvm.portable.machine import MACHINES
from polykern.kernels.op import NUMPY_DTYPES, Signature, TensorType
from polykern.kernels.quant import Array, Weight
from polykern.kernels.spi import BoundCall, DeviceInfo, Kernel, Launch, Unsupported

CC = ("gcc", "-std=c99", "-Wall", "-Werror", "-O2", "-shared", "-fPIC", "-ffp-contract=off")
SCALARS = {"int64": ctypes.c_int64, "int32": ctypes.c_int32}


def load(folder: Path, kernel: Mapping[str, Any]) -> Callable[..., None]:
    """A kernel of a manifest as a function: arrays by tensor name -> None; scratch is allocated, offsets are 0."""
    library = folder / f"{kernel['symbol']}.so"
    if not library.exists():
        subprocess.run([*CC, str(folder / kernel["file"]), "-o", str(library), "-lm"], check=True)
    function = ctypes.CDLL(str(library))[kernel["symbol"]]
    function.restype = None

    def call(**arrays: Array) -> None:
        arguments: list[Any] = []
        for argument in kernel["arguments"]:
            name = argument["name"]
            if argument["role"] == "scratch":
                arrays[name] = np.empty(argument["shape"], argument["dtype"])
            if argument["kind"] == "pointer":
                arguments.append(ctypes.c_void_p(arrays[name].ctypes.data))
            elif argument["kind"] == "offset":
                arguments.append(SCALARS[argument["dtype"]](0))
            else:
                row_stride = math.prod(kernel["tensors"][name]["shape"][1:])
                arguments.append(SCALARS[argument["dtype"]](row_stride))
        function(*arguments)

    return call


class SerialBackend:
    """Compiles each signature for a serial target, links it, and calls it on NumPy memory."""

    device, page_size = DeviceInfo("host"), 16

    def __init__(self, target: Any, folder: Path) -> None:
        self.target, self.folder = target, folder
        self.name = str(target.kind.name)
        self.machine = MACHINES[self.name]
        self._loaded: dict[str, tuple[Any, emit.Emitted]] = {}

    def supports(self, signature: Signature) -> Kernel | Unsupported:
        reason = emit.refusal(signature, self.machine)
        if reason:
            return Unsupported(signature.op, reason)
        return Kernel(f"{self.name}.{signature.op}", emit.numerics(signature, self.machine))

    def alloc(self, kind: TensorType) -> Array:
        return np.empty(math.prod(kind.shape), NUMPY_DTYPES[kind.dtype])

    def write(self, buffer: Array, array: Array, offset: int = 0) -> None:
        buffer[offset : offset + array.size] = array.reshape(-1)

    def read(self, buffer: Array, kind: TensorType, offset: int = 0) -> Array:
        return buffer[offset : offset + math.prod(kind.shape)].reshape(kind.shape).copy()

    def pack(self, weight: Weight) -> Array:
        return np.ascontiguousarray(weight.data).reshape(-1)

    def prepare(self, signatures: Sequence[Signature]) -> None:
        """All kernels in one library: a compiler's start costs more than a kernel."""
        wanted = {names.symbol(s): s for s in signatures if names.symbol(s) not in self._loaded}
        if not wanted:
            return
        emitted = {symbol: emit.emit(signature, self.target, symbol) for symbol, signature in wanted.items()}
        files: list[str] = []
        for symbol, kernel in emitted.items():
            path = self.folder / (symbol + self.machine.suffix)
            path.write_bytes(kernel.code)
            files.append(str(path))
        library = self.folder / f"kernels-{len(self._loaded)}-{next(iter(wanted))}.so"
        subprocess.run([*CC, *files, "-o", str(library), "-lm"], check=True)
        loaded = ctypes.CDLL(str(library))
        self._loaded.update((symbol, (loaded[symbol], kernel)) for symbol, kernel in emitted.items())

    def bind(self, call: BoundCall) -> Launch:
        self.prepare([call.signature])
        function, kernel = self._loaded[names.symbol(call.signature)]
        function.restype = None
        arguments: list[Any] = []
        held: list[Array] = []
        for parameter in kernel.parameters:
            if parameter.kind != "pointer":
                value = getattr(call.tensors[parameter.name], parameter.kind)
                arguments.append(SCALARS[parameter.dtype](value))
                continue
            if parameter.role == "scratch":
                held.append(np.empty(parameter.shape, parameter.dtype))
            else:
                held.append(call.tensors[parameter.name].buffer)
            arguments.append(ctypes.c_void_p(held[-1].ctypes.data))

        def launch() -> None:
            function(*arguments)
            assert held

        return launch

    def capture(self, launches: Sequence[Launch]) -> Launch:
        return launch_list(launches)

    def synchronize(self) -> None:
        """Every launch has ended when it returns."""

    def close(self) -> None:
        """Nothing to release."""
