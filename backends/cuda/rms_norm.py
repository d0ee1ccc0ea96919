"""rms_norm: one program per row, so that a norm over the heads of q and k fills a GPU and a decode step has one sum."""

from __future__ import annotations

import math

from ...kernels.op import Numerics, Signature
from ...kernels.spi import BoundCall
from .launch import FUNCTION_ULP, Launch, OpKernel, Planner, Target, cdiv, launch, place, pointer, power_of_two

WIDEST = 8192  # columns that stay in registers: 32 of each thread
THREADS = 32  # of a warp


def _block(target: Target, columns: int) -> int:
    return min(1024 if target.is_interpreted else WIDEST, power_of_two(columns))


def _warps(block: int) -> int:
    return min(8, max(1, block // 256))


def _bind(planner: Planner, call: BoundCall) -> list[Launch]:
    x, weight, y = (call.tensors[name] for name in ("x", "weight", "y"))
    rows, columns = x.shape
    block_c = _block(planner.target, columns)
    block_r = min(64, power_of_two(rows)) if planner.target.is_interpreted else 1
    arguments = {
        **place("x", x), "weight": pointer(weight), **place("y", y), "rows": rows, "columns": columns,
        "eps": float(call.attrs["eps"]), "weight_offset": float(call.attrs["weight_offset"]),
    }  # fmt: skip
    constants = {"IS_WHOLE": int(columns <= block_c), "BLOCK_R": block_r, "BLOCK_C": block_c}
    return [launch("rms_norm", "rms_norm", (cdiv(rows, block_r),), arguments, constants, warps=_warps(block_c))]


def _numerics(target: Target, signature: Signature) -> Numerics:
    """A thread adds up its own squares, of all blocks; then a tree over the threads."""
    columns = signature.tensors["x"].shape[1]
    block = _block(target, columns)
    threads = THREADS * _warps(block)
    depth = cdiv(columns, block) + cdiv(block, threads) + math.ceil(math.log2(threads))
    return Numerics("f32", depth, "f32", FUNCTION_ULP)


KERNELS = [OpKernel("rms_norm", _numerics, _bind)]
