"""Checks against the contract that any backend may use."""

from __future__ import annotations

from typing import Any

from ..kernels.errors import ContractError
from ..kernels.op import Op, Signature
from ..kernels.ops import OPS
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
