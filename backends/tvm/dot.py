"""The integer dot product: int32x16 += four bytes of weights times four bytes of activations, per lane.

Weights are unsigned bytes (quants of up to 8 bits; those of Q8_0 with 128 added), activations int8 in -127..127. Every
variant gives the same integers, so a kernel's result does not depend on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

from .emit import LANES, Emitter, Expr
from .target import MADDUBS, SDOT, VNNI256, VNNI512

BYTES = 4 * LANES
Dot = Callable[[Expr, Expr, Expr], Expr]  # (total, weights, word) -> total


def is_signed(k: Emitter, bits: int) -> bool:
    """Whether `dot` takes 8-bit quants without the 128 that is added to them in memory, hence without its correction.

    vpmaddubsw adds two products in 16 bits: 2 * 255 * 127 does not fit, 2 * 128 * 127 does. sdot and the plain code
    are signed anyway.
    """
    return bits == 8 and k.target.dot not in (VNNI512, VNNI256)


def dot(k: Emitter, total: Expr, weights: Expr, word: Expr, bits: int) -> Expr:
    """total + the products of `weights` (int8x64) with the four activations in each lane of `word` (int32x16)."""
    if k.target.dot == VNNI512:
        return _vnni(k, total, weights, word, 512)
    signed = is_signed(k, bits)
    if k.target.dot == VNNI256:
        return _by_halves(k, total, weights, word, 16, lambda t, w, x: _vnni(k, t, w, x, 256))
    if k.target.dot == MADDUBS:
        return _by_halves(k, total, weights, word, 16, lambda t, w, x: _maddubs(k, t, w, x, signed))
    if k.target.dot == SDOT:
        return _by_halves(k, total, weights, word, 16, lambda t, w, x: _by_halves(
            k, t, w, x, 8, lambda t, w, x: _sdot(k, t, w, x, signed)))  # fmt: skip
    return _plain(k, total, weights, word, signed)


def _by_halves(k: Emitter, total: Expr, weights: Expr, word: Expr, lanes: int, half: Dot) -> Expr:
    """On vectors of half the length (`weights` as int8x(4 * lanes), the others int32x(lanes))."""
    totals = k.halves(total, lanes, "int32")
    words = k.halves(word, lanes, "int32")
    parts = k.halves(weights, 4 * lanes, "int8")
    low, high = (half(t, w, x) for t, w, x in zip(totals, parts, words, strict=True))
    return k.let(k.T.vectorcombine(f"int32x{lanes}", low, high))


def _vnni(k: Emitter, total: Expr, weights: Expr, word: Expr, width: int) -> Expr:
    # LLVM 22 takes the bytes as i8 vectors (DESIGN 5); AVX-VNNI has the 256-bit intrinsic's name of AVX512-VL.
    lanes = width // 32
    name = f"llvm.x86.avx512.vpdpbusd.{width}"
    x = k.bits(word, f"int8x{width // 8}")
    return k.let(k.T.call_llvm_pure_intrin(f"int32x{lanes}", name, total, weights, x))


def _maddubs(k: Emitter, total: Expr, weights: Expr, word: Expr, signed: bool) -> Expr:
    T = k.T
    x = k.let(k.bits(word, "int8x32"))
    if signed:
        # |w| is the unsigned operand, and w's sign goes to x: w = -128 gives 128, which is right as unsigned.
        w = k.let(k.T.bitwise_xor(weights, k.splat(T.int8(-128), 32)))
        x = k.let(T.call_llvm_pure_intrin("int8x32", "llvm.x86.avx2.psign.b", x, w))
        weights = k.let(T.call_llvm_pure_intrin("int8x32", "llvm.abs", w, T.bool(False)))
    pairs = T.call_llvm_pure_intrin("int16x16", "llvm.x86.avx2.pmadd.ub.sw", weights, x)
    ones = k.splat(T.int16(1), 16)
    return k.let(total + T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx2.pmadd.wd", k.let(pairs), ones))


def _sdot(k: Emitter, total: Expr, weights: Expr, word: Expr, signed: bool) -> Expr:
    T = k.T
    w = k.let(T.bitwise_xor(weights, k.splat(T.int8(-128), 16))) if signed else weights
    x = k.bits(word, "int8x16")
    return k.let(T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.sdot.v4i32.v16i8", total, w, x))


def _plain(k: Emitter, total: Expr, weights: Expr, word: Expr, signed: bool) -> Expr:
    """Byte by byte in 32-bit lanes: shifts, a multiplication and an addition for each."""
    T = k.T
    shift = lambda n: k.splat(T.int32(n))  # noqa: E731
    lanes = k.let(k.bits(weights, "int32x16"))
    if signed:
        lanes = k.let(T.bitwise_xor(lanes, k.splat(T.int32(-0x7F7F7F80))))  # 0x80808080
    for byte in range(4):
        left = k.let(T.shift_left(lanes, shift(24 - 8 * byte)))
        if signed:
            w = T.shift_right(left, shift(24))
        else:
            w = T.bitwise_and(T.shift_right(lanes, shift(8 * byte)), shift(255))
        x = T.shift_right(T.shift_left(word, shift(24 - 8 * byte)), shift(24))
        total = k.let(total + w * x)
    return total
