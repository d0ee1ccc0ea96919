"""sample: one token per row, drawn from its logits with a counter-based generator.

The random number depends on (seed, counter) alone, so a row draws the same token in any batch and on any device, but
for draws that fall within rounding of the border between two tokens; `check` says which ids such rounding allows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .argmax import greedy
from .mutants import changed_inputs, changed_output
from .op import (
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
    rng_for,
    signature_bytes,
)
from .quant import Array

TEMPERATURE, TOP_K, TOP_P, MIN_P = range(4)  # columns of `params`


def philox4x32(counter: Array, key: Array, rounds: int = 10) -> Array:
    """Philox 4x32: u32 [n, 4] from counters u32 [n, 4] and keys u32 [n, 2] (Salmon et al., SC'11,
    doi 10.1145/2063384.2063405; multipliers and Weyl constants: table 2)."""
    c = [counter[:, i].astype(np.uint64) for i in range(4)]
    k = [key[:, i].astype(np.uint64) for i in range(2)]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(rounds):
        first, second = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(second >> np.uint64(32)) ^ c[1] ^ k[0], second & low, (first >> np.uint64(32)) ^ c[3] ^ k[1], first & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return np.stack(c, axis=1).astype(np.uint32)


def uniform(rng: Array, word: int = 0, rounds: int = 10) -> Array:
    """float64 [T] in [0, 1), a multiple of 2**-24, from (seed, counter) u32 [T, 2]."""
    zero = np.zeros(len(rng), np.uint32)
    words = philox4x32(np.stack([rng[:, 1], zero, zero, zero], 1), np.stack([rng[:, 0], zero], 1), rounds)
    return (words[:, word] >> np.uint32(8)) * 2.0**-24


def _is_greedy(x: Array, temperature: float) -> bool:
    return not (0 < temperature < np.inf and np.isfinite(x.max(initial=-np.inf)))


def _count(top_k: float) -> int:
    """top_k as a number of tokens, 0 for none: what float32 holds may also be a fraction, infinite or NaN."""
    return int(np.nan_to_num(top_k, nan=0.0, posinf=0.0, neginf=0.0))


def _masses(x: Array, temperature: float) -> Array:
    """Unnormalised probabilities of a row of logits [V], the largest being 1; float64."""
    return np.exp((x - x.max()) / temperature)


def _top_k(mass: Array, x: Array, k: int) -> Array:
    if not 0 < k < len(x):
        return mass
    return np.where(x >= np.partition(x, len(x) - k)[len(x) - k], mass, 0.0)


def _top_p(mass: Array, share: float) -> Array:
    """Token i stays if those more likely than it do not yet hold `share` of all mass; the most likely always stays."""
    if share >= 1:
        return mass
    order = np.sort(mass)[::-1]
    last = int(np.searchsorted(np.cumsum(order), share * order.sum()))
    return np.where(mass >= order[min(last, len(order) - 1)], mass, 0.0)


def _min_p(mass: Array, share: float) -> Array:
    return np.where(mass >= min(share, 1.0) * mass.max(), mass, 0.0) if share > 0 else mass


def keep(x: Array, params: Array) -> Array:
    """Masses [V] of the tokens that may be drawn, 0 for the others."""
    mass = _top_k(_masses(x, params[TEMPERATURE]), x, _count(params[TOP_K]))
    return _min_p(_top_p(mass, params[TOP_P]), params[MIN_P])


def _walk(mass: Array, u: float) -> int:
    reached = np.cumsum(mass)
    hit = np.flatnonzero((reached > u * reached[-1]) & (mass > 0))
    return int(hit[0]) if len(hit) else int(np.flatnonzero(mass)[-1])


def _run(
    inputs: Inputs,
    keep: Callable[[Array, Array], Array] = keep,
    draw: Callable[[Array], Array] = uniform,
    walk: Callable[[Array, float], int] = _walk,
) -> Outputs:
    """The definition, in float64 whatever the inputs: a sum over the vocabulary in float32 would blur the borders."""
    x = np.where(np.isnan(inputs["x"]), -np.inf, inputs["x"]).astype(np.float64)
    params, rng = inputs["params"].astype(np.float64), inputs["rng"]
    ids, numbers = greedy(x), draw(rng)
    for t in range(len(x)):
        if not _is_greedy(x[t], params[t, TEMPERATURE]):
            ids[t] = walk(keep(x[t], params[t]), numbers[t])
    advanced = rng.copy()
    advanced[:, 1] += np.uint32(1)
    return {"ids": ids, "rng": advanced}


def reference(inputs: Inputs, attrs: Attrs) -> Outputs:
    return _run(inputs)


def cost(signature: Signature) -> Cost:
    tokens, vocab = signature.tensors["x"].shape
    return Cost(signature_bytes(signature, ("x", "params", "rng", "rng", "ids")), 4 * tokens * vocab)


def error_bound(inputs: Inputs, attrs: Attrs, outputs: Outputs, numerics: Numerics) -> Outputs:
    return {"ids": np.zeros(1), "rng": np.zeros((1, 1))}


def _allowed(x: Array, params: Array, numerics: Numerics) -> tuple[Array, Array, Array, float]:
    """(masses, certainly kept, possibly kept, relative error of a share) of a row, for the given arithmetic.

    A mass is off by exp's own error and that of its argument; tokens of less than exp(-40) count for nothing. Sums are
    off by gamma(depth). Thresholds are compared with masses moved by that much towards and away from them.
    """
    temperature, k, top_p, min_p = params[TEMPERATURE], _count(params[TOP_K]), params[TOP_P], params[MIN_P]
    mass = _masses(x, temperature)
    off = (2 * numerics.function_ulp + 6 * (2 * abs(x.max()) / temperature + 40) + 2) * U32
    near = (1 - off) / (1 + off)
    total_off = 2 * off + 2 * numerics.gamma(2)
    sure = _top_k(mass, x, k) > 0
    possible = mass >= mass[sure].min(initial=np.inf) * near
    if top_p < 1:

        def above(kept: Array, limit: Array, side: Any) -> Array:
            """Mass of the kept tokens beyond each limit."""
            order = np.sort(mass[kept])
            return order.sum() - np.append(0.0, np.cumsum(order))[np.searchsorted(order, limit, side)]

        _, group, sizes = np.unique(mass, return_inverse=True, return_counts=True)
        most = above(possible, mass * near, "left") - mass * sizes[group]
        least = above(sure, mass / near, "right")
        is_top = mass == 1
        sure_p = most * (1 + total_off) < top_p * mass[sure].sum() * (1 - total_off)
        possible_p = least * (1 - total_off) < top_p * mass[possible].sum() * (1 + total_off)
        sure, possible = sure & (sure_p | is_top), possible & (possible_p | is_top)
    if min_p > 0:
        sure, possible = sure & (mass * near >= min(min_p, near)), possible & (mass >= min(min_p, 1.0) * near)
    return mass, sure & (mass > 0), possible & (mass > 0), total_off


def check(inputs: Inputs, attrs: Attrs, expected: Outputs, got: Outputs, numerics: Numerics) -> str | None:
    """Whether each id is one that correct arithmetic may draw: possibly kept, and its share of the mass contains u.

    The share of the tokens before it is smallest with the certain ones before and all possible ones behind, and the
    other way round; rounding widens both ends.
    """
    if not np.array_equal(got["rng"], expected["rng"]):
        row = int(np.flatnonzero((got["rng"] != expected["rng"]).any(axis=1))[0])
        return f"rng[{row}] is {got['rng'][row].tolist()}, expected {expected['rng'][row].tolist()}"
    x = np.where(np.isnan(inputs["x"]), -np.inf, inputs["x"]).astype(np.float64)
    params, numbers = inputs["params"].astype(np.float64), uniform(inputs["rng"])
    for t, token in enumerate(got["ids"].tolist()):
        if token == expected["ids"][t]:
            continue
        wrong = f"ids[{t}] is {token}, expected {expected['ids'][t]}"
        if _is_greedy(x[t], params[t, TEMPERATURE]):
            return f"{wrong} (greedy)"
        if not 0 <= token < x.shape[1]:
            return f"{wrong}: not in the vocabulary"
        mass, sure, possible, off = _allowed(x[t], params[t], numerics)
        if not possible[token]:
            return f"{wrong}: removed by top_k, top_p or min_p"
        before = np.arange(len(mass)) < token
        behind = np.arange(len(mass)) > token
        least, most = mass[before & sure].sum(), mass[before & possible].sum()
        start = least / (least + mass[token] + mass[behind & possible].sum())
        end = (most + mass[token]) / (most + mass[token] + mass[behind & sure].sum())
        if not start - off <= numbers[t] <= end + off:
            return f"{wrong}: u {numbers[t]:.7f} is outside its share {start:.7f}..{end:.7f}"
    return None


def make_inputs(case: Case) -> dict[str, Any]:
    """Every row has its own seed and counter (the largest among them); dims `params` is one row for all, or several
    that take turns. "ties": few different logits; "masked": NaN and -inf among them, one row all -inf."""
    rng, d = rng_for(case), case.dims
    x = rng.standard_normal((d["T"], d["V"])) * 2
    if case.fill == "ties":
        x = rng.integers(-2, 3, x.shape)
    elif case.fill == "masked":
        x[rng.random(x.shape) < 0.5] = -np.inf
        x[rng.random(x.shape) < 0.1] = np.nan
        x[1], x[2, 5] = -np.inf, np.inf
    rows = np.array(d["params"], np.float32).reshape(-1, 4)
    state = rng.integers(0, 2**32, (d["T"], 2), dtype=np.uint32)
    state[0, 1], state[-1, 1] = 0, 2**32 - 1
    return {
        "x": x.astype(np.float32),
        "params": rows[np.arange(d["T"]) % len(rows)],
        "rng": state,
    }


def _case(name: str, params: Any, t: int = 24, v: int = 123, fill: str = "normal") -> Case:
    return Case(name, {"T": t, "V": v, "params": params}, {}, fill)


_MIXED = ((0.0, 0, 1.0, 0.0), (0.7, 0, 1.0, 0.0), (1.0, 7, 0.9, 0.05), (1.5, 40, 1.0, 0.1), (1.0, 0, 0.5, 0.0))


# What a caller should not give, and a kernel must not trip over.
_STRANGE = (
    (1.0, 0.5, 1.0, 0.0), (1.0, 2.5, 1.0, 0.0), (1.0, -3, 1.0, 0.0), (1.0, np.inf, 1.0, 0.0), (1.0, np.nan, 1.0, 0.0),
    (1.0, 0, -1.0, 0.0), (1.0, 0, np.nan, 0.0), (1.0, 0, 2.0, 0.0), (1.0, 0, 1.0, 7.0), (1.0, 0, 1.0, np.nan),
    (np.nan, 0, 1.0, 0.0), (np.inf, 0, 1.0, 0.0), (-1.0, 0, 1.0, 0.0), (1e-38, 0, 1.0, 0.0),
)  # fmt: skip


def _cases() -> tuple[Case, ...]:
    return (
        _case("plain", (1.0, 0, 1.0, 0.0)),
        _case("greedy", (0.0, 40, 0.9, 0.1), 5),
        _case("greedy-ties", (0.0, 0, 1.0, 0.0), 5, fill="ties"),
        *(_case(f"temperature-{temp}", (temp, 0, 1.0, 0.0)) for temp in (0.01, 0.6, 2.5)),
        *(_case(f"top-k-{k}", (1.0, k, 1.0, 0.0)) for k in (1, 2, 10, 123, 1000)),
        *(_case(f"top-p-{p}", (1.0, 0, p, 0.0)) for p in (0.0, 0.1, 0.5, 0.95)),
        *(_case(f"min-p-{p}", (1.0, 0, 1.0, p)) for p in (0.02, 0.3, 1.0)),
        _case("top-k-top-p", (1.0, 5, 0.6, 0.0)),
        _case("top-p-min-p", (1.5, 0, 0.8, 0.1)),
        _case("all", (0.8, 40, 0.95, 0.05)),
        _case("ties", (1.0, 30, 0.7, 0.0), fill="ties"),
        _case("top-p-0-ties", (1.0, 0, 0.0, 0.0), fill="ties"),
        _case("strange-params", _STRANGE, 2 * len(_STRANGE), fill="ties"),
        _case("masked", (1.0, 20, 0.9, 0.02), fill="masked"),
        _case("mixed-rows", _MIXED, 20),
        *(_case(f"mixed-{t}x{v}", _MIXED[2:], t, v) for t, v in ((1, 1), (3, 5), (5, 1000), (3, 4099), (1, 49157))),
    )


def _with_params(change: Callable[[Array], Any]) -> Callable[[Inputs, Attrs], Outputs]:
    """The reference with columns of a copy of `params` edited in place."""

    def edited(inputs: dict[str, Any]) -> dict[str, Any]:
        params = inputs["params"].copy()
        change(params)
        return {"params": params}

    return changed_inputs(reference, edited)


def _column(index: int, change: Callable[[Array], Any]) -> Callable[[Inputs, Attrs], Outputs]:
    def edit(params: Array) -> None:
        params[:, index] = change(params[:, index])

    return _with_params(edit)


def _top_p_of_everything(x: Array, params: Array) -> Array:
    """top_p's share taken of all mass instead of what top_k left."""
    everything = _masses(x, params[TEMPERATURE])
    mass = np.minimum(_top_p(everything, params[TOP_P]), _top_k(everything, x, _count(params[TOP_K])))
    return _min_p(mass, params[MIN_P])


def _top_p_border_dropped(x: Array, params: Array) -> Array:
    """The largest set whose share is at most top_p, instead of the smallest whose share is at least that."""
    mass = keep(x, params)
    if params[TOP_P] >= 1:
        return mass
    least = mass[mass > 0].min()
    return np.where((mass > least) | (mass == mass.max()), mass, 0.0)


def _min_p_of_total(x: Array, params: Array) -> Array:
    """min_p as a share of all mass."""
    mass = keep(x, np.array([*params[:3], 0.0]))
    return np.where((mass >= params[MIN_P] * mass.sum()) | (mass == mass.max()), mass, 0.0)


def _walk_backwards(mass: Array, u: float) -> int:
    return len(mass) - 1 - _walk(mass[::-1], u)


def _zeroed(column: int) -> Callable[[Array], Array]:
    return lambda rng: uniform(np.where(np.arange(2) == column, np.uint32(0), rng))


SAMPLE = Op(
    name="sample",
    doc="ids[t] drawn from softmax(x[t] / temperature); params[t] is (temperature, top_k, top_p, min_p), rng[t] (seed, "
    "counter). A temperature that is not above 0 and finite, or a row whose largest logit is not finite: argmax (NaN "
    "counts as -inf). Tokens kept: top_k >= 1: those whose logit is at least the k-th largest, k the whole part of "
    "top_k; then top_p < 1: the smallest set {p >= threshold} of these with at least top_p of their mass; then min_p > "
    "0: those with p >= min_p times the largest. The most likely token always stays. u = philox4x32-10(counter "
    "(counter, 0, 0, 0), key (seed, 0))[0] >> 8, times 2**-24; the token is the first, in order of ids, at which the "
    "kept mass so far exceeds u times all kept mass (the last kept one if rounding leaves none). Every row's counter "
    "goes up by one.",
    params=(
        Param("x", ("tokens", "vocab")),
        Param("params", ("tokens", "4"), values="sampling"),
        Param("rng", ("tokens", "2"), "inout", dtypes=("u32",), values="seeds"),
        Param("ids", ("tokens",), "out", dtypes=("i32",)),
    ),
    splits=("tokens",),
    reference=reference,
    cost=cost,
    make_inputs=make_inputs,
    error_bound=error_bound,
    check=check,
    cases=_cases(),
    mutants=(
        Mutant("temperature_ignored", _column(TEMPERATURE, np.sign)),
        Mutant("temperature_multiplied", _column(TEMPERATURE, lambda t: np.where(t > 0, 1 / np.maximum(t, 1e-9), t))),
        Mutant("greedy_ignored", _column(TEMPERATURE, lambda t: np.where(t > 0, t, 1))),
        Mutant("always_greedy", _column(TEMPERATURE, lambda t: 0)),
        Mutant("top_k_ignored", _column(TOP_K, lambda k: 0)),
        Mutant("top_k_one_too_many", _column(TOP_K, lambda k: np.where(k > 0, k + 1, k))),
        Mutant("top_k_one_too_few", _column(TOP_K, lambda k: np.where(k > 1, k - 1, k))),
        Mutant("top_p_ignored", _column(TOP_P, lambda p: 1)),
        Mutant("top_p_of_all_mass", lambda i, a: _run(i, keep=_top_p_of_everything)),
        Mutant("top_p_border_dropped", lambda i, a: _run(i, keep=_top_p_border_dropped)),
        Mutant("min_p_ignored", _column(MIN_P, lambda p: 0)),
        Mutant("min_p_of_all_mass", lambda i, a: _run(i, keep=_min_p_of_total)),
        Mutant("params_of_first_row_for_all", _with_params(lambda p: p.__setitem__(slice(None), p[0]))),
        Mutant("counter_not_advanced", changed_output(reference, "rng", lambda rng, i: i["rng"])),
        Mutant("counter_ignored", lambda i, a: _run(i, draw=_zeroed(1))),
        Mutant("seed_ignored", lambda i, a: _run(i, draw=_zeroed(0))),
        Mutant("seven_rounds", lambda i, a: _run(i, draw=lambda rng: uniform(rng, rounds=7))),
        Mutant("second_word", lambda i, a: _run(i, draw=lambda rng: uniform(rng, word=1))),
        Mutant("walked_backwards", lambda i, a: _run(i, walk=_walk_backwards)),
    ),
)
