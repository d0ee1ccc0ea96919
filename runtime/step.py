"""Plans made runnable: buffers on the device, weights packed, native calls bound and captured, the rest on the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from ..kernels.errors import ContractError, DeviceError, PolykernError
from ..kernels.host import DenseWeight, dense_stride, run_reference, span, strided
from ..kernels.op import NUMPY_DTYPES, TensorType, type_of
from ..kernels.ops import OPS
from ..kernels.program import BufferSpec, View
from ..kernels.quant import Array, Weight
from ..kernels.spi import Backend, BoundCall, Buffer, DeviceTensor, Launch, Progress
from .plan import Plan, PlannedCall

HostValue = Any  # Array | Weight, or a function that returns one


@contextmanager
def vendor_errors(backend: Backend, what: str) -> Generator[None]:
    """Turns whatever a backend's own code raises into a DeviceError that names the backend and what it was doing."""
    try:
        yield
    except PolykernError:
        raise
    except Exception as error:
        raise DeviceError(f"{backend.name} failed {what}: {type(error).__name__}: {error}") from error


def row_stride_of(view: View) -> int:
    return dense_stride(view.shape) if view.row_stride is None else view.row_stride


@dataclass
class Step:
    """One program, ready to run again and again.

    `segments` alternate between captured runs of native launches and single calls on the host.
    """

    name: str
    backend: Backend
    segments: list[Launch] = field(default_factory=list[Launch])
    buffers: dict[str, tuple[Buffer, BufferSpec]] = field(default_factory=dict[str, tuple[Buffer, BufferSpec]])

    def run(self) -> None:
        """Enqueue the whole program; `read` or `Backend.synchronize` waits for it."""
        with vendor_errors(self.backend, f"running {self.name}"):
            for segment in self.segments:
                segment()

    def write(self, name: str, array: Array, offset: int = 0) -> None:
        """Put `array` into a buffer of this program, from element `offset` on."""
        _write(self.backend, self._find(name), array, offset)

    def read(self, name: str, shape: tuple[int, ...] | None = None, offset: int = 0) -> Array:
        """A copy of a buffer of this program (the whole of it, or `shape` from element `offset` on)."""
        return _read(self.backend, self._find(name), shape, offset)

    def _find(self, name: str) -> tuple[Buffer, BufferSpec]:
        if name not in self.buffers:
            raise ContractError(f"{self.name} has no buffer {name!r}")
        return self.buffers[name]


class Executable:
    """Weights and state on one backend, shared by name between the steps compiled for it (decode, prefill chunks).

    Scratch buffers are shared as well, where their size allows it: steps run one after the other.
    """

    def __init__(self, backend: Backend, progress: Progress | None = None) -> None:
        self.backend = backend
        self._progress = progress
        self._host: dict[str, HostValue] = {}  # weights by name, as given (a memory-mapped file costs nothing)
        self._release: dict[str, Callable[[], None]] = {}
        self._on_host: dict[str, DenseWeight] = {}  # those that calls on the host need, dequantised on first use
        self._device: dict[str, tuple[Buffer, BufferSpec]] = {}  # weights and state
        self._scratch: dict[str, tuple[Buffer, TensorType]] = {}

    def add_weight(
        self,
        name: str,
        value: Weight | Array | Callable[[], Weight | Array],
        release: Callable[[], None] | None = None,
    ) -> None:
        """Give the host value of a "weight" buffer, a Weight for a matrix, an array for a vector; `compile` packs it.

        A function is called when a program needs the value, and the value not kept: for what must be put together.
        `release` is called when the device has its copy; the value may be needed again all the same, on the host.
        """
        if name in self._host or name in self._device:
            raise ContractError(f"weight {name!r} was added before")
        self._host[name] = value
        if release:
            self._release[name] = release

    def release_weights(self) -> None:
        """Forget the host copies; a later `compile` can only use weights that an earlier one packed."""
        self._host.clear()

    def write(self, name: str, array: Array, offset: int = 0) -> None:
        """Put `array` into a state buffer, from element `offset` on. Raises ContractError if it does not fit."""
        _write(self.backend, self._find(name), array, offset)

    def read(self, name: str, shape: tuple[int, ...] | None = None, offset: int = 0) -> Array:
        """A copy of a state buffer (the whole of it, or `shape` from element `offset` on); waits for the device."""
        return _read(self.backend, self._find(name), shape, offset)

    def _find(self, name: str) -> tuple[Buffer, BufferSpec]:
        if name not in self._device:
            raise ContractError(f"no state buffer {name!r} in any compiled program")
        return self._device[name]

    def compile(self, plan: Plan) -> Step:
        """Compile kernels, allocate, pack and bind everything the plan needs.

        Raises ContractError for a missing or misshapen weight, or a buffer that an earlier program declared otherwise;
        DeviceError for a kernel that the backend promised and could not bind. State starts uninitialised.
        """
        if plan.backend is not self.backend:
            raise ContractError(f"{plan.program.name} was planned for another open backend than it is compiled on")
        leaves = list(plan.leaves())
        self.backend.prepare([leaf.signature for leaf in leaves if leaf.native])
        self._load_buffers(plan.buffers, leaves)
        step = Step(plan.program.name, self.backend)
        for spec in plan.buffers.values():
            if spec.name in self._device:
                step.buffers[spec.name] = self._device[spec.name]
            elif spec.kind == "scratch":
                step.buffers[spec.name] = (self._scratch_buffer(spec), spec)
        pending: list[Launch] = []
        for leaf in leaves:
            if leaf.native:
                pending.append(self._bind(step, leaf))
                continue
            if pending:
                step.segments.append(self.backend.capture(pending))
                pending = []
            step.segments.append(self._host_call(step, leaf))
        if pending:
            step.segments.append(self.backend.capture(pending))
        return step

    def _load_buffers(self, specs: dict[str, BufferSpec], leaves: list[PlannedCall]) -> None:
        """State and weights on the device, weights for the host kept there; nothing is loaded twice."""
        packed = {v.buffer for leaf in leaves if leaf.native for v in leaf.call.args.values()}
        on_host = {v.buffer for leaf in leaves if not leaf.native for v in leaf.call.args.values()}
        weights = [spec for spec in specs.values() if spec.kind == "weight"]
        for done, spec in enumerate(weights):
            if self._progress:
                self._progress("pack", done, len(weights))
            self._check_declared(spec)
            is_matrix = spec.dtype not in NUMPY_DTYPES
            if is_matrix and spec.name in on_host and spec.name not in self._on_host:
                self._on_host[spec.name] = DenseWeight.of(self._given(spec))
            if spec.name not in self._device and (not is_matrix or spec.name in packed):
                self._device[spec.name] = (self._to_device(self._given(spec), spec), spec)
                if release := self._release.pop(spec.name, None):
                    release()
        if self._progress and weights:
            self._progress("pack", len(weights), len(weights))
        for spec in specs.values():
            if spec.kind == "state":
                self._check_declared(spec)
                if spec.name not in self._device:
                    self._device[spec.name] = (self._alloc(spec.name, TensorType(spec.shape, spec.dtype)), spec)

    def _check_declared(self, spec: BufferSpec) -> None:
        _, declared = self._device.get(spec.name, (None, spec))
        if declared != spec:
            raise ContractError(f"buffer {spec.name} is {declared} in one program and {spec} in another")

    def _given(self, spec: BufferSpec) -> HostValue:
        wanted = TensorType(spec.shape, spec.dtype)
        if spec.name not in self._host:
            raise ContractError(f"weight {spec.name!r} {wanted} was not added, or released")
        given = self._host[spec.name]
        value = cast("HostValue", given() if callable(given) else given)
        if type_of(value) != wanted:
            raise ContractError(f"weight {spec.name!r} is {type_of(value)}, the program wants {wanted}")
        return value

    def _to_device(self, value: HostValue, spec: BufferSpec) -> Buffer:
        with vendor_errors(self.backend, f"packing {spec.name} {spec.dtype} {list(spec.shape)}"):
            if isinstance(value, Weight):
                return self.backend.pack(value)
            buffer = self.backend.alloc(TensorType(spec.shape, spec.dtype))
            self.backend.write(buffer, np.ascontiguousarray(value))
            return buffer

    def _alloc(self, name: str, kind: TensorType) -> Buffer:
        with vendor_errors(self.backend, f"allocating {name} {kind}"):
            return self.backend.alloc(kind)

    def _scratch_buffer(self, spec: BufferSpec) -> Buffer:
        """The scratch buffer of that name if it is large enough, or a new one (steps bound before keep theirs)."""
        buffer, kind = self._scratch.get(spec.name, (None, TensorType((0,), spec.dtype)))
        if kind.dtype != spec.dtype or math.prod(kind.shape) < math.prod(spec.shape):
            kind = TensorType(spec.shape, spec.dtype)
            buffer = self._alloc(spec.name, kind)
            self._scratch[spec.name] = (buffer, kind)
        return buffer

    def _bind(self, step: Step, leaf: PlannedCall) -> Launch:
        tensors = {
            name: DeviceTensor(step.buffers[v.buffer][0], v.shape, v.dtype, v.offset, row_stride_of(v))
            for name, v in leaf.call.args.items()
        }
        label = leaf.call.label or leaf.call.op
        with vendor_errors(self.backend, f"binding {label}, which it had accepted as {leaf.kernel}"):
            return self.backend.bind(BoundCall(leaf.call.op, tensors, leaf.signature.attrs, label))

    def _host_call(self, step: Step, leaf: PlannedCall) -> Launch:
        """The only place where a call runs on the host: read what it touches, run the reference, write back.

        Read buffer by buffer, so that two views of one buffer see each other's writes.
        """
        op, backend = OPS[leaf.call.op], self.backend
        views = {name: v for name, v in leaf.call.args.items() if v.buffer not in self._on_host}
        weights = {n: self._on_host[v.buffer] for n, v in leaf.call.args.items() if v.buffer in self._on_host}
        ranges: dict[str, tuple[int, int]] = {}
        for v in views.values():
            start, stop = ranges.get(v.buffer, (v.offset, v.offset))
            ranges[v.buffer] = (min(start, v.offset), max(stop, v.offset + span(v.shape, row_stride_of(v))))
        written = {views[p.name].buffer for p in op.params if p.is_written and p.name in views}

        def run() -> None:
            backend.synchronize()
            flat: dict[str, Array] = {}
            for name, (start, stop) in ranges.items():
                buffer, spec = step.buffers[name]
                flat[name] = np.array(backend.read(buffer, TensorType((stop - start,), spec.dtype), start))
            tensors: dict[str, HostValue] = dict(weights)
            for name, v in views.items():
                tensors[name] = strided(flat[v.buffer], v.shape, v.offset - ranges[v.buffer][0], row_stride_of(v))
            run_reference(op, tensors, leaf.signature.attrs)
            for name in written:
                backend.write(step.buffers[name][0], flat[name], ranges[name][0])

        return run


def _write(backend: Backend, found: tuple[Buffer, BufferSpec], array: Array, offset: int) -> None:
    buffer, spec = found
    if array.dtype != NUMPY_DTYPES.get(spec.dtype):
        raise ContractError(f"buffer {spec.name} is {spec.dtype}, the array {array.dtype}")
    _check_range(spec, array.size, offset)
    backend.write(buffer, np.ascontiguousarray(array), offset)


def _read(backend: Backend, found: tuple[Buffer, BufferSpec], shape: tuple[int, ...] | None, offset: int) -> Array:
    buffer, spec = found
    shape = spec.shape if shape is None else shape
    if spec.dtype not in NUMPY_DTYPES:
        raise ContractError(f"buffer {spec.name} is a packed {spec.dtype} weight and cannot be read back")
    _check_range(spec, math.prod(shape), offset)
    return backend.read(buffer, TensorType(shape, spec.dtype), offset)


def _check_range(spec: BufferSpec, count: int, offset: int) -> None:
    if offset < 0 or offset + count > math.prod(spec.shape):
        raise ContractError(f"{count} elements at {offset} do not fit buffer {spec.name} {list(spec.shape)}")
