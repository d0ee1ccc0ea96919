"""attention: causal softmax attention over a paged key/value cache, for ragged batches.

One query per sequence is decode, many are prefill; grouped-query heads, soft-capped logits and a sliding window are
attributes. Letters: P pages, G kv heads, S page size, D head_dim, H query heads, B rows of the block table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from .mutants import (
    changed_attrs,
    changed_inputs,
    changed_output,
    last_element_zero,
    one_sequence,
    padding_taken,
    table_ignored,
    token_major,
)
from .op import (
    NUMPY_DTYPES,
    U32,
    Attrs,
    Case,
    Cost,
    Inputs,
    Mutant,
    Numerics,
    Op,
    Outputs,
    Param,
    Signature,
    fp64,
    rng_for,
    signature_bytes,
)
from .quant import Array
from .testdata import page_count, paged_batch, stale_pages

# Whether a query at position p [n, 1] sees key j [1, L]; a mutant brings its own.
Sees = Callable[[Array, Array, Inputs, Attrs], Array]


def sees_causal(p: Array, j: Array, inputs: Inputs, attrs: Attrs) -> Array:
    window = attrs["window"]
    return (j <= p) & (j > p - window) if window else j <= p


class _Sequence(NamedTuple):
    """The part of a batch that belongs to one sequence: its rows of q, and queries, keys and values by kv head."""

    rows: Array  # [n]
    q: Array  # [G, n * H/G, D]
    k: Array  # [G, L, D]
    v: Array  # [G, L, D]
    visible: Array  # bool [n, 1, L]


def _first_page(position: Array, page_size: int, attrs: Attrs) -> Array:
    """The page of the first key that a query at `position` sees."""
    window = attrs["window"]
    return np.maximum(0, position - window + 1) // page_size if window else np.zeros_like(position)


def has_keys(inputs: Inputs, attrs: Attrs) -> Array:
    """Rows whose keys are all there, bool [T]: an existing sequence, a position in its table, pages of the cache."""
    table, seq_ids, positions = inputs["block_table"], inputs["seq_ids"], inputs["positions"].astype(np.int64)
    pages, _, page_size, _ = inputs["k_pages"].shape
    sequences, max_pages = table.shape
    known = (seq_ids >= 0) & (seq_ids < sequences) & (positions >= 0) & (positions < max_pages * page_size)
    lost_before = np.zeros((sequences, max_pages + 1), np.int64)  # how many of a row's first i pages do not exist
    lost_before[:, 1:] = np.cumsum((table < 0) | (table >= pages), axis=1)
    row, position = np.where(known, seq_ids, 0), np.where(known, positions, 0)
    first = _first_page(position, page_size, attrs)
    return known & (lost_before[row, position // page_size + 1] == lost_before[row, first])


def _sequences(inputs: Inputs, attrs: Attrs, sees: Sees) -> Iterator[_Sequence]:
    """The sequences of the rows that have all their keys."""
    q, k_pages, v_pages = inputs["q"], inputs["k_pages"], inputs["v_pages"]
    seq_ids, positions, complete = inputs["seq_ids"], inputs["positions"], has_keys(inputs, attrs)
    kv_heads, page_size, head_dim = k_pages.shape[1:]
    for seq in np.unique(seq_ids[complete]):
        rows = np.flatnonzero(complete & (seq_ids == seq))
        p = positions[rows]
        first, stop = int(_first_page(p.min(), page_size, attrs)), int(p.max()) + 1
        pages = inputs["block_table"][seq, first : -(-stop // page_size)]
        pages = np.where((pages >= 0) & (pages < len(k_pages)), pages, 0)  # between two windows nobody looks
        j = np.arange(first * page_size, stop)

        def gather(cache: Array, pages: Array = pages, length: int = len(j)) -> Array:
            taken = cache[pages].swapaxes(0, 1).reshape(kv_heads, -1, head_dim)
            return taken[:, :length].astype(q.dtype)

        grouped = q[rows].reshape(len(rows), kv_heads, -1, head_dim).swapaxes(0, 1)
        visible = sees(p[:, None], j[None, :], inputs, attrs)[:, None, :]
        yield _Sequence(
            rows, grouped.reshape(kv_heads, -1, head_dim), gather(k_pages), gather(v_pages), np.asarray(visible)
        )


def _scale(attrs: Attrs, head_dim: int) -> float:
    return attrs["scale"] or head_dim**-0.5


def _by_query(x: Array, rows: int) -> Array:
    """[G, n * R, C] -> [G, n, R, C], so that a mask [n, 1, L] applies."""
    return x.reshape(x.shape[0], rows, -1, x.shape[-1])


def _ungroup(y: Array, rows: int) -> Array:
    """[G, n * R, D] -> [n, G * R, D]: kv head h // R serves query head h."""
    return _by_query(y, rows).swapaxes(0, 1).reshape(rows, -1, y.shape[-1])


def _softcap(scores: Array, cap: float) -> Array:
    return cap * np.tanh(scores / cap)


def attend(
    inputs: Inputs, attrs: Attrs, sees: Sees = sees_causal, cap_after_mask: bool = False, shift: bool = True
) -> Outputs:
    """The definition; the last three arguments exist for mutants."""
    q = inputs["q"]
    y = np.zeros_like(q)
    y[(inputs["seq_ids"] >= 0) & ~has_keys(inputs, attrs)] = np.nan
    for part in _sequences(inputs, attrs, sees):
        scores = (part.q @ part.k.swapaxes(1, 2)) * q.dtype.type(_scale(attrs, q.shape[2]))
        cap, n = attrs["softcap"], len(part.rows)
        if cap and not cap_after_mask:
            scores = _softcap(scores, cap)
        scores = np.where(part.visible, _by_query(scores, n), -np.inf)
        if cap and cap_after_mask:
            scores = _softcap(scores, cap)
        with np.errstate(over="ignore", invalid="ignore"):
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True) if shift else scores)
            weights /= weights.sum(axis=-1, keepdims=True)
            result = weights.reshape(part.q.shape[:2] + weights.shape[-1:]).astype(q.dtype, copy=False) @ part.v
        y[part.rows] = _ungroup(result, n)
    return {"y": y}


def reference(inputs: Inputs, attrs: Attrs) -> Outputs:
    return attend(inputs, attrs)


def _validate(signature: Signature) -> str | None:
    attrs, heads, kv_heads = signature.attrs, signature.tensors["q"].shape[1], signature.tensors["k_pages"].shape[1]
    if heads % kv_heads:
        return f"{heads} query heads are no multiple of {kv_heads} kv heads"
    if not 0 <= attrs["window"] < 2**31:
        return f"window is {attrs['window']}, expected 0 (none) to {2**31 - 1}"
    return None if attrs["softcap"] >= 0 else f"softcap is {attrs['softcap']}, expected 0 (none) or more"


def cost(signature: Signature) -> Cost:
    """At the most keys the tables can hold: how many there are is in the data, not in the signature."""
    tokens = signature.tensors["q"].shape[0]
    page_size = signature.tensors["k_pages"].shape[2]
    sequences, max_pages = signature.tensors["block_table"].shape
    keys = max_pages * page_size
    if signature.attrs["window"]:
        keys = min(keys, signature.attrs["window"])
    return _cost(signature, min(sequences, tokens) * keys, tokens * keys)


def data_cost(signature: Signature, inputs: Inputs) -> Cost:
    """At the keys that these queries see."""
    window, page_size = signature.attrs["window"], signature.tensors["k_pages"].shape[2]
    complete = has_keys(inputs, signature.attrs)
    seq_ids, positions = inputs["seq_ids"][complete], inputs["positions"][complete].astype(np.int64)
    first = _first_page(positions, page_size, signature.attrs) * page_size
    seen = np.minimum(positions + 1, window) if window else positions + 1
    stored = 0
    for seq in np.unique(seq_ids):
        rows = seq_ids == seq
        stored += int(positions[rows].max() + 1 - first[rows].min())
    return _cost(signature, stored, int(seen.sum()))


def _cost(signature: Signature, stored: int, seen: int) -> Cost:
    """Of a call that reads `stored` keys and their values, and whose queries see `seen` keys in all."""
    _, heads, head_dim = signature.tensors["q"].shape
    kv_heads = signature.tensors["k_pages"].shape[1]
    element = np.dtype(NUMPY_DTYPES[signature.tensors["k_pages"].dtype]).itemsize
    return Cost(
        2 * stored * kv_heads * head_dim * element
        + signature_bytes(signature, ("q", "block_table", "seq_ids", "positions", "y")),
        4 * seen * heads * head_dim,
    )


def error_bound(inputs: Inputs, attrs: Attrs, outputs: Outputs, numerics: Numerics) -> Outputs:
    """`numerics.depth` is the longer of the chains over head_dim (one score) and over keys (one output).

    An error d of a score is a relative error of about d of its weight. On top come exp itself, the rounding of its
    argument, and one rescaling of the running sums per step of the chain over keys (online softmax); weights that are
    off by a relative r_j move y = sum p_j v_j / sum p_j by at most sum p_j r_j (|v_j| + |y|).
    """
    inputs = fp64(inputs)
    function = 2 * numerics.function_ulp * U32
    cap, scale = attrs["softcap"], _scale(attrs, inputs["q"].shape[2])
    bound = np.zeros(outputs["y"].shape)
    for part in _sequences(inputs, attrs, sees_causal):
        n = len(part.rows)
        scores = _by_query((part.q @ part.k.swapaxes(1, 2)) * scale, n)
        size = _by_query((np.abs(part.q) @ np.abs(part.k).swapaxes(1, 2)) * scale, n)
        error = numerics.gamma(4) * size
        if cap:
            error += 2 * U32 * np.abs(scores)
            t = np.tanh(scores / cap)
            error = np.minimum(1.0, 1 - t * t + 2 * error / cap) * error + (function + 2 * U32) * cap * np.abs(t)
            scores = cap * t
        scores = np.where(part.visible, scores, -np.inf)
        top = scores.max(axis=-1, keepdims=True)
        weights = np.exp(scores - top)
        weights /= weights.sum(axis=-1, keepdims=True)
        finite = np.where(part.visible, scores, 0.0)
        error = np.where(part.visible, error + 2 * U32 * (np.abs(finite) + np.abs(top)) + function, 0.0)
        error += numerics.depth * (function + U32)
        off = (weights * error * (1 + error)).reshape(part.q.shape[0], -1, part.k.shape[1])
        size = weights.reshape(off.shape) @ np.abs(part.v)
        y = np.abs(outputs["y"][part.rows])
        moved = _ungroup(off @ np.abs(part.v), n) + _ungroup(off.sum(axis=-1, keepdims=True), n) * y
        bound[part.rows] = moved + numerics.gamma(4) * (_ungroup(size, n) + y) + 4 * U32 * y + 1e-30
    return {"y": bound}


def make_inputs(case: Case) -> dict[str, Any]:
    """Random queries of standard deviation `q` (default 6), so that logits are peaky; unused slots are stale.

    Rows are ordered by sequence and position, but not in a "shuffled" case. In a "lost" case some rows lack keys: the
    second sequence its first page, the third its second, and of the first sequence some rows have an id or a position
    that is none.
    """
    rng, d = rng_for(case), case.dims
    dtype = NUMPY_DTYPES[d.get("kv", "f16")]
    sequences, heads, kv_heads, head_dim, page_size = d["seqs"], d["H"], d["G"], d["D"], d["S"]
    batch = paged_batch(rng, sequences, page_size, d.get("pad", 0))
    shape = (page_count(sequences, page_size), kv_heads, page_size, head_dim)
    k_pages, v_pages = stale_pages(rng, shape, dtype), stale_pages(rng, shape, dtype)
    first = 0
    for keys, queries in sequences:
        slots = np.arange(keys)
        pages = batch["block_table"][batch["seq_ids"][first], slots // page_size]
        for cache in (k_pages, v_pages):
            cache[pages, :, slots % page_size] = rng.standard_normal((keys, kv_heads, head_dim))
        first += queries
    q = rng.standard_normal((len(batch["seq_ids"]), heads, head_dim)) * d.get("q", 6.0)
    if d.get("shuffled"):
        order = rng.permutation(len(q))
        batch.update({name: batch[name][order] for name in ("seq_ids", "positions")})
    if d.get("lost"):
        table, seq_ids, positions = batch["block_table"], batch["seq_ids"], batch["positions"]
        second, third = seq_ids[sequences[0][1]], seq_ids[-1]
        table[second, 0], table[third, 1] = -1, shape[0]
        seq_ids[1], positions[2], positions[3] = len(table), table.shape[1] * page_size, -1
    return {"q": q.astype(np.float32), "k_pages": k_pages, "v_pages": v_pages, **batch}


def _case(name: str, seqs: tuple[tuple[int, int], ...], attrs: Attrs | None = None, **dims: Any) -> Case:
    return Case(name, {"H": 6, "G": 2, "D": 64, "S": 16, "seqs": seqs, **dims}, attrs or {})


def _cases() -> tuple[Case, ...]:
    ragged = ((33, 1), (1, 1), (17, 1), (16, 1))
    cases = [
        _case("decode-first-token", ((1, 1),)),
        *(_case(f"decode-{keys}", ((keys, 1),)) for keys in (15, 16, 17)),
        _case("decode-ragged", ragged, pad=3),
        _case("decode-long", ((1025, 1),), H=4, D=32),
        _case("decode-flat", ((300, 1),), q=0.01),
        _case("decode-huge-logits", ragged, q=60.0),
        _case("prefill", ((19, 19),)),
        _case("prefill-shuffled", ((19, 12), (23, 7)), D=16, shuffled=True),
        _case("prefill-softcap", ((21, 12),), {"softcap": 20.0, "scale": 0.3}, D=16),
        _case("prefill-head-dim-20", ((19, 10), (9, 1)), H=4, D=20, kv="f32"),
        _case("prefill-chunk", ((40, 9), (5, 5), (23, 1)), pad=2),
        *(_case(f"gqa-{h}-{g}", ((21, 3),), H=h, G=g, D=16) for h, g in ((1, 1), (3, 3), (4, 2), (6, 2), (8, 2))),
        *(_case(f"head-dim-{d}", ((20, 2), (9, 1)), D=d, H=4) for d in (5, 80, 96, 128, 256)),
        *(_case(f"page-size-{s}", ((23, 3), (8, 1)), S=s, D=32) for s in (1, 5, 64)),
        _case("pages-f32", ragged, kv="f32"),
        _case("lost", ((20, 5), (20, 1), (20, 1)), S=8, D=16, lost=True),
        _case("lost-chunk", ((20, 9), (20, 7), (20, 7)), S=8, D=16, lost=True),
        *(
            _case(f"lost-window-{queries}", ((20, queries), (20, 1), (20, 1)), {"window": 4}, S=8, D=16, lost=True)
            for queries in (4, 9)
        ),
        _case("chunk-small", ((20, 9), (3, 3), (9, 1)), pad=2, H=3, G=1, D=16, S=8),
        _case("scale", ((23, 5),), {"scale": 0.05}, D=16),
        _case("scale-softcap", ((23, 5),), {"scale": 0.3, "softcap": 20.0}),
        _case("softcap-2", ((23, 5), (14, 1)), {"softcap": 2.0}, pad=1, H=2, G=1, D=32, S=8),
        _case("softcap-50", ((23, 5),), {"softcap": 50.0}, q=40.0, D=16),
    ]
    for window in (1, 22, 23, 24):
        cases.append(_case(f"window-{window}-of-23", ((23, 1),), {"window": window}, H=8))
    cases.append(_case("window-ragged", ((40, 12), (7, 7), (16, 1)), {"window": 7}, S=5, pad=1, D=16))
    cases.append(_case("window-shuffled", ((60, 40),), {"window": 4}, H=2, G=1, D=16, shuffled=True))
    cases.append(_case("window-softcap", ((70, 6),), {"window": 33, "softcap": 8.0, "scale": 0.2}))
    return tuple(cases)


def _last(p: Array, j: Array) -> Array:
    return np.maximum(p, j.max())


def _sees(visible: Callable[[Array, Array, int], Array]) -> Callable[[Inputs, Attrs], Outputs]:
    """A mutant whose mask is `visible(p, j, page_size)`."""

    def sees(p: Array, j: Array, inputs: Inputs, attrs: Attrs) -> Array:
        inside = j > p - attrs["window"] if attrs["window"] else np.bool_(True)
        return visible(p, j, inputs["k_pages"].shape[2]) & inside

    return lambda inputs, attrs: attend(inputs, attrs, sees)


def _clamped(inputs: dict[str, Any]) -> dict[str, Any]:
    """The nearest of what there is for whatever there is not."""
    pages, _, page_size, _ = inputs["k_pages"].shape
    sequences, max_pages = inputs["block_table"].shape
    return {
        "block_table": np.clip(inputs["block_table"], 0, pages - 1),
        "seq_ids": np.minimum(inputs["seq_ids"], sequences - 1),
        "positions": np.clip(inputs["positions"], 0, max_pages * page_size - 1),
    }


def _lost_is_zero(y: Array, inputs: Inputs) -> Array:
    return np.nan_to_num(y)


def _heads_modulo(inputs: Inputs, attrs: Attrs) -> Outputs:
    """Query head h served by kv head h % G."""
    heads = np.arange(inputs["q"].shape[1])
    order = np.argsort(heads % inputs["k_pages"].shape[1], kind="stable")
    y = np.empty_like(inputs["q"])
    y[:, order] = attend({**inputs, "q": inputs["q"][:, order]}, attrs)["y"]
    return {"y": y}


ATTENTION = Op(
    name="attention",
    doc="Causal softmax attention. The query at position p of sequence s sees keys 0..p of s, which are already in the "
    "cache: key j lies in slot j % S of page block_table[s, j // S]. `scale` 0 means D**-0.5; `softcap` c > 0 turns a "
    "scaled score s into c * tanh(s / c) before the mask; `window` W > 0 keeps the last W keys, p itself included. "
    "Query head h reads kv head h // (H / G). Rows with a seq_id below 0 are padding and give zeros. Table entries of "
    "pages that no query sees may be -1 or stale. A query that lacks keys gives NaN: its seq_id or position is outside "
    "the table, or a page outside the cache.",
    params=(
        Param("q", ("tokens", "heads", "head_dim")),
        Param("k_pages", ("pages", "kv_heads", "page_size", "head_dim"), dtypes=("f16", "f32")),
        Param("v_pages", ("pages", "kv_heads", "page_size", "head_dim"), dtypes=("f16", "f32")),
        Param("block_table", ("sequences", "max_pages"), dtypes=("i32",), values="pages"),
        Param("seq_ids", ("tokens",), dtypes=("i32",), values="seq_ids"),
        Param("positions", ("tokens",), dtypes=("i32",), values="positions"),
        Param("y", ("tokens", "heads", "head_dim"), "out"),
    ),
    attrs={"scale": 0.0, "softcap": 0.0, "window": 0},
    validate=_validate,
    splits=("tokens",),
    reference=reference,
    cost=cost,
    data_cost=data_cost,
    make_inputs=make_inputs,
    error_bound=error_bound,
    cases=_cases(),
    mutants=(
        Mutant("softcap_ignored", changed_attrs(reference, lambda a: {"softcap": 0.0})),
        Mutant("softcap_after_mask", lambda i, a: attend(i, a, cap_after_mask=True)),
        Mutant("scale_ignored", changed_attrs(reference, lambda a: {"scale": 0.0})),
        Mutant(
            "scale_5_percent_off",
            lambda i, a: attend(i, {**a, "scale": 1.05 * _scale(a, i["q"].shape[2])}),
        ),
        Mutant("window_ignored", changed_attrs(reference, lambda a: {"window": 0})),
        Mutant("window_one_too_wide", changed_attrs(reference, lambda a: {"window": a["window"] and a["window"] + 1})),
        Mutant("window_one_too_narrow", changed_attrs(reference, lambda a: {"window": max(a["window"] - 1, 0)})),
        Mutant("last_key_dropped", _sees(lambda p, j, s: j < np.maximum(p, 1))),
        Mutant("last_page_dropped", _sees(lambda p, j, s: (j < p // s * s) | ((p < s) & (j <= p)))),
        Mutant("first_key_dropped", _sees(lambda p, j, s: (j <= p) & (j > 0) | (j == p))),
        Mutant("mask_off_by_one", _sees(lambda p, j, s: j <= p + 1)),
        Mutant("mask_ignored", _sees(lambda p, j, s: j <= _last(p, j))),
        Mutant("max_not_subtracted", lambda i, a: attend(i, a, shift=False)),
        Mutant("kv_head_is_h_modulo_G", _heads_modulo),
        Mutant("block_table_ignored", changed_inputs(reference, table_ignored)),
        Mutant("all_rows_in_one_sequence", changed_inputs(reference, one_sequence)),
        Mutant("lost_keys_clamped", changed_inputs(reference, _clamped)),
        Mutant("lost_keys_give_zeros", changed_output(reference, "y", _lost_is_zero)),
        Mutant("padding_row_written", changed_inputs(reference, padding_taken)),
        Mutant(
            "k_and_v_swapped", changed_inputs(reference, lambda i: {"k_pages": i["v_pages"], "v_pages": i["k_pages"]})
        ),
        Mutant("pages_read_token_major", changed_inputs(reference, lambda i: {"k_pages": token_major(i["k_pages"])})),
        Mutant("last_element_zero", changed_output(reference, "y", last_element_zero)),
    ),
    required=True,
)
