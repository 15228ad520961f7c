"""What "the mean and variance of a class" is: exactly pooled, or as one of the published methods gathers it.

Pooled is the definition: of all elements of a class's images at once. The others are what programs of dataset distillation hold
in their buffers instead; they are three different quantities, here so that their numbers can be had again.

    pooled    the moments of all elements together (arXiv 2210.03205)
    images    the average over images of each image's own mean and variance (EDC, arXiv 2404.13733)
    batches   the average over batches, weighted by images, of the mean and variance of the class's images in each (WMDD, arXiv
              2311.18531, whose batches hold one class)
    ema       a moving average of the same from batch to batch, a tenth of it each new batch's, from mean 0 and variance 1 on
              (LPLD, arXiv 2410.15919)

Their variance leaves out how images, or batches, differ from one another in mean. `ema` is of the last batches for the most
part, and of its start as long as batches are few. `batches` and `ema` depend on which images came together, `ema` also on their
order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import InputError
from .site_moments import SiteMoments

VARIANCES = ("pooled", "images", "batches", "ema")
NEW_SHARE = 0.1  # of a batch in `ema`: BatchNorm's default momentum, which LPLD takes


def check_variance(variance: str) -> None:
    if variance not in VARIANCES:
        raise InputError(f"variance must be one of {', '.join(VARIANCES)}, got {variance!r}")


def index_batches(variance: str, labels: Tensor, batch_size: int, seed: int = 0) -> list[list[int]]:
    """The images of each batch, in the order that an estimator's method takes them: for a DataLoader's ``batch_sampler``.

    `batches` are of one class each, as WMDD's; those of an `ema` are shuffled, as LPLD's; of the others the order is the
    dataset's and does not matter.
    """
    check_variance(variance)
    if variance == "batches":
        runs = [(labels == k).nonzero().flatten() for k in labels.unique()]
    elif variance == "ema":
        runs = [torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    else:
        runs = [torch.arange(len(labels))]
    return [batch.tolist() for run in runs for batch in run.split(batch_size)]


class SiteEstimator:
    """Gathers one site's tables batch by batch.

    Parameters
    ----------
    variance : one of `VARIANCES`

    Attributes
    ----------
    whole : `SiteMoments` of one class, the exact moments of all images of all classes; None where `finish` has them (pooled)
    """

    def __init__(self, variance: str, num_classes: int, channels: int):
        self.variance = variance
        self.moments = SiteMoments.empty(num_classes, channels)  # pooled; of the others the count alone
        self.whole: SiteMoments | None = None
        if variance != "pooled":
            self.whole = SiteMoments.empty(1, channels)
            self.mean = torch.zeros(num_classes, channels, dtype=torch.float64)  # [K, C], sums, or moving averages
            self.var = torch.ones_like(self.mean) if variance == "ema" else torch.zeros_like(self.mean)
            self.images = torch.zeros(num_classes, dtype=torch.float64)  # [K]

    def add_batch(self, x: Tensor, labels: Tensor) -> None:
        """The inputs x [N, C, *spatial] of samples with `labels` int64 [N]."""
        if self.variance == "pooled":
            return self.moments.add_batch(x, labels)
        labels = labels.cpu()
        if self.variance == "images":
            classes, rows = labels, torch.arange(len(labels))
        else:
            classes, rows = labels.unique(return_inverse=True)
        # A slice is an image, or a class's images in the batch; there are k of them.
        images = torch.bincount(rows, minlength=len(classes)).double()  # [k]
        slices = SiteMoments.empty(len(classes), x.shape[1])
        slices.add_batch(x, rows)
        self.whole = self.whole.merge(slices.pooled())
        self.moments.count.index_add_(0, classes, slices.count)
        mean, var = slices.mean, slices.m2 / slices.count.clamp(min=1)[:, None]  # [k, C]
        if self.variance == "ema":
            self.mean[classes] = torch.lerp(self.mean[classes], mean, NEW_SHARE)
            self.var[classes] = torch.lerp(self.var[classes], var, NEW_SHARE)
        else:
            self.images.index_add_(0, classes, images)
            self.mean.index_add_(0, classes, mean * images[:, None])
            self.var.index_add_(0, classes, var * images[:, None])

    def finish(self) -> SiteMoments:
        """The tables: mean and m2 [K, C], the variance being m2 / count whatever the estimator."""
        if self.variance == "pooled":
            return self.moments
        share = 1.0 if self.variance == "ema" else self.images.clamp(min=1)[:, None]  # [K, 1]
        count = self.moments.count
        return SiteMoments(count, self.mean / share, self.var / share * count[:, None])


class ImageCounts:
    """How many images of each class there were, and how many of them its statistics amount to.

    Attributes
    ----------
    images : int64 [K]
    batches : int64 [K], batches that had any
    """

    def __init__(self, variance: str, num_classes: int):
        self.variance = variance
        self.images = torch.zeros(num_classes, dtype=torch.int64)
        self.batches = torch.zeros_like(self.images)
        self._weight = torch.zeros(num_classes, dtype=torch.float64)  # [K], the sum of the images' weights in an `ema`
        self._squares = torch.zeros_like(self._weight)  # and of their squares

    def add_batch(self, labels: Tensor) -> None:
        """labels : int64 [N], on the CPU"""
        images = torch.bincount(labels, minlength=len(self.images))
        here = images > 0
        self.images += images
        self.batches += here
        self._weight[here] = torch.lerp(self._weight[here], torch.ones_like(self._weight[here]), NEW_SHARE)
        self._squares[here] = (1 - NEW_SHARE) ** 2 * self._squares[here] + NEW_SHARE**2 / images[here]

    @property
    def effective(self) -> Tensor:
        """float64 [K]: as many images of equal weight would average out as well, (Σw)² / Σw² (Kish 1965)."""
        if self.variance != "ema":
            return self.images.double()
        return torch.where(self.batches > 0, self._weight.square() / self._squares.clamp(min=1e-300), 0.0)

    @property
    def of_the_start(self) -> Tensor:
        """float64 [K]: the share of each class's statistics that is what a moving average starts from, else 0."""
        return (1 - NEW_SHARE) ** self.batches.double() if self.variance == "ema" else torch.zeros_like(self._weight)
