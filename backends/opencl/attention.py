"""attention: a work-item per token and head for a few tokens, tiles of 16 tokens for many."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...kernels.op import Numerics, Signature
from ...kernels.spi import BoundCall
from .launch import FUNCTION_ULP, Enqueue, OpKernel, ProgramSpec, kv_define, place, start

if TYPE_CHECKING:
    from . import OpenCLBackend

TILE = 16  # tokens that share each block of keys
# Below this a tile is mostly empty, and transposing the keys for it costs more than it saves.
TILED_FROM = 8


def _program(signature: Signature) -> ProgramSpec:
    head_dim = signature.tensors["q"].shape[2]
    return ProgramSpec(("lanes.h", "attention.cl"), (f"D={head_dim}", kv_define(signature)), (f"TILE={TILE}",))


def _numerics(signature: Signature) -> Numerics:
    """Longest chain: a score's head_dim, or the keys of a value sum one by one, rescaled once per block of 16."""
    table, pages = signature.tensors["block_table"].shape, signature.tensors["k_pages"].shape
    keys = table[1] * pages[2]
    return Numerics("f32", max(signature.tensors["q"].shape[2], keys + -(-keys // 16)), "f32", FUNCTION_ULP)


def _local_bytes(head_dim: int) -> int:
    return 4 * 16 * (2 * head_dim + TILE)


def _bind(backend: OpenCLBackend, call: BoundCall) -> list[Enqueue]:
    signature, attrs = call.signature, call.attrs
    tokens, heads, head_dim = call.tensors["q"].shape
    pages, kv_heads, page_size, _ = call.tensors["k_pages"].shape
    sequences, max_pages = call.tensors["block_table"].shape
    scale = attrs["scale"] or head_dim**-0.5
    args: list[Any] = [
        *place(call.tensors["q"]), *start(call.tensors["k_pages"]), *start(call.tensors["v_pages"]),
        *place(call.tensors["block_table"]), *start(call.tensors["seq_ids"]), *start(call.tensors["positions"]),
        *place(call.tensors["y"]), *map(np.int32, (heads, kv_heads, page_size, sequences, max_pages, pages)),
        np.float32(scale), np.float32(attrs["softcap"]), np.int32(attrs["window"]),
    ]  # fmt: skip
    program = _program(signature)
    if tokens >= TILED_FROM and _local_bytes(head_dim) <= backend.opened.device.local_mem_size:
        size = (-(-tokens // TILE), heads)
        return [backend.enqueue(program, "attention_tiles", size, (1, 1), *args, np.int32(tokens))]
    return [backend.enqueue(program, "attention_rows", (tokens, heads), (1, 1), *args)]


KERNELS = [OpKernel("attention", lambda signature: [_program(signature)], _numerics, _bind)]
