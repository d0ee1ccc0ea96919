"""gemm for many rows on AMX: weights and activations as bfloat16, sums in float32 (Sapphire Rapids and later).

A tile instruction multiplies 16 rows of x by 16 rows of the weight over 32 columns. A thread unpacks some panels of its
weight, 32 rows each, into its own cache, and runs all of its rows of x past them. bfloat16 rather than AMX's int8,
because integer sums would have to leave the tiles after every block of 32 for its scale: 48 vector instructions for 16
cycles of tiles.

Only formats whose numbers are d * q + m: those with two levels of scales have more bits than bfloat16 keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .emit import LANES, MANY_ROWS
from .formats import BLOCK, LAYOUTS, TILE_ROWS, Block, layout_of

if TYPE_CHECKING:
    from .emit import Emitter, Expr, Memory

FORMATS = (*(name for name, layout in LAYOUTS.items() if layout.blocks == 1), "BF16")
LEAST_ROWS = 16  # one tile; with fewer rows most of it would be padding
GROUP_ROWS = 32  # rows of x at a time: two tiles, by two tiles of weights: four sums of 16 x 16, all 8 tiles in use
# Columns at a time: 32 rows of x then stay in the first level (36 of 48 KiB) while PANELS panels of weights go past
# them out of the second, by instructions that ask not to be kept: 1490 G multiply-adds a second of a core's 1710, with
# ordinary loads 1110, with whole rows of 1536 columns 860.
SLICE = 576
# Panels that are ready at a time: x comes from further away once for all of them, and a row of y, which lies in a page
# of its own, is written for all of them at a time.
PANELS = 8
# Bytes of weights asked for ahead of those that are unpacked; the CPU's own reading ahead stops at each page of 4 KiB.
AHEAD = 12288
SUMS_BYTES = GROUP_ROWS * TILE_ROWS * 4


def padded(rows: int) -> int:
    return -(-rows // GROUP_ROWS) * GROUP_ROWS


def room_bytes(columns: int, rows: int) -> int:
    """Scratch of one thread: panels, and the sums of each group of rows while slices of columns go by."""
    sums = padded(rows) // GROUP_ROWS * PANELS if columns > SLICE else 2
    return PANELS * min(columns, SLICE) * 2 * TILE_ROWS + sums * SUMS_BYTES


def row_parts(rows: int, threads: int) -> int:
    """Among how many parts of the rows threads are divided; those of a part share out the weight.

    Where every thread has rows of its own it finds in its second level what it wrote there itself, from op to op, but
    unpacks all of the weight: worth it from MANY_ROWS on.
    """
    return max(n for n in range(1, threads + 1) if threads % n == 0 and (n == 1 or rows >= n * MANY_ROWS))


def to_bf16(k: Emitter, value: Expr) -> Expr:
    """float32x16 rounded to nearest even, as the upper halves of uint32x16 (the lower are not cleared).

    By integers: LLVM's vcvtne2ps2bf16 intrinsic ends TVM 0.27's compiler ("unknown" fault), which has i16 for bfloat16.
    """
    T = k.T
    word = k.let(k.bits(value, "uint32x16"))
    odd = T.bitwise_and(T.shift_right(word, k.splat(T.uint32(16))), k.splat(T.uint32(1)))
    rounded = k.let(word + k.splat(T.uint32(0x7FFF)) + odd)
    # A NaN of all ones would be rounded up to -0.
    return k.let(T.Select(value == value, rounded, k.splat(T.uint32(0x7FC00000))))  # noqa: PLR0124


def configure(k: Emitter) -> None:
    """All 8 tiles as 16 rows of 64 bytes."""
    T = k.T
    config = T.alloc_buffer((16,), "int32")
    words = {0: 1, **dict.fromkeys(range(4, 8), 0x00400040), 12: 0x10101010, 13: 0x10101010}
    for i in range(16):
        T.buffer_store(config, T.int32(words.get(i, 0)), [i])
    call(k, "ldtilecfg", T.address_of(config[0]))


def release(k: Emitter) -> None:
    call(k, "tilerelease")


def call(k: Emitter, name: str, *arguments: Expr) -> None:
    k.T.evaluate(k.T.call_llvm_intrin("void", f"llvm.x86.{name}", *arguments))


@dataclass(frozen=True)
class Half:
    """16 rows of a weight: a half, 0 or 1, of a tile whose memory is `w`, as float16 `heads`."""

    w: Memory
    heads: Memory
    half: Expr


def unpack(
    k: Emitter, fmt: str, halves: Sequence[Half], first: Expr, blocks: Expr, panel: Memory, place: Expr
) -> None:  # fmt: skip
    """Blocks first .. first + blocks - 1 of two halves of tiles of weights as bfloat16.

    panel (uint32), from `place` on: for each 32 columns and each half 16 rows of 64 bytes; row p, lane n holds columns
    2p and 2p + 1 of row n of the half.
    """
    with k.loop(0, blocks) as b:
        for half in halves if halves[0].w is not halves[1].w else halves[:1]:
            nbytes, element = (layout_of(fmt).super_bytes, 1) if fmt in LAYOUTS else (2 * BLOCK * TILE_ROWS, 2)
            for line in range(AHEAD, AHEAD + nbytes, 64):
                half.w.prefetch((first + b) * (nbytes // element) + line // element)
        for i, half in enumerate(halves):
            start = k.let(place + (2 * b + i) * 256)
            for p, word in enumerate(_words(k, fmt, half, k.let(first + b))):
                panel.store(start + 16 * p, word)


def _words(k: Emitter, fmt: str, source: Half, b: Expr) -> list[Expr]:
    """The 32 columns of a block as bfloat16, two by two, uint32x16.

    Rounded half up, in two instructions less than to nearest even: a NaN's payload must not overflow, so that of
    scales is cleared.
    """
    T = k.T
    if fmt not in LAYOUTS:  # bfloat16 as it is
        columns = [source.w.load((b * BLOCK + c) * TILE_ROWS + LANES * source.half) for c in range(BLOCK)]
        wide = [k.let(k.cast(column, "uint32x16")) for column in columns]
        return [
            k.let(T.bitwise_or(even, T.shift_left(odd, k.splat(T.uint32(16)))))
            for even, odd in zip(wide[0::2], wide[1::2], strict=True)
        ]
    layout = layout_of(fmt)
    block = Block(k, fmt, source.w, source.heads, k.let(b * layout.super_bytes), T.int32(0), source.half)
    scale = _plain_nan(k, block.scale())
    minimum = _plain_nan(k, block.minimum()) if layout.has_min else k.let(scale * k.splat(float(-layout.offset)))
    numbers = [
        k.let(k.bits(number, "uint32x16") + k.splat(T.uint32(0x8000))) for number in block.numbers(scale, minimum)
    ]
    return [k.upper_halves(even, odd) for even, odd in zip(numbers[0::2], numbers[1::2], strict=True)]


def _plain_nan(k: Emitter, value: Expr) -> Expr:
    return k.let(k.T.Select(value == value, value, k.splat(k.f32(float("nan")))))  # noqa: PLR0124


def place_of(k: Emitter, row: Expr, columns: Expr) -> Expr:
    """Where row `row` of x begins: rows lie in groups of 16, a group's 32 columns together (1 KiB, one tile), so that a
    tile is 16 consecutive lines, not 16 lines of as many rows."""
    return k.wide(k.div(row, 16)) * k.wide(columns * 16) + k.wide(k.mod(row, 16) * BLOCK)


def multiply(
    k: Emitter, x: Memory, group: Expr, columns: Expr, first: Expr, blocks: Expr, panel: Memory, place: Expr,
    sums: Memory, is_first: Expr, meanwhile: Callable[[Expr], None],
) -> None:  # fmt: skip
    """sums [4, 16, 16] (rows of x, rows of the weight) of blocks first .. first + blocks - 1 of 32 rows of x (uint16,
    see `place_of`) times the panel at `place`; added to what is there unless `is_first`.

    `meanwhile` gets the number of each block, counted from 0: what vector instructions do there takes no time, while
    tile instructions, 16 cycles each, are under way.
    """
    T = k.T
    sums_at = [T.address_of(sums[256 * tile]) for tile in range(4)]
    line = T.int64(64)
    with k.branches(is_first) as (begins, goes_on):
        with begins:
            for tile in range(4):
                call(k, "tilezero", T.int8(tile))
        with goes_on:
            for tile, at in enumerate(sums_at):
                call(k, "tileloadd64", T.int8(tile), at, line)
    start = k.let(k.wide(first) * T.int64(16 * BLOCK))
    rows = [x.at(k.wide(group * 2 + i) * k.wide(columns * 16) + start) for i in range(2)]
    with k.loop(0, blocks) as b:
        for half in range(2):
            call(k, "tileloaddt164", T.int8(6 + half), T.address_of(panel[place + (2 * b + half) * 256]), line)
        for i, row in enumerate(rows):
            call(k, "tileloadd64", T.int8(4 + i), T.address_of(row[b * 512]), line)
            for half in range(2):
                call(k, "tdpbf16ps", T.int8(2 * i + half), T.int8(4 + i), T.int8(6 + half))
        meanwhile(b)
    for tile, at in enumerate(sums_at):
        call(k, "tilestored64", T.int8(tile), at, line)


def sums_of(k: Emitter, sums: Memory, row: Expr) -> list[Expr]:
    """The 32 sums of row `row`, 0 .. 31, of a group."""
    place = k.let(k.div(row, 16) * 512 + k.mod(row, 16) * 16)
    return [sums.load(place + 256 * half) for half in range(2)]


def takes(fmt: str, columns: int, rows: int) -> bool:
    """Whether a product goes through tiles."""
    return fmt in FORMATS and columns % BLOCK == 0 and rows >= LEAST_ROWS
