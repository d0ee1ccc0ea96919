"""What the kernel of a signature is called: the same in every layer, on every machine."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ....kernels.op import Signature
from ....kernels.ops import OPS

# `precision` allows rounding; these kernels never round.
_WITHOUT_EFFECT = ("precision",)


def attributes(signature: Signature) -> dict[str, Any]:
    """The attributes that a kernel depends on, sorted."""
    attrs = OPS[signature.op].with_defaults(signature.attrs)
    return {name: attrs[name] for name in sorted(attrs) if name not in _WITHOUT_EFFECT}


def identity(signature: Signature) -> str:
    """Everything that a kernel depends on, as text; equal for signatures that one kernel serves."""
    params = [p.name for p in OPS[signature.op].params if p.name in signature.tensors]
    tensors = [[name, signature.tensors[name].dtype, *signature.tensors[name].shape] for name in params]
    return json.dumps([signature.op, tensors, attributes(signature)])


def symbol(signature: Signature) -> str:
    """A C identifier: op, formats, axis lengths in the op's order, and a part of the identity's SHA-256."""
    op = OPS[signature.op]
    formats = dict.fromkeys(
        kind.dtype.lower() for kind in signature.tensors.values() if kind.dtype not in ("f32", "i32", "u32")
    )
    lengths = dict.fromkeys(
        axis for p in op.params if p.name in signature.tensors for axis in p.axes if not axis.isdigit()
    )
    dims = op.bind(signature.tensors)
    digest = hashlib.sha256(identity(signature).encode()).hexdigest()[:8]
    return "_".join([signature.op, *formats, "x".join(str(dims[axis]) for axis in lengths), digest])
