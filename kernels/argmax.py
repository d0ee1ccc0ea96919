"""argmax: the most likely token of each row, by a rule without freedom: greedy decoding is the same everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np

from .mutants import changed_inputs, changed_output, last_row_is_its_neighbour
from .op import Attrs, Case, Cost, Inputs, Mutant, Numerics, Op, Outputs, Param, Signature, rng_for, signature_bytes
from .quant import Array


def greedy(x: Array) -> Array:
    """Index of the largest number of each row, the lowest of several, i32 [T]; NaN counts as -inf."""
    return np.argmax(np.where(np.isnan(x), -np.inf, x), axis=1).astype(np.int32)


def reference(inputs: Inputs, attrs: Attrs) -> Outputs:
    return {"ids": greedy(inputs["x"])}


def cost(signature: Signature) -> Cost:
    tokens, vocab = signature.tensors["x"].shape
    return Cost(signature_bytes(signature, ("x", "ids")), tokens * vocab)


def error_bound(inputs: Inputs, attrs: Attrs, outputs: Outputs, numerics: Numerics) -> Outputs:
    return {"ids": np.zeros(1)}


def make_inputs(case: Case) -> dict[str, Any]:
    """ "ties": few different values; "negative": nothing above zero; "nan": NaN among them, the second row all NaN and
    the third all -inf; "last": the largest is the last, in the first row, and the first, in the second."""
    rng, d = rng_for(case), case.dims
    shape = (d["T"], d["V"])
    x = rng.standard_normal(shape, dtype=np.float32)
    if case.fill == "ties":
        x = rng.integers(-3, 4, shape).astype(np.float32)
    elif case.fill == "negative":
        x = -np.abs(x) - 1
    elif case.fill == "nan":
        x[rng.random(shape) < 0.3] = np.nan
        x[1], x[2] = np.nan, -np.inf
        x[3, 0] = np.nan
    elif case.fill == "last":
        x[0, -1] = x[1, 0] = 9.0
    return {"x": x}


def _ties_high(inputs: Inputs, attrs: Attrs) -> Outputs:
    x = inputs["x"]
    return {"ids": (x.shape[1] - 1 - greedy(x[:, ::-1])).astype(np.int32)}


def _nan_wins(inputs: Inputs, attrs: Attrs) -> Outputs:
    return {"ids": np.argmax(inputs["x"], axis=1).astype(np.int32)}


def _starts_at_zero(inputs: Inputs, attrs: Attrs) -> Outputs:
    """The running best starts at 0.0 and index 0."""
    x = np.nan_to_num(inputs["x"], nan=-np.inf)
    return {"ids": np.where(x.max(axis=1) > 0, greedy(x), 0).astype(np.int32)}


def _tail_dropped(inputs: Inputs, attrs: Attrs) -> Outputs:
    """Only whole groups of four are looked at."""
    x = inputs["x"]
    return {"ids": greedy(x[:, : max(4, x.shape[1] // 4 * 4)])}


ARGMAX = Op(
    name="argmax",
    doc="ids[t] = index of the largest x[t]; the lowest index wins ties, NaN never wins, and a row of nothing but NaN "
    "and -inf gives 0.",
    params=(Param("x", ("tokens", "vocab")), Param("ids", ("tokens",), "out", dtypes=("i32",))),
    splits=("tokens",),
    reference=reference,
    cost=cost,
    make_inputs=make_inputs,
    error_bound=error_bound,
    cases=(
        *(Case(f"{t}x{v}", {"T": t, "V": v}) for t, v in ((1, 1), (1, 5), (5, 123), (3, 64), (2, 1000), (1, 49157))),
        *(
            Case(f"{fill}-{t}x{v}", {"T": t, "V": v}, {}, fill)
            for fill in ("ties", "negative", "nan", "last")
            for t, v in ((5, 123), (4, 4099))
        ),
    ),
    mutants=(
        Mutant("ties_broken_high", _ties_high),
        Mutant("nan_wins", _nan_wins),
        Mutant("starts_at_zero", _starts_at_zero),
        Mutant("tail_dropped", _tail_dropped),
        Mutant("largest_magnitude", changed_inputs(reference, lambda i: {"x": np.abs(i["x"])})),
        Mutant("smallest", changed_inputs(reference, lambda i: {"x": -i["x"]})),
        Mutant("last_row_is_its_neighbour", changed_output(reference, "ids", last_row_is_its_neighbour)),
    ),
)
