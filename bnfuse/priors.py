"""What any image is expected to be, whatever the network says: smooth, and not too bright. Added to the objective."""

from __future__ import annotations

from torch import Tensor


def total_variation(images: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels, down and across: a scalar.

    images [N, C, H, W]. A mean over pixels and images, so that a weight carries over between sizes (Rudin, Osher, Fatemi
    1992; squared, as in Mahendran and Vedaldi 2015 with β = 2).
    """
    down = (images[:, :, 1:] - images[:, :, :-1]).square()
    across = (images[:, :, :, 1:] - images[:, :, :, :-1]).square()
    return down.mean() + across.mean()


def l2(images: Tensor) -> Tensor:
    """Mean squared pixel value of normalised images [N, C, H, W]: a scalar; draws them to the dataset's mean."""
    return images.square().mean()
