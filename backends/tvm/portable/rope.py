"""rope, kv_append, and both in one kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ....kernels.op import Numerics, Signature
from .machine import Machine

if TYPE_CHECKING:
    from .builder import Builder, Expr, Tensor


def _pair(k: Builder, i: Expr) -> tuple[Expr, Expr]:
    """Which two numbers of a head pair i turns."""
    half = k.signature.tensors["cos_sin"].shape[1] // 2
    return (2 * i, 2 * i + 1) if k.signature.attrs["pairing"] == "interleaved" else (i, i + half)


def _rotated(k: Builder, x: Tensor, t: Expr, h: Expr, i: Expr, position: Expr) -> tuple[Expr, Expr]:
    """Pair i of head h, turned by the angle of a position that the table has."""
    table = k.tensors["cos_sin"]
    first, second = _pair(k, i)
    a, b = k.keep(x[t, h, first]), k.keep(x[t, h, second])
    cos, sin = k.keep(table[position, i]), k.keep(table[position, i + table.shape[1] // 2])
    return k.keep(a * cos - b * sin), k.keep(a * sin + b * cos)


def _turn(k: Builder, x: Tensor, t: Expr, h: Expr, i: Expr) -> None:
    position = k.keep(k.tensors["positions"][t])
    with k.when(k.both(position >= 0, position < k.tensors["cos_sin"].shape[0])):
        first, second = _pair(k, i)
        x[t, h, first], x[t, h, second] = _rotated(k, x, t, h, i, position)


def rope(k: Builder) -> None:
    tokens, heads, _ = k.signature.tensors["x"].shape
    pairs = k.signature.tensors["cos_sin"].shape[1] // 2
    with k.kernel() as tensors, k.each(tokens, heads, pairs) as (t, h, i):
        _turn(k, tensors["x"], t, h, i)


class _Slot:
    """Where token t goes: `exists`, then `page` and `slot`."""

    def __init__(self, k: Builder, t: Expr) -> None:
        pages, _, page_size, _ = k.signature.tensors["k_pages"].shape
        sequences, max_pages = k.signature.tensors["block_table"].shape
        seq, position = k.keep(k.tensors["seq_ids"][t]), k.keep(k.tensors["positions"][t])
        known = k.both(seq >= 0, seq < sequences, position >= 0, position < max_pages * page_size)
        row, place = k.keep(k.select(known, seq, 0)), k.keep(k.select(known, position, 0))
        self.page = k.keep(k.tensors["block_table"][row, k.quotient(place, page_size)])
        self.slot = k.keep(k.remainder(place, page_size))
        self.exists = k.both(known, self.page >= 0, self.page < pages)


def kv_append(k: Builder) -> None:
    tokens, kv_heads, head_dim = k.signature.tensors["k"].shape
    with k.kernel() as tensors, k.each(tokens, kv_heads, head_dim) as (t, g, d):
        to = _Slot(k, t)
        with k.when(to.exists):
            tensors["k_pages"][to.page, g, to.slot, d] = tensors["k"][t, g, d]
            tensors["v_pages"][to.page, g, to.slot, d] = tensors["v"][t, g, d]


def rope_kv_append(k: Builder) -> None:
    """An item for each number of each head of q and k; the one of the first number of a pair turns it."""
    tokens, heads, head_dim = k.signature.tensors["q"].shape
    kv_heads, pairs = k.signature.tensors["k"].shape[1], k.signature.tensors["cos_sin"].shape[1] // 2
    with k.kernel() as tensors, k.each(tokens, heads + kv_heads, head_dim) as (t, h, i):
        with k.when(k.both(h < heads, i < pairs)):
            _turn(k, tensors["q"], t, h, i)
        with k.when(h >= heads):
            to, g = _Slot(k, t), k.keep(h - heads)
            with k.when(to.exists):
                _append_turned(k, tensors, to, t, g, i, pairs)


def _append_turned(k: Builder, tensors: dict[str, Any], to: _Slot, t: Expr, g: Expr, i: Expr, pairs: int) -> None:
    source, pages = tensors["k"], tensors["k_pages"]
    tensors["v_pages"][to.page, g, to.slot, i] = tensors["v"][t, g, i]
    with k.when(i >= 2 * pairs):
        pages[to.page, g, to.slot, i] = source[t, g, i]
    with k.when(i < pairs):
        first, second = _pair(k, i)
        a, b = k.cell(source[t, g, first]), k.cell(source[t, g, second])
        position = k.keep(tensors["positions"][t])
        with k.when(position < tensors["cos_sin"].shape[0]):  # and at least 0: it has a slot
            first_turned, second_turned = _rotated(k, source, t, g, i, position)
            a.set(first_turned)
            b.set(second_turned)
        pages[to.page, g, to.slot, first] = a.value
        pages[to.page, g, to.slot, second] = b.value


def numerics(signature: Signature, machine: Machine) -> Numerics:
    return Numerics("f32", 2, "f32", 1.0)


KERNELS = {
    "rope": (rope, numerics),
    "kv_append": (kv_append, numerics),
    "rope_kv_append": (rope_kv_append, numerics),
}
