"""kv_append: new keys and values written to their slots of the paged cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from .mutants import changed_inputs, changed_output, one_sequence, padding_taken, table_ignored, token_major
from .op import (
    NUMPY_DTYPES,
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
    rng_for,
    signature_bytes,
)
from .quant import Array
from .testdata import page_count, paged_batch, stale_pages


def slots(inputs: Inputs) -> tuple[Array, Array, Array]:
    """(rows, pages, slots) of the tokens that are stored: those for which there is a slot."""
    table, seq_ids, positions = inputs["block_table"], inputs["seq_ids"], inputs["positions"]
    pages, _, page_size, _ = inputs["k_pages"].shape
    known = (seq_ids >= 0) & (seq_ids < len(table)) & (positions >= 0) & (positions < table.shape[1] * page_size)
    page = table[np.where(known, seq_ids, 0), np.where(known, positions // page_size, 0)]
    rows = np.flatnonzero(known & (page >= 0) & (page < pages))
    return rows, page[rows], positions[rows] % page_size


def append(inputs: Inputs, name: str, values: Array) -> Array:
    """A copy of the pages `name` with `values` [T, G, D] in their slots, rounded to the dtype of the pages."""
    rows, pages, slot = slots(inputs)
    cache = inputs[name].copy()
    cache[pages, :, slot] = values[rows]
    return cache


def reference(inputs: Inputs, attrs: Attrs) -> Outputs:
    return {"k_pages": append(inputs, "k_pages", inputs["k"]), "v_pages": append(inputs, "v_pages", inputs["v"])}


def cost(signature: Signature) -> Cost:
    read = signature_bytes(signature, ("k", "v", "block_table", "seq_ids", "positions"))
    element = np.dtype(NUMPY_DTYPES[signature.tensors["k_pages"].dtype]).itemsize
    return Cost(read + 2 * int(np.prod(signature.tensors["k"].shape)) * element, 0)


def stored_bound(inputs: Inputs, name: str, values: Array, error: Array | float = 0.0) -> Array:
    """Largest error of the pages `name` after `append`, where `values` [T, G, D] may be off by `error`.

    The float64 reference stores values unrounded, so float16 pages may be off by half a unit in the last place
    (2**-11, or half a step of a subnormal). Widened to float64 they are told by holding nothing but float16 numbers.
    Slots nobody writes must stay bit-identical.
    """
    cache, rows = inputs[name], slots(inputs)
    with np.errstate(over="ignore"):
        half = bool(np.all(cache == cache.astype(np.float16)))
    size = np.abs(values.astype(np.float64)) + error
    bound = np.zeros(cache.shape)
    off = np.broadcast_to(error + (np.maximum(2.0**-11 * size, 2.0**-25) if half else 0.0), size.shape)
    bound[rows[1], :, rows[2]] = off[rows[0]]
    return bound


def error_bound(inputs: Inputs, attrs: Attrs, outputs: Outputs, numerics: Numerics) -> Outputs:
    return {
        "k_pages": stored_bound(inputs, "k_pages", inputs["k"]),
        "v_pages": stored_bound(inputs, "v_pages", inputs["v"]),
    }


def make_pages(rng: np.random.Generator, case: Case) -> dict[str, Array]:
    """Batch and pages of a case with dims seqs, pad, S (page size), G, D, kv (dtype of the pages).

    A case with `beyond` has one more row of the first sequence, at the first position its table cannot hold. A case
    with `lost` has a row of a sequence that there is not, and the last page of two sequences is none of the cache.
    """
    d = case.dims
    batch = paged_batch(rng, d["seqs"], d["S"], d.get("pad", 0))
    if d.get("beyond"):
        end = batch["block_table"].shape[1] * d["S"]
        batch["seq_ids"] = np.insert(batch["seq_ids"], d["seqs"][0][1], batch["seq_ids"][0])
        batch["positions"] = np.insert(batch["positions"], d["seqs"][0][1], end).astype(np.int32)
    dtype = NUMPY_DTYPES[d.get("kv", "f16")]
    shape = (page_count(d["seqs"], d["S"]), d["G"], d["S"], d["D"])
    if d.get("lost"):
        table, (keys, queries) = batch["block_table"], d["seqs"][0]
        table[batch["seq_ids"][0], (keys - 1) // d["S"]] = -1
        table[batch["seq_ids"][-1], (d["seqs"][-1][0] - 1) // d["S"]] = shape[0]
        batch["seq_ids"][queries] = len(table)
    return {**batch, "k_pages": stale_pages(rng, shape, dtype), "v_pages": stale_pages(rng, shape, dtype)}


def make_inputs(case: Case) -> dict[str, Any]:
    rng, d = rng_for(case), case.dims
    pages = make_pages(rng, case)
    k, v = rng.standard_normal((2, len(pages["seq_ids"]), d["G"], d["D"]), dtype=np.float32)
    v[0, 0, :2] = 3e-6, 1e-7  # a subnormal float16, and one that is a step or nothing
    return {"k": k, "v": v, **pages}


BATCHES = (
    ("decode-first-token", ((1, 1),), {}),
    ("decode-15", ((15, 1),), {}),
    ("decode-16", ((16, 1),), {}),
    ("decode-17", ((17, 1),), {}),
    ("decode-ragged", ((33, 1), (1, 1), (17, 1), (16, 1)), {"pad": 3}),
    ("prefill", ((40, 40),), {}),
    ("prefill-chunk", ((40, 9), (5, 5), (23, 1)), {"pad": 2, "G": 3}),
    ("page-size-1", ((3, 3), (2, 1)), {"S": 1, "D": 6}),
    ("page-size-5", ((13, 7), (5, 2)), {"S": 5, "D": 80, "pad": 1}),
    ("pages-f32", ((20, 5), (9, 1)), {"kv": "f32", "pad": 1}),
    ("beyond-the-table", ((6, 2), (5, 1)), {"S": 4, "beyond": True}),
    ("lost", ((6, 3), (5, 2), (7, 4)), {"S": 4, "D": 16, "lost": True}),
)


def _truncated(inputs: Inputs, attrs: Attrs) -> Outputs:
    """Values cut to float16 instead of rounded."""
    if inputs["k_pages"].dtype != np.float16:
        return reference(inputs, attrs)

    def cut(x: Array) -> Array:
        half = x.astype(np.float16)
        return np.where(np.abs(half.astype(x.dtype)) > np.abs(x), np.nextafter(half, np.float16(0)), half)

    return reference({**inputs, "k": cut(inputs["k"]), "v": cut(inputs["v"])}, attrs)


def _clamped(inputs: dict[str, Any]) -> dict[str, Any]:
    end = inputs["block_table"].shape[1] * inputs["k_pages"].shape[2]
    return {"positions": np.minimum(inputs["positions"], end - 1)}


def lost_wrapped(inputs: dict[str, Any]) -> dict[str, Any]:
    """Pages counted from the end, or anew."""
    return {"block_table": inputs["block_table"] % len(inputs["k_pages"])}


def unknown_sequence_is_last(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"seq_ids": np.minimum(inputs["seq_ids"], len(inputs["block_table"]) - 1)}


def slot_off_by_one(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"positions": np.maximum(inputs["positions"] - 1, -1)}


def _token_major(inputs: Inputs, attrs: Attrs) -> Outputs:
    """Pages [P, G, S, D] written as if they were [P, S, G, D]."""
    cache = inputs["k_pages"]
    wrong = reference({**inputs, "k_pages": token_major(cache)}, attrs)
    return {**wrong, "k_pages": wrong["k_pages"].swapaxes(1, 2).reshape(cache.shape)}


KV_APPEND = Op(
    name="kv_append",
    doc="k[t], v[t] into slot positions[t] % S of page block_table[seq_ids[t], positions[t] // S], rounded to nearest "
    "even where pages are f16. Rows without a slot are skipped: a seq_id (-1 for padding) or position outside the "
    "table, a page outside the cache. Other slots stay. No two rows have the same slot.",
    params=(
        Param("k", ("tokens", "kv_heads", "head_dim")),
        Param("v", ("tokens", "kv_heads", "head_dim")),
        Param("block_table", ("sequences", "max_pages"), dtypes=("i32",), values="pages"),
        Param("seq_ids", ("tokens",), dtypes=("i32",), values="seq_ids"),
        Param("positions", ("tokens",), dtypes=("i32",), values="positions"),
        Param("k_pages", ("pages", "kv_heads", "page_size", "head_dim"), "inout", dtypes=("f16", "f32")),
        Param("v_pages", ("pages", "kv_heads", "page_size", "head_dim"), "inout", dtypes=("f16", "f32")),
    ),
    splits=("kv_heads",),
    reference=reference,
    cost=cost,
    make_inputs=make_inputs,
    error_bound=error_bound,
    cases=tuple(Case(name, {"S": 16, "G": 2, "D": 64, "seqs": seqs, **dims}) for name, seqs, dims in BATCHES),
    mutants=(
        Mutant("k_and_v_swapped", changed_inputs(reference, lambda i: {"k": i["v"], "v": i["k"]})),
        Mutant("slot_off_by_one", changed_inputs(reference, slot_off_by_one)),
        Mutant("block_table_ignored", changed_inputs(reference, table_ignored)),
        Mutant("padding_row_written", changed_inputs(reference, padding_taken)),
        Mutant("all_rows_in_one_sequence", changed_inputs(reference, one_sequence)),
        Mutant("beyond_the_table_clamped", changed_inputs(reference, _clamped)),
        Mutant("lost_page_wrapped", changed_inputs(reference, lost_wrapped)),
        Mutant("unknown_sequence_is_last", changed_inputs(reference, unknown_sequence_is_last)),
        Mutant("truncated_to_f16", _truncated),
        Mutant("pages_written_token_major", _token_major),
        Mutant("v_not_written", changed_output(reference, "v_pages", lambda pages, i: i["v_pages"])),
        Mutant(
            "other_slots_cleared",
            changed_output(reference, "k_pages", lambda pages, i: np.where(pages == i["k_pages"], 0, pages)),
        ),
    ),
)
