"""Weights as the beats that hls/README.md ("The engine") defines.

Quants and sub-scales are read through the contract's own dequantisation: with all scales 1 and no minimum a weight *is*
its quant. Nothing about the file formats is transcribed here but which field holds what.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from polykern.kernels.quant import Array, Weight, dequantize_rows

BEAT_BYTES = 64
BITS = {"F32": 32, "F16": 16, "BF16": 16, "Q4_0": 4, "Q4_1": 4, "Q4_K": 4}  # of a weight in a beat; 8 for all others
HEADERS = {"Q4_0": "S", "Q5_0": "S", "Q8_0": "S", "Q4_1": "SM", "Q5_1": "SM", "Q4_K": "K", "Q5_K": "K", "Q6_K": "K6"}
HEADER_BITS = {"S": 16, "SM": 32, "K": 16, "K6": 32}  # per block of 32

_ONE, _MINUS_ONE, _ZERO = b"\x00\x3c", b"\x00\xbc", b"\x00\x00"  # float16
_UNIT_SUBSCALES = bytes([1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1])  # all scales 1, all minima 0 (get_scale_min_k4)


def up(count: int, unit: int) -> int:
    return -(-count // unit)


def layout(name: str, in_features: int) -> tuple[int, int, int]:
    """Weight beats of a row, weight beats behind one header beat (0: no headers), beats of a row in all."""
    bits = BITS.get(name, 8)
    weights = up(in_features * bits, 8 * BEAT_BYTES)
    if name not in HEADERS:
        return weights, 0, weights
    group = 8 * BEAT_BYTES // HEADER_BITS[HEADERS[name]] * 32 * bits // (8 * BEAT_BYTES)
    return weights, group, weights + up(weights, group)


def row_beats(weight: Weight) -> Array:
    """The rows of a weight in beats, uint8 [out_features, beats, 64]."""
    name, (rows, in_features) = weight.format.name, weight.shape
    weight_beats, group, beats = layout(name, in_features)
    quants = _padded(_quant_bytes(weight), weight_beats * BEAT_BYTES).reshape(rows, weight_beats, BEAT_BYTES)
    if not group:
        return quants
    packed = np.zeros((rows, beats, BEAT_BYTES), np.uint8)
    is_header = np.arange(beats) % (group + 1) == 0
    packed[:, ~is_header] = quants
    packed[:, is_header] = _padded(_header_bytes(weight), int(is_header.sum()) * BEAT_BYTES).reshape(
        rows, -1, BEAT_BYTES
    )
    return packed


def channels_of(weight: Weight, channels: int) -> list[Array]:
    """The beats of each channel, flat uint8: row r lies in channel r % channels."""
    beats = row_beats(weight)
    return [np.ascontiguousarray(beats[channel::channels]).reshape(-1) for channel in range(channels)]


def _padded(rows: Array, width: int) -> Array:
    return np.pad(rows, ((0, 0), (0, width - rows.shape[1])))


def _field(weight: Weight, name: str) -> Array:
    """The bytes of a field, uint8 [out_features, blocks, bytes]."""
    (field,) = (f for f in weight.format.fields if f.name == name)
    blocks = weight.data.reshape(weight.shape[0], -1, weight.format.block_bytes)
    return blocks[:, :, field.offset : field.offset + field.nbytes]


def _probe(weight: Weight, **values: bytes) -> Array:
    """The weight dequantised with other bytes in some fields, int [out_features, in_features]."""
    blocks = weight.data.reshape(weight.shape[0], -1, weight.format.block_bytes).copy()
    for field in weight.format.fields:
        if field.name in values:
            content = np.frombuffer(values[field.name], np.uint8)
            blocks[:, :, field.offset : field.offset + field.nbytes] = np.resize(content, field.nbytes)
    numbers = dequantize_rows(weight.format, blocks.reshape(weight.data.shape))
    return np.rint(numbers).astype(np.int16)


def quants(weight: Weight) -> Array:
    """Quants as the kernels multiply them, offsets subtracted: int16 [out_features, in_features]."""
    name = weight.format.name
    subscales: dict[str, Any] = {"Q6_K": {"scales": b"\x01"}, "Q4_K": {"scales": _UNIT_SUBSCALES}}
    return _probe(weight, d=_ONE, m=_ZERO, dmin=_ZERO, **subscales.get("Q4_K" if name == "Q5_K" else name, {}))


def _quant_bytes(weight: Weight) -> Array:
    """uint8 [out_features, bytes]."""
    name = weight.format.name
    if weight.format.is_float:
        return weight.data
    numbers = quants(weight)
    if BITS.get(name, 8) == 8:
        return numbers.astype(np.int8).view(np.uint8)
    nibbles = (numbers + (8 if name == "Q4_0" else 0)).astype(np.uint8)
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def fields_of(weight: Weight) -> tuple[Array, Array, Array, Array]:
    """What headers say of each block of 32: d, m float32 and submin int64 [N, blocks], sub int64 [N, blocks, 2]."""
    kind, rows = HEADERS[weight.format.name], weight.shape[0]
    blocks = weight.shape[1] // 32
    d = _half(weight, "d").repeat(min(8, weight.format.block_length // 32), axis=1)
    m, sub, submin = np.zeros_like(d), np.ones((rows, blocks, 2), np.int64), np.ones((rows, blocks), np.int64)
    if kind == "SM":
        m = _half(weight, "m")
    elif kind == "K":
        m = -_half(weight, "dmin").repeat(8, axis=1)
        scales, submin = _subscales(weight)
        sub = scales[:, :, None].repeat(2, axis=2)
    elif kind == "K6":
        sub = np.ascontiguousarray(_field(weight, "scales")).view(np.int8).astype(np.int64).reshape(rows, blocks, 2)
    return d, m, sub, submin


def _half(weight: Weight, name: str) -> Array:
    return np.ascontiguousarray(_field(weight, name)).view("<f2")[..., 0].astype(np.float32)


def _subscales(weight: Weight) -> tuple[Array, Array]:
    """6-bit scales and minima of a K format, int64 [out_features, blocks]."""
    sub = _probe(weight, d=_ONE, dmin=_ZERO, qs=b"\x11", qh=b"\x00")[:, ::32]
    submin = _probe(weight, d=_ZERO, dmin=_MINUS_ONE, qs=b"\x00", qh=b"\x00")[:, ::32]
    return sub.astype(np.int64), submin.astype(np.int64)


def _header_bytes(weight: Weight) -> Array:
    """uint8 [out_features, bytes]."""
    kind, rows = HEADERS[weight.format.name], weight.shape[0]
    d = _field(weight, "d")
    if kind == "S":
        return d.reshape(rows, -1)
    if kind == "SM":
        return np.concatenate([d, _field(weight, "m")], axis=2).reshape(rows, -1)
    if kind == "K6":
        header = np.zeros((*d.shape[:2], 32), np.uint8)
        header[:, :, :2], header[:, :, 2:18] = d, _field(weight, "scales")
        return header.reshape(rows, -1)
    turned = _field(weight, "dmin").copy()
    turned[:, :, 1] ^= 0x80  # the sign of a float16
    sub, submin = _subscales(weight)
    fields = (sub | submin << 6).astype(np.uint32).reshape(*d.shape[:2], 4, 2)
    pairs = fields[..., 0] | fields[..., 1] << 12
    scales = (pairs[..., None] >> np.array([0, 8, 16], np.uint32)).astype(np.uint8).reshape(*d.shape[:2], 12)
    return np.concatenate([d, turned, scales], axis=2).reshape(rows, -1)
