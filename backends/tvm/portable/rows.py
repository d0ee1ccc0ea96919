"""embedding and dequantize: rows of a weight as floats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....kernels.op import Numerics, Signature
from .machine import Machine

if TYPE_CHECKING:
    from .builder import Builder


def embedding(k: Builder) -> None:
    vocab, _ = k.signature.tensors["w"].shape
    tokens, scale = k.signature.tensors["y"].shape[0], k.signature.attrs["scale"]
    with k.kernel() as tensors:
        w, y = tensors["w"], tensors["y"]
        with k.each(tokens, w.runs) as (t, run):
            token, values = k.keep(tensors["token_ids"][t]), k.array(w.length)
            with k.loop(w.length) as j:
                values[j] = k.constant(0.0)
            with k.when(k.both(token >= 0, token < vocab)):
                w.run(token, run, values)
            with k.loop(w.length) as j:
                y[t, run * w.length + j] = values[j] * k.constant(scale)


def dequantize(k: Builder) -> None:
    with k.kernel() as tensors:
        w, y = tensors["w"], tensors["y"]
        with k.each(y.shape[0], w.runs) as (n, run):
            values = k.array(w.length)
            w.run(n, run, values)
            with k.loop(w.length) as j:
                y[n, run * w.length + j] = values[j]


def numerics(signature: Signature, machine: Machine) -> Numerics:
    return Numerics("f32", 2, "f32", 1.0)


KERNELS = {"embedding": (embedding, numerics), "dequantize": (dequantize, numerics)}
