"""What the arithmetic units of a GPU do at best: the same numbers multiplied again and again."""

import triton
import triton.language as tl


@triton.jit
def products(x, y, rounds, SIDE: tl.constexpr, DEEP: tl.constexpr):
    """`rounds` products of bfloat16 tiles [SIDE, DEEP] and [DEEP, SIDE] of x, summed up on tensor cores."""
    row = tl.arange(0, SIDE)
    column = tl.arange(0, DEEP)
    a = tl.load(x + row[:, None] * DEEP + column[None, :])
    b = tl.load(x + column[:, None] * SIDE + row[None, :])
    total = tl.full((SIDE, SIDE), 0.0, tl.float32)
    for _ in range(rounds):
        total = tl.dot(a, b, total)
    tl.store(y + row[:, None] * SIDE + row[None, :], total)


@triton.jit
def multiply_adds(x, y, rounds, SIZE: tl.constexpr):
    """`rounds` float32 multiply-adds on each of SIZE numbers of x."""
    at = tl.arange(0, SIZE)
    factor = tl.load(x + at)
    value = factor
    for _ in range(rounds):
        value = value * factor + factor
    tl.store(y + at, value)
