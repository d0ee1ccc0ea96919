"""exp, tanh, erf and float16 from nothing but arithmetic: the same on every target, and objects need no library.

TVM's own lowerings either call the target's library (expf of an LLVM object, ROCm's device library) or, where there is
none, cancel near 0 (tanh as a quotient of exps). Coefficients: weighted least squares at Chebyshev nodes. Errors below:
the largest of some millions of float32 arguments against float64; a target that contracts to fma is no worse.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ....kernels.glu import GELU_CUBIC, GELU_SCALE

if TYPE_CHECKING:
    from .builder import Builder, Expr

# For `Numerics.function_ulp`: exp 1.0 and tanh 1.4 ulp; OpenCL lets a quotient be off by 2.5, 1 / sqrt by 5.5 ulp.
FUNCTION_ULP = 4.0
RSQRT_ULP = 6.0
ERF_ULP = 16.0  # erf is off by 10 * 2**-24 absolutely

# exp(r) = 1 + r + r**2 P(r) for |r| <= ln(2) / 2
_EXP = (0.49999988079071045, 0.16666512191295624, 0.04166964441537857, 0.008369628340005875, 0.0013748962664976716)
_LOG2_E = 1.4426950408889634
# ln 2 in two parts, the first of so few bits that its product with a whole number up to 150 is exact (Cody and Waite,
# Software Manual for the Elementary Functions, 1980).
_LN2_HIGH, _LN2_LOW = 0.693359375, -0.00021219444170128554
# tanh(x) = x + x**3 P(x**2) for |x| < 0.6
_TANH = (-0.33333301544189453, 0.1333194375038147, -0.05378306657075882, 0.020787004381418228, -0.0058785779401659966)
# Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: |error| <= 1.5e-7
_ERF_P = 0.3275911
_ERF = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


def _polynomial(k: Builder, coefficients: tuple[float, ...], x: Expr) -> Expr:
    """Horner's scheme, lowest coefficient first."""
    value = k.constant(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = k.keep(value * x + k.constant(coefficient))
    return value


def _power_of_two(k: Builder, n: Expr) -> Expr:
    """2.0**n for -126 <= n <= 127."""
    return k.as_float((n + 127).astype("uint32") << k.constant(23, "u32"))


def exp(k: Builder, x: Expr) -> Expr:
    """e**x; 0 below -104, infinity above 88.8, NaN for NaN."""
    x = k.keep(x)
    # NaN fails every comparison, and only a number may become an int.
    inside = k.keep(k.select(x > -104.0, k.select(x < 89.0, x, k.constant(89.0)), k.constant(-104.0)))
    half = k.select(inside < 0.0, k.constant(-0.5), k.constant(0.5))
    n = k.keep((inside * k.constant(_LOG2_E) + half).astype("int32"))
    whole = k.keep(n.astype("float32"))
    r = k.keep(inside - whole * k.constant(_LN2_HIGH))
    r = k.keep(r - whole * k.constant(_LN2_LOW))
    fraction = k.keep(_polynomial(k, _EXP, r) * (r * r) + r + 1.0)
    first = k.keep(n >> 1)  # in two factors: 2**n itself may be no normal number
    result = fraction * _power_of_two(k, first) * _power_of_two(k, n - first)
    return k.keep(k.select(is_nan(k, x), x, result))


def tanh(k: Builder, x: Expr) -> Expr:
    x = k.keep(x)
    size = k.keep(k.select(x < 0.0, -x, x))
    square = k.keep(x * x)
    near = x + x * (square * _polynomial(k, _TANH, square))
    far = k.keep(1.0 - 2.0 / (exp(k, size + size) + 1.0))
    return k.keep(k.select(size < 0.6, near, k.select(x < 0.0, -far, far)))


def erf(k: Builder, x: Expr) -> Expr:
    x = k.keep(x)
    size = k.keep(k.select(x < 0.0, -x, x))
    t = k.keep(1.0 / (1.0 + k.constant(_ERF_P) * size))
    value = k.keep(1.0 - _polynomial(k, _ERF, t) * t * exp(k, -(x * x)))
    return k.keep(k.select(x < 0.0, -value, value))


def activate(k: Builder, gate: Expr, kind: str) -> Expr:
    """The activation of kernels/glu.py."""
    gate = k.keep(gate)
    if kind == "silu":
        return gate / (1.0 + exp(k, -gate))
    if kind == "gelu_tanh":
        argument = k.constant(GELU_SCALE) * (gate + k.constant(GELU_CUBIC) * gate * gate * gate)
        return 0.5 * gate * (1.0 + tanh(k, argument))
    return 0.5 * gate * (1.0 + erf(k, gate * k.constant(math.sqrt(0.5))))


def is_nan(k: Builder, x: Expr) -> Expr:
    """By its bits: a comparison of x with itself is folded away by code generators that rule NaN out."""
    return (k.as_bits(x) & k.constant(0x7FFFFFFF, "u32")) > k.constant(0x7F800000, "u32")


def half_to_float(k: Builder, bits: Expr) -> Expr:
    """float32 of a float16 in the low half of `bits` (uint32, the high half 0)."""
    bits = k.keep(bits)
    sign = (bits & k.constant(0x8000, "u32")) << k.constant(16, "u32")
    size = k.keep(bits & k.constant(0x7FFF, "u32"))
    shifted = k.keep(size << k.constant(13, "u32"))
    normal = shifted + k.constant(112 << 23, "u32")
    # Subnormals are multiples of 2**-24: by a product, not as float32 subnormals, which a device may take for 0.
    small = k.as_bits(size.astype("float32") * k.constant(2.0**-24))
    special = shifted | k.constant(0x7F800000, "u32")
    is_small = size < k.constant(0x0400, "u32")
    is_special = size >= k.constant(0x7C00, "u32")
    return k.keep(k.as_float(sign | k.select(is_small, small, k.select(is_special, special, normal))))


def float_to_half(k: Builder, value: Expr) -> Expr:
    """The bits (uint32) of `value` rounded to the nearest float16, ties to even."""
    bits = k.keep(k.as_bits(value))
    sign = (bits >> k.constant(16, "u32")) & k.constant(0x8000, "u32")
    size = k.keep(bits & k.constant(0x7FFFFFFF, "u32"))
    tie = (size >> k.constant(13, "u32")) & k.constant(1, "u32")
    normal = (size + k.constant(0x0FFF, "u32") + tie - k.constant(112 << 23, "u32")) >> k.constant(13, "u32")
    # The unit of a float32 in [0.5, 1) is 2**-24, that of subnormal float16: the sum rounds to it.
    small = k.as_bits(k.as_float(size) + 0.5) - k.constant(0x3F000000, "u32")
    is_nan = size > k.constant(0x7F800000, "u32")
    special = k.select(is_nan, k.constant(0x7E00, "u32"), k.constant(0x7C00, "u32"))
    is_small, is_special = size < k.constant(0x38800000, "u32"), size >= k.constant(0x47800000, "u32")
    return k.keep(sign | k.select(is_small, small, k.select(is_special, special, normal)))
