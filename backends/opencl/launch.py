"""From a call of an op to enqueued kernels: what every op's file in this folder builds on.

An op's file declares `KERNELS`, one `OpKernel` per op: which program it needs, what its arithmetic is, and how a call
is turned into launches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...kernels.op import Numerics, Signature
from ...kernels.spi import BoundCall, DeviceTensor, Launch

if TYPE_CHECKING:
    from . import OpenCLBackend

# OpenCL C 3.0, table 59 (single precision, full profile): exp 3, tanh 5, erf 16 ulp; 1 / sqrt is 2.5 + 3 ulp.
FUNCTION_ULP = 6.0
ERF_ULP = 16.0


@dataclass(frozen=True)
class ProgramSpec:
    """A program as files of this folder and preprocessor definitions; equal specs are built once.

    `constants` are definitions too: numbers that this folder's Python and its kernels share, the same in all programs
    of one label, which therefore does not show them.
    """

    files: tuple[str, ...]
    defines: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return " ".join([Path(self.files[-1]).stem, *self.defines])

    def source(self) -> tuple[str, list[str]]:
        """Whole source and options. No -cl-fast-relaxed-math: it gives exp and tanh errors no bound covers."""
        text = "\n".join(read_source(name) for name in self.files)
        return text, ["-cl-std=CL1.2", *(f"-D{define}" for define in (*self.defines, *self.constants))]


@cache
def read_source(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Enqueue:
    """One kernel with its arguments set, enqueued by calling it. Holds its buffers: the runtime does not."""

    queue: Any
    kernel: Any
    global_size: tuple[int, ...]
    local_size: tuple[int, ...] | None
    enqueue: Callable[..., Any]
    held: tuple[Any, ...]

    def __call__(self) -> None:
        self.enqueue(self.queue, self.kernel, self.global_size, self.local_size)


@dataclass(frozen=True)
class Launches:
    """Several kernels for one call; `capture` flattens them into one list."""

    parts: tuple[Launch, ...]

    def __call__(self) -> None:
        for part in self.parts:
            part()


@dataclass(frozen=True)
class OpKernel:
    """How this backend runs one op.

    programs   the programs a call of this signature needs
    numerics   what its arithmetic is
    bind       the launches of a call, arguments set
    """

    op: str
    programs: Callable[[Signature], Sequence[ProgramSpec]]
    numerics: Callable[[Signature], Numerics]
    bind: Callable[[OpenCLBackend, BoundCall], Sequence[Launch]]


def place(tensor: DeviceTensor) -> tuple[Any, ...]:
    """Kernel arguments of a tensor whose rows may be apart: buffer, offset, row stride."""
    return tensor.buffer, np.int64(tensor.offset), np.int64(tensor.row_stride)


def start(tensor: DeviceTensor) -> tuple[Any, ...]:
    """Kernel arguments of a dense tensor: buffer, offset."""
    return tensor.buffer, np.int64(tensor.offset)


def kv_define(signature: Signature) -> str:
    return "KV_HALF" if signature.tensors["k_pages"].dtype == "f16" else "KV_FLOAT"
