"""From a call to the launches of single-work-item kernels, op by op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ....kernels.op import Numerics, Signature
from ....kernels.spi import BoundCall, Launch
from ..launch import ERF_ULP, FUNCTION_ULP, OpKernel, place, start
from .engine import LANES, LAYOUTS, PARTIALS, Engine
from .programs import GLU_KINDS, Family, gemm_family

if TYPE_CHECKING:
    from . import FpgaBackend

INT8_LEVELS = 127
POINTWISE, RMS_NORM, ROPE, SAMPLE = Family("pointwise"), Family("rms_norm"), Family("rope"), Family("sample")


def _ints(*numbers: int) -> tuple[np.int32, ...]:
    return tuple(np.int32(number) for number in numbers)


# gemm


def _gemm_family(signature: Signature) -> Family:
    return gemm_family(signature.tensors["w"].dtype, signature.attrs["precision"])


def _gemm_numerics(signature: Signature) -> Numerics:
    """hls/README.md: 8 partial sums, added up in 3 steps; a beat's blocks in 2 or 1 before, or 16 products in 4."""
    kind = signature.tensors["w"]
    layout = LAYOUTS[kind.dtype]
    if _gemm_family(signature).fast:
        blocks = 2 if layout.bits == 4 else 1
        return Numerics(
            "f32", -(-layout.weight_beats(kind.shape[1]) // PARTIALS) + 3 + blocks, "int8", 1.0, INT8_LEVELS
        )
    words = layout.weight_beats(kind.shape[1]) * layout.weights // LANES
    return Numerics("f32", -(-words // PARTIALS) + 3 + 4, "f32", 1.0)


def _gemm_refusal(signature: Signature, engine: Engine, is_sequential: bool) -> str:
    return _too_long("in_features", signature.tensors["w"].shape[1], engine.max_in_features)


def _too_long(what: str, number: int, limit: int) -> str:
    return f"{what} {number} > {limit}, which these kernels hold on chip" if number > limit else ""


def _gemm(backend: FpgaBackend, call: BoundCall) -> list[Launch]:
    x, w, y, bias = call.tensors["x"], call.tensors["w"], call.tensors["y"], call.tensors.get("bias")
    engine, family, (out_features, in_features) = backend.engine, _gemm_family(call.signature), w.shape
    row_beats, channel_rows = LAYOUTS[w.dtype].row_beats(in_features), engine.channel_rows(out_features)
    rows, tile = channel_rows, x.shape[0]
    if backend.is_sequential:  # what the channels hold
        tile = engine.tokens
        rows = min(rows, engine.weight_fifo // row_beats, engine.result_fifo // (engine.channels * tile))
    launches: list[Launch] = []
    for token in range(0, x.shape[0], tile):
        tokens = min(tile, x.shape[0] - token)
        x_at = (x.buffer, np.int64(x.offset + token * x.row_stride), np.int64(x.row_stride))
        y_at = (y.buffer, np.int64(y.offset + token * y.row_stride), np.int64(y.row_stride))
        for first in range(0, channel_rows, rows):
            part = min(rows, channel_rows - first)
            launches += backend.pipeline(
                family,
                ("gemm_read", w.buffer, *x_at, *_ints(tokens, in_features, channel_rows, row_beats, first, part)),
                ("gemm", *_ints(tokens, in_features, part)),
                ("gemm_write", *start(bias or y), *y_at, *_ints(tokens, out_features, first, part, bias is not None)),
            )
    return launches


# dequantize, embedding


def _rows_family(signature: Signature) -> Family:
    return Family("dequantize", signature.tensors["w"].dtype)


def _rows_numerics(signature: Signature) -> Numerics:
    return Numerics("f32", 2, "f32", 1.0)


def _dequantize_refusal(signature: Signature, engine: Engine, is_sequential: bool) -> str:
    words = -(-signature.tensors["w"].shape[1] // LANES)
    beats = LAYOUTS[signature.tensors["w"].dtype].row_beats(signature.tensors["w"].shape[1])
    limit = min(engine.result_fifo, engine.weight_fifo)
    return _too_deep("a row", max(words, beats), limit) if is_sequential else ""


def _too_deep(what: str, words: int, limit: int) -> str:
    return f"{what} takes {words} words of 512 bits > {limit}, which an emulated channel holds" if words > limit else ""


def _dequantize(backend: FpgaBackend, call: BoundCall) -> list[Launch]:
    w, y, engine = call.tensors["w"], call.tensors["y"], backend.engine
    (out_features, in_features), family = w.shape, _rows_family(call.signature)
    row_beats, rows = LAYOUTS[w.dtype].row_beats(in_features), out_features
    if backend.is_sequential:
        rows = min(rows, engine.weight_fifo // row_beats, engine.result_fifo // -(-in_features // LANES))
    launches: list[Launch] = []
    for first in range(0, out_features, rows):
        part = min(rows, out_features - first)
        launches += backend.pipeline(
            family,
            ("dequantize_read", w.buffer, *_ints(engine.channel_rows(out_features), row_beats, first, part)),
            ("dequantize", *_ints(part, in_features)),
            ("dequantize_write", *place(y), *_ints(in_features, first, part)),
        )
    return launches


def _embedding(backend: FpgaBackend, call: BoundCall) -> list[Launch]:
    ids, w, y = call.tensors["token_ids"], call.tensors["w"], call.tensors["y"]
    vocab, features = w.shape
    sizes = (ids.shape[0], vocab, features, backend.engine.channel_rows(vocab), LAYOUTS[w.dtype].row_beats(features))
    args = (*start(ids), w.buffer, *place(y), *_ints(*sizes), np.float32(call.attrs["scale"]))
    return [backend.single(_rows_family(call.signature), "embedding", *args)]


# attention, kv_append


def _pages_family(signature: Signature) -> Family:
    return Family("attention", signature.tensors["k_pages"].dtype.upper())


def _keys(signature: Signature) -> int:
    """Most keys that a query can see."""
    keys = signature.tensors["block_table"].shape[1] * signature.tensors["k_pages"].shape[2]
    return min(keys, signature.attrs["window"] or keys)


def _attention_numerics(signature: Signature) -> Numerics:
    """Keys one after another, rescaled by each; scores in words of 16."""
    words = -(-signature.tensors["q"].shape[2] // LANES)
    return Numerics("f32", max(words + 4, _keys(signature)), "f32", FUNCTION_ULP)


def _attention_refusal(signature: Signature, engine: Engine, is_sequential: bool) -> str:
    _, heads, head_dim = signature.tensors["q"].shape
    group = heads // signature.tensors["k_pages"].shape[1]
    words = 2 * _keys(signature) * -(-head_dim // LANES)
    return (
        _too_long("head_dim", head_dim, engine.max_head_dim)
        or _too_long("query heads per KV head", group, engine.max_group)
        or (is_sequential and _too_deep(f"{_keys(signature)} keys of head_dim {head_dim}", words, engine.key_fifo))
        or ""
    )


def _attention(backend: FpgaBackend, call: BoundCall) -> list[Launch]:
    engine, attrs, family = backend.engine, call.attrs, _pages_family(call.signature)
    q, k, v, table, seq_ids, positions, y = (
        call.tensors[name] for name in ("q", "k_pages", "v_pages", "block_table", "seq_ids", "positions", "y")
    )
    tokens, heads, head_dim = q.shape
    pages, kv_heads, page_size, _ = k.shape
    group, words = heads // kv_heads, -(-head_dim // LANES)
    items = tokens * kv_heads  # a token and a KV head each
    if backend.is_sequential:
        most = engine.key_fifo // (2 * words * _keys(call.signature))
        items = min(items, most, engine.query_fifo // (group * words), engine.count_fifo)
    token_step, head_step = max(1, items // kv_heads), min(items, kv_heads)
    sizes = _ints(kv_heads, group, head_dim, page_size, *table.shape, pages, attrs["window"])
    where = (*place(table), *start(seq_ids), *start(positions))
    numbers = (np.float32(attrs["scale"] or head_dim**-0.5), np.float32(attrs["softcap"]))
    launches: list[Launch] = []
    for first in range(0, tokens, token_step):
        for g in range(0, kv_heads, head_step):
            part = (first, min(token_step, tokens - first), g, min(head_step, kv_heads - g))
            launches += backend.pipeline(
                family,
                ("attention_read", *place(q), *place(k), *place(v), *where, *sizes, *_ints(*part)),
                ("attention", *_ints(group, head_dim), *numbers, *_ints(part[1] * part[3])),
                ("attention_write", *place(y), *_ints(group, head_dim, *part)),
            )
    return launches


def _kv_append(backend: FpgaBackend, call: BoundCall) -> list[Launch]:
    k, v, table, seq_ids, positions, k_pages, v_pages = (
        call.tensors[name] for name in ("k", "v", "block_table", "seq_ids", "positions", "k_pages", "v_pages")
    )
    pages, _, page_size, _ = k_pages.shape
    args = (*place(k), *place(v), *place(table), *start(seq_ids), *start(positions), *place(k_pages), *place(v_pages))
    sizes = _ints(*k.shape, page_size, *table.shape, pages)
    return [backend.single(_pages_family(call.signature), "kv_append", *args, *sizes)]


def _copy_numerics(signature: Signature) -> Numerics:
    return Numerics("f32", 2, "f32", 1.0)


# the small ones


def _rms_norm(backend: FpgaBackend, call: BoundCall) -> list[Launch]:
    x, weight, y = (call.tensors[name] for name in ("x", "weight", "y"))
    numbers = (np.float32(call.attrs["eps"]), np.float32(call.attrs["weight_offset"]))
    return [backend.single(RMS_NORM, "rms_norm", *place(x), *start(weight), *place(y), *_ints(*x.shape), *numbers)]


def _rms_norm_numerics(signature: Signature) -> Numerics:
    words = -(-signature.tensors["x"].shape[1] // LANES)
    return Numerics("f32", -(-words // PARTIALS) + 3 + 4, "f32", FUNCTION_ULP)


def _rope(backend: FpgaBackend, call: BoundCall) -> list[Launch]:
    x, table = call.tensors["x"], call.tensors["cos_sin"]
    sizes = _ints(*x.shape, *table.shape, call.attrs["pairing"] == "interleaved")
    return [backend.single(ROPE, "rope", *place(x), *place(table), *start(call.tensors["positions"]), *sizes)]


def _pointwise_numerics(signature: Signature) -> Numerics:
    return Numerics("f32", 1, "f32", ERF_ULP if signature.attrs.get("kind") == "gelu_erf" else FUNCTION_ULP)


def _add(backend: FpgaBackend, call: BoundCall) -> list[Launch]:
    x, y = call.tensors["x"], call.tensors["y"]
    return [backend.single(POINTWISE, "add", *place(x), *place(y), *_ints(*x.shape))]


def _softcap(backend: FpgaBackend, call: BoundCall) -> list[Launch]:
    x = call.tensors["x"]
    return [backend.single(POINTWISE, "softcap", *place(x), *_ints(*x.shape), np.float32(call.attrs["cap"]))]


def _glu(backend: FpgaBackend, call: BoundCall) -> list[Launch]:
    gate, up, y = (call.tensors[name] for name in ("gate", "up", "y"))
    sizes = _ints(*y.shape, GLU_KINDS[call.attrs["kind"]])
    return [backend.single(POINTWISE, "glu", *place(gate), *place(up), *place(y), *sizes)]


def _gather(backend: FpgaBackend, call: BoundCall) -> list[Launch]:
    x, rows, y = (call.tensors[name] for name in ("x", "rows", "y"))
    return [backend.single(POINTWISE, "gather", *place(x), *start(rows), *place(y), *_ints(*y.shape, x.shape[0]))]


def _advance(backend: FpgaBackend, call: BoundCall) -> list[Launch]:
    positions, seq_ids = call.tensors["positions"], call.tensors["seq_ids"]
    return [backend.single(POINTWISE, "advance", *start(positions), *start(seq_ids), *_ints(*positions.shape))]


def _argmax(backend: FpgaBackend, call: BoundCall) -> list[Launch]:
    x, ids = call.tensors["x"], call.tensors["ids"]
    return [backend.single(SAMPLE, "argmax", *place(x), *start(ids), *_ints(*x.shape))]


def _sample(backend: FpgaBackend, call: BoundCall) -> list[Launch]:
    x, params, rng, ids = (call.tensors[name] for name in ("x", "params", "rng", "ids"))
    room = backend.scratch("probabilities", x.shape[1] * 4)
    args = (*place(x), *place(params), *place(rng), *start(ids), room, *_ints(*x.shape))
    return [backend.single(SAMPLE, "sample", *args)]


def _sample_numerics(signature: Signature) -> Numerics:
    """The walk through the kept tokens adds one after another."""
    return Numerics("f32", signature.tensors["x"].shape[1], "f32", FUNCTION_ULP)


def _kernel(
    op: str,
    family: Callable[[Signature], Family],
    numerics: Callable[[Signature], Numerics],
    bind: Callable[[FpgaBackend, BoundCall], Sequence[Launch]],
) -> OpKernel:
    return OpKernel(op, lambda signature: [family(signature)], numerics, bind)  # type: ignore[arg-type, list-item]


KERNELS = [
    _kernel("gemm", _gemm_family, _gemm_numerics, _gemm),
    _kernel("attention", _pages_family, _attention_numerics, _attention),
    _kernel("dequantize", _rows_family, _rows_numerics, _dequantize),
    _kernel("embedding", _rows_family, _rows_numerics, _embedding),
    _kernel("kv_append", _pages_family, _copy_numerics, _kv_append),
    _kernel("rms_norm", lambda s: RMS_NORM, _rms_norm_numerics, _rms_norm),
    _kernel("rope", lambda s: ROPE, _copy_numerics, _rope),
    _kernel("argmax", lambda s: SAMPLE, _sample_numerics, _argmax),
    _kernel("sample", lambda s: SAMPLE, _sample_numerics, _sample),
    *(
        _kernel(op, lambda s: POINTWISE, _pointwise_numerics, bind)
        for op, bind in (
            ("add", _add),
            ("softcap", _softcap),
            ("glu", _glu),
            ("gather", _gather),
            ("advance", _advance),
        )
    ),
]
# What kernels of a given size cannot do: op -> (signature, engine, whether kernels run one after another) -> reason
REFUSALS: dict[str, Callable[[Signature, Engine, bool], str]] = {
    "gemm": _gemm_refusal,
    "dequantize": _dequantize_refusal,
    "attention": _attention_refusal,
}
