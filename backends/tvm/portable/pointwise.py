"""Element-wise ops: add, softcap, glu, gather, advance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....kernels.op import Numerics, Signature
from .machine import Machine
from .maths import ERF_ULP, FUNCTION_ULP, activate, tanh

if TYPE_CHECKING:
    from .builder import Builder


def add(k: Builder) -> None:
    with k.kernel() as tensors, k.each(*k.signature.tensors["x"].shape) as (t, i):
        tensors["x"][t, i] = tensors["x"][t, i] + tensors["y"][t, i]


def softcap(k: Builder) -> None:
    cap = k.signature.attrs["cap"]
    with k.kernel() as tensors, k.each(*k.signature.tensors["x"].shape) as (t, i):
        x = tensors["x"]
        x[t, i] = tanh(k, x[t, i] / k.constant(cap)) * k.constant(cap)


def glu(k: Builder) -> None:
    with k.kernel() as tensors, k.each(*k.signature.tensors["y"].shape) as (t, i):
        gate = activate(k, tensors["gate"][t, i], k.signature.attrs["kind"])
        tensors["y"][t, i] = gate * tensors["up"][t, i]


def gather(k: Builder) -> None:
    tokens = k.signature.tensors["x"].shape[0]
    with k.kernel() as tensors, k.each(*k.signature.tensors["y"].shape) as (r, i):
        row, value = k.keep(tensors["rows"][r]), k.cell(0.0)
        with k.when(k.both(row >= 0, row < tokens)):
            value.set(tensors["x"][row, i])
        tensors["y"][r, i] = value.value


def advance(k: Builder) -> None:
    with k.kernel() as tensors, k.each(*k.signature.tensors["positions"].shape) as (t,):
        positions = tensors["positions"]
        with k.when(tensors["seq_ids"][t] >= 0):
            positions[t] = positions[t] + 1


def numerics(signature: Signature, machine: Machine) -> Numerics:
    return Numerics("f32", 1, "f32", ERF_ULP if signature.attrs.get("kind") == "gelu_erf" else FUNCTION_ULP)


KERNELS = {kernel.__name__: (kernel, numerics) for kernel in (add, softcap, glu, gather, advance)}
