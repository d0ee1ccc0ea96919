"""Building blocks of mutants: the reference with a changed input, attribute or result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .op import Attrs, Inputs, Outputs, Reference
from .quant import Array

Run = Callable[[Inputs, Attrs], Outputs]


def changed_inputs(reference: Reference, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Run:
    """The reference on inputs replaced by what `change(inputs)` returns; the other inputs stay."""
    return lambda inputs, attrs: reference({**inputs, **change(dict(inputs))}, attrs)


def changed_attrs(reference: Reference, change: Callable[[Attrs], dict[str, Any]]) -> Run:
    """The reference with attributes replaced by what `change(attrs)` returns; the other attributes stay."""
    return lambda inputs, attrs: reference(inputs, {**attrs, **change(attrs)})


def changed_output(reference: Reference, name: str, change: Callable[[Array, Inputs], Any]) -> Run:
    """The reference with output `name` replaced: `change(copy, inputs)` edits the copy, or returns another array."""

    def run(inputs: Inputs, attrs: Attrs) -> Outputs:
        outputs = reference(inputs, attrs)
        copy = outputs[name].copy()
        edited = change(copy, inputs)
        return {**outputs, name: copy if edited is None else edited}

    return run


def last_row_is_its_neighbour(y: Array, inputs: Inputs) -> None:
    y[-1] = y[max(0, len(y) - 2)]


def last_column_is_its_neighbour(y: Array, inputs: Inputs) -> None:
    y[:, -1] = y[:, max(0, y.shape[1] - 2)]


def last_element_zero(y: Array, inputs: Inputs) -> None:
    y[(-1,) * y.ndim] = 0


# Mistakes of paged, ragged batches (see testdata.paged_batch): changes for `changed_inputs`.


def table_ignored(inputs: dict[str, Any]) -> dict[str, Any]:
    """Page i of every sequence is page i of the cache."""
    table = inputs["block_table"]
    rows = np.arange(table.shape[1], dtype=np.int32) % inputs["k_pages"].shape[0]
    return {"block_table": np.broadcast_to(rows, table.shape)}


def padding_taken(inputs: dict[str, Any]) -> dict[str, Any]:
    """Padding rows handled as rows of the first row's sequence."""
    seq_ids = inputs["seq_ids"]
    return {
        "seq_ids": np.where(seq_ids < 0, seq_ids[0], seq_ids),
        "positions": np.maximum(inputs["positions"], 0),
    }


def one_sequence(inputs: dict[str, Any]) -> dict[str, Any]:
    """Every row taken for one of the first row's sequence."""
    seq_ids = inputs["seq_ids"]
    keys = inputs["positions"][seq_ids == seq_ids[0]].max()
    return {
        "seq_ids": np.where(seq_ids >= 0, seq_ids[0], -1),
        "positions": np.minimum(inputs["positions"], keys),
    }


def token_major(cache: Array) -> Array:
    """Pages [P, G, S, D] read as if they were [P, S, G, D]."""
    pages, kv_heads, page_size, head_dim = cache.shape
    return cache.reshape(pages, page_size, kv_heads, head_dim).swapaxes(1, 2)
