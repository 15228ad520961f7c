"""Activations and their derivatives on tiles, as `bnfuse.reference` defines them, at kinks and for NaN too."""

import triton
import triton.language as tl


@triton.jit
def activation(z, ACT: tl.constexpr, SLOPE: tl.constexpr):
    """act(z); SLOPE is leaky ReLU's for z < 0. Comparisons are such that NaN stays."""
    if ACT == "relu":
        return tl.where(z < 0, 0.0, z)
    elif ACT == "relu6":
        above = tl.where(z < 0, 0.0, z)
        return tl.where(above > 6, 6.0, above)
    elif ACT == "leaky_relu":
        return tl.where(z > 0, z, z * SLOPE)
    elif ACT == "silu":
        return z / (1.0 + tl.exp(-z))
    elif ACT == "hardswish":
        above = tl.where(z < -3, 0.0, z + 3.0)
        return z * tl.where(above > 6, 6.0, above) / 6.0
    else:
        return z


@triton.jit
def on_upper_slope(z, ACT: tl.constexpr):
    """Whether z stands where a two-slope activation's derivative is 1: what a bit of the mask says."""
    if ACT == "relu6":
        return (z > 0) & (z < 6)
    else:
        return z > 0


@triton.jit
def two_slopes(upper, ACT: tl.constexpr, SLOPE: tl.constexpr, DTYPE: tl.constexpr):
    """A two-slope activation's derivative from `on_upper_slope`."""
    below: tl.constexpr = SLOPE if ACT == "leaky_relu" else 0.0
    # A constant is made of DTYPE at once: `where` would round it to float32 first.
    return tl.where(upper, tl.full((), 1.0, DTYPE), tl.full((), below, DTYPE))


@triton.jit
def derivative(z, ACT: tl.constexpr, SLOPE: tl.constexpr):
    """act'(z)."""
    if ACT == "silu":
        s = 1.0 / (1.0 + tl.exp(-z))
        return s * (1.0 + z * (1.0 - s))
    elif ACT == "hardswish":
        inner = tl.where(z < 3, z / 3.0 + 0.5, 1.0)
        return tl.where(z > -3, inner, 0.0)
    else:
        return two_slopes(on_upper_slope(z, ACT), ACT, SLOPE, z.dtype)
