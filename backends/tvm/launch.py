"""From a call of an op to kernels with their arguments: what every op's file in this folder builds on.

An op's file declares `KERNELS`, one `OpKernel` per op: which kernels it needs, what its arithmetic is, and how a call
is turned into launches. A kernel is written by an emitting function of that file; a `KernelSpec` names the function and
what the kernel is specialised for.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...kernels.op import NUMPY_DTYPES, Numerics, Signature
from ...kernels.spi import BoundCall, DeviceTensor

if TYPE_CHECKING:
    from . import TVMBackend

# emit.py's exp is within 2 ulp, 1 / sqrt within 1.5; the C library's tanhf and erff stay below 2 (glibc manual,
# "Known Maximum Errors in Math Functions").
FUNCTION_ULP = 4.0


@dataclass(frozen=True)
class KernelSpec:
    """A kernel: the emitting function and the keyword arguments it is called with. Equal specs are compiled once."""

    emit: Callable[..., None]
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        shown = (str(value) if not isinstance(value, bool) else name for name, value in self.options if value)
        return "-".join([self.emit.__name__, *shown])

    @property
    def symbol(self) -> str:
        """The kernel's name in object files."""
        return f"pk_{hashlib.sha256(self.identity.encode()).hexdigest()[:20]}"

    @property
    def identity(self) -> str:
        return f"{self.emit.__module__.rsplit('.', 1)[1]}.{self.emit.__name__}{self.options!r}"


def spec(emit: Callable[..., None], **options: Any) -> KernelSpec:
    return KernelSpec(emit, tuple(sorted(options.items())))


@dataclass(frozen=True)
class HostBuffer:
    """Memory of this process: `array` is uint8, aligned to a cache line (TVM's LLVM code may assume it)."""

    array: np.ndarray[Any, Any]

    @property
    def address(self) -> int:
        return self.array.ctypes.data

    @property
    def nbytes(self) -> int:
        return self.array.nbytes


@dataclass(frozen=True)
class Launch:
    """One kernel with its arguments, run by calling it. Holds the buffers its arguments point to."""

    backend: TVMBackend
    spec: KernelSpec
    arguments: np.ndarray[Any, Any]
    held: tuple[Any, ...]

    def __call__(self) -> None:
        self.backend.run_now((self,))


@dataclass(frozen=True)
class Launches:
    """Several kernels for one call, each reading what those before it wrote."""

    parts: tuple[Launch, ...]

    def __call__(self) -> None:
        if self.parts:
            self.parts[0].backend.run_now(self.parts)


@dataclass(frozen=True)
class OpKernel:
    """How this backend runs one op.

    kernels    the kernels a call of this signature needs, the one that does the work first
    numerics   what its arithmetic is
    bind       the launches of a call
    """

    op: str
    kernels: Callable[[TVMBackend, Signature], Sequence[KernelSpec]]
    numerics: Callable[[TVMBackend, Signature], Numerics]
    bind: Callable[[TVMBackend, BoundCall], Sequence[Launch]]


def address(tensor: DeviceTensor) -> int:
    """Where a tensor begins."""
    return tensor.buffer.address + tensor.offset * np.dtype(NUMPY_DTYPES[tensor.dtype]).itemsize


def place(tensor: DeviceTensor) -> tuple[int, int]:
    """Arguments of a tensor whose rows may be apart: address, row stride in elements."""
    return address(tensor), tensor.row_stride


def slots(values: Sequence[int | float]) -> np.ndarray[Any, Any]:
    """Arguments as 64-bit slots: integers and addresses as they are, floats as the bits of a float64."""
    return np.array([struct.unpack("<q", struct.pack("<d", v))[0] if isinstance(v, float) else int(v) for v in values],
                    np.int64)  # fmt: skip
