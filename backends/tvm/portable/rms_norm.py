"""rms_norm: the lanes of a group share a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....kernels.op import Numerics, Signature
from .machine import Machine
from .maths import RSQRT_ULP

if TYPE_CHECKING:
    from .builder import Builder


def rms_norm(k: Builder) -> None:
    (tokens, features), attrs = k.signature.tensors["x"].shape, k.signature.attrs
    with k.kernel() as tensors, k.groups(tokens) as (t,):
        x, weight, y = (tensors[name] for name in ("x", "weight", "y"))
        square = k.cell(0.0)
        with k.share(features) as i:
            square.add(x[t, i] * x[t, i])
        k.reduce([square])
        scale = k.keep(1.0 / k.sqrt(square.value * k.constant(1.0 / features) + k.constant(attrs["eps"])))
        with k.share(features) as i:
            y[t, i] = x[t, i] * scale * (weight[i] + k.constant(attrs["weight_offset"]))


def numerics(signature: Signature, machine: Machine) -> Numerics:
    features = signature.tensors["x"].shape[1]
    return Numerics("f32", -(-features // machine.lanes) + machine.lanes.bit_length(), "f32", RSQRT_ULP)


KERNELS = {"rms_norm": (rms_norm, numerics)}
