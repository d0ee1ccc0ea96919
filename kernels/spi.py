"""What a backend is: the service-provider interface, in one file.

A vendor writes memory (`alloc`, `write`, `read`), `pack`, `supports`, and `bind` for the kernels there are; everything
else (plans, fallbacks, decomposition of fused ops, conformance, benchmarks, the command line) comes from this project.
A backend is found through the entry-point group `polykern.backends`, whose value is a `Provider`. CONTRIBUTING.md has a
complete one that runs, kernels/README.md lists the ops with their tensors and attributes.

Raise DeviceError (kernels/errors.py) where a device, driver or compiler fails, with the vendor's name of the error. Any
other exception is taken for a mistake in the program that let it through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from .op import Attrs, Numerics, Signature, TensorType
from .quant import Array, Weight

SPI_VERSION = 1
LAST_RESORT = 1000  # the `order` from which on `--backend auto` takes a backend only if no other opens

Buffer = Any  # a backend's own handle; nobody else looks inside
Launch = Callable[[], None]  # enqueue one bound kernel; asynchronous where the device is
Progress = Callable[[str, int, int], None]  # (what, done, total): compile and pack report through it


@dataclass(frozen=True)
class DeviceInfo:
    """One device a provider can open. `memory_bytes` 0: unknown; otherwise a model that does not fit is refused.

    All of it goes into conformance reports: `driver` is the version of what runs the kernels, `detail` what else
    decides how they behave (firmware, clock, ISA).
    """

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
    """An acceptance: which kernel would run, and what it states about its arithmetic.

    `name` is what plans and reports show: "acme.gemm_q4". `numerics` is a promise that results are held to; where it is
    looser than the kernel, wrong kernels pass too, and the suite says so ("survived").
    """

    name: str
    numerics: Numerics


@dataclass(frozen=True)
class DeviceTensor:
    """A tensor of a call: a view into a buffer that `alloc` returned.

    `offset` and `row_stride` (between entries of the first axis; the others are dense) count elements, not bytes.
    Callers always give the stride, also of dense tensors. Neither is aligned to more than an element. For weights
    `buffer` is what `pack` returned, and offset and stride mean nothing.
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
    """A call with its tensors on the device, ready for `Backend.bind`.

    `attrs` holds every attribute of the op, defaults filled in. Of `tensors` only the op's optional ones may be absent.
    """

    op: str
    tensors: Mapping[str, DeviceTensor]
    attrs: Attrs
    label: str = ""

    @property
    def signature(self) -> Signature:
        return Signature(self.op, {name: t.type for name, t in self.tensors.items()}, self.attrs)


@dataclass(frozen=True)
class OpenOptions:
    """How to open a backend.

    device    index into `Provider.devices()`, or part of a name; None: the provider's first choice
    threads   of a CPU device; None: all it has
    progress  may be called while opening, in `prepare` and in `pack`
    """

    device: str | None = None
    threads: int | None = None
    progress: Progress | None = None


@runtime_checkable
class Backend(Protocol):
    """An open device. Not thread-safe; one per loaded model. Launches run, or seem to run, in the order of their calls.

    name       the name it is registered as
    device     what was opened
    page_size  tokens per KV-cache page this device likes best; `attention` is tried with others as well
    supports   Kernel if `bind` would accept a call of this signature, else why not; launches nothing
    alloc      uninitialised device memory for a dense tensor. There is no `free`: it goes with the last reference to
               the handle (weakref.finalize) or with `close`, as does a packed weight
    write/read host -> device and back, synchronous, `offset` in elements of the buffer's dtype; `array` is contiguous
               and of that dtype, what `read` returns is a copy
    pack       a weight in whatever layout this device's kernels want; the host copy may go away afterwards. Called only
               for what `supports` accepted in some call
    bind       a launch with all arguments set
    capture    the launches of one step as one replayable unit (graph, command buffer, launch list)

    A backend may also have `peaks() -> Mapping[str, float]`, measured now: "read" in GB/s, and in Gop/s, a multiply-add
    counting as two, what each kind of `Numerics.activations` is multiplied at: "f32", "int8", "bf16". `pytest bench`
    compares kernels with it.
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

    `spi_version` is the number it was written for, not SPI_VERSION as it is at run time: that is how a later polykern
    knows to adapt it. `order` makes it a candidate of `--backend auto`, which measures those that have a device and
    takes the fastest; of equals the lower order, and LAST_RESORT or above only where no other opens. None: never chosen
    by itself. Our own: opencl 20, reference 1000. `devices` and `open` raise BackendUnavailable with the reason and
    what to install; `open` also for a device that is not there.
    """

    spi_version: int
    order: int | None

    def devices(self) -> Sequence[DeviceInfo]: ...
    def open(self, options: OpenOptions) -> Backend: ...
    def describe(self) -> Mapping[str, Any]:
        """Versions, drivers and caches, JSON-able: for `runtime doctor` and conformance reports. Must not fail."""
        ...
