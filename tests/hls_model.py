"""The engine's arithmetic of hls/README.md in NumPy, operation by operation: the kernels equal it bit for bit."""

from __future__ import annotations

import numpy as np
from hls_pack import BITS, HEADERS, fields_of, quants, up
from polykern.kernels.quant import Array, Weight

SMALLEST = np.float32(1e-36)
PARTIALS = 8


def round_blocks(x: Array) -> tuple[Array, Array]:
    """q int64 [blocks, 32] and step float32 [blocks] of a row of x, float32 [32 * blocks]."""
    blocks = x.reshape(-1, 32)
    largest = np.abs(blocks).max(axis=1)
    good, used = np.isfinite(largest), np.isfinite(largest) & (largest >= SMALLEST)
    safe = np.where(used, largest, np.float32(1))
    per_step = np.where(used, np.float32(127) / safe, np.float32(0))
    q = np.rint(np.where(used[:, None], blocks, np.float32(0)) * per_step[:, None])
    step = np.where(used, safe / np.float32(127), np.float32(0))
    return q.astype(np.int64), np.where(good, step, np.float32(np.nan))


def engine(weight: Weight, x: Array, bias: Array | None = None) -> Array:
    """float32 [tokens, out_features] of gemm_int4 and gemm_int8."""
    header, beat_blocks = HEADERS[weight.format.name], 16 // BITS.get(weight.format.name, 8)
    rows, in_features = weight.shape
    blocks = up(in_features, 32 * beat_blocks) * beat_blocks
    pad = ((0, 0), (0, blocks * 32 - in_features))
    w = np.pad(quants(weight).astype(np.int64), pad).reshape(rows, blocks, 2, 16)
    d, m, sub, submin = (
        np.pad(field, ((0, 0), (0, blocks - field.shape[1]), *[(0, 0)] * (field.ndim - 2)))
        for field in fields_of(weight)
    )
    results: list[Array] = []
    for row in np.pad(x, pad):
        q, step = round_blocks(row)
        dots = np.einsum("nbhi,bhi->nbh", w, q.reshape(blocks, 2, 16))
        scaled = (sub * dots).sum(axis=2).astype(np.float32) * d
        if header in ("SM", "K"):
            scaled = scaled + (submin * q.sum(axis=1)).astype(np.float32) * m
        product = (scaled * step).reshape(rows, -1, beat_blocks // 2, 2)
        pairs = product[..., 0] + product[..., 1]
        values = pairs[..., 0] + pairs[..., 1] if beat_blocks == 4 else pairs[..., 0]
        partial = np.zeros((rows, PARTIALS), np.float32)
        for i in range(values.shape[1]):
            partial[:, i % PARTIALS] = values[:, i] if i < PARTIALS else partial[:, i % PARTIALS] + values[:, i]
        tree = partial[:, 0::2] + partial[:, 1::2]
        tree = tree[:, 0::2] + tree[:, 1::2]
        results.append(tree[:, 0] + tree[:, 1] if bias is None else tree[:, 0] + tree[:, 1] + bias)
    return np.array(results)
