"""attention: the query heads of a kv head together, token by token for decode, in tiles of rows for prefill."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ...kernels.op import Numerics, Signature, TensorType
from ...kernels.spi import BoundCall, DeviceTensor
from .launch import FUNCTION_ULP, Launch, OpKernel, Planner, Target, cdiv, launch, place, pointer, power_of_two, room

INTERPRETED_UNITS = 8  # as many as it takes for keys to come in parts


@dataclass(frozen=True)
class Tile:
    """`block_m` rows by `block_n` keys, padded to powers of two."""

    block_m: int
    block_n: int
    warps: int
    stages: int

    def shared_bytes(self, block_d: int, element: int) -> int:
        """Of queries, keys and values under way, and weights."""
        under_way = (self.stages - 1) * 2 * self.block_n * element
        return block_d * (self.block_m * 4 + under_way) + self.block_m * self.block_n * 4


@dataclass(frozen=True)
class Plan:
    """How a call is cut: `rows` of (token, query head of a kv head) in each of `tiles`, and `parts` of the keys, each
    of `longest` at most."""

    function: str
    tile: Tile
    block_d: int
    rows: int
    tiles: int
    parts: int
    longest: int


def _has_products(target: Target) -> bool:
    """Whether Triton has tensor cores multiply: for NVIDIA from compute capability 8.0 on."""
    return target.kind != "cuda" or int(target.arch) >= 80


def _is_half(target: Target, tensor: DeviceTensor | TensorType) -> bool:
    """Whether products with this cache are of float16."""
    return tensor.dtype == "f16" and _has_products(target)


def _decode_tile(target: Target, group: int, row: int) -> Tile:
    """16 kB of keys at a time and as much of values, and three times that under way; half where a multiprocessor cannot
    hold two such programs."""
    size = 16384 if target.shared_bytes >= 160 * 1024 else 8192
    block_n = min(64, max(16, size // row))
    return Tile(max(16, power_of_two(group)), block_n, 4 if row <= 512 else 8, 2 if target.kind == "hip" else 3)


def _prefill_tile(target: Target, block_d: int, element: int) -> Tile:
    """The largest that fits and compiles without spills (counted for cuda:80, 90, 100 and hip:gfx942); of float32
    caches whose rows are long every tile spills, these 20 registers of a thread."""
    row = block_d * element
    if target.kind == "hip":
        return Tile(64 if row <= 512 else 32, 32 if row <= 256 else 16, 4, 2)
    major = 9 if target.is_interpreted else int(target.arch) // 10
    if row <= 256 and element == 2:
        sizes = [(128, 64 if major >= 9 else 32, 8), (64, 32, 4), (32, 32, 4)]
    elif row <= 512 and element == 2:
        # Tiles of 64 are for where sums lie in a memory of their own: elsewhere they leave too few registers.
        sizes = [(64, 32, 8), (32, 32, 4)] if major >= 10 else [(32, 32, 4), (32, 16, 4)]
    else:
        sizes = [(32, 32, 4) if row <= 256 else (32, 16, 4) if row <= 512 else (16, 16, 8), (16, 16, 4)]
    tiles = [Tile(m, n, warps, stages) for m, n, warps in sizes for stages in (3, 2)]
    return next((x for x in tiles if x.shared_bytes(block_d, element) <= target.shared_bytes), tiles[-1])


def _plan(target: Target, signature: Signature) -> Plan:
    tensors = signature.tensors
    tokens, heads, head_dim = tensors["q"].shape
    _, kv_heads, page_size, _ = tensors["k_pages"].shape
    sequences, max_pages = tensors["block_table"].shape
    group, block_d = heads // kv_heads, max(16, power_of_two(head_dim))
    element = 2 if all(_is_half(target, tensors[name]) for name in ("k_pages", "v_pages")) else 4
    keys, units = max_pages * page_size, INTERPRETED_UNITS if target.is_interpreted else target.multiprocessors
    # as many sequences: one token of each, no two of which share keys
    is_decode = tokens <= sequences and group * block_d <= 64 * 128
    if is_decode:
        # A multiprocessor holds two programs at once; of sequences of different lengths it wants some more.
        tile, rows = _decode_tile(target, group, block_d * element), group
        keys, units = min(keys, signature.attrs["window"] or keys), units * (2 if tokens == 1 else 4)
    else:
        tile = _prefill_tile(target, block_d, element)
        rows = min(tile.block_m, min(tokens, max(1, tile.block_m // group)) * group)
        if power_of_two(rows) < tile.block_m:
            tile = replace(tile, block_m=max(16, power_of_two(rows)))
            if tile.block_m <= 32:
                tile = replace(tile, block_n=min(32, tile.block_n), warps=4)
    tiles = cdiv(tokens * group, rows)
    parts = max(1, min(units // (tiles * kv_heads), cdiv(keys, tile.block_n)))
    function = "attention_decode" if is_decode else "attention_prefill"
    return Plan(function, tile, block_d, rows, tiles, parts, max(tile.block_n, cdiv(keys, 16 * parts) * 16))


def _bind(planner: Planner, call: BoundCall) -> list[Launch]:
    tensors, attrs, target = call.tensors, call.attrs, planner.target
    tokens, heads, head_dim = tensors["q"].shape
    pages, kv_heads, page_size, _ = tensors["k_pages"].shape
    sequences, max_pages = tensors["block_table"].shape
    x = _plan(target, call.signature)
    parted = tokens * heads * x.parts * 4 if x.parts > 1 else 0
    parts = {
        "part_tops": room(planner, "attention_tops", parted),
        "part_norms": room(planner, "attention_norms", parted),
        "part_sums": room(planner, "attention_sums", parted * head_dim),
    }
    scale, cap = attrs["scale"] or head_dim**-0.5, attrs["softcap"]
    factor = scale / cap if cap else scale * math.log2(math.e)
    arguments = {
        **place("q", tensors["q"]), **place("k_pages", tensors["k_pages"]), **place("v_pages", tensors["v_pages"]),
        **place("block_table", tensors["block_table"]), "seq_ids": pointer(tensors["seq_ids"]),
        "positions": pointer(tensors["positions"]), **place("y", tensors["y"]), **parts, "tokens": tokens,
        "sequences": sequences, "max_pages": max_pages, "pages": pages, "kv_heads": kv_heads, "factor": float(factor),
        "cap": float(cap * math.log2(math.e)), "window": attrs["window"],
        "rows": x.rows,
    }  # fmt: skip
    constants = {
        "GROUP": heads // kv_heads, "HEAD_DIM": head_dim, "PAGE": page_size,
        "K_HALF": int(_is_half(target, tensors["k_pages"])), "V_HALF": int(_is_half(target, tensors["v_pages"])),
        "HAS_CAP": int(cap > 0), "HAS_WINDOW": int(attrs["window"] > 0), "IS_WHOLE": int(x.parts == 1),
        "BLOCK_M": x.tile.block_m, "BLOCK_N": x.tile.block_n, "BLOCK_D": x.block_d, "PRECISION": _precision(target),
    }  # fmt: skip
    grid = (x.tiles, kv_heads, x.parts)
    launches = [launch("attention", x.function, grid, arguments, constants, x.tile.warps, x.tile.stages)]
    if x.parts > 1:
        arguments = {
            **place("y", tensors["y"]),
            **parts,
            "seq_ids": pointer(tensors["seq_ids"]),
            "heads": heads,
            "parts": x.parts,
        }
        constants = {"HEAD_DIM": head_dim, "BLOCK_P": power_of_two(x.parts), "BLOCK_D": x.block_d}
        launches.append(launch("attention", "attention_merge", (tokens, heads), arguments, constants))
    return launches


def _precision(target: Target) -> str:
    """Of products of float32 matrices: three of tensor cores, or the exact one where those do not exist."""
    return "tf32x3" if target.kind == "cuda" and _has_products(target) else "ieee"


def _numerics(target: Target, signature: Signature) -> Numerics:
    """Longest chain: a score's head_dim, or the keys of a part, rescaled once per block, and the parts. A product of
    two or three adds to it as often, and splitting its factors costs no more than 12 roundings."""
    x = _plan(target, signature)
    products = 3 if _precision(target) == "tf32x3" else 2
    keys = products * x.longest + cdiv(x.longest, x.tile.block_n) + (x.parts if x.parts > 1 else 0)
    return Numerics("f32", max(products * signature.tensors["q"].shape[2], keys) + 12, "f32", FUNCTION_ULP)


KERNELS = [OpKernel("attention", _numerics, _bind)]
