"""Writes one kernel as TIR: parameters from the signature, work shared out to threads or loops, sums over lanes.

A kernel of this package is a function that fills a `Builder`, and every target's code comes from the same function: on
a target with threads, `each` and `groups` become a grid of work-groups, on a serial one loops.

Parameters, in this order: a pointer for each tensor of the signature (in the op's order), one for each scratch buffer,
then for each tensor but weights its offset in elements and, where it has more than one axis, its row stride.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ....kernels.op import Signature
from ....kernels.ops import OPS
from ....kernels.quant import FORMATS
from .machine import Machine

Expr = Any  # a TIR expression, or a Python number where one is converted
DTYPES = {"f32": "float32", "f16": "float16", "i32": "int32", "u32": "uint32"}
FLAT = 2**31 - 1  # length of a parameter's buffer; nothing depends on it, but TIR wants one


@dataclass(frozen=True)
class Parameter:
    """One argument of a kernel, as the manifest lists it.

    kind   "pointer", "offset" or "row_stride"; the last two belong to the tensor `name`
    dtype  what is pointed to, or the scalar's own
    role   the op's (in, out, inout, clobber, weight), or scratch
    axes   of the tensor, with `shape`; scratch has a shape only
    """

    kind: str
    name: str
    dtype: str
    role: str
    axes: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    stored: str = ""  # dtype of the tensor itself, or the weight format


def _dtype(value: Expr) -> str:
    """TVM's name of an expression's type."""
    return str(value.ty.dtype)


class Tensor:
    """A parameter's tensor: `x[t, i]` is an expression, `x[t, i] = value` a statement."""

    def __init__(self, builder: Builder, name: str, flat: Any, shape: tuple[int, ...], dtype: str) -> None:
        self.builder, self.name, self.flat, self.shape, self.dtype = builder, name, flat, shape, dtype
        self.offset: Expr = None
        self.row_stride: Expr = None

    def _place(self, index: Expr | tuple[Expr, ...]) -> Expr:
        first, *rest = index if isinstance(index, tuple) else (index,)
        wide = self.builder.wide
        place = wide(first) if self.row_stride is None else wide(first) * self.row_stride
        if self.offset is not None:
            place = self.offset + place
        for axis, i in enumerate(rest, start=2):
            step = math.prod(self.shape[axis:])
            place = place + (wide(i) * wide(step) if step != 1 else wide(i))
        return place

    def __getitem__(self, index: Expr | tuple[Expr, ...]) -> Expr:
        value = self.flat[self._place(index)]
        if self.dtype != "f16":
            return value
        if self.builder.machine.half:
            return value.astype("float32")
        return self.builder.half_to_float(value.astype("uint32"))

    def __setitem__(self, index: Expr | tuple[Expr, ...], value: Expr) -> None:
        if self.dtype == "f16":
            half = self.builder.machine.half
            value = value.astype("float16") if half else self.builder.float_to_half(value).astype("uint16")
        self.builder.store(self.flat, value, self._place(index))


class Local:
    """Memory of one work-item: registers, once the target's compiler has unrolled."""

    def __init__(self, builder: Builder, flat: Any) -> None:
        self.builder, self.flat = builder, flat

    def __getitem__(self, i: Expr) -> Expr:
        return self.flat[i]

    def __setitem__(self, i: Expr, value: Expr) -> None:
        self.builder.store(self.flat, value, i)


class Cell:
    """One number that changes."""

    def __init__(self, local: Local) -> None:
        self._local = local

    @property
    def value(self) -> Expr:
        return self._local[0]

    def set(self, value: Expr) -> None:
        self._local[0] = value

    def add(self, value: Expr) -> None:
        self.set(self.value + value)


class Builder:
    """The kernel of one signature, named `symbol`, for one machine. Use it as a context manager; then `function`."""

    def __init__(self, signature: Signature, machine: Machine, target: Any, symbol: str) -> None:
        from tvm import ir, tirx
        from tvm.tirx.script.builder import ir as statements

        self.signature, self.machine, self.symbol = signature, machine, symbol
        self.tirx, self.T = tirx, statements
        self._target, self._expression = target, ir.Expr
        self.parameters: list[Parameter] = []
        self.tensors: dict[str, Any] = {}
        self.grid, self.lanes = 1, machine.lanes
        self.function: Any = None
        self.lane: Expr = 0
        self._shared: dict[str, Any] = {}

    @contextmanager
    def kernel(self, **scratch: tuple[str, tuple[int, ...]]) -> Generator[dict[str, Any]]:
        """The function around the statements; gives its tensors by name. `scratch` adds buffers: dtype and shape."""
        from tvm.script.ir_builder import IRBuilder

        with IRBuilder() as ir, self.T.prim_func(s_tir=True):
            self.T.func_name(self.symbol)
            self._declare(scratch)
            attrs: dict[str, Any] = {"global_symbol": self.symbol, "target": self._target, "tirx.noalias": True}
            if not self.machine.is_serial:
                attrs["calling_conv"] = 2  # DEVICE_KERNEL_LAUNCH: the code generators of devices take nothing else
                attrs["tirx.kernel_launch_params"] = ["blockIdx.x", "threadIdx.x"]
            attrs["tirx.is_global_func"] = True
            self.T.func_attr(attrs)
            for tensor in self.tensors.values():
                length = self.tirx.const(FLAT, self.machine.index)
                tensor.flat = self.T.decl_buffer((length,), tensor.flat[1], data=tensor.flat[0])
            yield self.tensors
        self.function = ir.get()

    def _declare(self, scratch: dict[str, tuple[str, tuple[int, ...]]]) -> None:
        from .weights import WeightRows

        op, machine = OPS[self.signature.op], self.machine
        present = [
            (param, self.signature.tensors[param.name]) for param in op.params if param.name in self.signature.tensors
        ]
        for param, kind in present:
            fmt = FORMATS.get(kind.dtype) if param.role == "weight" else None
            if fmt:
                dtype = "uint32" if fmt.name == "F32" or machine.word_bits == 32 else "uint16"
            else:
                dtype = DTYPES[kind.dtype]
                dtype = "uint16" if dtype == "float16" and not machine.half else dtype
            data = self.T.arg(param.name, self.T.handle(dtype, "global"))
            self.parameters.append(
                Parameter("pointer", param.name, dtype, param.role, param.axes, kind.shape, kind.dtype)
            )
            flat = (data, dtype)
            self.tensors[param.name] = (
                WeightRows(self, flat, fmt, kind.shape[1])
                if fmt
                else Tensor(self, param.name, flat, kind.shape, kind.dtype)
            )
        for name, (dtype, shape) in scratch.items():
            data = self.T.arg(name, self.T.handle(DTYPES[dtype], "global"))
            self.parameters.append(Parameter("pointer", name, DTYPES[dtype], "scratch", (), shape, dtype))
            self.tensors[name] = tensor = Tensor(self, name, (data, DTYPES[dtype]), shape, dtype)
            tensor.row_stride = self.wide(math.prod(shape[1:]))
        for param, kind in present:
            tensor = self.tensors[param.name]
            if isinstance(tensor, Tensor):
                tensor.offset = self._scalar("offset", param.name, param.role)
                if len(kind.shape) > 1:
                    tensor.row_stride = self._scalar("row_stride", param.name, param.role)

    def _scalar(self, kind: str, name: str, role: str) -> Expr:
        self.parameters.append(Parameter(kind, name, self.machine.index, role))
        full = f"{name}_{kind}"
        return self.T.arg(full, self.tirx.Var(full, self.machine.index))

    # Sharing out work

    def widen(self, lanes: int) -> None:
        """More lanes than usual, where there are any: for long rows. Before the first statement."""
        if not self.machine.is_serial:
            self.lanes = lanes

    @contextmanager
    def each(self, *extents: int) -> Generator[tuple[Expr, ...]]:
        """Independent items, one work-item each: the indices of one of them."""
        count, lanes = math.prod(extents), self.lanes
        if self.machine.is_serial:
            with self.T.serial(count) as item:
                yield self._unravel(item, extents)
            return
        self.grid = -(-count // lanes)
        with self._launch() as block:
            item = self.keep(block * lanes + self.lane)
            with self.when(item < count):
                yield self._unravel(item, extents)

    @contextmanager
    def groups(self, *extents: int, reduces: tuple[str, ...] = ("f32",)) -> Generator[tuple[Expr, ...]]:
        """Items that all lanes of a work-group work on together: `share` and `reduce`.

        `reduces` are the dtypes of what is reduced: OpenCL wants shared memory declared before any branch or loop.
        """
        count = math.prod(extents)
        if self.machine.is_serial:
            with self.T.serial(count) as item:
                yield self._unravel(item, extents)
            return
        self.grid = count
        with self._launch() as block:
            for dtype in reduces:
                self._shared[DTYPES[dtype]] = self.T.alloc_buffer((self.lanes,), DTYPES[dtype], scope="shared")
            yield self._unravel(block, extents)

    @contextmanager
    def _launch(self) -> Generator[Expr]:
        launch = self.T.launch_thread
        with launch("blockIdx.x", self.grid) as block, launch("threadIdx.x", self.lanes) as self.lane:
            yield block

    def _unravel(self, item: Expr, extents: tuple[int, ...]) -> tuple[Expr, ...]:
        indices: list[Expr] = []
        for place, extent in enumerate(extents):
            inner = math.prod(extents[place + 1 :])
            index = item if inner == 1 else self.quotient(item, inner)
            indices.append(index if place == 0 else self.remainder(index, extent))
        return tuple(self.keep(index) for index in indices)

    @contextmanager
    def share(self, count: int) -> Generator[Expr]:
        """0 .. count-1, every `lanes`-th for each lane of a group."""
        lanes = self.lanes
        with self.T.serial(-(-count // lanes)) as step:
            if lanes == 1:
                yield step
                return
            item = self.keep(step * lanes + self.lane)
            if count % lanes == 0:
                yield item
                return
            with self.when(item < count):
                yield item

    @contextmanager
    def stretch(self, count: int) -> Generator[Expr]:
        """0 .. count-1, for each lane of a group a part in one piece; the pieces are in the order of the lanes.

        A lane finds again what it wrote to scratch, which needs no fence for global memory.
        """
        lanes = self.lanes
        if lanes == 1:
            with self.T.serial(count) as item:
                yield item
            return
        length = -(-count // lanes)
        with self.T.serial(length) as step:
            item = self.keep(self.lane * length + step)
            with self.when(item < count):
                yield item

    @contextmanager
    def stride(self, first: Expr, stop: Expr, lanes: int) -> Generator[Expr]:
        """first .. stop-1, each for one of the first `lanes` lanes of a group."""
        if self.machine.is_serial:
            with self.T.serial(first, stop) as item:
                yield item
            return
        with self.when(self.lane < lanes):
            steps = self.quotient(stop - first + (lanes - 1), lanes)
            with self.T.serial(self.largest(steps, 0)) as step:
                item = self.keep(first + step * lanes + self.lane)
                with self.when(item < stop):
                    yield item

    def reduce(self, cells: Sequence[Cell], combine: Any = None) -> None:
        """Combine each cell over the lanes of the group; every lane has the result. Default: the sum.

        A tree, so the longest chain is log2(lanes). `combine` gets and returns a list with a number of each cell; the
        cells of one call differ in their dtype.
        """
        lanes = self.lanes
        if lanes == 1:
            return
        combine = combine or (lambda mine, other: [a + b for a, b in zip(mine, other, strict=True)])
        shared = [self._shared[_dtype(cell.value)] for cell in cells]
        assert len(set(map(id, shared))) == len(cells), "two cells of one dtype"
        for cell, memory in zip(cells, shared, strict=True):
            self.store(memory, cell.value, self.lane)
        width = lanes // 2
        while width:
            self.barrier()
            with self.when(self.lane < width):
                mine = [self.keep(memory[self.lane]) for memory in shared]
                other = [self.keep(memory[self.lane + width]) for memory in shared]
                for memory, value in zip(shared, combine(mine, other), strict=True):
                    self.store(memory, value, self.lane)
            width //= 2
        self.barrier()
        for cell, memory in zip(cells, shared, strict=True):
            cell.set(memory[0])
        self.barrier()

    def shared(self, count: int) -> Local:
        """float32 memory of all lanes of a group; `barrier` between writing and reading."""
        return Local(self, self.T.alloc_buffer((count,), "float32", scope="shared"))

    def barrier(self) -> None:
        """Lanes wait for each other, and see what the others wrote to shared memory."""
        if not self.machine.is_serial:
            self.T.evaluate(self.tirx.op.tvm_storage_sync("shared"))

    @contextmanager
    def first_lane(self) -> Generator[None]:
        """Statements for one lane of the group."""
        if self.machine.is_serial:
            yield
            return
        with self.when(self.lane == 0):
            yield

    # Statements and expressions

    @contextmanager
    def when(self, condition: Expr) -> Generator[None]:
        with self.T.If(condition), self.T.Then():
            yield

    @contextmanager
    def loop(self, start: Expr, stop: Expr = None) -> Generator[Expr]:
        with self.T.serial(start) if stop is None else self.T.serial(start, stop) as i:
            yield i

    def store(self, flat: Any, value: Expr, index: Expr) -> None:
        self.T.buffer_store(flat, value, [index])

    def keep(self, value: Expr) -> Expr:
        """Compute a value once, here.

        Whole numbers by name. Others through a memory cell: TVM's code generators analyse what a name stands for, and
        what the names in it stand for, which takes minutes for chains like Philox.
        """
        if not isinstance(value, self._expression):
            return value
        dtype = _dtype(value)
        if dtype not in ("float32", "uint32"):
            return self.T.Bind(value)
        return self.cell(value, "f32" if dtype == "float32" else "u32").value

    def array(self, count: int, dtype: str = "f32") -> Local:
        scope = "global" if self.machine.is_serial else "local"  # a local array, in TVM's words for either
        return Local(self, self.T.alloc_buffer((count,), DTYPES[dtype], scope=scope))

    def cell(self, value: Expr, dtype: str = "f32") -> Cell:
        made = Cell(self.array(1, dtype))
        made.set(self.constant(value, dtype) if isinstance(value, (int, float)) else value)
        return made

    def constant(self, value: float, dtype: str = "f32") -> Expr:
        """A number; a float32 to the last bit: TVM writes six decimals into the source of most targets."""
        if dtype == "f32":
            single = np.float32(value)
            if np.float32(f"{single:e}") != single:
                return self.as_float(self.tirx.const(int(single.view(np.uint32)), "uint32"))
            value = float(single)
        return self.tirx.const(value, DTYPES[dtype])

    def wide(self, value: Expr) -> Expr:
        """A number as an index."""
        if isinstance(value, int):
            return self.tirx.const(value, self.machine.index)
        return value.astype(self.machine.index)

    def quotient(self, a: Expr, b: Expr) -> Expr:
        """a / b towards zero: what the hardware does (TIR's // rounds down)."""
        return a // b if isinstance(a, int) else self.tirx.truncdiv(a, b)

    def remainder(self, a: Expr, b: Expr) -> Expr:
        return self.tirx.truncmod(a, b)

    def select(self, condition: Expr, yes: Expr, no: Expr) -> Expr:
        """One of two values; both may be computed."""
        return self.tirx.Select(condition, yes, no)

    def both(self, *conditions: Expr) -> Expr:
        return self.tirx.all(*conditions)

    def either(self, *conditions: Expr) -> Expr:
        return self.tirx.any(*conditions)

    def least(self, a: Expr, b: Expr) -> Expr:
        return self.tirx.min(a, b)

    def largest(self, a: Expr, b: Expr) -> Expr:
        return self.tirx.max(a, b)

    def as_float(self, bits: Expr) -> Expr:
        if self.machine.as_float:
            return self.tirx.call_pure_extern("float32", self.machine.as_float, bits)
        return self.tirx.op.reinterpret("float32", bits)

    def as_bits(self, value: Expr) -> Expr:
        if self.machine.as_bits:
            return self.tirx.call_pure_extern("uint32", self.machine.as_bits, value)
        return self.tirx.op.reinterpret("uint32", value)

    def sqrt(self, value: Expr) -> Expr:
        name = self.machine.sqrt
        call = self.tirx.call_llvm_pure_intrin if name.startswith("llvm.") else self.tirx.call_pure_extern
        return call("float32", name, value)

    @cached_property
    def infinity(self) -> Expr:
        return self.as_float(self.constant(0x7F800000, "u32"))

    @cached_property
    def minus_infinity(self) -> Expr:
        return self.as_float(self.constant(0xFF800000, "u32"))

    @cached_property
    def nan(self) -> Expr:
        return self.as_float(self.constant(0x7FC00000, "u32"))

    def half_to_float(self, bits: Expr) -> Expr:
        from .maths import half_to_float

        return half_to_float(self, bits)

    def float_to_half(self, value: Expr) -> Expr:
        from .maths import float_to_half

        return float_to_half(self, value)
