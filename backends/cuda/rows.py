"""embedding and dequantize: rows of a packed weight as floats."""

from __future__ import annotations

from ...kernels.op import Numerics, Signature
from ...kernels.quant import FORMATS
from ...kernels.spi import BoundCall
from . import formats
from .launch import Launch, OpKernel, Planner, Target, cdiv, launch, place, pointer, power_of_two, weight_arguments

BLOCKS = 32  # of a row at a time: 1024 columns
ROWS = 4  # of `dequantize` at a time


def _bind(planner: Planner, call: BoundCall) -> list[Launch]:
    weight, y = call.tensors["w"], call.tensors["y"]
    ids = call.tensors.get("token_ids")
    rows, columns = y.shape
    most = 1024 if planner.target.is_interpreted else BLOCKS
    block_b = min(most, power_of_two(cdiv(columns, formats.BLOCK)))
    block_r = 1 if ids else min(rows, 64) if planner.target.is_interpreted else ROWS
    block_r = power_of_two(block_r)
    arguments = {
        "ids": pointer(ids or y), **weight_arguments("w", weight), **place("y", y), "rows": rows, "columns": columns,
        "vocab": weight.shape[0], "factor": float(call.attrs.get("scale", 1.0)),
    }  # fmt: skip
    constants = {
        "HAS_IDS": int(ids is not None), **formats.constants(FORMATS[weight.dtype]),
        "BLOCK_R": block_r, "BLOCK_B": block_b,
    }  # fmt: skip
    grid = (cdiv(rows, block_r), cdiv(cdiv(columns, formats.BLOCK), block_b))
    return [launch("rows", "rows_of_weight", grid, arguments, constants)]


def _numerics(target: Target, signature: Signature) -> Numerics:
    return Numerics("f32", 2, "f32", 1.0)


KERNELS = [OpKernel(op, _numerics, _bind) for op in ("embedding", "dequantize")]
