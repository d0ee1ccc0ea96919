"""Tensors of a case on a device, each inside a larger guarded buffer that shows whatever is written beside it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import ContractError
from .host import dense_stride, span, strided
from .op import NUMPY_DTYPES, Param, TensorType
from .quant import Array
from .spi import Backend, DeviceTensor

GUARD = 64  # elements before and behind every tensor

# What guards and unwritten outputs hold, as bits. Floats: a NaN with a payload, so that a kernel which reads beside its
# inputs, or leaves an output unwritten, spreads it. Integers: 1 beside what is only read, a page or position that is
# wrong but does not send the kernel far out of its memory; a rare number in what is written.
_NAN = {"f32": 0x7FC5A5A5, "f16": 0x7EA5}
_READ, _WRITTEN = 1, 0x5A5A5A5A


def filled(count: int, dtype: str, is_written: bool) -> Array:
    """`count` elements of guard bits."""
    numpy_dtype = np.dtype(NUMPY_DTYPES[dtype])
    bits = _NAN.get(dtype, _WRITTEN if is_written else _READ)
    return np.full(count, bits, f"u{numpy_dtype.itemsize}").view(numpy_dtype)


def bits_of(array: Array) -> Array:
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")


@dataclass
class Guarded:
    """One tensor of a case. `initial` is the whole buffer as written before a run, `inside` marks the tensor in it."""

    param: Param
    tensor: DeviceTensor
    initial: Array
    inside: Array

    @classmethod
    def place(cls, backend: Backend, param: Param, kind: TensorType, value: Array | None, loose: bool) -> Guarded:
        """Allocate and lay out a tensor holding `value`, or poison for a pure output.

        `loose`: tensors with rows of tokens get a row stride longer than a row, and an offset that is aligned to
        nothing but the element. The buffer is written by `reset`.
        """
        is_loose = loose and len(kind.shape) > 1 and param.axes[0] == "tokens"
        row_stride = dense_stride(kind.shape) + (5 if is_loose else 0)
        offset = GUARD + (3 if is_loose else 0)
        total = offset + span(kind.shape, row_stride) + GUARD
        initial = filled(total, kind.dtype, param.is_written)
        inside = np.zeros(total, np.bool_)
        strided(inside, kind.shape, offset, row_stride)[...] = True
        if value is not None:
            strided(initial, kind.shape, offset, row_stride)[...] = value
        buffer = backend.alloc(TensorType((total,), kind.dtype))
        return cls(param, DeviceTensor(buffer, kind.shape, kind.dtype, offset, row_stride), initial, inside)

    def reset(self, backend: Backend) -> None:
        backend.write(self.tensor.buffer, self.initial)

    def read(self, backend: Backend) -> Array:
        """The whole buffer as it is now [total]; a ContractError if the backend returns another type."""
        kind = TensorType(self.initial.shape, self.tensor.dtype)
        flat = backend.read(self.tensor.buffer, kind)
        if flat.shape != self.initial.shape or flat.dtype != self.initial.dtype:
            raise ContractError(f"read() of {kind} gave {flat.dtype}{list(flat.shape)}")
        return flat

    def value(self, flat: Array) -> Array:
        """The tensor in a buffer that `read` returned."""
        return strided(flat, self.tensor.shape, self.tensor.offset, self.tensor.row_stride).copy()

    def damage(self, flat: Array) -> str:
        """What a run changed that it must not: anything beside the tensor, and the tensor itself if it is an input."""
        changed = bits_of(flat) != bits_of(self.initial)
        beside = np.flatnonzero(changed & ~self.inside)
        name, first = self.param.name, self.tensor.offset
        if beside.size:
            at = int(beside[0])
            behind = int(np.flatnonzero(self.inside)[-1]) if self.inside.any() else first - 1
            where = (
                f"{first - at} before its start"
                if at < first
                else f"{at - behind} behind its end"
                if at > behind
                else f"in a gap between its rows (element {at - first})"
            )
            return f"wrote out of bounds of {name}: {beside.size} elements, the first {where}"
        if self.param.role == "in" and changed.any():
            return f"changed its input {name} at element {int(np.flatnonzero(changed)[0]) - first}"
        return ""
