"""How far a result may be from the float64 reference: the one table that every test uses, with the reason for each.

The reference is evaluated in float64 on the very values that the kernel is given, so what is tolerated here is the
kernel's own rounding and nothing else. Tests of activations avoid nothing: they draw values for which scale·x + shift
(+ residual) is exact in every dtype, so that both sides of a comparison stand on the same side of a kink.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """|actual − expected| ≤ absolute + relative·|expected|, for elements (y, gradients) and for moments (mean, var)."""

    relative: float
    absolute: float
    moments_relative: float
    moments_absolute: float


TOLERANCES = {
    # Nothing is rounded but by float64 itself, and sums run in another order than the reference's.
    torch.float64: Tolerance(1e-12, 1e-12, 1e-12, 1e-12),
    # A few roundings of 6e-8 an element, on terms of size 10 that may cancel; a tile is summed in float32, tiles are
    # merged in float64.
    torch.float32: Tolerance(2e-6, 5e-6, 2e-6, 1e-6),
    # As float32, then stored with 8 significant bits: half a step is at most 2⁻⁸ of the value.
    torch.bfloat16: Tolerance(2**-8 + 2e-6, 5e-6, 2e-6, 1e-6),
    # As float32, then stored with 11 significant bits.
    torch.float16: Tolerance(2**-11 + 2e-6, 5e-6, 2e-6, 1e-6),
}

# |mean|/std = 10⁴ in float32: x itself carries steps of 10⁻³ std, which are the input's and not the kernel's; the
# variance of the values as given must still agree to this. It is what the design promises, not a measured error.
LARGE_MEAN_VARIANCE_RELATIVE = 1e-3


def assert_elements_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """`actual` of `dtype` against `expected` in float64."""
    tolerance = TOLERANCES[dtype]
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance.relative, atol=tolerance.absolute)


def assert_moments_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Moments of an input of `dtype` against `expected` in float64."""
    tolerance = TOLERANCES[dtype]
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance.moments_relative, atol=tolerance.moments_absolute)
