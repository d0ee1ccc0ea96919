"""Host data for cases: activations and weights drawn so that wrong kernels show.

"normal"   standard normal activations, random quants, scales around 0.02
"integer"  small integers with exact partial sums: bit-equal results in any order, in int8 too (each block of 32
           activations holds a +-127, so its scale is 1) and in bfloat16 (no number has more than 8 bits)
"outlier"  normal, with one channel a thousand times larger
"cancel"   the second half of K repeats the first with the sign turned, to a thousandth: results near 0 from large terms
"zeros"    one block of activations and the scales of one block of weights are 0 (a scale to divide by that is 0)
"small"    normal, a thousandth of the size (an epsilon beside the mean square shows)
"last"     normal, with the last channel twenty times larger (a tail left out shows, in int8 too)
"extreme"  activations of one size and, row by row, one sign; quants all of one pattern, row by row (sums of integers
           reach the largest there are)
"nan"      normal, with one NaN in the last row
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .errors import ContractError
from .op import NUMPY_DTYPES, Op, Param, Signature, TensorType
from .quant import FORMATS, Array, Weight

# A weight with more rows repeats them: drawing the head of an 8B model takes longer than running it. A prime, so that
# no tile or thread gets the same rows as its neighbour.
DISTINCT_ROWS = 4099


def activations(rng: np.random.Generator, tokens: int, features: int, fill: str) -> Array:
    """float32 [tokens, features]."""
    if fill == "integer":
        x = rng.integers(-2, 3, (tokens, features)).astype(np.float32)
        x[:, ::32] = rng.choice([-127.0, 127.0], (tokens, -(-features // 32)))
        return x
    x = rng.standard_normal((tokens, features), dtype=np.float32)
    if fill == "extreme":
        x = np.full_like(x, 3.0)
        x[1::2] = -3.0
    elif fill == "nan":
        x[-1, features // 3] = np.nan
    elif fill == "outlier":
        x[:, int(rng.integers(features))] *= 1000
    elif fill == "cancel":
        half = features // 2
        x[:, half : 2 * half] = -x[:, :half] * rng.normal(1, 0.001, (tokens, half))
    elif fill == "zeros":
        x[:, :32] = 0
    elif fill == "small":
        x /= 1000
    elif fill == "last":
        x[:, -1] *= 20
    return x


def random_weight(rng: np.random.Generator, name: str, out_features: int, in_features: int, fill: str) -> Weight:
    """A Weight [out_features, in_features] in format `name`: random quants, every scale field finite and sane."""
    fmt = FORMATS[name]
    if fmt.is_float:
        values = (
            rng.integers(-8, 9, (out_features, in_features))
            if fill == "integer"
            else rng.standard_normal((out_features, in_features)) / 8
        )
        values = values.astype(np.float32)
        if fill == "cancel":
            half = in_features // 2
            values[:, half : 2 * half] = values[:, :half]
        return Weight.from_array(values, name)
    blocks_per_row = in_features // fmt.block_length
    blocks = rng.integers(0, 256, (out_features, blocks_per_row, fmt.block_bytes), dtype=np.uint8)
    for field in fmt.fields:
        shape = (out_features, blocks_per_row, field.count)
        if field.kind in ("scale", "min"):
            if fill == "integer":
                values = rng.choice([0.5, 1.0, 2.0], shape) if fmt.block_length == 32 else np.full(shape, 0.5)
            else:
                values = rng.uniform(0.01, 0.03, shape)
                if field.kind == "scale" and fmt.block_length == 32:
                    values *= rng.choice([-1.0, 1.0], shape)  # the format allows it, and kernels forget it
                elif field.kind == "min":
                    values *= -8.0 if field.name == "m" else 1.0
            data = values.astype(field.dtype)
            if fill == "zeros":
                data[:, -1:] = 0
        elif field.kind == "subscale" and field.dtype == "i1":
            limit = 8 if fill == "integer" else 16
            data = rng.integers(-limit, limit + 1, shape).astype("i1")
        elif field.kind == "subscale" and fill == "integer":  # 6 bits packed: scales up to 3
            data = rng.integers(0, 256, shape, np.uint8) & np.repeat(np.array([0x03, 0x3F, 0xF3], np.uint8), 4)
        elif field.kind in ("quants", "high") and fill == "extreme":
            patterns = np.array([0x00, 0xFF, 0x80, 0x7F], np.uint8)
            data = np.broadcast_to(patterns[np.arange(out_features) % 4, None, None], shape).copy()
        else:
            continue
        blocks[:, :, field.offset : field.offset + field.nbytes] = data.view(np.uint8).reshape(*shape[:2], field.nbytes)
    if fill == "cancel" and blocks_per_row > 1:
        half = blocks_per_row // 2
        blocks[:, half : 2 * half] = blocks[:, :half]
    return Weight(fmt, (out_features, in_features), blocks.reshape(out_features, -1))


def paged_batch(
    rng: np.random.Generator, sequences: Sequence[tuple[int, int]], page_size: int, padding: int = 0
) -> dict[str, Array]:
    """A ragged batch over a paged cache: `sequences` gives (keys, queries) for each, its queries being the last keys.

    Returns block_table i32 [B, max_pages], seq_ids i32 [T], positions i32 [T]. Pages and table rows are shuffled, one
    row is an idle sequence's, and table entries behind a sequence's last page hold -1 or another sequence's page. The
    `padding` rows at the end have seq_id -1 and any position.
    """
    counts = [-(-keys // page_size) for keys, _ in sequences]
    width = max(counts) + 1
    pages = rng.permutation(sum(counts) + 2).astype(np.int32)
    table = rng.choice(np.append(pages, -1), (len(sequences) + 1, width)).astype(np.int32)
    rows = rng.permutation(len(sequences) + 1)[: len(sequences)]
    seq_ids: list[int] = []
    positions: list[int] = []
    for row, (keys, queries), count in zip(rows, sequences, counts, strict=True):
        table[row, :count], pages = pages[:count], pages[count:]
        seq_ids += [int(row)] * queries
        positions += range(keys - queries, keys)
    seq_ids += [-1] * padding
    positions += [(0, -1, 3)[i % 3] for i in range(padding)]
    return {
        "block_table": table,
        "seq_ids": np.array(seq_ids, np.int32),
        "positions": np.array(positions, np.int32),
    }


def page_count(sequences: Sequence[tuple[int, int]], page_size: int) -> int:
    """Pages of the cache that `paged_batch` numbers: those in use and two spare ones."""
    return sum(-(-keys // page_size) for keys, _ in sequences) + 2


def stale_pages(rng: np.random.Generator, shape: tuple[int, int, int, int], dtype: type[np.generic]) -> Array:
    """Pages [P, G, S, D] full of huge finite numbers, fatal to whoever uses them; no float16 if `dtype` is float32."""
    stale = 60000.0 if dtype is np.float16 else 1e30
    return rng.choice([-stale, stale], shape).astype(dtype)


def inputs_for(
    op: Op, signature: Signature, rng: np.random.Generator, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Host data for a call of any op, from its declaration alone: every tensor that is read, as in `Op.make_inputs`.

    Those in `given` are taken as they are, the others drawn.

    The rows of a batch belong to as many sequences as the block table has, in order, and are the last tokens that their
    tables hold: a decode step at full context, or the last chunk of a prompt. Raises ContractError for a parameter of
    integers that does not say what they are.
    """
    dims = op.bind(signature.tensors)
    inputs = dict(given or {})
    for param in op.params:
        if param.role != "out" and param.name in signature.tensors and param.name not in inputs:
            inputs[param.name] = _draw(op, param, signature.tensors[param.name], dims, rng)
    return inputs


def large_weight(rng: np.random.Generator, kind: TensorType) -> Weight:
    """A random weight of any size; see DISTINCT_ROWS."""
    rows, features = kind.shape
    drawn = random_weight(rng, kind.dtype, min(rows, DISTINCT_ROWS), features, "normal")
    return Weight(drawn.format, (rows, features), np.resize(drawn.data, (rows, drawn.data.shape[1])))


def _draw(op: Op, param: Param, kind: TensorType, dims: Mapping[str, int], rng: np.random.Generator) -> Any:
    if param.role == "weight":
        return large_weight(rng, kind)
    dtype = NUMPY_DTYPES[kind.dtype]
    if param.values == "numbers":
        if kind.dtype in ("i32", "u32"):
            raise ContractError(f"{op.name}: {param.name} is {kind.dtype}, and its `values` do not say which integers")
        return rng.standard_normal(kind.shape, np.float32).astype(dtype, copy=False)
    if param.values == "angles":
        angle = rng.uniform(-np.pi, np.pi, (kind.shape[0], kind.shape[1] // 2))
        return np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(dtype)
    if param.values == "seeds":
        return rng.integers(0, 2**32, kind.shape, np.uint32).astype(dtype)
    if param.values == "sampling":
        return np.full(kind.shape, (0.8, 40, 0.95, 0.05), dtype)
    if param.values == "pages":
        return np.resize(rng.permutation(dims["pages"]), kind.shape).astype(dtype)
    if param.values in ("token_ids", "rows"):
        return rng.integers(0, dims["vocab" if param.values == "token_ids" else "tokens"], kind.shape).astype(dtype)
    seq_ids, positions = _batch(dims)
    return (seq_ids if param.values == "seq_ids" else positions).astype(dtype)


def _batch(dims: Mapping[str, int]) -> tuple[Array, Array]:
    """(seq_ids, positions) of rows shared out evenly, each sequence's being its last: see `inputs_for`."""
    tokens, sequences = dims["tokens"], dims.get("sequences", 1)
    held = [dims["max_pages"] * dims["page_size"]] if "max_pages" in dims else []
    held += [dims["table_length"]] if "table_length" in dims else []
    counts = [tokens // sequences + (i < tokens % sequences) for i in range(sequences)]
    stop = max(counts[0], min(held, default=tokens))
    positions = [np.arange(stop - count, stop) for count in counts]
    return np.repeat(np.arange(sequences), counts), np.concatenate(positions)


def part(op: Op, tensors: Mapping[str, Any], taken: Mapping[str, Array]) -> dict[str, Any]:
    """The entries `taken` (axis -> indices) of every tensor that has such an axis; other tensors whole.

    Along an axis in `op.splits` the reference of the part is the part of the reference.
    """
    found = dict(tensors)
    for name in tensors:
        for position, axis in enumerate(op.param(name).axes):
            if axis in taken:
                found[name] = _take(found[name], taken[axis], position)
    return found


def _take(value: Any, indices: Array, axis: int) -> Any:
    if isinstance(value, Weight):
        return Weight(value.format, (len(indices), value.shape[1]), value.data[indices])
    return np.take(value, indices, axis)
