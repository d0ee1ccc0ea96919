"""Element-wise ops: add, softcap, glu, gather, advance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...kernels.op import Numerics, Signature
from ...kernels.spi import BoundCall, DeviceTensor
from .launch import (
    FUNCTION_ULP,
    Argument,
    Launch,
    OpKernel,
    Planner,
    Target,
    cdiv,
    launch,
    place,
    pointer,
    power_of_two,
)

TILE = 512  # numbers of a program: 4 a thread, 16 bytes


def _launch(
    planner: Planner, op: str, shape: tuple[int, ...], arguments: Mapping[str, Argument],
    more: Mapping[str, Argument] | None = None, constants: Mapping[str, Any] | None = None,
) -> list[Launch]:  # fmt: skip
    """`arguments`, rows and columns of `shape`, then `more`."""
    rows, columns = shape
    if planner.target.is_interpreted:
        block_c, block_r = min(1 << 14, power_of_two(columns)), min(64, power_of_two(rows))
    else:
        block_c = min(TILE, power_of_two(columns))
        block_r = TILE // block_c
    every = {**arguments, "rows": rows, "columns": columns, **(more or {})}
    blocks = {**(constants or {}), "BLOCK_R": block_r, "BLOCK_C": block_c}
    return [launch("pointwise", op, (cdiv(rows, block_r), cdiv(columns, block_c)), every, blocks)]


def _places(tensors: Mapping[str, DeviceTensor], names: Sequence[str]) -> dict[str, Argument]:
    return {name: value for one in names for name, value in place(one, tensors[one]).items()}


def _add(planner: Planner, call: BoundCall) -> list[Launch]:
    return _launch(planner, "add", call.tensors["x"].shape, _places(call.tensors, ("x", "y")))


def _softcap(planner: Planner, call: BoundCall) -> list[Launch]:
    x = call.tensors["x"]
    return _launch(planner, "softcap", x.shape, place("x", x), {"cap": float(call.attrs["cap"])})


def _glu(planner: Planner, call: BoundCall) -> list[Launch]:
    arguments = _places(call.tensors, ("gate", "up", "y"))
    return _launch(planner, "glu", call.tensors["y"].shape, arguments, constants={"KIND": call.attrs["kind"]})


def _gather(planner: Planner, call: BoundCall) -> list[Launch]:
    x, rows, y = (call.tensors[name] for name in ("x", "rows", "y"))
    arguments = {**place("x", x), "chosen": pointer(rows), **place("y", y)}
    return _launch(planner, "gather", y.shape, arguments, {"tokens": x.shape[0]})


def _advance(planner: Planner, call: BoundCall) -> list[Launch]:
    positions, seq_ids = call.tensors["positions"], call.tensors["seq_ids"]
    (tokens,) = positions.shape
    arguments = {"positions": pointer(positions), "seq_ids": pointer(seq_ids), "tokens": tokens}
    return [launch("pointwise", "advance", (cdiv(tokens, 128),), arguments, {"BLOCK": 128}, warps=1)]


def _numerics(target: Target, signature: Signature) -> Numerics:
    return Numerics("f32", 1, "f32", FUNCTION_ULP)


BINDERS: dict[str, Callable[[Planner, BoundCall], list[Launch]]] = {
    "add": _add,
    "softcap": _softcap,
    "glu": _glu,
    "gather": _gather,
    "advance": _advance,
}
KERNELS = [OpKernel(op, _numerics, bind) for op, bind in BINDERS.items()]
