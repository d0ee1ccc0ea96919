"""What a backend is: the service-provider interface, on one screen.

A vendor writes memory (`alloc`, `write`, `read`), `pack`, `supports`, and `bind` for the kernels there are; everything
else (plans, fallbacks, decomposition of fused ops, conformance, benchmarks, the command line) comes from this project.
A backend is found through the entry-point group `polykern.backends`, whose value is a `Provider`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from .op import Attrs, Numerics, Signature, TensorType
from .quant import Array, Weight

SPI_VERSION = 1

Buffer = Any  # a backend's own handle; nobody else looks inside
Launch = Callable[[], None]  # enqueue one bound kernel; asynchronous where the device is
Progress = Callable[[str, int, int], None]  # (what, done, total): compile and pack report through it


@dataclass(frozen=True)
class DeviceInfo:
    """One device a provider can open. `memory_bytes` 0: unknown."""

    name: str
    vendor: str = ""
    driver: str = ""
    memory_bytes: int = 0
    detail: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Unsupported:
    """A refusal before any launch, with the reason and the numbers ("head_dim 320 > 256: local memory 80 KiB")."""

    op: str
    reason: str


@dataclass(frozen=True)
class Kernel:
    """An acceptance: which kernel would run, and what it states about its arithmetic."""

    name: str
    numerics: Numerics


@dataclass(frozen=True)
class DeviceTensor:
    """A tensor of a call: a view into a buffer, in elements (`row_stride` between entries of the first axis).

    For weights `buffer` is what `pack` returned and offset and stride mean nothing.
    """

    buffer: Buffer
    shape: tuple[int, ...]
    dtype: str
    offset: int = 0
    row_stride: int = 0

    @property
    def type(self) -> TensorType:
        return TensorType(self.shape, self.dtype)


@dataclass(frozen=True)
class BoundCall:
    """A call with its tensors on the device, ready for `Backend.bind`."""

    op: str
    tensors: Mapping[str, DeviceTensor]
    attrs: Attrs
    label: str = ""

    @property
    def signature(self) -> Signature:
        return Signature(self.op, {name: t.type for name, t in self.tensors.items()}, self.attrs)


@dataclass(frozen=True)
class OpenOptions:
    """How to open a backend. `device` None: the provider's first choice; `threads` None: all the device has."""

    device: str | None = None
    threads: int | None = None
    progress: Progress | None = None


@runtime_checkable
class Backend(Protocol):
    """An open device. Not thread-safe; one per loaded model.

    device     what was opened
    page_size  tokens per KV-cache page this device likes best
    supports   Kernel if `bind` would accept a call of this signature, else why not; launches nothing
    alloc      uninitialised device memory for a dense tensor
    write/read host -> device and back, synchronous, `offset` in elements of the buffer's dtype
    pack       a weight in whatever layout this device's kernels want; the host copy may go away afterwards
    bind       a launch with all arguments set
    capture    the launches of one step as one replayable unit (graph, command buffer, launch list)
    """

    name: str
    device: DeviceInfo
    page_size: int

    def supports(self, signature: Signature) -> Kernel | Unsupported: ...
    def alloc(self, kind: TensorType) -> Buffer: ...
    def write(self, buffer: Buffer, array: Array, offset: int = 0) -> None: ...
    def read(self, buffer: Buffer, kind: TensorType, offset: int = 0) -> Array: ...
    def pack(self, weight: Weight) -> Buffer: ...
    def bind(self, call: BoundCall) -> Launch: ...
    def capture(self, launches: Sequence[Launch]) -> Launch: ...
    def prepare(self, signatures: Sequence[Signature]) -> None:
        """Compile what these calls will need, with progress. May do nothing."""
        ...

    def synchronize(self) -> None: ...
    def close(self) -> None: ...


@runtime_checkable
class Provider(Protocol):
    """What the entry point names. Cheap to import: vendor libraries are imported in `devices` and `open`.

    `order` sorts the candidates of `--backend auto` (lower first; None: never chosen by itself).
    `devices` and `open` raise BackendUnavailable with the reason and what to install.
    """

    spi_version: int
    order: int | None

    def devices(self) -> Sequence[DeviceInfo]: ...
    def open(self, options: OpenOptions) -> Backend: ...
    def describe(self) -> Mapping[str, Any]:
        """Versions, drivers and caches, for `runtime doctor`. Must not fail."""
        ...
