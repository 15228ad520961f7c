"""One group's distance at one site, and its gradient, channel by channel: `bnfuse.reference.bn_distance`, in float64.

A distance is a function of two sums over the site's channels, so that it takes three steps: each channel's terms, their sums
(the kernels' affair), and from the sums the distance and every channel's coefficients.
"""

import triton
import triton.language as tl


@triton.jit
def load_target(pointers, valid):
    """Targets in float64. Where there are none, for want of a class's row, they are NaN, and so will be the loss."""
    return tl.load(pointers, mask=valid, other=float("nan")).to(tl.float64)


@triton.jit
def deviations(mean, var, target_mean, target_var, eps, USE_STD: tl.constexpr):
    """Δμ and Δv."""
    if USE_STD:
        return mean - target_mean, tl.sqrt(var + eps) - tl.sqrt(target_var + eps)
    else:
        return mean - target_mean, var - target_var


@triton.jit
def excess(delta, slack):
    """max(|delta| − slack, 0), of which NaN is NaN."""
    above = tl.abs(delta) - slack
    return tl.where(above < 0, 0.0, above)


@triton.jit
def sign(delta):
    return tl.where(delta > 0, 1.0, tl.where(delta < 0, -1.0, delta))  # NaN stays


@triton.jit
def term(delta, slack, DISTANCE: tl.constexpr):
    if DISTANCE == "l1":
        return tl.abs(delta)
    elif DISTANCE == "hinge":
        return excess(delta, slack) * excess(delta, slack)
    else:
        return delta * delta


@triton.jit
def channel_terms(mean, var, target_mean, target_var, eps, slack, DISTANCE: tl.constexpr, USE_STD: tl.constexpr):
    """A channel's share of the sum for the mean and of that for the variance; all of KL is in the first."""
    if DISTANCE == "kl":
        v, t = var + eps, target_var + eps
        delta = mean - target_mean
        return 0.5 * (tl.log(t / v) + (v + delta * delta) / t - 1), tl.zeros_like(v)
    else:
        delta_mean, delta_var = deviations(mean, var, target_mean, target_var, eps, USE_STD)
        return term(delta_mean, slack, DISTANCE), term(delta_var, slack, DISTANCE)


@triton.jit
def site_distance(mean_sum, var_sum, channels, mean_weight, var_weight, DISTANCE: tl.constexpr):
    """The distance from the sums of all channels' terms."""
    if DISTANCE == "kl":
        return mean_sum / channels
    elif DISTANCE == "l2":
        return mean_weight * tl.sqrt(mean_sum) + var_weight * tl.sqrt(var_sum)
    elif (DISTANCE == "mse") | (DISTANCE == "l1"):
        return (mean_weight * mean_sum + var_weight * var_sum) / channels
    else:
        return mean_weight * mean_sum + var_weight * var_sum


@triton.jit
def slope(delta, total, channels, slack, DISTANCE: tl.constexpr):
    """The derivative of one of the two weighed terms by delta, `total` being the sum over the channels."""
    if DISTANCE == "l2":  # where all deltas vanish, the subgradient 0
        return tl.where(total == 0, 0.0, delta / tl.sqrt(tl.where(total == 0, 1.0, total)))
    elif DISTANCE == "l2_squared":
        return 2 * delta
    elif DISTANCE == "mse":
        return 2 * delta / channels
    elif DISTANCE == "l1":
        return sign(delta) / channels
    else:
        return 2 * excess(delta, slack) * sign(delta)


@triton.jit
def coefficients(
    mean,
    var,
    target_mean,
    target_var,
    mean_sum,
    var_sum,
    channels,
    eps,
    slack,
    mean_weight,
    var_weight,
    DISTANCE: tl.constexpr,
    USE_STD: tl.constexpr,
):
    """∂distance/∂mean and ∂distance/∂var of each channel."""
    if DISTANCE == "kl":
        t = target_var + eps
        return (mean - target_mean) / t / channels, 0.5 * (1 / t - 1 / (var + eps)) / channels
    else:
        delta_mean, delta_var = deviations(mean, var, target_mean, target_var, eps, USE_STD)
        dmean = mean_weight * slope(delta_mean, mean_sum, channels, slack, DISTANCE)
        dvar = var_weight * slope(delta_var, var_sum, channels, slack, DISTANCE)
        if USE_STD:
            dvar *= 0.5 / tl.sqrt(var + eps)
        return dmean, dvar


@triton.jit
def store_coefficients(
    mean_ptr,  # [C], as are the next five
    var_ptr,
    target_mean_ptr,
    target_var_ptr,
    dmean_ptr,
    dvar_ptr,
    has_target,
    share,  # factor of both
    mean_sum,
    var_sum,
    channels,
    eps,
    slack,
    mean_weight,
    var_weight,
    DISTANCE: tl.constexpr,
    USE_STD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """share·∂distance/∂mean and share·∂distance/∂var of all channels."""
    for start in tl.range(0, channels, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        valid = channel < channels
        # Other programs may have written the moments: they are read where those wrote them to, in L2 (".cg").
        mean = tl.load(mean_ptr + channel, mask=valid, other=0.0, cache_modifier=".cg").to(tl.float64)
        var = tl.load(var_ptr + channel, mask=valid, other=0.0, cache_modifier=".cg").to(tl.float64)
        target_mean = load_target(target_mean_ptr + channel, valid & has_target)
        target_var = load_target(target_var_ptr + channel, valid & has_target)
        dmean, dvar = coefficients(
            mean,
            var,
            target_mean,
            target_var,
            mean_sum,
            var_sum,
            channels,
            eps,
            slack,
            mean_weight,
            var_weight,
            DISTANCE,
            USE_STD,
        )
        tl.store(dmean_ptr + channel, (share * dmean).to(dmean_ptr.dtype.element_ty), mask=valid)
        tl.store(dvar_ptr + channel, (share * dvar).to(dvar_ptr.dtype.element_ty), mask=valid)
