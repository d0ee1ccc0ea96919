"""gemm and gemm_add: one row of the weight for a few tokens, or for tiles of many."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....kernels.op import Numerics, Signature
from ....kernels.quant import FORMATS
from .machine import Machine
from .maths import FUNCTION_ULP
from .weights import run_length

if TYPE_CHECKING:
    from .builder import Builder, Cell, Expr, Local

GEMV_TOKENS = 4  # up to so many tokens the lanes of a group share a row; above, each lane has a row of its own
TILE = 8  # tokens for which a dequantised run is used


def _spread(machine: Machine, length: int) -> int:
    return min(machine.spread, length)


def gemm(k: Builder) -> None:
    """Attributes change nothing: `fast` is computed exactly."""
    tokens = k.signature.tensors["x"].shape[0]
    with k.kernel():
        _few(k, tokens) if tokens <= GEMV_TOKENS else _many(k, tokens)


def _few(k: Builder, tokens: int) -> None:
    w = k.tensors["w"]
    spread = _spread(k.machine, w.length)
    with k.groups(k.tensors["y"].shape[1]) as (n,):
        sums, values = k.array(tokens * spread), k.array(w.length)
        with k.loop(tokens * spread) as i:
            sums[i] = k.constant(0.0)
        with k.share(w.runs) as run:
            w.run(n, run, values)
            for t in range(tokens):
                _multiply(k, sums, values, t, t, run, spread)
        totals = [_total(k, sums, t, spread) for t in range(tokens)]
        for total in totals:
            k.reduce([total])
        with k.first_lane():
            for t, total in enumerate(totals):
                _finish(k, t, n, total.value)


def _many(k: Builder, tokens: int) -> None:
    w = k.tensors["w"]
    spread = _spread(k.machine, w.length)
    with k.each(-(-tokens // TILE), k.tensors["y"].shape[1]) as (tile, n):
        sums, values = k.array(TILE * spread), k.array(w.length)
        with k.loop(TILE * spread) as i:
            sums[i] = k.constant(0.0)
        with k.loop(w.runs) as run:
            w.run(n, run, values)
            with k.loop(TILE) as t:  # past the last token it is repeated and not stored
                token = k.keep(k.least(tile * TILE + t, tokens - 1))
                _multiply(k, sums, values, t, token, run, spread)
        with k.loop(TILE) as t, k.when(tile * TILE + t < tokens):
            _finish(k, tile * TILE + t, n, _total(k, sums, t, spread).value)


def _multiply(k: Builder, sums: Local, values: Local, t: Expr, token: Expr, run: Expr, spread: int) -> None:
    """sums[t] += x[token] * values over one run, in `spread` sums side by side."""
    x, length = k.tensors["x"], k.tensors["w"].length
    with k.loop(length // spread) as step, k.loop(spread) as lane:
        product = x[token, run * length + step * spread + lane] * values[step * spread + lane]
        sums[t * spread + lane] = sums[t * spread + lane] + product


def _total(k: Builder, sums: Local, t: Expr, spread: int) -> Cell:
    total = k.cell(0.0)
    with k.loop(spread) as lane:
        total.add(sums[t * spread + lane])
    return total


def _finish(k: Builder, t: Expr, n: Expr, value: Expr) -> None:
    y = k.tensors["y"]
    if "bias" in k.tensors:
        value = value + k.tensors["bias"][n]
    y[t, n] = y[t, n] + value if k.signature.op == "gemm_add" else value


def numerics(signature: Signature, machine: Machine) -> Numerics:
    """Longest chain: a lane's products, its partial sums, the tree over the lanes."""
    tokens, in_features = signature.tensors["x"].shape
    length = run_length(FORMATS[signature.tensors["w"].dtype], in_features)
    spread = _spread(machine, length)
    lanes = machine.lanes if tokens <= GEMV_TOKENS else 1
    runs = -(-(in_features // length) // lanes)
    return Numerics("f32", runs * length // spread + spread + lanes.bit_length(), "f32", FUNCTION_ULP)


KERNELS = {"gemm": (gemm, numerics), "gemm_add": (gemm, numerics)}
