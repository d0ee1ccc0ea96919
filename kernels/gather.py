"""gather: chosen rows of a matrix, so that only they take part in what follows (the last token of each sequence)."""

from __future__ import annotations

from typing import Any

import numpy as np

from .mutants import changed_inputs, changed_output, last_column_is_its_neighbour, last_row_is_its_neighbour
from .op import Attrs, Case, Cost, Inputs, Mutant, Numerics, Op, Outputs, Param, Signature, rng_for, signature_bytes


def reference(inputs: Inputs, attrs: Attrs) -> Outputs:
    x, rows = inputs["x"], inputs["rows"]
    known = (rows >= 0) & (rows < len(x))
    return {"y": np.where(known[:, None], x[np.where(known, rows, 0)], x.dtype.type(0))}


def cost(signature: Signature) -> Cost:
    return Cost(signature_bytes(signature, ("rows", "y", "y")), 0)


def error_bound(inputs: Inputs, attrs: Attrs, outputs: Outputs, numerics: Numerics) -> Outputs:
    return {"y": np.zeros((1, 1))}  # a copy


def make_inputs(case: Case) -> dict[str, Any]:
    rng, d = rng_for(case), case.dims
    rows = rng.integers(0, d["T"], d["R"])
    rows[-1] = d["T"] - 1
    if d.get("strange"):
        rows[0], rows[2], rows[3] = -1, d["T"], 2**31 - 1
    return {"x": rng.standard_normal((d["T"], d["K"]), dtype=np.float32), "rows": rows.astype(np.int32)}


GATHER = Op(
    name="gather",
    doc="y[r] = x[rows[r]]. A row number outside 0..T-1 (padding is -1) gives a row of zeros.",
    params=(
        Param("x", ("tokens", "features")),
        Param("rows", ("rows",), dtypes=("i32",), values="rows"),
        Param("y", ("rows", "features"), "out"),
    ),
    splits=("rows", "features"),
    reference=reference,
    cost=cost,
    make_inputs=make_inputs,
    error_bound=error_bound,
    cases=(
        *(
            Case(f"{t}-to-{r}x{k}", {"T": t, "R": r, "K": k})
            for t, r, k in ((1, 1, 1), (5, 1, 123), (17, 5, 64), (3, 9, 5), (33, 2, 576))
        ),
        Case("strange-rows", {"T": 6, "R": 6, "K": 33, "strange": True}),
    ),
    mutants=(
        Mutant("row_off_by_one", changed_inputs(reference, lambda i: {"rows": np.maximum(i["rows"] - 1, 0)})),
        Mutant(
            "strange_rows_clamped",
            changed_inputs(reference, lambda i: {"rows": np.clip(i["rows"], 0, len(i["x"]) - 1)}),
        ),
        Mutant("strange_rows_wrapped", changed_inputs(reference, lambda i: {"rows": i["rows"] % len(i["x"])})),
        Mutant("first_rows_copied", changed_inputs(reference, lambda i: {"rows": np.arange(len(i["rows"]))})),
        Mutant("last_column_is_its_neighbour", changed_output(reference, "y", last_column_is_its_neighbour)),
        Mutant("last_row_is_its_neighbour", changed_output(reference, "y", last_row_is_its_neighbour)),
    ),
)
