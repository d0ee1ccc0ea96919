"""attention: the query heads of a KV head together, for a few tokens one by one, for many in tiles of 32 rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...kernels.op import Numerics, Signature
from ...kernels.spi import BoundCall
from .launch import FUNCTION_ULP, Enqueue, OpKernel, ProgramSpec, kv_define, place, start

if TYPE_CHECKING:
    from . import OpenCLBackend

KEYS = 32  # keys that a tile takes at a time
# Below this a tile is mostly empty.
TILED_FROM = 8
# A few tokens' keys are split into parts where that many work-groups would leave threads idle: no fewer keys than this,
# a few microseconds of work, in each.
PART_KEYS = 128
GROUPS_PER_UNIT = 3


def _program(signature: Signature, *tiles: str) -> ProgramSpec:
    _, heads, head_dim = signature.tensors["q"].shape
    group = heads // signature.tensors["k_pages"].shape[1]
    defines = (f"D={head_dim}", f"R={group}", kv_define(signature), *tiles)
    return ProgramSpec(("lanes.h", "attention.cl"), defines, (f"KEYS={KEYS}",))


def _programs(signature: Signature) -> list[ProgramSpec]:
    rows = _program(signature)
    return [rows, _program(signature, "TILES")] if signature.tensors["q"].shape[0] >= TILED_FROM else [rows]


def _numerics(signature: Signature) -> Numerics:
    """Longest chain: a score's head_dim, or the keys of a value sum one by one, rescaled once per block of 16."""
    table, pages = signature.tensors["block_table"].shape, signature.tensors["k_pages"].shape
    keys = table[1] * pages[2]
    return Numerics("f32", max(signature.tensors["q"].shape[2], keys + -(-keys // 16)), "f32", FUNCTION_ULP)


def _local_bytes(head_dim: int) -> int:
    return 4 * (2 * 32 * head_dim + 2 * KEYS * head_dim + KEYS * 32)


def _bind(backend: OpenCLBackend, call: BoundCall) -> list[Enqueue]:
    signature, attrs = call.signature, call.attrs
    tokens, heads, head_dim = call.tensors["q"].shape
    pages, kv_heads, page_size, _ = call.tensors["k_pages"].shape
    sequences, max_pages = call.tensors["block_table"].shape
    scale = attrs["scale"] or head_dim**-0.5
    table, where = (
        place(call.tensors["block_table"]),
        (*start(call.tensors["seq_ids"]), *start(call.tensors["positions"])),
    )
    y, window = place(call.tensors["y"]), np.int32(attrs["window"])
    sizes = tuple(map(np.int32, (kv_heads, page_size, sequences, max_pages, pages)))
    args: list[Any] = [
        *place(call.tensors["q"]), *start(call.tensors["k_pages"]), *start(call.tensors["v_pages"]),
        *table, *where, *y, *sizes, np.float32(scale), np.float32(attrs["softcap"]), window,
    ]  # fmt: skip
    if tokens >= TILED_FROM and _local_bytes(head_dim) <= backend.opened.device.local_mem_size:
        size = (-(-tokens * heads // kv_heads // 32), kv_heads)
        return [backend.enqueue(_program(signature, "TILES"), "attention_tiles", size, (1, 1), *args, np.int32(tokens))]
    program = _program(signature)
    most = max(1, min(attrs["window"] or max_pages * page_size, max_pages * page_size) // PART_KEYS)
    parts = min(most, -(-GROUPS_PER_UNIT * backend.opened.threads // (tokens * kv_heads)))
    room = backend.scratch("parts", tokens * heads * parts * (2 + head_dim) * 4)
    size = (tokens, kv_heads, parts)
    launches = [backend.enqueue(program, "attention_rows", size, (1, 1, 1), *args, np.int32(PART_KEYS), room)]
    if parts > 1:
        merged = (*y, *where, *table, *sizes, window, np.int32(parts), np.int32(PART_KEYS), room)
        launches.append(backend.enqueue(program, "attention_merge", (tokens,), (1,), *merged))
    return launches


KERNELS = [OpKernel("attention", _programs, _numerics, _bind)]
