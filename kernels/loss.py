"""The loss of all sites at once: every group's distance at every site, the loss, and its gradient by all moments.

A copy that lays all moments side by side, a launch with a program for each group and site, and one that adds up in a fixed
order. Everything is computed in float64, for it is little. How many channels each site has is a constant of the compiled
kernel, one for each network: nothing is uploaded, and nothing kept on the device, so that a CUDA graph may capture it all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnfuse import reference
from bnfuse.errors import InputError

from . import boundary
from .distances import channel_terms, load_target, site_distance, store_coefficients

BLOCK = 1024  # channels


@triton.jit(
    do_not_specialize=("groups", "width", "targets", "mean_stride", "var_stride"),
    do_not_specialize_on_alignment=("target_mean_ptr", "target_var_ptr", "classes_ptr", "site_weights_ptr"),
)
def site_distances(
    moments_ptr,  # [2·G·T], the means, then the variances; of each site its [G, C]
    target_mean_ptr,  # [K, T], rows mean_stride apart
    target_var_ptr,  # [K, T], rows var_stride apart
    classes_ptr,  # int64 [G], or None where K is 1
    site_weights_ptr,  # [S]
    distances_ptr,  # [G, S]
    weighted_ptr,  # float64 [S, G], distances times weights
    dmean_ptr,  # [G·T], of each site its [G, C]
    dvar_ptr,  # [G·T], of each site its [G, C]
    groups,
    width,  # T
    targets,  # K
    mean_stride,
    var_stride,
    eps: tl.float64,
    slack: tl.float64,
    mean_weight: tl.float64,
    var_weight: tl.float64,
    STARTS: tl.constexpr,  # (0, C of site 0, C of sites 0 and 1, …, T)
    DISTANCE: tl.constexpr,
    USE_STD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program finds one group's distance at one site, and its coefficients."""
    sites: tl.constexpr = len(STARTS) - 1
    site, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    start = site * 0
    stop = site * 0
    for s in tl.static_range(sites):
        start = tl.where(site == s, STARTS[s], start)
        stop = tl.where(site == s, STARTS[s + 1], stop)
    channels = stop - start

    row = tl.zeros((), tl.int64)
    if classes_ptr is not None:
        row = tl.load(classes_ptr + group)
    has_target = (row >= 0) & (row < targets)
    target_mean_ptr += row * mean_stride + start
    target_var_ptr += row * var_stride + start
    first = start.to(tl.int64) * groups + group * channels
    mean_ptr, var_ptr = moments_ptr + first, moments_ptr + width.to(tl.int64) * groups + first

    mean_terms = tl.zeros((BLOCK,), tl.float64)
    var_terms = tl.zeros((BLOCK,), tl.float64)
    for begin in tl.range(0, channels, BLOCK):
        channel = begin + tl.arange(0, BLOCK)
        valid = channel < channels
        mean = tl.load(mean_ptr + channel, mask=valid, other=0.0).to(tl.float64)
        var = tl.load(var_ptr + channel, mask=valid, other=0.0).to(tl.float64)
        target_mean = load_target(target_mean_ptr + channel, valid & has_target)
        target_var = load_target(target_var_ptr + channel, valid & has_target)
        terms = channel_terms(mean, var, target_mean, target_var, eps, slack, DISTANCE, USE_STD)
        mean_terms += tl.where(valid, terms[0], 0.0)
        var_terms += tl.where(valid, terms[1], 0.0)
    mean_sum, var_sum = tl.sum(mean_terms, 0), tl.sum(var_terms, 0)
    distance = site_distance(mean_sum, var_sum, channels, mean_weight, var_weight, DISTANCE)
    weight = tl.load(site_weights_ptr + site).to(tl.float64)
    tl.store(distances_ptr + group * sites + site, distance.to(distances_ptr.dtype.element_ty))
    tl.store(weighted_ptr + tl.program_id(0), distance * weight)

    share = weight / groups
    store_coefficients(
        mean_ptr,
        var_ptr,
        target_mean_ptr,
        target_var_ptr,
        dmean_ptr + first,
        dvar_ptr + first,
        has_target,
        share,
        mean_sum,
        var_sum,
        channels,
        eps,
        slack,
        mean_weight,
        var_weight,
        DISTANCE,
        USE_STD,
        BLOCK,
    )


@triton.jit(do_not_specialize=("count", "groups"))
def sum_distances(
    weighted_ptr,  # float64 [S, G]
    loss_ptr,  # scalar
    count,  # S·G
    groups,
    BLOCK: tl.constexpr,
):
    total = tl.zeros((BLOCK,), tl.float64)
    for begin in tl.range(0, count, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        total += tl.load(weighted_ptr + index, mask=index < count, other=0.0)
    tl.store(loss_ptr, (tl.sum(total, 0) / groups).to(loss_ptr.dtype.element_ty))


def bn_loss(
    mean: list[Tensor],
    var: list[Tensor],
    target_mean: Tensor,
    target_var: Tensor,
    classes: Tensor | None,
    site_weights: Tensor,
    distance: str,
    use_std: bool,
    eps: float,
    slack: float,
    mean_weight: float,
    var_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`bnfuse.reference.bn_loss`, and its gradient.

    Parameters
    ----------
    mean, var : for each of S sites [G, C], float32 or float64, all of one dtype
    target_mean, target_var : [K, T] in that dtype, T = ΣC
    classes : int64 [G], or None where K is 1. A class out of range makes the loss NaN: nothing on the host sees its value.
    site_weights : [S] in that dtype

    Returns
    -------
    loss : scalar; distances : [G, S], unweighted
    dmean, dvar : [G·T], for each site its [G, C], of the loss
    """
    boundary.check_choice("distance", distance, reference.DISTANCES)
    if not mean:
        raise InputError("bn_loss needs at least one site, got none")
    if len(var) != len(mean):
        raise InputError(f"var must have one tensor a site, {len(mean)}, got {len(var)}")
    dtype, device, groups = mean[0].dtype, mean[0].device, mean[0].shape[0]
    boundary.check_device(mean[0])
    if dtype not in (torch.float32, torch.float64):
        raise InputError(f"moments must be float32 or float64, got {boundary.describe(mean[0])}")
    for name, moments in (("mean", mean), ("var", var)):
        for site, like in zip(moments, mean):
            if like.dim() != 2:
                raise InputError(f"{name} must be [G, C] at every site, got {boundary.describe(like)}")
            boundary.check(name, site, dtype, (groups, like.shape[1]), device)
    starts = [0]
    for site in mean:
        starts.append(starts[-1] + site.shape[1])
    width, targets = starts[-1], target_mean.shape[0]
    if target_mean.dim() != 2:
        raise InputError(f"target_mean must be [K, {width}], got {boundary.describe(target_mean)}")
    target_mean = boundary.check_table("target_mean", target_mean, dtype, (targets, width), device)
    target_var = boundary.check_table("target_var", target_var, dtype, (targets, width), device)
    boundary.check("site_weights", site_weights, dtype, (len(mean),), device)
    classes = boundary.check_classes(classes, groups, targets, device)

    loss, distances = mean[0].new_empty(()), mean[0].new_empty(groups, len(mean))
    dmean, dvar = mean[0].new_empty(groups * width), mean[0].new_empty(groups * width)
    weighted = mean[0].new_empty(len(mean) * groups, dtype=torch.float64)
    moments = torch.cat([site.reshape(-1) for site in (*mean, *var)])
    boundary.launch(
        site_distances,
        len(mean) * groups,
        moments,
        target_mean,
        target_var,
        classes,
        site_weights.contiguous(),
        distances,
        weighted,
        dmean,
        dvar,
        groups,
        width,
        targets,
        target_mean.stride(0),
        target_var.stride(0),
        eps,
        slack,
        mean_weight,
        var_weight,
        STARTS=tuple(starts),
        DISTANCE=distance,
        USE_STD=use_std,
        BLOCK=BLOCK,
        num_warps=4,
    )
    boundary.launch(sum_distances, 1, weighted, loss, len(weighted), groups, BLOCK=BLOCK, num_warps=4)
    return loss, distances, dmean, dvar
