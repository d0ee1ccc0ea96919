"""A bit-exact model of the GEMV processing element (hls/rtl/gemv_pe.v), and what it is fed: beats, activations.

Layouts are those of hls/README.md, "The engine", headers S and SM. Arithmetic, for a row of blocks b:

    y = round32(2**exponent * sum_b step_b * (scale_b * sum(w q) + minimum_b * sum(q)))

scale, minimum and step are float16, so every term is a multiple of 2**-48 below 2**100; the sum is exact and rounded to
float32 once. Against real activations the error is that of rounding them to int8 (half a step; the step is rounded to
float16 before anything is counted in it, which makes it 1 + 2**-11 halves) and that one rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from polykern.kernels.op import Numerics
from polykern.kernels.quant import Array, Weight
from polykern.runtime.fpga.cycles import Element

BLOCK = 32
FRACTION_BITS = 48
ACC_WIDTH = 112

# format -> (bits of a stored weight, headers hold minima)
FORMATS = {"Q4_0": (4, False), "Q4_1": (4, True), "Q5_0": (8, False), "Q5_1": (8, True), "Q8_0": (8, False)}

# One rounding of an exact sum. The 127 levels are of a step that is itself rounded to float16.
NUMERICS = Numerics(accumulate="f32", depth=1, activations="int8", activation_levels=127)


@dataclass(frozen=True)
class Blocks:
    """A matrix as blocks: quants as stored int [N, B, 32], scale and minimum float16 [N, B] (minimum or None)."""

    bits: int
    quants: Array
    scale: Array
    minimum: Array | None

    @property
    def rows(self) -> int:
        return self.quants.shape[0]

    @property
    def count(self) -> int:
        return self.quants.shape[1]

    def numbers(self) -> Array:
        """What the element multiplies: stored 4-bit numbers without a minimum are 8 too large."""
        return self.quants - 8 if self.bits == 4 and self.minimum is None else self.quants


@dataclass(frozen=True)
class Activations:
    """A row of x: q int8 [B, 32] in steps float16 [B] * 2**exponent."""

    q: Array
    step: Array
    exponent: int

    def sums(self) -> Array:
        return self.q.astype(np.int64).sum(axis=1)


def blocks_of(weight: Weight) -> Blocks:
    """A weight of one of FORMATS, read by its declared fields."""
    bits, has_minimum = FORMATS[weight.format.name]
    raw = weight.data.reshape(weight.shape[0], -1, weight.format.block_bytes)
    parts = {
        f.name: np.ascontiguousarray(raw[..., f.offset : f.offset + f.nbytes]).view(f.dtype)
        for f in weight.format.fields
    }
    quants = parts["qs"].astype(np.int64)
    if weight.format.bits < 8:  # byte j: number j in the low half, number j + 16 in the high one
        quants = np.concatenate([quants & 15, quants >> 4], axis=-1)
    if "qh" in parts:
        quants |= np.unpackbits(parts["qh"], axis=-1, bitorder="little").astype(np.int64) << 4
    if weight.format.name == "Q5_0":
        quants -= 16
    return Blocks(bits, quants, parts["d"][..., 0], parts["m"][..., 0] if has_minimum else None)


def random_blocks(rng: np.random.Generator, element: Element, rows: int, count: int, wild: bool = False) -> Blocks:
    """Any stored numbers; scales around 1/50, or `wild`: any finite float16, zero and subnormal ones too."""
    low, high = (0, 16) if element.bits == 4 else (-128, 128)
    shape = (rows, count)

    def halves() -> Array:
        if wild:
            return (rng.integers(0, 2, shape) << 15 | rng.integers(0, 0x7C00, shape)).astype(np.uint16).view(np.float16)
        return (rng.uniform(0.01, 0.03, shape) * rng.choice([-1, 1], shape)).astype(np.float16)

    quants = rng.integers(low, high, (*shape, BLOCK))
    return Blocks(element.bits, quants, halves(), halves() if element.minimum else None)


def quantize(x: Array) -> Activations:
    """float [K] rounded to int8 per block of 32; K is padded with zeros.

    The largest step of the row becomes about 2**15, `exponent` takes the rest of the power of two: float16 steps are
    then exact to 11 bits for blocks down to 2**-29 of the largest one.
    """
    x = np.pad(x.astype(np.float64), (0, -len(x) % BLOCK)).reshape(-1, BLOCK)
    with np.errstate(invalid="ignore"):
        largest = np.abs(x).max(axis=1)
    good = np.isfinite(largest)
    top = largest[good].max(initial=0.0) / 127
    exponent = int(np.frexp(top)[1]) - 15 if top > 0 else 0
    step = np.where(good, np.ldexp(np.where(good, largest, 0.0) / 127, -exponent), np.nan).astype(np.float16)
    usable = good & (step > 0)
    divisor = np.where(usable, step.astype(np.float64), 1.0)[:, None]
    q = np.rint(np.ldexp(np.where(usable[:, None], x, 0.0), -exponent) / divisor)
    return Activations(np.clip(q, -127, 127).astype(np.int8), step, exponent)


def random_activations(rng: np.random.Generator, count: int, wild: bool = False) -> Activations:
    """Any int8 but -128, and any steps: `wild` ones are any finite float16."""
    q = rng.integers(-127, 128, (count, BLOCK)).astype(np.int8)
    if wild:
        return Activations(q, rng.integers(0, 0x7C00, count).astype(np.uint16).view(np.float16), 0)
    return Activations(q, rng.uniform(0.5, 2.0, count).astype(np.float16), int(rng.integers(-40, 40)))


def _fixed(half: Array) -> Array:
    """float16 as Python integers in units of 2**-24, which is exact; where not finite, 0."""
    finite = np.where(np.isfinite(half), half, np.float16(0)).astype(np.float64)
    return np.ldexp(finite, 24).astype(np.int64).astype(object)


def exact_sums(blocks: Blocks, x: Activations) -> tuple[Array, Array]:
    """Each row's sum in units of 2**-48 (Python integers [N]), and whether a scale or step is no number (bool [N])."""
    dots = np.einsum("nbi,bi->nb", blocks.numbers(), x.q.astype(np.int64)).astype(object)
    inner = _fixed(blocks.scale) * dots
    special = ~np.isfinite(blocks.scale) | ~np.isfinite(x.step)
    if blocks.minimum is not None:
        inner = inner + _fixed(blocks.minimum) * x.sums().astype(object)
        special |= ~np.isfinite(blocks.minimum)
    sums = (inner * _fixed(x.step)).sum(axis=1)
    assert all(abs(s) < 1 << (ACC_WIDTH - 1) for s in sums)
    return sums, special.any(axis=1)


def round32(value: int, exponent: int) -> int:
    """value * 2**(exponent - 48) as the bits of a float32: nearest even, infinite beyond, 0 below normal numbers."""
    if value == 0:
        return 0
    sign, size = (1 << 31 if value < 0 else 0), abs(value)
    excess = size.bit_length() - 24
    if excess > 0:
        kept, rest, half = size >> excess, size & ((1 << excess) - 1), 1 << (excess - 1)
        kept += rest > half or (rest == half and kept & 1)
    else:
        kept = size << -excess
    if kept == 1 << 24:
        kept, excess = kept >> 1, excess + 1
    field = 127 + 23 + excess - FRACTION_BITS + exponent
    if field >= 255:
        return sign | 0xFF << 23
    return sign if field <= 0 else sign | field << 23 | (kept & 0x7FFFFF)


def gemv_bits(blocks: Blocks, x: Activations) -> Array:
    """The element's results, uint32 [N]: the bits of its float32."""
    sums, special = exact_sums(blocks, x)
    return np.array(
        [0x7FC00000 if bad else round32(s, x.exponent) for s, bad in zip(sums, special, strict=True)], np.uint32
    )


def gemv(blocks: Blocks, x: Activations) -> Array:
    """float32 [N]."""
    return gemv_bits(blocks, x).view(np.float32)


def beats_of(blocks: Blocks, rng: np.random.Generator | None = None) -> list[str]:
    """The rows as 512-bit beats in hexadecimal; with `rng`, what pads a row's last beats is noise rather than zeros."""
    element = Element(blocks.bits, minimum=blocks.minimum is not None)
    per_header, per_beat = element.header_blocks, element.beat_blocks
    pad = -blocks.count % per_header
    shape = (blocks.rows, pad)

    def padded(half: Array) -> Array:
        noise = rng.integers(0, 1 << 16, shape) if rng is not None else np.zeros(shape, np.int64)
        return np.concatenate([half.view(np.uint16), noise.astype(np.uint16)], axis=1)

    headers = padded(blocks.scale)
    if blocks.minimum is not None:
        headers = np.stack([headers, padded(blocks.minimum)], axis=-1).reshape(blocks.rows, -1)
    filler = rng.integers(0, 16, (*shape, BLOCK)) if rng is not None else np.zeros((*shape, BLOCK), np.int64)
    quants = np.concatenate([blocks.quants, filler], axis=1).reshape(blocks.rows, -1, per_beat * BLOCK)
    data = (quants[..., 0::2] | quants[..., 1::2] << 4 if blocks.bits == 4 else quants).astype(np.uint8)
    lines: list[str] = []
    for row in range(blocks.rows):
        for start in range(0, blocks.count, per_header):
            words = headers[row].reshape(-1, 32)[start // per_header]
            lines.append(_hex(words.astype("<u2").tobytes()))
            stop = min(start + per_header, blocks.count)
            lines += [_hex(data[row, beat].tobytes()) for beat in range(start // per_beat, -(-stop // per_beat))]
    return lines


def words_of(x: Activations) -> list[str]:
    """The words that load x: {step, 32 int8} in hexadecimal."""
    return [_hex(q.tobytes() + step.tobytes()) for q, step in zip(x.q, x.step, strict=True)]


def _hex(little: bytes) -> str:
    return little[::-1].hex()


@dataclass(frozen=True)
class Tile:
    """One command: a matrix and the x it is multiplied with. `load` false: the x of the command before, still there."""

    blocks: Blocks
    x: Activations
    load: bool = True


@dataclass(frozen=True)
class Group:
    """Commands played one behind the other without waiting.

    hold_x, hold_y  how many of 256 cycles x is not offered, y not taken, at random
    hold_w          the same for weights; negative: evenly
    reset_at        cycle of a reset, after which the group is played again from the start; 0: none
    """

    tiles: Sequence[Tile]
    hold_x: int = 0
    hold_w: int = 0
    hold_y: int = 0
    reset_at: int = 0

    def text(self, noise: np.random.Generator) -> str:
        """As the test bench (hls/rtl/gemv_pe_tb.v) reads it."""
        words = [word for tile in self.tiles if tile.load for word in words_of(tile.x)]
        beats = [beat for tile in self.tiles for beat in beats_of(tile.blocks, noise)]
        rows = sum(tile.blocks.rows for tile in self.tiles)
        head = (len(self.tiles), len(words), len(beats), rows, self.hold_x, self.hold_w, self.hold_y, self.reset_at)
        commands = [f"{t.blocks.rows} {t.blocks.count} {t.x.exponent} {int(t.load)}" for t in self.tiles]
        return "\n".join([" ".join(map(str, head)), *commands, *words, *beats, ""])

    def expected(self) -> Array:
        """uint32 [rows of all tiles]."""
        return np.concatenate([gemv_bits(tile.blocks, tile.x) for tile in self.tiles])


@dataclass(frozen=True)
class Played:
    """What came out: results uint32 [rows], cycles, and those of them in which something outside was waited for.

    starved: for x or weights; blocked: for a credit, because results were not taken; drain: of the last result in the
    FIFO beyond the one cycle it always needs.
    """

    results: Array
    cycles: int
    starved: int
    blocked: int
    drain: int

    @property
    def stalls(self) -> int:
        return self.starved + self.blocked + self.drain


def read_output(text: str) -> list[Played]:
    """The test bench's output, group by group."""
    played: list[Played] = []
    results: list[int] = []
    for line in text.splitlines():
        if line.startswith("cycles"):
            played.append(Played(np.array(results, np.uint32), *map(int, line.split()[1:])))
            results = []
        else:
            assert line != "left over", "beats or results are left over after the last result"
            results.append(int(line, 16))
    return played
