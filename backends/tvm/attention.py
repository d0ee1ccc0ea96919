"""attention: which kernel a call takes.

attention_split.py has those for a few tokens, attention_tiles.py that for many, attention_amx.py that for many where
the CPU has tiles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...kernels.op import Numerics, Signature
from ...kernels.spi import BoundCall
from . import attention_amx, attention_tiles
from .attention_split import attention_merge, attention_split
from .emit import DEALT_ROWS
from .launch import FUNCTION_ULP, KernelSpec, Launch, OpKernel, address, place, spec
from .softmax import BLOCK

if TYPE_CHECKING:
    from . import TVMBackend

# From here on tiles pay for turning keys and values into floats: at 1024 keys splits take 0.8 of their time for 32
# tokens, 0.95 for 64, 1.15 for 128.
TILED_FROM = 64


def _shape(signature: Signature) -> dict[str, Any]:
    dtypes = {"f16": "float16", "f32": "float32"}
    kinds = {f"{name[0]}_dtype": dtypes[signature.tensors[name].dtype] for name in ("k_pages", "v_pages")}
    _, _, page_size, head_dim = signature.tensors["k_pages"].shape
    return {**kinds, "head_dim": head_dim, "page_size": page_size, "capped": signature.attrs["softcap"] > 0}


def _per_head(signature: Signature) -> int:
    return signature.tensors["q"].shape[1] // signature.tensors["k_pages"].shape[1]


def _split_rows(signature: Signature) -> int:
    """Rows of an item: those of a kv head in equal parts of at most 8."""
    per_head = _per_head(signature)
    return -(-per_head // -(-per_head // 8))


def _is_tiled(signature: Signature) -> bool:
    return signature.tensors["q"].shape[0] >= TILED_FROM


def _is_amx(backend: TVMBackend, signature: Signature) -> bool:
    halves = all(signature.tensors[name].dtype == "f16" for name in ("k_pages", "v_pages"))
    return _is_tiled(signature) and backend.target.amx and halves


def kernels(backend: TVMBackend, signature: Signature) -> list[KernelSpec]:
    shape = _shape(signature)
    if _is_amx(backend, signature):
        shape = {name: value for name, value in shape.items() if not name.endswith("_dtype")}
        return [spec(attention_amx.attention_amx, per_head=_per_head(signature), **shape)]
    if _is_tiled(signature):
        return [spec(attention_tiles.attention_tiles, per_head=_per_head(signature), **shape)]
    rows = _split_rows(signature)
    return [spec(attention_split, rows=rows, **shape), spec(attention_merge, head_dim=shape["head_dim"], rows=rows)]


def numerics(backend: TVMBackend, signature: Signature) -> Numerics:
    """Longest chain: a score's head_dim, or the keys of a value's sum one by one, rescaled once per block."""
    table, pages = signature.tensors["block_table"].shape, signature.tensors["k_pages"].shape
    keys = table[1] * pages[2]
    depth = max(pages[3], keys + -(-keys // BLOCK) + backend.threads)
    if _is_amx(backend, signature):
        depth = 3 * depth + attention_amx.ROUNDINGS
    return Numerics("f32", depth, "f32", FUNCTION_ULP)


def bind(backend: TVMBackend, call: BoundCall) -> list[Launch]:
    signature, attrs, tensors = call.signature, call.attrs, call.tensors
    tokens, _, head_dim = tensors["q"].shape
    pages, kv_heads, _, _ = tensors["k_pages"].shape
    sequences, max_pages = tensors["block_table"].shape
    per_head, chunks = _per_head(signature), -(-head_dim // 16)
    specs = kernels(backend, signature)
    problem = [
        *place(tensors["q"]), address(tensors["k_pages"]), address(tensors["v_pages"]), *place(tensors["block_table"]),
        address(tensors["seq_ids"]), address(tensors["positions"]), tokens, kv_heads, sequences, max_pages, pages,
        float(attrs["scale"] or head_dim**-0.5), float(attrs["softcap"]), attrs["window"] or 2**31 - 1,
    ]  # fmt: skip
    if _is_tiled(signature):
        # Smaller tiles where there would not be a few for each worker.
        most, group, words = attention_tiles.TILE_ROWS, attention_tiles.ROWS, attention_tiles.tile_floats
        if _is_amx(backend, signature):
            most, group, words = attention_amx.TILE_ROWS, attention_amx.ROWS, attention_amx.scratch_words
        tile = max(1, min(DEALT_ROWS, most // per_head, -(-tokens * kv_heads // (4 * backend.threads))))
        capacity = -(-tile * per_head // group) * group
        lasts = backend.scratch("attention rows", backend.threads * capacity * 4)
        scratch = backend.scratch("attention tiles", backend.threads * words(capacity, head_dim) * 4)
        tiles = backend.launch(
            specs[0], *problem, *place(tensors["y"]), tile, capacity, lasts.address, scratch.address,
            held=(call, lasts, scratch),
        )  # fmt: skip
        return [tiles]
    rows = _split_rows(signature)
    groups, splits = -(-per_head // rows), backend.threads
    lines = tokens * kv_heads * groups * splits * rows
    largest = backend.scratch("attention largest", lines * 4)
    totals = backend.scratch("attention totals", lines * 64)
    sums = backend.scratch("attention sums", lines * 64 * chunks)
    scratch = backend.scratch("attention weights", backend.threads * rows * BLOCK * 4)
    partial = [buffer.address for buffer in (largest, totals, sums)]
    held = (call, largest, totals, sums, scratch)
    split = backend.launch(specs[0], *problem, per_head, groups, splits, *partial, scratch.address, held=held)
    merge = backend.launch(
        specs[1], *place(tensors["y"]), address(tensors["seq_ids"]), tokens, kv_heads, per_head, groups, splits,
        *partial, held=held,
    )  # fmt: skip
    return [split, merge]


KERNELS = [OpKernel("attention", kernels, numerics, bind)]
