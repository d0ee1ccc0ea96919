"""Plug-ins built for the SPI version before this one keep working: what an older backend lacks is added here.

`ADAPTERS[n]` turns an open backend that speaks version n into one that speaks SPI_VERSION. Only the previous version
is kept; an older plug-in is refused with a line that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..kernels.op import Signature, TensorType
from ..kernels.quant import Array, Weight
from ..kernels.spi import SPI_VERSION, Backend, BoundCall, Buffer, Kernel, Launch, Unsupported
from .replay import launch_list

# What `open` of each version has to return; checked by name, since a plug-in's objects are structural.
METHODS_V0 = ("supports", "alloc", "write", "read", "pack", "bind", "synchronize", "close")
MEMBERS: Mapping[int, tuple[str, ...]] = {
    0: ("name", "device", "page_size", *METHODS_V0),
    1: ("name", "device", "page_size", *METHODS_V0, "capture", "prepare"),
}


class FromVersion0:
    """Version 0, the form before the first release: no `capture` and no `prepare`."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.name: str = inner.name
        self.device = inner.device
        self.page_size: int = inner.page_size

    def supports(self, signature: Signature) -> Kernel | Unsupported:
        return self.inner.supports(signature)

    def alloc(self, kind: TensorType) -> Buffer:
        return self.inner.alloc(kind)

    def write(self, buffer: Buffer, array: Array, offset: int = 0) -> None:
        self.inner.write(buffer, array, offset)

    def read(self, buffer: Buffer, kind: TensorType, offset: int = 0) -> Array:
        return self.inner.read(buffer, kind, offset)

    def pack(self, weight: Weight) -> Buffer:
        return self.inner.pack(weight)

    def bind(self, call: BoundCall) -> Launch:
        return self.inner.bind(call)

    def capture(self, launches: Sequence[Launch]) -> Launch:
        return launch_list(launches)

    def prepare(self, signatures: Sequence[Signature]) -> None:
        """Version 0 compiles when it binds."""

    def synchronize(self) -> None:
        self.inner.synchronize()

    def close(self) -> None:
        self.inner.close()


ADAPTERS: Mapping[int, Callable[[Any], Backend]] = {0: FromVersion0}
VERSIONS = (SPI_VERSION, *sorted(ADAPTERS, reverse=True))
