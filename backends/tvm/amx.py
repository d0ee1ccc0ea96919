"""gemm for many rows on AMX: weights and activations as bfloat16, sums in float32 (Sapphire Rapids and later).

A tile instruction multiplies 16 rows of x by 16 rows of the weight over 32 columns. A thread unpacks 32 rows of its
weight once into a panel in its own cache, and runs all of x past it. bfloat16 rather than AMX's int8, because integer
sums would have to leave the tiles after every block of 32 for its scale: 48 vector instructions for 16 cycles of tiles.

Only formats whose numbers are d * q + m: those with two levels of scales have more bits than bfloat16 keeps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .formats import BLOCK, LAYOUTS, TILE_ROWS, Block, float_column, layout_of

if TYPE_CHECKING:
    from .emit import Emitter, Expr, Memory

FORMATS = (*(name for name, layout in LAYOUTS.items() if layout.blocks == 1), "BF16")
LEAST_ROWS = 16  # one tile; with fewer rows most of it would be padding
GROUP_ROWS = 32  # rows of x at a time: two tiles, by two tiles of weights: four sums of 16 x 16, all 8 tiles in use
SUMS_BYTES = GROUP_ROWS * TILE_ROWS * 4


def padded(rows: int) -> int:
    return -(-rows // GROUP_ROWS) * GROUP_ROWS


def panel_bytes(columns: int, weights: int) -> int:
    """Scratch of one thread: a panel for each weight, and the sums."""
    return weights * (columns * 2 * TILE_ROWS + SUMS_BYTES)


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


def unpack(k: Emitter, fmt: str, w: Memory, heads: Memory, columns: Expr, panel: Memory) -> None:
    """A tile of a weight as bfloat16.

    panel (uint32): for each 32 columns and each half 16 rows of 64 bytes; row p, lane n holds columns 2p and 2p + 1 of
    row n of the half.
    """
    T = k.T
    upper, sixteen = k.splat(T.uint32(0xFFFF0000)), k.splat(T.uint32(16))
    with k.loop(0, k.div(columns, BLOCK)) as b:
        for half in range(2):
            place = k.let((2 * b + half) * 256)
            for p, (even, odd) in enumerate(_pairs(k, fmt, w, heads, b, half)):
                low = T.shift_right(to_bf16(k, even), sixteen)
                panel.store(place + 16 * p, T.bitwise_or(low, T.bitwise_and(to_bf16(k, odd), upper)))


def _pairs(k: Emitter, fmt: str, w: Memory, heads: Memory, b: Expr, half: int) -> list[tuple[Expr, Expr]]:
    """The 32 columns of a block as float32x16, two by two."""
    T = k.T
    if fmt not in LAYOUTS:
        numbers = [float_column(k, fmt, w, (b * BLOCK + c) * TILE_ROWS, half) for c in range(BLOCK)]
    else:
        layout = layout_of(fmt)
        block = Block(k, fmt, w, heads, k.let(b * layout.super_bytes), T.int32(0), half)
        scale = block.scale()
        zero = block.minimum() if layout.has_min else k.let(scale * k.splat(float(-layout.offset)))
        numbers = []
        for vector in block.vectors():
            word = k.let(k.bits(vector, "int32x16"))
            for i in range(4):
                byte = T.bitwise_and(T.shift_right(word, k.splat(T.int32(8 * i))), k.splat(T.int32(255)))
                numbers.append(k.fma(k.floats(byte), scale, zero))
    return list(zip(numbers[0::2], numbers[1::2], strict=True))


def place_of(k: Emitter, row: Expr, columns: Expr) -> Expr:
    """Where row `row` of x begins: rows lie in groups of 16, a group's 32 columns together (1 KiB, one tile), so that a
    tile is 16 consecutive lines, not 16 lines of as many rows."""
    return k.wide(k.div(row, 16)) * k.wide(columns * 16) + k.wide(k.mod(row, 16) * BLOCK)


def multiply(k: Emitter, x: Memory, first: Expr, columns: Expr, panel: Memory, sums: Memory) -> None:
    """sums [32, 32] = 32 rows of x from row `first` on (uint16, see `place_of`) times a panel."""
    T = k.T
    for tile in range(4):
        call(k, "tilezero", T.int8(tile))
    rows = [x.at(k.wide(k.div(first, 16) + i) * k.wide(columns * 16)) for i in range(2)]
    line = T.int64(64)
    with k.loop(0, k.div(columns, BLOCK)) as b:
        for half in range(2):
            call(k, "tileloadd64", T.int8(6 + half), T.address_of(panel[(2 * b + half) * 256]), line)
        for i, row in enumerate(rows):
            call(k, "tileloadd64", T.int8(4 + i), T.address_of(row[b * 512]), line)
            for half in range(2):
                call(k, "tdpbf16ps", T.int8(2 * i + half), T.int8(4 + i), T.int8(6 + half))
    for i in range(2):
        for half in range(2):
            where = T.address_of(sums[16 * i * TILE_ROWS + 16 * half])
            call(k, "tilestored64", T.int8(2 * i + half), where, T.int64(4 * TILE_ROWS))


def takes(fmt: str, columns: int, rows: int) -> bool:
    """Whether a product goes through tiles."""
    return fmt in FORMATS and columns % BLOCK == 0 and rows >= LEAST_ROWS
