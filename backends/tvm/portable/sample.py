"""argmax and sample: the lanes of a group share a row of logits. Definition: kernels/sample.py."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from ....kernels.op import Numerics, Signature
from .machine import Machine
from .maths import FUNCTION_ULP, exp, is_nan

if TYPE_CHECKING:
    from .builder import Builder, Cell, Expr


# Lanes for a row of the vocabulary: as many as every target allows (WebGPU's maxComputeInvocationsPerWorkgroup).
LANES = 256


def _row_argmax(k: Builder, t: Expr) -> tuple[Cell, Cell]:
    """The largest number of a row and the lowest index that has it; -infinity and 0 where there is none."""
    x = k.tensors["x"]
    best, where = k.cell(k.minus_infinity), k.cell(0, "i32")
    with k.share(x.shape[1]) as i:
        value = k.keep(x[t, i])
        with k.when(value > best.value):
            best.set(value)
            where.set(i)

    def better(mine: list[Expr], other: list[Expr]) -> list[Expr]:
        takes = k.either(other[0] > mine[0], k.both(other[0] == mine[0], other[1] < mine[1]))
        return [k.select(takes, other[0], mine[0]), k.select(takes, other[1], mine[1])]

    k.reduce([best, where], better)
    return best, where


def argmax(k: Builder) -> None:
    k.widen(LANES)
    with k.kernel() as tensors, k.groups(k.signature.tensors["x"].shape[0], reduces=("f32", "i32")) as (t,):
        _, where = _row_argmax(k, t)
        with k.first_lane():
            tensors["ids"][t] = where.value


def _product_high(k: Builder, a: int, b: Expr) -> Expr:
    """Upper 32 bits of a product, by halves: WGSL has no 64-bit integers."""
    low, high, mask, shift = a & 0xFFFF, a >> 16, k.constant(0xFFFF, "u32"), k.constant(16, "u32")
    b_low, b_high = k.keep(b & mask), k.keep(b >> shift)
    across = k.keep(b_low * k.constant(high, "u32") + ((b_low * k.constant(low, "u32")) >> shift))
    middle = k.keep(b_high * k.constant(low, "u32") + (across & mask))
    return k.keep(b_high * k.constant(high, "u32") + (across >> shift) + (middle >> shift))


def _philox(k: Builder, counter: Expr, seed: Expr) -> Expr:
    """First word of Philox4x32-10 (Salmon et al., SC'11, doi 10.1145/2063384.2063405)."""

    @cache
    def word(rounds: int, i: int) -> Expr:
        """Word i after so many rounds; only what the first word needs is ever computed."""
        if not rounds:
            return counter if i == 0 else k.constant(0, "u32")
        multiplier, source = ((0xCD9E8D57, 2), (0xD2511F53, 0))[i // 2]
        factor = word(rounds - 1, source)
        if i % 2:
            return k.keep(factor * k.constant(multiplier, "u32"))
        step = rounds - 1
        key = (
            seed + k.constant(0x9E3779B9 * step % 2**32, "u32")
            if i == 0
            else k.constant(0xBB67AE85 * step % 2**32, "u32")
        )
        return k.keep(_product_high(k, multiplier, factor) ^ word(rounds - 1, i + 1) ^ key)

    return word(10, 0)


def _mass(k: Builder, t: Expr, least: Expr) -> tuple[Cell, Cell]:
    """Sum and number of the probabilities of at least `least`."""
    p = k.tensors["p"]
    total, count = k.cell(0.0), k.cell(0, "i32")
    with k.stretch(p.shape[1]) as i, k.when(p[t, i] >= least):
        total.add(p[t, i])
        count.add(1)
    k.reduce([total, count])
    return total, count


def _threshold(k: Builder, t: Expr, enough: Expr, by_count: bool, least: Cell, applies: Expr) -> None:
    """Where it applies, raises `least` to the largest number up to 1 that still keeps `enough` (tokens, or mass):
    bisection over the bits of a float that is not negative, whose order is that of the numbers. Once found it stays."""
    low, high = k.cell(k.as_bits(least.value), "u32"), k.cell(0x3F800001, "u32")
    with k.loop(31):
        middle = k.keep(low.value + ((high.value - low.value) >> k.constant(1, "u32")))
        total, count = _mass(k, t, k.as_float(middle))
        keeps = k.keep((count.value >= enough) if by_count else (total.value >= enough))
        low.set(k.select(keeps, middle, low.value))
        high.set(k.select(keeps, high.value, middle))
    least.set(k.select(applies, k.as_float(low.value), least.value))


def sample(k: Builder) -> None:
    k.widen(LANES)
    tokens, vocab = k.signature.tensors["x"].shape
    with k.kernel(p=("f32", (tokens, vocab))) as tensors, k.groups(tokens, reduces=("f32", "i32")) as (t,):
        x, params, rng, ids, p = (tensors[name] for name in ("x", "params", "rng", "ids", "p"))
        temperature, top_k, top_p, min_p = (k.keep(params[t, i]) for i in range(4))
        top, best = _row_argmax(k, t)
        with k.stretch(vocab) as i:
            value = k.keep(x[t, i])
            mass = exp(k, (value - top.value) / temperature)
            p[t, i] = k.select(is_nan(k, value), k.constant(0.0), mass)
        least = k.cell(0.0)
        # All lanes meet in `reduce`, so a row that asks for neither goes the same way: PoCL 3.1 makes wrong code of
        # some barriers behind a branch, and WGSL allows none. The largest probability is exp(0) = 1, so that a
        # threshold above 1 would keep nothing.
        has_top_k = k.keep(k.both(top_k >= 1.0, top_k < float(vocab)))
        enough = k.keep(k.select(has_top_k, top_k, k.constant(0.0)).astype("int32"))
        _threshold(k, t, enough, True, least, has_top_k)
        before, _ = _mass(k, t, least.value)
        _threshold(k, t, k.keep(top_p * before.value), False, least, k.keep(top_p < 1.0))
        with k.when(min_p > 0.0):
            least.set(k.largest(least.value, k.least(min_p, k.constant(1.0))))
        kept, _ = _mass(k, t, least.value)
        seed, counter = k.keep(rng[t, 0]), k.keep(rng[t, 1])
        share = (_philox(k, counter, seed) >> k.constant(8, "u32")).astype("float32") * k.constant(2.0**-24)
        drawn = _walk(k, t, least.value, k.keep(share * kept.value), best.value)
        is_drawn = k.both(
            temperature > 0.0, temperature < k.infinity, top.value > k.minus_infinity, top.value < k.infinity
        )
        with k.first_lane():
            rng[t, 1] = counter + k.constant(1, "u32")
            ids[t] = k.select(is_drawn, drawn, best.value)


def _walk(k: Builder, t: Expr, least: Expr, goal: Expr, best: Expr) -> Expr:
    """The first token at which the kept mass so far exceeds `goal`; if rounding leaves none, the last kept one.

    Each lane walks a stretch of the vocabulary, from the mass of the stretches before.
    """
    p, lanes = k.tensors["p"], k.lanes
    vocab = p.shape[1]
    found, last, reached = k.cell(vocab, "i32"), k.cell(0, "i32"), k.cell(0.0)
    if lanes > 1:
        stretches = k.shared(lanes)
        with k.stretch(vocab) as i, k.when(p[t, i] >= least):
            reached.add(p[t, i])
        stretches[k.lane] = reached.value
        k.barrier()
        reached.set(k.constant(0.0))
        with k.loop(lanes) as other, k.when(other < k.lane):
            reached.add(stretches[other])
    with k.stretch(vocab) as i, k.when(k.both(p[t, i] >= least, p[t, i] > 0.0)):
        last.set(i)
        reached.add(p[t, i])
        with k.when(k.both(reached.value > goal, found.value == vocab)):
            found.set(i)
    k.reduce([found], lambda mine, other: [k.least(mine[0], other[0])])
    k.reduce([last], lambda mine, other: [k.largest(mine[0], other[0])])
    return k.keep(k.select(found.value < vocab, found.value, last.value))


def numerics(signature: Signature, machine: Machine) -> Numerics:
    """The walk adds one after the other, stretch by stretch."""
    vocab, lanes = signature.tensors["x"].shape[1], 1 if machine.is_serial else LANES
    return Numerics("f32", -(-vocab // lanes) + lanes, "f32", FUNCTION_ULP)


KERNELS = {"argmax": (argmax, numerics), "sample": (sample, numerics)}
