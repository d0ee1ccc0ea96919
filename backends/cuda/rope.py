"""rope, kv_append, and both in one launch."""

from __future__ import annotations

from typing import Any

from ...kernels.op import Numerics, Signature
from ...kernels.spi import BoundCall
from .launch import Argument, Launch, OpKernel, Planner, Target, cdiv, launch, place, pointer, power_of_two

PAIRS = 256  # of a program
WARPS = 2  # of 4 pairs a thread


def _heads(planner: Planner, heads: int, head_dim: int) -> int:
    """How many heads a program does: all of a token where a program costs more than its work."""
    most = heads if planner.target.is_interpreted else max(1, 2 * PAIRS // power_of_two(head_dim))
    return power_of_two(min(heads, most))


def _rotation(call: BoundCall, head_dim: int) -> dict[str, Any]:
    rot_dim = call.tensors["cos_sin"].shape[1]
    return {"HEAD_DIM": head_dim, "ROT_DIM": rot_dim, "IS_INTERLEAVED": int(call.attrs["pairing"] == "interleaved")}


def _cache(call: BoundCall) -> dict[str, Argument]:
    """Arguments for where keys and values go; `_cache_sizes` come later."""
    tensors = call.tensors
    return {
        **place("block_table", tensors["block_table"]), "seq_ids": pointer(tensors["seq_ids"]),
        "positions": pointer(tensors["positions"]), **place("k_pages", tensors["k_pages"]),
        **place("v_pages", tensors["v_pages"]),
    }  # fmt: skip


def _cache_sizes(call: BoundCall) -> dict[str, Argument]:
    sequences, max_pages = call.tensors["block_table"].shape
    pages, kv_heads, page_size, _ = call.tensors["k_pages"].shape
    return {
        "kv_heads": kv_heads, "sequences": sequences, "max_pages": max_pages, "pages": pages, "page_size": page_size,
    }  # fmt: skip


def _bind_rope(planner: Planner, call: BoundCall) -> list[Launch]:
    x, table = call.tensors["x"], call.tensors["cos_sin"]
    tokens, heads, head_dim = x.shape
    block_h = _heads(planner, heads, head_dim)
    arguments = {
        **place("x", x), **place("cos_sin", table), "positions": pointer(call.tensors["positions"]),
        "heads": heads, "table_length": table.shape[0],
    }  # fmt: skip
    blocks = {"BLOCK_H": block_h, "BLOCK_P": power_of_two(table.shape[1] // 2)}
    constants = {**_rotation(call, head_dim), **blocks}
    return [launch("rope", "rope", (tokens, cdiv(heads, block_h)), arguments, constants, warps=WARPS)]


def _bind_kv_append(planner: Planner, call: BoundCall) -> list[Launch]:
    k, v = call.tensors["k"], call.tensors["v"]
    tokens, kv_heads, head_dim = k.shape
    block_h = _heads(planner, kv_heads, head_dim)
    arguments = {**place("k", k), **place("v", v), **_cache(call), **_cache_sizes(call)}
    constants = {"HEAD_DIM": head_dim, "BLOCK_H": block_h, "BLOCK_D": power_of_two(head_dim)}
    return [launch("rope", "kv_append", (tokens, cdiv(kv_heads, block_h)), arguments, constants, warps=WARPS)]


def _bind_both(planner: Planner, call: BoundCall) -> list[Launch]:
    q, k, v, table = (call.tensors[name] for name in ("q", "k", "v", "cos_sin"))
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    block_h = _heads(planner, kv_heads, head_dim)
    arguments = {
        **place("q", q), **place("k", k), **place("v", v), **place("cos_sin", table), **_cache(call),
        "heads": heads, "table_length": table.shape[0], **_cache_sizes(call),
    }  # fmt: skip
    constants = {
        **_rotation(call, head_dim), "BLOCK_H": block_h, "BLOCK_P": power_of_two(table.shape[1] // 2),
        "BLOCK_D": power_of_two(head_dim),
    }  # fmt: skip
    grid = (tokens, cdiv(heads, block_h) + cdiv(kv_heads, block_h))
    return [launch("rope", "rope_kv_append", grid, arguments, constants, warps=WARPS)]


def _numerics(target: Target, signature: Signature) -> Numerics:
    return Numerics("f32", 2, "f32", 1.0)


KERNELS = [
    OpKernel("rope", _numerics, _bind_rope),
    OpKernel("kv_append", _numerics, _bind_kv_append),
    OpKernel("rope_kv_append", _numerics, _bind_both),
]
