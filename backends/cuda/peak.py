"""What a GPU could do at best, measured now: the bandwidth of a copy, and the rates of the units that kernels use."""

from __future__ import annotations

from typing import Any

from .launch import Launch, Pointer, launch

SIDE, DEEP = 128, 64  # of the tiles: what tensor cores of compute capability 9.0 take at a time, twice
SIZE = 4096  # numbers of a program of multiply-adds: 16 independent ones in each thread
ROUNDS = 4096
PROGRAMS = 2  # on each multiprocessor


def measure(hardware: Any) -> dict[str, float]:
    """ "read": GB/s of a copy, reads and writes counted; Gop/s, a multiply-add being two: "f32", "bf16"."""
    data = hardware.alloc(4 * max(SIDE * SIDE, SIZE), "numbers to multiply")
    grid = (PROGRAMS * hardware.target.multiprocessors,)

    def rate(one: Launch, operations: int) -> float:
        hardware.load([one])
        return operations * grid[0] * ROUNDS / hardware.time(hardware.bind(one)) / 1e6

    output = hardware.alloc(4 * max(SIDE * SIDE, SIZE), "products")
    arguments = {"x": Pointer(data, 0, "fp32"), "y": Pointer(output, 0, "fp32"), "rounds": ROUNDS}
    single = launch("peak", "multiply_adds", grid, arguments, {"SIZE": SIZE}, warps=8)
    tiles = {**arguments, "x": Pointer(data, 0, "bf16")}
    tensor = launch("peak", "products", grid, tiles, {"SIDE": SIDE, "DEEP": DEEP}, warps=4)
    return {
        "read": hardware.copy_bandwidth(),
        "f32": rate(single, 2 * SIZE),
        "bf16": rate(tensor, 2 * SIDE * SIDE * DEEP),
    }
