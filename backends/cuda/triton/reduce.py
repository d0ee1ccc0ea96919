"""Sums and extremes along an axis. `tl.sum` and its like cannot be called here (see __init__.py); what they hand to
`tl.reduce` can, and the interpreter knows these functions by name and has NumPy do the work."""

import triton
import triton.language as tl


@triton.jit
def total(x, AXIS: tl.constexpr):
    return tl.reduce(x, AXIS, tl.standard._sum_combine)


@triton.jit
def largest(x, AXIS: tl.constexpr):
    """Undefined for NaN."""
    return tl.reduce(x, AXIS, tl.standard._elementwise_max)


@triton.jit
def smallest(x, AXIS: tl.constexpr):
    """Undefined for NaN."""
    return tl.reduce(x, AXIS, tl.standard._elementwise_min)
