"""attention: the lanes of a group share keys of a token and head, each with an online softmax (arXiv 1805.02867)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ....kernels.op import Numerics, Signature
from .machine import Machine
from .maths import FUNCTION_ULP, exp, tanh

if TYPE_CHECKING:
    from .builder import Builder, Cell, Expr, Local

# What the lanes put together is in shared memory, of which OpenCL and WebGPU promise 16 KiB at least.
SHARED_FLOATS = 4096


def _workers(machine: Machine, head_dim: int) -> int:
    """Lanes that have keys; a power of two."""
    return max(1, min(machine.lanes, 1 << (SHARED_FLOATS // head_dim).bit_length() - 1))


def _spread(machine: Machine, head_dim: int) -> int:
    return next(spread for spread in (16, 8, 4, 2, 1) if head_dim % spread == 0 and spread <= machine.spread)


def attention(k: Builder) -> None:
    tensors, attrs = k.signature.tensors, k.signature.attrs
    tokens, heads, head_dim = tensors["q"].shape
    pages, kv_heads, page_size, _ = tensors["k_pages"].shape
    sequences, max_pages = tensors["block_table"].shape
    workers, window, cap = _workers(k.machine, head_dim), attrs["window"], attrs["softcap"]
    with k.kernel() as t_, k.groups(tokens, heads, reduces=("f32", "i32")) as (t, h):
        table, y = t_["block_table"], t_["y"]
        seq, position = k.keep(t_["seq_ids"][t]), k.keep(t_["positions"][t])
        known = k.both(seq >= 0, seq < sequences, position >= 0, position < max_pages * page_size)
        g = k.keep(k.quotient(h, heads // kv_heads))
        row, last = k.keep(k.select(known, seq, 0)), k.keep(k.select(known, position, -1))
        first = k.keep(k.largest(last - (window - 1), 0)) if window else 0
        # Every page that holds a key which this query sees has to exist; a query with a lost one sees none.
        lost = k.cell(0, "i32")
        with (
            k.share(max_pages) as place,
            k.when(k.both(place >= k.quotient(first, page_size), place <= k.quotient(last, page_size))),
        ):
            page = k.keep(table[row, place])
            with k.when(k.either(page < 0, page >= pages)):
                lost.set(k.constant(1, "i32"))
        k.reduce([lost])
        complete = k.keep(k.both(known, lost.value == 0))
        stop = k.keep(k.select(complete, last + 1, 0))

        top, total, sums = k.cell(k.minus_infinity), k.cell(0.0), k.array(head_dim)
        with k.loop(head_dim) as d:
            sums[d] = k.constant(0.0)
        with k.stride(first, stop, workers) as j:
            page, slot = k.keep(table[row, k.quotient(j, page_size)]), k.keep(k.remainder(j, page_size))
            place = (page, g, slot)
            score = k.keep(_dot(k, t, h, place, head_dim) * k.constant(attrs["scale"] or head_dim**-0.5))
            if cap:
                score = k.keep(tanh(k, score / k.constant(cap)) * k.constant(cap))
            with k.when(score > top.value):
                shrink = exp(k, top.value - score)
                total.set(total.value * shrink)
                with k.loop(head_dim) as d:
                    sums[d] = sums[d] * shrink
                top.set(score)
            # Scores of -infinity so far: such a key counts for nothing, and infinity - infinity would be NaN.
            base = k.select(top.value > k.minus_infinity, top.value, k.constant(0.0))
            share = exp(k, score - base)
            total.add(share)
            with k.loop(head_dim) as d:
                sums[d] = sums[d] + share * t_["v_pages"][(*place, d)]
        merged = _merge(k, top, total, sums, workers, head_dim)
        with k.share(head_dim) as d:
            value = k.select(complete, merged(d), k.select(seq < 0, k.constant(0.0), k.nan))
            y[t, h, d] = value


def _dot(k: Builder, t: Expr, h: Expr, place: tuple[Expr, ...], head_dim: int) -> Expr:
    q, keys = k.tensors["q"], k.tensors["k_pages"]
    spread = _spread(k.machine, head_dim)
    products, score = k.array(spread), k.cell(0.0)
    with k.loop(spread) as i:
        products[i] = k.constant(0.0)
    with k.loop(head_dim // spread) as step, k.loop(spread) as i:
        d = step * spread + i
        products[i] = products[i] + q[t, h, d] * keys[(*place, d)]
    with k.loop(spread) as i:
        score.add(products[i])
    return score.value


def _merge(k: Builder, top: Cell, total: Cell, sums: Local, workers: int, head_dim: int) -> Callable[[Expr], Expr]:
    """One softmax of the lanes' own: a function that gives output d (of a query with keys)."""
    if k.machine.is_serial:
        return lambda d: sums[d] / total.value
    own = k.keep(top.value)
    k.reduce([top], lambda mine, other: [k.largest(mine[0], other[0])])
    factor = exp(k, k.select(own > k.minus_infinity, own - top.value, k.minus_infinity))  # 0 for a lane without a key
    total.set(total.value * factor)
    k.reduce([total])
    shared = k.shared(workers * head_dim)
    with k.when(k.lane < workers), k.loop(head_dim) as d:
        shared[k.lane * head_dim + d] = sums[d] * factor
    k.barrier()

    def output(d: Expr) -> Expr:
        value = k.cell(0.0)
        with k.loop(workers) as lane:
            value.add(shared[lane * head_dim + d])
        return value.value / total.value

    return output


def numerics(signature: Signature, machine: Machine) -> Numerics:
    """Longest chain: a score's head_dim, or a lane's keys, rescaled as they go, then the lanes."""
    head_dim = signature.tensors["q"].shape[2]
    keys = signature.tensors["block_table"].shape[1] * signature.tensors["k_pages"].shape[2]
    workers, spread = _workers(machine, head_dim), _spread(machine, head_dim)
    score = head_dim // spread + spread
    return Numerics("f32", max(score, 2 * -(-keys // workers) + workers + 2), "f32", FUNCTION_ULP)


KERNELS = {"attention": (attention, numerics)}
