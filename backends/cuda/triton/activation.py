"""tanh, and the activations of kernels/glu.py, for tiles of float32."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Within 4 ulp, near 0 as well: there a polynomial (Cephes, tanhf.c), elsewhere exp, whose error hardly counts."""
    size = tl.abs(x)
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, series * square * x + x, tl.where(x < 0.0, -far, far))


@triton.jit
def activate(x, KIND: tl.constexpr):
    """KIND: "silu", "gelu_tanh" or "gelu_erf"."""
    if KIND == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif KIND == "gelu_tanh":  # arXiv 1606.08415
        y = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    else:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return y
