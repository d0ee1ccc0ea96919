"""The engine of hls/README.md as numbers, and weights packed into the beats it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ....kernels.quant import Array, QuantFormat, Weight

BEAT_BYTES = 64  # 512 bits
LANES = 16  # float32 numbers in a beat
PARTIALS = 8
_PACKED_AT_ONCE = 1 << 22  # bytes: what is read and written of so many rows stays in a cache


@dataclass(frozen=True)
class Engine:
    """What kernels are compiled for; a manifest holds these numbers (see bitstream.py).

    channels, tokens    memory channels; rows of x that share a beat of weights
    max_*               what is held on chip: a row of x, a query, the query heads of a KV head
    *_fifo              depths of channels, in items
    emulated            for a CPU: loops stay loops
    """

    channels: int = 4
    tokens: int = 4
    max_in_features: int = 15360  # 240 KiB for 4 rows of float32; the emulator has 256 KiB of local memory
    max_head_dim: int = 256
    max_group: int = 16
    weight_fifo: int = 64
    x_fifo: int = 64
    result_fifo: int = 64
    key_fifo: int = 64
    query_fifo: int = 64
    count_fifo: int = 8
    emulated: bool = False

    def options(self) -> list[str]:
        numbers = {name: value for name, value in vars(self).items() if name != "emulated"}
        defines = [f"-D{name.upper()}={value}" for name, value in sorted(numbers.items())]
        return ["-cl-std=CL1.2", *defines, *(["-DEMULATED"] if self.emulated else [])]

    def channel_rows(self, out_features: int) -> int:
        """Rows that each memory channel holds of a weight; those past its end are zeros."""
        return -(-out_features // self.channels)

    def packed_bytes(self, fmt: QuantFormat, out_features: int, in_features: int) -> int:
        return self.channels * self.channel_rows(out_features) * LAYOUTS[fmt.name].row_beats(in_features) * BEAT_BYTES


# A FIFO of the emulator holds all that one launch sends, so that the kernels of a launch can run one after another: a
# kernel that waits for another costs the emulator a time slice of the machine, 20 ms (2 cores, Intel 2023.2.4), where
# sending 512 bits costs 50 ns.
EMULATED = Engine(
    weight_fifo=16384, x_fifo=4096, result_fifo=16384, key_fifo=65536, query_fifo=4096, count_fifo=256, emulated=True
)


@dataclass(frozen=True)
class Layout:
    """How a format lies in beats: bits of a stored weight, weight beats behind a header (0: no header)."""

    bits: int
    group: int

    @property
    def weights(self) -> int:
        """In a beat."""
        return 512 // self.bits

    def weight_beats(self, in_features: int) -> int:
        return -(-in_features // self.weights)

    def row_beats(self, in_features: int) -> int:
        """With header beats."""
        beats = self.weight_beats(in_features)
        return beats + (-(-beats // self.group) if self.group else 0)


LAYOUTS: Mapping[str, Layout] = {
    "Q4_0": Layout(4, 8), "Q4_1": Layout(4, 4), "Q4_K": Layout(4, 8),
    "Q8_0": Layout(8, 16), "Q5_0": Layout(8, 16), "Q5_1": Layout(8, 8), "Q5_K": Layout(8, 16), "Q6_K": Layout(8, 8),
    "F16": Layout(16, 0), "BF16": Layout(16, 0), "F32": Layout(32, 0),
}  # fmt: skip


def pack(weight: Weight, engine: Engine) -> Array:
    """uint8 [channels, channel_rows, row_beats, 64]: row r is row r // channels of memory channel r % channels."""
    rows, in_features = weight.shape
    row_beats = LAYOUTS[weight.format.name].row_beats(in_features)
    packed = np.zeros((engine.channels, engine.channel_rows(rows), row_beats, BEAT_BYTES), np.uint8)
    step = max(1, _PACKED_AT_ONCE // (row_beats * BEAT_BYTES)) * engine.channels
    for first in range(0, rows, step):
        part = _row_beats(weight.format, weight.data[first : first + step], in_features)
        for channel in range(engine.channels):
            mine = part[channel :: engine.channels]
            start = first // engine.channels
            packed[channel, start : start + len(mine)] = mine
    return packed


def _row_beats(fmt: QuantFormat, rows: Array, in_features: int) -> Array:
    """The beats of rows [n, row bytes] in `fmt`, uint8 [n, row_beats, 64]."""
    layout, n = LAYOUTS[fmt.name], len(rows)
    beats = layout.weight_beats(in_features)
    if not layout.group:
        return _padded(np.ascontiguousarray(rows), beats * BEAT_BYTES).reshape(n, beats, BEAT_BYTES)
    fields = _fields(fmt, rows)
    quants = _padded(_QUANTS[fmt.name](fields).reshape(n, in_features), beats * layout.weights)
    if layout.bits == 4:
        quants = quants[:, 0::2] | quants[:, 1::2] << 4
    groups = -(-beats // layout.group)
    header = _padded(_header(fmt, fields).reshape(n, -1), groups * BEAT_BYTES)
    place = np.arange(beats)
    result = np.empty((n, beats + groups, BEAT_BYTES), np.uint8)
    result[:, place + place // layout.group + 1] = quants.reshape(n, beats, BEAT_BYTES)
    result[:, :: layout.group + 1] = header.reshape(n, groups, BEAT_BYTES)
    return result


def _padded(a: Array, width: int) -> Array:
    """uint8 [n, width], zeros behind what `a` [n, k] has."""
    result = np.zeros((len(a), width), np.uint8)
    result[:, : a.shape[1]] = a.view(np.uint8)
    return result


def _fields(fmt: QuantFormat, rows: Array) -> dict[str, Array]:
    """The fields of all blocks as bytes, uint8 [n, blocks, bytes of the field]."""
    blocks = rows.reshape(len(rows), -1, fmt.block_bytes)
    return {field.name: blocks[:, :, field.offset : field.offset + field.nbytes] for field in fmt.fields}


def _nibbles(fields: dict[str, Array], width: int = 16) -> Array:
    """Low nibbles of `width` bytes, then their high ones, then those of the next bytes."""
    qs = fields["qs"]
    qs = qs.reshape(*qs.shape[:2], -1, width)
    return np.concatenate([qs & 15, qs >> 4], axis=3).reshape(*qs.shape[:2], -1)


def _fifth_bits(fields: dict[str, Array]) -> Array:
    return np.unpackbits(fields["qh"], axis=2, bitorder="little") << 4


def _q5_k(fields: dict[str, Array]) -> Array:
    """Bit g of byte l of `qh` belongs to weight l of group g."""
    bits = np.unpackbits(fields["qh"][..., None], axis=3, bitorder="little")  # [n, blocks, l, g]
    return _nibbles(fields, 32) | bits.swapaxes(2, 3).reshape(*bits.shape[:2], 256) << 4


def _q6_k(fields: dict[str, Array]) -> Array:
    """Quarter u of half h: nibble u // 2 of bytes 64 h + 32 (u % 2) + l of `ql`, bits 2 u of byte 32 h + l of `qh`."""
    shape = fields["ql"].shape[:2]
    ql, qh = fields["ql"].reshape(*shape, 2, 2, 32), fields["qh"].reshape(*shape, 2, 1, 32)
    low = np.stack([ql & 15, ql >> 4], axis=3).reshape(*shape, 2, 4, 32)
    high = qh >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    return (low | high << 4) - 32  # as bytes: int8


_QUANTS: Mapping[str, Callable[[dict[str, Array]], Array]] = {
    "Q4_0": _nibbles,
    "Q4_1": _nibbles,
    "Q5_0": lambda fields: (_nibbles(fields) | _fifth_bits(fields)) - 16,
    "Q5_1": lambda fields: _nibbles(fields) | _fifth_bits(fields),
    "Q8_0": lambda fields: fields["qs"],
    "Q4_K": lambda fields: _nibbles(fields, 32),
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


def _header(fmt: QuantFormat, fields: dict[str, Array]) -> Array:
    """What header beats hold, one entry per block of the file: uint8 [n, blocks, bytes]."""
    if fmt.name == "Q6_K":
        entry = np.zeros((*fields["d"].shape[:2], 32), np.uint8)
        entry[..., :2], entry[..., 2:18] = fields["d"], fields["scales"]
        return entry
    if "dmin" in fields:
        return _super_header(fields)
    return np.concatenate([fields["d"], fields["m"]], axis=2) if "m" in fields else fields["d"]


def _super_header(fields: dict[str, Array]) -> Array:
    """d, -dmin, then for each group 6 bits of scale and 6 of minimum; in the file they are packed otherwise."""
    s = fields["scales"].astype(np.uint64)  # 12 bytes
    first, second, third = s[..., 0:4], s[..., 4:8], s[..., 8:12]
    sub = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=2)
    submin = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=2)
    both = sub | submin << 6  # [n, blocks, 8]
    bits = (both[..., None] >> np.arange(12, dtype=np.uint64) & 1).astype(np.uint8)
    packed = np.packbits(bits.reshape(*bits.shape[:2], 96), axis=2, bitorder="little")
    turned = fields["dmin"].copy()
    turned[..., 1] ^= 0x80
    return np.concatenate([fields["d"], turned, packed], axis=2)
