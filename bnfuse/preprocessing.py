"""How pixels become a network's input: size, channels, normalisation. Travels with teachers, statistics and datasets."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .errors import InputError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """Pixels in [0, 1], [C, H, W], and the normalisation ``(pixels - mean) / std`` that a network expects.

    Attributes
    ----------
    image_size : (height, width) in pixels
    mean, std : one float a channel; their length is the number of channels
    """

    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self):
        for name, kind in (("image_size", int), ("mean", float), ("std", float)):
            object.__setattr__(self, name, tuple(kind(v) for v in getattr(self, name)))
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise InputError(f"image_size must be (height, width), two positive integers, got {self.image_size}")
        if len(self.mean) != len(self.std) or not self.mean:
            raise InputError(f"mean and std need one value a channel each, got {len(self.mean)} and {len(self.std)}")
        if not all(0 <= value <= 1 for value in self.mean):
            raise InputError(
                f"mean must be of pixels in [0, 1], got {self.mean}; of pixels in 0..255, divide mean and std by 255"
            )
        if not all(0 < value < math.inf for value in self.std):
            raise InputError(f"std must be positive and finite, got {self.std}")

    @property
    def channels(self) -> int:
        return len(self.mean)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1], [..., C, H, W] → network input of the same shape and dtype."""
        return (pixels - self._per_channel(self.mean, pixels)) / self._per_channel(self.std, pixels)

    def denormalize(self, inputs: Tensor) -> Tensor:
        """Network input [..., C, H, W] → pixels; the inverse of `normalize`, not clamped."""
        return inputs * self._per_channel(self.std, inputs) + self._per_channel(self.mean, inputs)

    @staticmethod
    def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]  # [C, 1, 1]

    def to_dict(self) -> dict:
        return {name: list(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: dict) -> Preprocessing:
        return cls(**{name: tuple(fields[name]) for name in ("image_size", "mean", "std")})
