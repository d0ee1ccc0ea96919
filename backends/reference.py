"""The `reference` backend: every op by its own NumPy definition in float32. Slow, and right by construction.

Always there, so that a model runs anywhere and every other backend has something to be compared with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels.errors import BackendUnavailable
from ..kernels.host import DenseWeight, run_reference, strided
from ..kernels.op import NUMPY_DTYPES, Numerics, Signature, TensorType
from ..kernels.quant import Array, Weight
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


def longest_sum(signature: Signature) -> int:
    """Longest chain of additions behind one output: NumPy and its BLAS may sum a row in any order, so all of it.

    Rows are summed along the last axis; attention sums over the keys a sequence can have as well.
    """
    longest = max((kind.shape[-1] for kind in signature.tensors.values() if kind.shape), default=1)
    if {"block_table", "k_pages"} <= signature.tensors.keys():
        longest = max(longest, signature.tensors["block_table"].shape[1] * signature.tensors["k_pages"].shape[2])
    return max(1, longest)


@dataclass
class ReferenceBackend:
    """Buffers are flat numpy arrays; a packed weight is the weight dequantised to float32.

    `precision` "fast" computes exactly, as its kernels' names and numerics say.
    """

    device: DeviceInfo
    name: str = "reference"
    page_size: int = 16

    def supports(self, signature: Signature) -> Kernel | Unsupported:
        found = check_signature(signature)
        if isinstance(found, Unsupported):
            return found
        # NumPy's float32 exp, sin and tanh stay below 4 ulp (its SVML loops are the 4-ulp variants)
        return Kernel(f"numpy.{found.name}.f32", Numerics("f32", longest_sum(signature), "f32", 4.0))

    def alloc(self, kind: TensorType) -> Buffer:
        return np.empty(math.prod(kind.shape), NUMPY_DTYPES[kind.dtype])

    def write(self, buffer: Buffer, array: Array, offset: int = 0) -> None:
        check_transfer(buffer.size, buffer.dtype, array.size, array.dtype, offset)
        buffer[offset : offset + array.size] = array.reshape(-1)

    def read(self, buffer: Buffer, kind: TensorType, offset: int = 0) -> Array:
        count = math.prod(kind.shape)
        check_transfer(buffer.size, buffer.dtype, count, NUMPY_DTYPES[kind.dtype], offset)
        return buffer[offset : offset + count].reshape(kind.shape).copy()

    def pack(self, weight: Weight) -> Buffer:
        packed = DenseWeight.of(weight)
        packed.dense()
        return packed

    def bind(self, call: BoundCall) -> Launch:
        op = check_call(call)
        attrs = op.with_defaults(call.attrs)
        tensors: dict[str, Any] = {
            name: t.buffer if isinstance(t.buffer, Weight) else strided(t.buffer, t.shape, t.offset, t.row_stride)
            for name, t in call.tensors.items()
        }
        return lambda: run_reference(op, tensors, attrs)

    def capture(self, launches: Sequence[Launch]) -> Launch:
        return launch_list(launches)

    def prepare(self, signatures: Sequence[Signature]) -> None:
        """Nothing to compile."""

    def synchronize(self) -> None:
        """Every launch has ended when it returns."""

    def close(self) -> None:
        """Buffers go with their last handle."""


class ReferenceProvider:
    """Opens anywhere; the last candidate of `--backend auto`."""

    spi_version = SPI_VERSION
    order: int | None = 1000

    def devices(self) -> Sequence[DeviceInfo]:
        return [DeviceInfo("host", vendor="NumPy", driver=np.__version__)]

    def open(self, options: OpenOptions) -> ReferenceBackend:
        """Threads are the BLAS library's own affair (OMP_NUM_THREADS): `options.threads` changes nothing here."""
        (device,) = self.devices()
        if options.device not in (None, "0") and options.device.lower() not in device.name:
            raise BackendUnavailable(f"no device matches {options.device!r}: the only one is 0 {device.name!r}")
        return ReferenceBackend(device)

    def describe(self) -> Mapping[str, Any]:
        return {"numpy": np.__version__}


provider = ReferenceProvider()
