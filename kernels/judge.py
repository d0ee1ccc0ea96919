"""Is a result right? The one comparison by which kernels pass and mutants die."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .op import NUMPY_DTYPES, Case, Inputs, Numerics, Op, Outputs, Signature
from .quant import Array


@dataclass(frozen=True)
class Verdict:
    """`reason` is empty for a right result; `ratio` is the largest error as a fraction of its bound (inf: no bound)."""

    ratio: float = 0.0
    reason: str = ""


def judge(
    op: Op, case: Case, signature: Signature, inputs: Inputs, expected: Outputs, got: Outputs, numerics: Numerics
) -> Verdict:
    """Compare every written tensor of a call with the float64 reference.

    `inputs` and `expected` are float64 (see op.fp64), `got` what the kernel wrote. Integers must be equal, as must
    everything in a case of small integers; floats may be off by the op's error bound for the kernel's `numerics`.
    """
    names = [p.name for p in op.params if p.is_written and p.name in signature.tensors]
    for name in names:
        kind, array = signature.tensors[name], got.get(name)
        if array is None:
            return Verdict(np.inf, f"{name} is missing")
        if array.shape != kind.shape or array.dtype != NUMPY_DTYPES[kind.dtype]:
            return Verdict(np.inf, f"{name} is {array.dtype}{list(array.shape)}, expected {kind}")
    if op.check is not None:
        reason = op.check(inputs, signature.attrs, expected, got, numerics)
        return Verdict(np.inf if reason else 0.0, reason or "")
    bounds: Outputs = {} if case.is_exact else op.error_bound(inputs, signature.attrs, expected, numerics)
    worst = Verdict()
    for name in names:
        verdict = compare(name, got[name], expected[name], bounds.get(name, np.zeros(())))
        if verdict.reason:
            return verdict
        worst = max(worst, verdict, key=lambda v: v.ratio)
    return worst


def compare(name: str, got: Array, expected: Array, bound: Array) -> Verdict:
    """Element by element: |got - expected| <= bound; infinities and NaNs must be where they are expected."""
    if expected.dtype.kind in "iu":
        bound = np.zeros(())
    wide, truth = got.astype(np.float64), expected.astype(np.float64)
    allowed = np.broadcast_to(np.asarray(bound, np.float64), truth.shape)
    same = (wide == truth) | (np.isnan(wide) & np.isnan(truth))
    with np.errstate(all="ignore"):
        error = np.where(same, 0.0, np.abs(wide - truth))
        error = np.where(np.isnan(error), np.inf, error)
        ratio = np.where(error == 0, 0.0, error / allowed)
    wrong = ~(same | ((error <= allowed) & np.isfinite(error)))  # beside a NaN or an infinity a bound is none
    if not wrong.any():
        return Verdict(float(ratio.max(initial=0.0)))
    at = np.unravel_index(
        int(np.argmax(np.where(wrong, np.nan_to_num(ratio, nan=np.inf, posinf=np.inf), -1))), wrong.shape
    )
    index = ", ".join(str(int(i)) for i in at)
    return Verdict(
        float(ratio[at]),
        f"{name}[{index}] is {got[at]:.9g}, expected {truth[at]:.9g} within {allowed[at]:.3g}"
        f" (error {error[at]:.3g}); {int(wrong.sum())} of {wrong.size} elements are wrong",
    )
