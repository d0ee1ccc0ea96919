"""The device `interpret`: Triton's interpreter, which runs the kernels' source in NumPy on memory of this process.

It needs no GPU and proves what kernels compute, not how fast. Every program of a grid runs one after another; races
between programs do not show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...kernels.errors import DeviceError
from ...kernels.quant import Array
from .launch import Launch, Pointer, Target
from .sources import jitted

ALIGNMENT = 256
TARGET = Target("interpret", "", 1, 1 << 30)


class HostBuffer:
    """Memory of this process; `nbytes` are what was asked for. `guard` bytes behind it belong to it as well: a masked
    lane's address may lie past the end, but nothing is read there."""

    def __init__(self, nbytes: int) -> None:
        try:
            raw = np.empty(max(1, nbytes) + ALIGNMENT, np.uint8)
        except MemoryError as error:
            raise DeviceError(f"out of memory: {nbytes} bytes asked for") from error
        start = -raw.ctypes.data % ALIGNMENT
        self.array = raw[start : start + max(1, nbytes)]
        self.nbytes = nbytes
        self.address = self.array.ctypes.data


class _Tensor:
    """What the interpreter asks of a tensor: as much of torch.Tensor's interface as it uses, over an address.

    It takes torch tensors only by their methods; with these it need not copy whole storages back after each launch,
    and torch need not be there.
    """

    def __init__(self, address: int, dtype: str) -> None:
        self._address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self._address

    def untyped_storage(self) -> _Tensor:
        return self

    def cpu(self) -> _Tensor:
        return self

    def copy_(self, other: Any) -> None:
        """The memory is the same."""

    def new_empty(self, *size: Any, **options: Any) -> _Tensor:
        return _Tensor(self._address, self.dtype)

    def set_(self, *place: Any) -> _Tensor:
        return self

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return ()

    def stride(self) -> tuple[int, ...]:
        return ()

    def element_size(self) -> int:
        return int(np.dtype({"bf16": "u2"}.get(self.dtype, self.dtype.replace("fp", "f"))).itemsize)


class InterpretedDevice:
    """Memory and launches. All run when they are called."""

    target = TARGET

    def alloc(self, nbytes: int, what: str) -> HostBuffer:
        return HostBuffer(nbytes)

    def write(self, buffer: HostBuffer, array: Array, offset: int) -> None:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        buffer.array[offset : offset + data.nbytes] = data

    def read(self, buffer: HostBuffer, shape: tuple[int, ...], dtype: Any, offset: int) -> Array:
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        return buffer.array[offset : offset + nbytes].view(dtype).reshape(shape).copy()

    def load(self, launches: Sequence[Launch], progress: Callable[[int, int], None] | None = None) -> None:
        """Nothing to compile."""

    def bind(self, launch: Launch) -> Callable[[], None]:
        spec = launch.spec
        kernel = jitted(spec, interpreted=True)
        arguments = [self._value(value) for value in launch.arguments.values()]
        constants, held = dict(spec.constants), launch

        def run(held: Launch = held) -> None:
            with np.errstate(all="ignore"):  # NumPy warns where a GPU computes inf or NaN
                kernel[launch.grid](*arguments, **constants)

        return run

    def capture(self, parts: Sequence[Callable[[], None]]) -> Callable[[], None]:
        frozen = tuple(parts)

        def replay() -> None:
            for part in frozen:
                part()

        return replay

    def fastest(self, key: tuple[Any, ...], candidates: Sequence[Sequence[Launch]]) -> Sequence[Launch]:
        """The first: nothing can be timed."""
        return candidates[0]

    def synchronize(self) -> None:
        """A launch has ended when it returns."""

    def close(self) -> None:
        """Memory goes with its buffers."""

    @staticmethod
    def _value(value: Any) -> Any:
        return _Tensor(value.buffer.address + value.offset, value.dtype) if isinstance(value, Pointer) else value
