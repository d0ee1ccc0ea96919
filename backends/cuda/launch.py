"""From a call of an op to kernels with their arguments: what every op's file in this folder builds on.

An op's file declares `KERNELS`, one `OpKernel` per op: what its arithmetic is, and how a call is turned into launches.
Device code lies beside it: Triton in triton/*.py, CUDA C++ in *.cu. A `KernelSpec` names one of their functions and
what it is compiled for, so that it can be compiled without a device; a `Launch` adds the grid and the arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ...kernels.op import NUMPY_DTYPES, Numerics, Signature
from ...kernels.quant import FORMATS, QuantFormat
from ...kernels.spi import BoundCall, DeviceTensor
from . import formats

# CUDA C++ Programming Guide 12.9, table 13: expf 1, tanhf 2, erff 2, rsqrtf 2 ulp. Triton's exp is ex2.approx of a
# product, 2 ulp + rounding of the argument (PTX ISA 8.8, ex2: 2**-22.5); its tanh and erf are libdevice's.
FUNCTION_ULP = 6.0
TYPES = {"f32": "fp32", "f16": "fp16", "i32": "i32", "u32": "u32"}


@dataclass(frozen=True)
class Target:
    """What kernels are compiled for.

    kind             "cuda", "hip", or "interpret": Triton's interpreter, which runs the same source in NumPy
    arch             compute capability times ten ("90"), or AMD's name ("gfx942")
    multiprocessors  how many units a grid should fill
    shared_bytes     of memory that one block may have
    """

    kind: str
    arch: str
    multiprocessors: int
    shared_bytes: int

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.arch}" if self.arch else self.kind

    @property
    def is_interpreted(self) -> bool:
        return self.kind == "interpret"


@dataclass(frozen=True)
class KernelSpec:
    """A kernel, specialised: equal specs are compiled once.

    file       "gemm" (triton/gemm.py) or "gemv.cu"
    params     its arguments in order: name, and Triton's word for its type, with "/16" behind it where the value (an
               address, a stride, a number of columns) is a multiple of 16: then 16 bytes are loaded at once
    constants  what else it is compiled for: constexprs of Triton, definitions of CUDA C++
    warps      of 32 threads (AMD: 64) in a block; stages: loads that Triton keeps under way in a loop
    """

    file: str
    function: str
    params: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...] = ()
    warps: int = 4
    stages: int = 2

    @property
    def is_triton(self) -> bool:
        return not self.file.endswith(".cu")

    @property
    def label(self) -> str:
        shown = "-".join(f"{name.lower()}{value}" for name, value in self.constants if value)
        return f"{self.function}-{shown}" if shown else self.function


@dataclass(frozen=True)
class Pointer:
    """An argument: `offset` bytes into a buffer (None: some aligned buffer, when only the spec is wanted), of elements
    `dtype` in Triton's words."""

    buffer: Any
    offset: int
    dtype: str

    @property
    def type(self) -> str:
        return f"*{self.dtype}" + ("/16" if self.offset % 16 == 0 else "")


Argument = Pointer | int | float


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and its arguments, by name, in order. `shared`: bytes CUDA C++ asks for at launch."""

    spec: KernelSpec
    grid: tuple[int, ...]
    arguments: Mapping[str, Argument]
    shared: int = 0


def launch(
    file: str, function: str, grid: tuple[int, ...], arguments: Mapping[str, Argument],
    constants: Mapping[str, Any] | None = None, warps: int = 4, stages: int = 2, shared: int = 0,
) -> Launch:  # fmt: skip
    params = tuple((name, _type_of(name, value)) for name, value in arguments.items())
    if file.endswith(".cu"):  # looks at the addresses itself: one binary for aligned ones and others
        params = tuple((name, kind.removesuffix("/16")) for name, kind in params)
    spec = KernelSpec(file, function, params, tuple((constants or {}).items()), warps, stages)
    return Launch(spec, grid, arguments, shared)


def _type_of(name: str, value: Argument) -> str:
    """Of whole numbers only strides say whether they are aligned: a context of 4096 or 4097 takes the same kernel."""
    if isinstance(value, Pointer):
        return value.type
    if isinstance(value, float):
        return "fp32"
    return "i32/16" if name.endswith(("_stride", "columns")) and value % 16 == 0 else "i32"


class Planner(Protocol):
    """What op files ask for while they turn a call into launches: the backend, or a stand-in without a device."""

    target: Target

    def scratch(self, name: str, nbytes: int) -> Any:
        """A buffer that holds nothing between calls; shared by all, since they run one after another."""
        ...

    def choose(self, key: tuple[Any, ...], candidates: Sequence[Sequence[Launch]]) -> Sequence[Launch]:
        """The fastest of several ways to do the same (equal promises of arithmetic); the first where nothing can be
        timed. `key` says what decides: op, format, shape."""
        ...


class Sketch:
    """A Planner without a device: for the specs alone, as `prepare` and ahead-of-time compilation want them."""

    def __init__(self, target: Target, every: bool = False) -> None:
        self.target = target
        self._every = every

    def scratch(self, name: str, nbytes: int) -> Any:
        return None

    def choose(self, key: tuple[Any, ...], candidates: Sequence[Sequence[Launch]]) -> Sequence[Launch]:
        """Only the first, or with `every` all of them: whichever is chosen later, its code is there."""
        return [launch for one in candidates for launch in one] if self._every else candidates[0]


@dataclass(frozen=True)
class OpKernel:
    """How this backend runs one op: what its arithmetic is, and the launches of a call in order."""

    op: str
    numerics: Callable[[Target, Signature], Numerics]
    bind: Callable[[Planner, BoundCall], Sequence[Launch]]


@dataclass(frozen=True)
class PackedWeight:
    """What `pack` returns: one buffer with the planes of formats.py."""

    buffer: Any
    format: QuantFormat
    shape: tuple[int, int]


def sketch_of(signature: Signature) -> BoundCall:
    """A call of this signature with dense, aligned tensors and no memory."""
    tensors = {
        name: DeviceTensor(None, kind.shape, kind.dtype, 0, int(np.prod(kind.shape[1:])))
        for name, kind in signature.tensors.items()
    }
    return BoundCall(signature.op, tensors, signature.attrs)


def pointer(tensor: DeviceTensor) -> Pointer:
    """Argument of a dense tensor."""
    return Pointer(tensor.buffer, tensor.offset * np.dtype(NUMPY_DTYPES[tensor.dtype]).itemsize, TYPES[tensor.dtype])


def place(name: str, tensor: DeviceTensor) -> dict[str, Argument]:
    """Arguments `name` and `name`_stride of a tensor whose rows may be apart."""
    return {name: pointer(tensor), f"{name}_stride": tensor.row_stride}


def room(planner: Planner, name: str, nbytes: int, dtype: str = "fp32") -> Pointer:
    """Argument of scratch memory."""
    return Pointer(planner.scratch(name, nbytes), 0, dtype)


def weight_arguments(name: str, tensor: DeviceTensor) -> dict[str, Argument]:
    """Arguments `name`_quants, _high, _scales and _supers; a plane that a format lacks is its quants."""
    fmt = FORMATS[tensor.dtype]
    buffer = tensor.buffer.buffer if tensor.buffer is not None else None
    there = formats.planes(fmt, tensor.shape[0], tensor.shape[1])
    types = formats.dtypes(fmt)

    def plane(which: str) -> Pointer:
        found = which if which in there else "quants"
        return Pointer(buffer, there[found][0], types[found])

    return {f"{name}_{which}": plane(which) for which in formats.PLANES}


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is at least n: what Triton's blocks must be."""
    return 1 << max(0, n - 1).bit_length()


@dataclass
class Captured:
    """What `bind` hands out: launches ready to run on their device, one after the other."""

    parts: tuple[Callable[[], None], ...]
    launches: tuple[Launch, ...] = field(default=())

    def __call__(self) -> None:
        for part in self.parts:
            part()
