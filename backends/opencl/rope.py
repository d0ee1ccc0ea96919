"""rope, kv_append, and both in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...kernels.op import Numerics, Signature
from ...kernels.spi import BoundCall
from .launch import Enqueue, OpKernel, ProgramSpec, kv_define, place, start

if TYPE_CHECKING:
    from . import OpenCLBackend


def _program(signature: Signature) -> ProgramSpec:
    kv = kv_define(signature) if "k_pages" in signature.tensors else "KV_HALF"
    pairing = ("INTERLEAVED",) if signature.attrs.get("pairing") == "interleaved" else ()
    return ProgramSpec(("rope.cl",), (kv, *pairing))


def _bind_rope(backend: OpenCLBackend, call: BoundCall) -> list[Enqueue]:
    x, table = call.tensors["x"], call.tensors["cos_sin"]
    tokens, heads, head_dim = x.shape
    sizes = map(np.int32, (heads, head_dim, *table.shape))
    args = (*place(x), *place(table), *start(call.tensors["positions"]), *sizes)
    return [backend.enqueue(_program(call.signature), "rope", (tokens,), (1,), *args)]


def _cache(call: BoundCall) -> tuple[object, ...]:
    """Arguments for where keys and values go; `_cache_sizes` come behind them."""
    return (
        *place(call.tensors["block_table"]), *start(call.tensors["seq_ids"]), *start(call.tensors["positions"]),
        *start(call.tensors["k_pages"]), *start(call.tensors["v_pages"]),
    )  # fmt: skip


def _cache_sizes(call: BoundCall) -> tuple[int, ...]:
    """Sequences and pages of the block table, pages of the cache, page size."""
    pages, _, page_size, _ = call.tensors["k_pages"].shape
    return (*call.tensors["block_table"].shape, pages, page_size)


def _bind_kv_append(backend: OpenCLBackend, call: BoundCall) -> list[Enqueue]:
    k, v = call.tensors["k"], call.tensors["v"]
    tokens, kv_heads, head_dim = k.shape
    args = (*place(k), *place(v), *_cache(call), *map(np.int32, (kv_heads, *_cache_sizes(call), head_dim)))
    return [backend.enqueue(_program(call.signature), "kv_append", (tokens,), (1,), *args)]


def _bind_both(backend: OpenCLBackend, call: BoundCall) -> list[Enqueue]:
    q, k, v, table = (call.tensors[name] for name in ("q", "k", "v", "cos_sin"))
    tokens, heads, head_dim = q.shape
    sizes = (heads, k.shape[1], *_cache_sizes(call), head_dim, *table.shape)
    args = (*place(q), *place(k), *place(v), *place(table), *_cache(call), *map(np.int32, sizes))
    return [backend.enqueue(_program(call.signature), "rope_kv_append", (tokens,), (1,), *args)]


def _numerics(signature: Signature) -> Numerics:
    return Numerics("f32", 2, "f32", 1.0)


KERNELS = [
    OpKernel("rope", lambda s: [_program(s)], _numerics, _bind_rope),
    OpKernel("kv_append", lambda s: [_program(s)], _numerics, _bind_kv_append),
    OpKernel("rope_kv_append", lambda s: [_program(s)], _numerics, _bind_both),
]
