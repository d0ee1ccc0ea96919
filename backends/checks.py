"""Checks against the contract that any backend may use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..kernels.errors import ContractError
from ..kernels.host import dense_stride, span
from ..kernels.op import NUMPY_DTYPES, Op, Signature
from ..kernels.ops import OPS
from ..kernels.quant import FORMATS
from ..kernels.spi import BoundCall, Unsupported


def check_signature(signature: Signature) -> Op | Unsupported:
    """The op of a signature, or why the contract itself does not allow it."""
    op = OPS.get(signature.op)
    if op is None:
        return Unsupported(signature.op, f"no op of that name in the contract; it has {', '.join(OPS)}")
    try:
        op.signature(signature.tensors, signature.attrs)
    except ContractError as error:
        return Unsupported(signature.op, str(error))
    return op


def check_call(call: BoundCall) -> Op:
    """The op of a call; a ContractError unless its tensors and attributes fit and none is missing."""
    found = check_signature(call.signature)
    reason = found.reason if isinstance(found, Unsupported) else ""
    if not isinstance(found, Unsupported):
        missing = [p.name for p in found.params if p.name not in call.tensors and not p.optional]
        if not missing:
            return found
        reason = f"{found.name}: {', '.join(missing)} is missing"
    raise ContractError(f"{call.label}: {reason}" if call.label else reason)


def check_transfer(size: int, dtype: Any, count: int, other: Any, offset: int) -> None:
    """A ContractError unless `count` elements of dtype `other` fit at `offset` into a buffer of `size` of `dtype`."""
    if other != dtype:
        raise ContractError(f"{other} cannot be written to or read from a buffer of {dtype}")
    if offset < 0 or offset + count > size:
        raise ContractError(f"{count} elements at {offset} do not fit a buffer of {size}")


def check_axes(op: Op, signature: Signature, longest: int) -> Unsupported | None:
    """A refusal for a tensor with an axis longer than what kernels that count in 32 bits can count."""
    for name, kind in signature.tensors.items():
        for axis, length in zip(op.param(name).axes, kind.shape, strict=True):
            if length > longest:
                return Unsupported(signature.op, f"{axis} {length} > {longest}: kernels count in 32 bits")
    return None


def check_memory(
    call: BoundCall, size_of: Callable[[Any], int], packed_bytes: Callable[[str, tuple[int, ...]], int]
) -> None:
    """A ContractError unless every tensor lies in its buffer: a kernel that leaves it takes the process along.

    `size_of` gives the bytes of a buffer, `packed_bytes` those of a packed weight by its format and shape.
    """
    for name, tensor in call.tensors.items():
        size = size_of(tensor.buffer)
        if tensor.dtype in FORMATS:
            fits = size >= packed_bytes(tensor.dtype, tensor.shape)
        else:
            end = tensor.offset + span(tensor.shape, tensor.row_stride)
            overlaps = tensor.row_stride < dense_stride(tensor.shape)
            fits = tensor.offset >= 0 and not overlaps and end * np.dtype(NUMPY_DTYPES[tensor.dtype]).itemsize <= size
        if not fits:
            where = f"at {tensor.offset}, row stride {tensor.row_stride}"
            raise ContractError(
                f"{call.label or call.op}: {name} {tensor.type} {where}, does not fit a buffer of {size} bytes"
            )
