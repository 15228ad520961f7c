"""What any image is expected to be, whatever the network says: smooth, and not too bright. Added to the objective.

Three kinds, as projects define them; they are not to scale with each other, so that a weight goes with a kind:

- ``mean_squares``: means of squares, over pixels and images, so that a weight carries over between sizes;
- ``norms``: DeepInversion's, of what the teacher sees: norms of four differences over the whole batch, and of each image;
- ``absolute``: means of absolute values of the same four differences (CMI, DP-ImgSyn).
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

KINDS = ("mean_squares", "norms", "absolute")


_SQUARES = ("tv across", "tv down", "tv rising", "tv falling")  # squared differences of an image, summed


def image_means(images: Tensor, view: Tensor, kind: str, wanted: Collection[str]) -> dict[str, Tensor]:
    """What each image contributes to the priors `wanted` ("tv", "l2"), as means over the images.

    images, view [N, C, H, W], normalised; the view is what the teacher sees. `combine` makes the priors of a batch of them.
    """
    means = {}
    if "tv" in wanted:
        if kind == "norms":
            means |= {name: d.square().sum() / len(d) for name, d in zip(_SQUARES, four_differences(view))}
        else:
            means["tv"] = absolute_variation(images) if kind == "absolute" else total_variation(images)
    if "l2" in wanted:
        means["l2"] = view.flatten(1).norm(dim=1).mean() if kind == "norms" else l2(images)
    return means


def combine(means: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The terms of a batch of `count` images whose `means` these are; others than the priors' are passed on."""
    if _SQUARES[0] not in means:
        return means
    variation = sum(_root(count * means[name]) for name in _SQUARES)
    return {name: value for name, value in means.items() if name not in _SQUARES} | {"tv": variation}


def total_variation(images: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels, down and across: a scalar.

    images [N, C, H, W]. A mean over pixels and images, so that a weight carries over between sizes (Rudin, Osher, Fatemi
    1992; squared, as in Mahendran and Vedaldi 2015 with β = 2).
    """
    down = (images[:, :, 1:] - images[:, :, :-1]).square()
    across = (images[:, :, :, 1:] - images[:, :, :, :-1]).square()
    return down.mean() + across.mean()


def absolute_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, summed over four directions: a scalar."""
    return sum(difference.abs().mean() for difference in four_differences(images))


def l2(images: Tensor) -> Tensor:
    """Mean squared pixel value of normalised images [N, C, H, W]: a scalar; draws them to the dataset's mean."""
    return images.square().mean()


def four_differences(images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of neighbouring pixels of [N, C, H, W]: across, down, and along both diagonals."""
    across = images[:, :, :, :-1] - images[:, :, :, 1:]
    down = images[:, :, :-1] - images[:, :, 1:]
    rising = images[:, :, 1:, :-1] - images[:, :, :-1, 1:]
    falling = images[:, :, :-1, :-1] - images[:, :, 1:, 1:]
    return across, down, rising, falling


def _root(square: Tensor) -> Tensor:
    """√, with gradient 0 at 0, as a norm has it."""
    return torch.where(square == 0, 0.0, torch.where(square == 0, 1.0, square).sqrt())
