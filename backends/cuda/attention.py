"""attention: the query heads of a kv head together, token by token for decode, in tiles of rows for prefill."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ...kernels.op import NUMPY_DTYPES, Numerics, Signature
from ...kernels.spi import BoundCall
from .launch import FUNCTION_ULP, Launch, OpKernel, Planner, Target, cdiv, launch, place, pointer, power_of_two, room

BLOCK_BYTES = 16384  # of keys under way at a time, and as much of values
LONGEST_BLOCK = 64
LARGEST_TILE = 128
DECODE_PER_UNIT = 2  # programs that a multiprocessor holds at once
INTERPRETED_UNITS = 8  # as many as it takes for keys to come in parts


@dataclass(frozen=True)
class Tiling:
    """How a call is cut: `rows` of (token, query head of a kv head) in a tile of block_m, `parts` of the keys in blocks
    of block_n; `longest` keys are in a part."""

    rows: int
    tiles: int
    parts: int
    longest: int
    block_m: int
    block_n: int
    block_d: int
    warps: int
    stages: int


def _tiling(target: Target, signature: Signature) -> Tiling:
    tensors = signature.tensors
    tokens, heads, head_dim = tensors["q"].shape
    _, kv_heads, page_size, _ = tensors["k_pages"].shape
    sequences, max_pages = tensors["block_table"].shape
    group, block_d = heads // kv_heads, max(16, power_of_two(head_dim))
    element = max(np.dtype(NUMPY_DTYPES[tensors[name].dtype]).itemsize for name in ("k_pages", "v_pages"))
    block_n = min(LONGEST_BLOCK, max(16, BLOCK_BYTES // (block_d * element)))
    # one token of each sequence: no two share keys
    is_decode = tokens <= sequences
    most = max(16, min(LARGEST_TILE, 128 * 128 // block_d))
    rows = group if is_decode else min(tokens, max(1, most // group)) * group
    rows = min(rows, most)
    tiles = cdiv(tokens * group, rows)
    units = (
        INTERPRETED_UNITS if target.is_interpreted else target.multiprocessors * (DECODE_PER_UNIT if is_decode else 1)
    )
    keys = max_pages * page_size
    if signature.attrs["window"] and is_decode:
        keys = min(keys, signature.attrs["window"])
    parts = max(1, min(units // (tiles * kv_heads), cdiv(keys, block_n)))
    longest = max(block_n, cdiv(keys, 16 * parts) * 16)
    block_m = max(16, power_of_two(rows))
    warps = 8 if block_m > 64 else 4
    return Tiling(rows, tiles, parts, longest, block_m, block_n, block_d, warps, 3)


def _bind(planner: Planner, call: BoundCall) -> list[Launch]:
    tensors, attrs, target = call.tensors, call.attrs, planner.target
    tokens, heads, head_dim = tensors["q"].shape
    pages, kv_heads, page_size, _ = tensors["k_pages"].shape
    sequences, max_pages = tensors["block_table"].shape
    x = _tiling(target, call.signature)
    parts = {
        "part_tops": room(planner, "attention_tops", tokens * heads * x.parts * 4),
        "part_norms": room(planner, "attention_norms", tokens * heads * x.parts * 4),
        "part_sums": room(planner, "attention_sums", tokens * heads * x.parts * head_dim * 4),
    }
    scale, cap = attrs["scale"] or head_dim**-0.5, attrs["softcap"]
    factor = scale / cap if cap else scale * math.log2(math.e)
    arguments = {
        **place("q", tensors["q"]), **place("k_pages", tensors["k_pages"]), **place("v_pages", tensors["v_pages"]),
        **place("block_table", tensors["block_table"]), "seq_ids": pointer(tensors["seq_ids"]),
        "positions": pointer(tensors["positions"]), **place("y", tensors["y"]), **parts, "tokens": tokens,
        "sequences": sequences, "max_pages": max_pages, "pages": pages, "kv_heads": kv_heads, "factor": float(factor),
        "cap": float(cap * math.log2(math.e)), "window": attrs["window"],
    }  # fmt: skip
    constants = {
        "GROUP": heads // kv_heads, "HEAD_DIM": head_dim, "PAGE": page_size,
        "K_HALF": int(tensors["k_pages"].dtype == "f16"), "V_HALF": int(tensors["v_pages"].dtype == "f16"),
        "HAS_CAP": int(cap > 0), "HAS_WINDOW": int(attrs["window"] > 0), "ROWS": x.rows, "PARTS": x.parts,
        "BLOCK_M": x.block_m, "BLOCK_N": x.block_n, "BLOCK_D": x.block_d, "PRECISION": _precision(target),
    }  # fmt: skip
    grid = (x.tiles, kv_heads, x.parts)
    launches = [launch("attention", "attention_tiles", grid, arguments, constants, x.warps, x.stages)]
    if x.parts > 1:
        arguments = {**place("y", tensors["y"]), **parts, "seq_ids": pointer(tensors["seq_ids"]), "heads": heads}
        constants = {"HEAD_DIM": head_dim, "PARTS": x.parts, "BLOCK_P": power_of_two(x.parts), "BLOCK_D": x.block_d}
        launches.append(launch("attention", "attention_merge", (tokens, heads), arguments, constants))
    return launches


def _precision(target: Target) -> str:
    """Of products of float32 matrices: three of tensor cores, or the exact one where those do not exist."""
    return "tf32x3" if target.kind == "cuda" and int(target.arch) >= 80 else "ieee"


def _numerics(target: Target, signature: Signature) -> Numerics:
    x = _tiling(target, signature)
    products = 3 if _precision(target) == "tf32x3" else 2
    keys = products * x.longest + cdiv(x.longest, x.block_n) + (x.parts if x.parts > 1 else 0)
    return Numerics("f32", max(products * signature.tensors["q"].shape[2], keys), "f32", FUNCTION_ULP)


KERNELS = [OpKernel("attention", _numerics, _bind)]
