"""Running an op on the host: strided views of flat numpy buffers, and the op's own reference on them.

Used by the `reference` backend, by a step's fallback calls and by the conformance suite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .errors import ContractError
from .op import Attrs, Op
from .quant import Array, Weight


class DenseWeight(Weight):
    """A Weight that is dequantised once, on first use, and then answers `dense` from memory (4 bytes a number)."""

    @classmethod
    def of(cls, weight: Weight) -> DenseWeight:
        return weight if isinstance(weight, cls) else cls(weight.format, weight.shape, weight.data)

    def dense(self, dtype: Any = np.float32) -> Array:
        cached: Array | None = self.__dict__.get("_dense")
        if cached is None:
            cached = super().dense(np.float32)
            cached.flags.writeable = False
            self.__dict__["_dense"] = cached
        return cached.astype(dtype, copy=False)


def dense_stride(shape: tuple[int, ...]) -> int:
    """Elements between entries of the first axis of a dense tensor (1 for a vector, also where an axis is empty)."""
    return math.prod(shape[1:]) if shape else 1


def span(shape: tuple[int, ...], row_stride: int) -> int:
    """Elements from the first to behind the last of a tensor whose rows are `row_stride` apart."""
    if not math.prod(shape):
        return 0
    return (shape[0] - 1) * row_stride + dense_stride(shape) if shape else 1


def strided(flat: Array, shape: tuple[int, ...], offset: int = 0, row_stride: int = 0) -> Array:
    """A writable view of `shape` into the one-dimensional `flat`; offset and row stride in elements, stride 0: dense.

    Raises ContractError where it would leave `flat` or let rows overlap.
    """
    row = dense_stride(shape)
    row_stride = row_stride or row
    end = offset + span(shape, row_stride)
    if offset < 0 or end > flat.size or row_stride < row:
        raise ContractError(
            f"a view {list(shape)} at element {offset}, row stride {row_stride}, does not fit a buffer of {flat.size}"
        )
    inner = [math.prod(shape[axis + 1 :]) for axis in range(1, len(shape))]
    strides = [step * flat.itemsize for step in ([row_stride, *inner] if shape else [])]
    return np.lib.stride_tricks.as_strided(flat[offset:], shape, strides)


def run_reference(op: Op, tensors: Mapping[str, Array | Weight], attrs: Attrs) -> None:
    """Run `op.reference` in the precision of the given arrays and write its results into the written ones."""
    outputs = op.reference(tensors, attrs)
    for param in op.params:
        if param.is_written and param.name in tensors:
            target: Any = tensors[param.name]
            target[...] = outputs[param.name]
