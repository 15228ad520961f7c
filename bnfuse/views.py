"""Augmented views of a dataset's images: what was drawn for each, and how the pixels come of it.

A view is drawn once and shown as often as wanted, to the teacher that labels it and to each student that learns the labels:
both see the same pixels. Nothing here knows networks or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from .batches import crop, draw_crops, draw_mix, mix_weights


@dataclass(frozen=True)
class Views:
    """One view of each of n images, in the order in which they are shown.

    Attributes
    ----------
    index : int64 [n], which image of the dataset
    crops : float32 [n, 4], boxes as `batches.crop` has them; None, the images whole
    flips : bool [n], mirrored left to right before they are cropped; None, none is
    mixes : float32 [n, 4], draws as `batches.mix_weights` has them; None, none is mixed
    partners : int64 [n], the view that it is mixed with, as a place among these n; None with `mixes`
    """

    index: Tensor
    crops: Tensor | None = None
    flips: Tensor | None = None
    mixes: Tensor | None = None
    partners: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)

    @classmethod
    def draw(cls, index: Tensor, config, generator: Generator) -> Views:
        """Views of one batch of images. Of `config` the fields crop_scale, flip, mixup and cutmix are read, as in training."""
        count, crops, flips, mixes, partners = len(index), None, None, None, None
        if config.crop_scale < 1:
            crops = draw_crops(count, config.crop_scale, generator)
        if config.flip:
            flips = torch.rand(count, generator=generator) < 0.5
        if config.mixup or config.cutmix:
            mixes, partners = draw_mix(count, config, generator)
        return cls(index, crops, flips, mixes, partners)

    @classmethod
    def joined(cls, parts: Sequence[Views]) -> Views:
        """All views of the parts, one after the other, each mixed with the view it was mixed with before."""
        starts = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0).tolist()
        parts = [p if p.partners is None else replace(p, partners=p.partners + s) for p, s in zip(parts, starts)]
        fields = [[getattr(part, name) for part in parts] for name in cls.__dataclass_fields__]
        return cls(*(None if values[0] is None else torch.cat(values) for values in fields))

    def needed(self, part: slice) -> Tensor:
        """The places of the views that it takes to show those of `part`, int64, rising: their own and their partners'."""
        own = torch.arange(part.start, part.stop)
        return own if self.partners is None else torch.cat([own, self.partners[part]]).unique()

    def show(self, images: Tensor, part: slice) -> Tensor:
        """The views of `part`.

        images : the whole images of `needed(part)`, [M, C, H, W] in [0, 1]

        Returns
        -------
        [B, C, H, W] in [0, 1]
        """
        places = self.needed(part)  # [M]
        if self.flips is not None:
            flipped = self.flips[places].to(images.device)
            images = torch.where(flipped[:, None, None, None], images.flip(3), images)
        if self.crops is not None:
            images = crop(images, self.crops[places])
        if self.partners is None:
            return images
        own, partner = (
            torch.searchsorted(places, of).to(images.device)
            for of in (torch.arange(part.start, part.stop), self.partners[part])
        )
        weight = mix_weights(self.mixes[part], *images.shape[2:]).to(images.device)  # [B, H, W]
        return images[partner].lerp(images[own], weight[:, None])
