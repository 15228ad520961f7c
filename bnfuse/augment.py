"""Random views of the images being optimised: crop, shift, flip. What is drawn is kept apart from applying it, so that the
same views can be shown again."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError


@dataclass(frozen=True)
class View:
    """One draw for a batch of N images.

    Attributes
    ----------
    crop : (top, left, height, width) of the box that is resized to the full image, or None
    shift : (rows, columns) by which the images roll around
    flip : bool [N] on the CPU, the images mirrored left to right, or None
    """

    crop: tuple[int, int, int, int] | None
    shift: tuple[int, int]
    flip: Tensor | None

    def __getitem__(self, rows: slice) -> View:
        """The same view, for these rows of the batch."""
        return View(self.crop, self.shift, None if self.flip is None else self.flip[rows])

    def __call__(self, images: Tensor) -> Tensor:
        """[N, C, H, W] → the view, the same shape; differentiable."""
        if self.crop is not None:
            top, left, height, width = self.crop
            images = F.interpolate(
                images[:, :, top : top + height, left : left + width],
                images.shape[2:],
                mode="bilinear",
                align_corners=False,
            )
        if self.flip is not None:
            images = torch.where(self.flip.to(images.device)[:, None, None, None], images.flip(3), images)
        return images.roll(self.shift, dims=(2, 3)) if any(self.shift) else images


@dataclass(frozen=True)
class Augmentation:
    """How views are drawn. Crop and shift are drawn once a batch, the flip for each image.

    Parameters
    ----------
    jitter : largest shift in pixels, up, down, left and right (DeepInversion)
    flip : mirror each image with probability ½
    crop_scale : least share of the area that a random resized crop keeps (SRe2L); 1 crops nothing
    crop_curriculum : share of the steps over which that least share falls from 1, by half a cosine (CDA); 0, it is constant
    """

    jitter: int = 0
    flip: bool = False
    crop_scale: float = 1.0
    crop_curriculum: float = 0.0

    def __post_init__(self):
        if self.jitter < 0 or not 0 < self.crop_scale <= 1:
            raise InputError(f"jitter must be ≥ 0 and crop_scale in (0, 1], got {self.jitter} and {self.crop_scale}")
        if not 0 <= self.crop_curriculum <= 1:
            raise InputError(f"crop_curriculum must be a share of the steps, from 0 to 1, got {self.crop_curriculum}")

    def draw(self, images: Tensor, generator: torch.Generator, count: int | None = None, progress: float = 1.0) -> View:
        """Draws a view of `images` [N, C, H, W], or of a batch of `count` that is like them, with a CPU generator.

        `progress` is the share of the steps that have been made.
        """
        height, width = images.shape[2:]
        crop = self._draw_crop(height, width, self.least_crop(progress), generator) if self.crop_scale < 1 else None
        shift = (0, 0)
        if self.jitter:
            shift = tuple(torch.randint(-self.jitter, self.jitter + 1, (2,), generator=generator).tolist())
        flip = torch.rand(len(images) if count is None else count, generator=generator) < 0.5 if self.flip else None
        return View(crop, shift, flip)

    def least_crop(self, progress: float) -> float:
        """The least share of the area that a crop keeps, when a share `progress` of the steps has been made."""
        if progress >= self.crop_curriculum:
            return self.crop_scale
        return self.crop_scale + (1 - self.crop_scale) * 0.5 * (1 + math.cos(math.pi * progress / self.crop_curriculum))

    def _draw_crop(self, height: int, width: int, least: float, generator: torch.Generator) -> tuple[int, int, int, int]:
        """A box of area in [least, 1] and aspect ratio in [3/4, 4/3] (Szegedy et al. 2015), cut to the image."""
        area, ratio, down, across = torch.rand(4, generator=generator).tolist()
        area = height * width * (least + (1 - least) * area)
        ratio = math.exp((2 * ratio - 1) * math.log(4 / 3))
        box_height = min(height, max(1, round(math.sqrt(area / ratio))))
        box_width = min(width, max(1, round(math.sqrt(area * ratio))))
        return round(down * (height - box_height)), round(across * (width - box_width)), box_height, box_width
