"""Moments of a batch that lies in several places: on ranks, or in the replicas of a DataParallel network.

Every channel's power sums about a centre near its mean are added up, see `site_moments.power_sums`. Each place differentiates
by its own moments alone, the others' being numbers to it: its gradient is that of the whole batch for its own images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..site_moments import from_power_sums, power_sums


@dataclass(frozen=True)
class Part:
    """What one place has of a batch.

    Attributes
    ----------
    count : float64 [G, 1], elements a channel in each group
    mean, var : [G, C], moments of them; var is biased
    target_mean, target_var : [G, C] or [1, C], what the whole batch is measured against; the same in all places
    """

    count: Tensor
    mean: Tensor
    var: Tensor
    target_mean: Tensor
    target_var: Tensor


def over_ranks(part: Part, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """mean and var [G, C] over all ranks of the group, the same bits on each; one all-reduce. The centre is the target mean."""
    centre = part.target_mean.double()
    sums = _SumOverRanks.apply(torch.cat([part.count, *_sums(part, centre)], dim=1), group)
    channels = part.mean.shape[1]
    return _moments(*sums.split([1, channels, channels], dim=1), centre, part.mean.dtype)


def merge(parts: Sequence[Part], device: torch.device) -> Part:
    """The parts, which came in any order, as one on this device; all places are differentiated through."""
    parts = sorted(parts, key=lambda part: part.mean.device.index or 0)
    count, sums, squares = 0, 0, 0
    for part in parts:
        local = [value.to(device) for value in (part.count, *_sums(part, part.target_mean.double()))]
        count, sums, squares = (a + b for a, b in zip((count, sums, squares), local))
    target_mean, target_var = (value.to(device) for value in (parts[0].target_mean, parts[0].target_var))
    mean, var = _moments(count, sums, squares, target_mean.double(), parts[0].mean.dtype)
    return Part(count, mean, var, target_mean, target_var)


def _sums(part: Part, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Σ(x − c) and Σ(x − c)² [G, C], float64."""
    return power_sums(part.count, part.mean, part.count * part.var.double(), centre)


def _moments(count: Tensor, sums: Tensor, squares: Tensor, centre: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """mean and biased var [G, C] in this dtype."""
    mean, m2 = from_power_sums(count, sums, squares, centre)
    return mean.to(dtype), (m2 / count.clamp(min=1)).to(dtype)


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks, of which each differentiates by its own term."""

    @staticmethod
    def forward(ctx, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = own.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None
