"""The `null` backend: accepts every call of the contract, computes nothing, and remembers what was launched.

For tests of the runtime and for plans of models this machine could not hold: no buffer takes memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..kernels.op import NUMPY_DTYPES, Numerics, Signature, TensorType
from ..kernels.quant import Array, QuantFormat, Weight
from ..kernels.spi import (
    SPI_VERSION,
    BoundCall,
    Buffer,
    DeviceInfo,
    Kernel,
    Launch,
    OpenOptions,
    Unsupported,
)
from .checks import check_call, check_signature, check_transfer
from .replay import launch_list


@dataclass(frozen=True)
class NullBuffer:
    """A handle that stands for device memory and has none."""

    kind: TensorType


@dataclass(frozen=True)
class NullWeight:
    """A handle that stands for a packed weight."""

    format: QuantFormat
    shape: tuple[int, int]


@dataclass
class NullBackend:
    """`launches` lists every call that ran, in order; reads return zeros."""

    device: DeviceInfo
    name: str = "null"
    page_size: int = 16
    launches: list[BoundCall] = field(default_factory=list[BoundCall])

    def supports(self, signature: Signature) -> Kernel | Unsupported:
        found = check_signature(signature)
        return found if isinstance(found, Unsupported) else Kernel(f"null.{found.name}", Numerics())

    def alloc(self, kind: TensorType) -> Buffer:
        return NullBuffer(kind)

    def write(self, buffer: Buffer, array: Array, offset: int = 0) -> None:
        self._check(buffer, array.size, array.dtype, offset)

    def read(self, buffer: Buffer, kind: TensorType, offset: int = 0) -> Array:
        self._check(buffer, math.prod(kind.shape), np.dtype(NUMPY_DTYPES[kind.dtype]), offset)
        return np.zeros(kind.shape, NUMPY_DTYPES[kind.dtype])

    def _check(self, buffer: NullBuffer, count: int, dtype: Any, offset: int) -> None:
        check_transfer(math.prod(buffer.kind.shape), np.dtype(NUMPY_DTYPES[buffer.kind.dtype]), count, dtype, offset)

    def pack(self, weight: Weight) -> Buffer:
        return NullWeight(weight.format, weight.shape)

    def bind(self, call: BoundCall) -> Launch:
        check_call(call)
        return lambda: self.launches.append(call)

    def capture(self, launches: Sequence[Launch]) -> Launch:
        return launch_list(launches)

    def prepare(self, signatures: Sequence[Signature]) -> None:
        """Nothing to compile."""

    def synchronize(self) -> None:
        """Nothing runs."""

    def close(self) -> None:
        """Nothing is held."""


class NullProvider:
    """Opens anywhere, but only by name: its results mean nothing."""

    spi_version = SPI_VERSION
    order: int | None = None

    def devices(self) -> Sequence[DeviceInfo]:
        return [DeviceInfo("null")]

    def open(self, options: OpenOptions) -> NullBackend:
        return NullBackend(self.devices()[0])

    def describe(self) -> Mapping[str, Any]:
        return {}


provider = NullProvider()
