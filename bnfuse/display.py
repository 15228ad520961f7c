"""What a run shows while it works, on its first rank."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from .forecast import Forecast
from .optimisation import learning_rate, stages
from .pictures import ContactSheet
from .plans import Unit
from .scalars import Scalars
from .store import Store
from .units import UnitMaker, to_pixels

_LOOK_EVERY = 2.0  # seconds, at what other ranks have committed


class Display:
    """The progress bar, the contact sheet, what the run will take, and TensorBoard's scalars where asked for.

    Parameters
    ----------
    store, maker : of the run; teams : how many groups of ranks work at the same time
    progress : False shows no bar, and says nothing
    tensorboard : folder of the scalars, or None
    """

    def __init__(self, store: Store, maker: UnitMaker, teams: int, progress: bool, tensorboard: str | Path | None):
        self.store, self.teacher, self.units, self.steps = store, maker.teacher, maker.units, maker.config.total_iterations
        self.sheet = ContactSheet(store.root, store.class_names)
        self.scalars = Scalars(tensorboard, self.steps, partial(learning_rate, maker.config)) if tensorboard else None
        self.others, self.asked = 0, time.monotonic()
        images, preprocessing = sum(len(unit.classes) for unit in self.units), maker.teacher.preprocessing
        self.bar = tqdm(
            total=images, initial=self.committed(), desc="synthesising", unit="img", unit_scale=True, disable=not progress
        )
        self.forecast = Forecast(
            store.root,
            self.units,
            store.done,
            list(stages(preprocessing.image_size, maker.config)),
            (preprocessing.channels, *preprocessing.image_size),
            logits=len(store.class_names) if maker.config.soft_labels else 0,
            teams=teams,
            say=self.bar.write if progress else lambda line: None,
        )
        self.forecast.begin()

    def committed(self) -> int:
        """The images that all ranks have committed."""
        return sum(self.store.counts) + self.store.committed_by_others()

    def show(self, unit: Unit, step: int, images: Tensor, terms: dict[str, float]) -> None:
        """`images` are this rank's of the unit so far, normalised; `terms` the loss."""
        postfix = {"unit": f"{unit.number + 1}/{len(self.units)}"} | {k: f"{v:.3g}" for k, v in terms.items()}
        self.bar.set_postfix(postfix, refresh=False)
        self.count(len(unit.classes) * step / self.steps)
        self.sheet.refresh(unit, len(images), lambda rows: to_pixels(images[rows], self.teacher))
        self.forecast.show(unit, step, images)
        if self.scalars:
            self.scalars.show(unit, step, images, terms)

    def count(self, forming: float = 0) -> None:
        """Moves the bar to what all ranks have committed, and the share of the batch that is forming on this one.

        Never back: what has formed may still be on its way to the disk.
        """
        if time.monotonic() - self.asked > _LOOK_EVERY:
            self.others, self.asked = self.store.committed_by_others(), time.monotonic()
        self.bar.update(max(0, sum(self.store.counts) + self.others + forming - self.bar.n))

    def made(self, unit: Unit, pixels: Tensor) -> None:
        """After a unit: `pixels` are its images, uint8 [N, C, H, W]. InputError where the rest does not fit the disk."""
        self.forecast.committed(unit, pixels)

    def finish(self) -> None:
        """When every image is on disk."""
        self.bar.update(self.bar.total - self.bar.n)
        self.sheet.final()

    def close(self) -> None:
        self.bar.close()
        if self.scalars:
            self.scalars.close()
