"""The pooled moments of one BatchNorm input, class by class: gathered batch by batch, merged exactly.

Also the power sums by which moments in several places are merged, say on ranks: each sends its own, and they add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SLICE_BYTES = 64 << 20  # of float64 made at a time while recording


@dataclass
class SiteMoments:
    """Exact pooled moments of one site's input for each of K classes.

    Attributes
    ----------
    count : int64 [K], elements a channel (images × positions)
    mean, m2 : float64 [K, C]; the biased variance is m2 / count
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def empty(cls, num_classes: int, channels: int) -> SiteMoments:
        zeros = torch.zeros(num_classes, channels, dtype=torch.float64)
        return cls(torch.zeros(num_classes, dtype=torch.int64), zeros, zeros.clone())

    def of_classes(self, classes: Sequence[int] | Tensor) -> SiteMoments:
        """A copy of the rows of these classes, in their order."""
        classes = torch.as_tensor(classes)
        return SiteMoments(self.count[classes], self.mean[classes], self.m2[classes])

    def merge(self, other: SiteMoments) -> SiteMoments:
        """The moments of both sets of elements together (Chan, Golub, LeVeque 1979)."""
        count = self.count + other.count  # [K]
        share = (other.count.double() / count.clamp(min=1))[:, None]  # [K, 1]
        delta = other.mean - self.mean
        mean = self.mean + delta * share
        m2 = self.m2 + other.m2 + delta.square() * self.count[:, None] * share
        return SiteMoments(count, mean, m2)

    def pooled(self) -> SiteMoments:
        """All classes as one: count [1], mean and m2 [1, C]."""
        count = self.count.sum().clamp(min=1)
        mean = (self.mean * self.count[:, None]).sum(0) / count
        m2 = (self.m2 + self.count[:, None] * (self.mean - mean).square()).sum(0)
        return SiteMoments(count[None], mean[None], m2[None])

    def add_batch(self, x: Tensor, labels: Tensor) -> None:
        """Merges the inputs x [N, C, *spatial] of samples with `labels` int64 [N]."""
        step = max(1, _SLICE_BYTES // max(1, 8 * x[:1].numel()))
        for part, classes in zip(x.split(step), labels.split(step)):
            self._add_slice(part.flatten(2) if part.dim() > 2 else part[:, :, None], classes)

    def _add_slice(self, x: Tensor, labels: Tensor) -> None:
        n, c, positions = x.shape
        image_var, image_mean = torch.var_mean(x.double(), dim=2, correction=0)  # [n, C]: each image's own moments
        image_mean, image_var = image_mean.cpu(), image_var.cpu()
        classes, rows = labels.cpu().unique(return_inverse=True)  # [k] and [n]: a batch touches its own classes alone
        batch = SiteMoments.empty(len(classes), c)
        batch.count.index_add_(0, rows, torch.full((n,), positions))
        batch.mean.index_add_(0, rows, image_mean)
        batch.mean /= (batch.count / positions).clamp(min=1)[:, None]
        deviation = image_mean - batch.mean[rows]
        batch.m2.index_add_(0, rows, positions * (image_var + deviation.square()))
        merged = self.of_classes(classes).merge(batch)
        self.count[classes], self.mean[classes], self.m2[classes] = merged.count, merged.mean, merged.m2


def power_sums(count: Tensor, mean: Tensor, m2: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Σ(x − c) and Σ(x − c)² [K, C], float64. A centre near the mean keeps a mean far from 0 from cancelling the variance.

        Σ(x − c) = n·(mean − c)          Σ(x − c)² = m2 + n·(mean − c)²

    Parameters
    ----------
    count : [K, 1], elements a channel, or another number in proportion
    mean : [K, C]
    m2 : float64 [K, C], Σ(x − mean)²
    centre : float64, broadcast to [K, C]
    """
    sums = count * (mean.double() - centre)
    return sums, m2 + sums * (mean.double() - centre)


def from_power_sums(count: Tensor, sums: Tensor, squares: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """mean and m2 [K, C], float64: the inverse of `power_sums`. Where the count is 0 the mean is the centre."""
    count = count.clamp(min=1)
    return centre + sums / count, (squares - sums.square() / count).clamp(min=0)
