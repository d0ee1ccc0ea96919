"""Host data for cases: activations and weights drawn so that wrong kernels show.

"normal"   standard normal activations, random quants, scales around 0.02
"integer"  small integers with exact partial sums: bit-equal results in any order, in int8 too (each block of 32
           activations holds a +-127, so its scale is 1)
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

from collections.abc import Sequence

import numpy as np

from .quant import FORMATS, Array, Weight


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
            data = rng.integers(-16, 17, shape).astype("i1")
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
