"""The course of a synthesis for TensorBoard: loss terms, learning rate and pace, by global step."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from .errors import InputError


class Scalars:
    """Event files in a folder, with the interface of a display.

    Written are ``loss/TERM``, ``lr``, ``pace/steps_per_second`` and ``pace/images_per_second``, the images that went through
    the network in a second. The global step counts the steps of all units, in the order of their numbers.

    Parameters
    ----------
    folder : of the event files; several runs below one folder are compared
    steps_a_unit : of the schedule
    lr : step of a unit, from 1 → learning rate

    Raises
    ------
    InputError : tensorboard is not installed
    """

    def __init__(self, folder: str | Path, steps_a_unit: int, lr: Callable[[int], float]):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(f"--tensorboard needs tensorboard ({error}): pip install 'bnfuse[tensorboard]'") from error
        self.writer = SummaryWriter(str(folder))
        self.steps_a_unit, self.lr = steps_a_unit, lr
        self._last: tuple[int, int, float] | None = None  # unit, step and time of the last call

    def show(self, unit, step: int, images: Tensor, terms: dict[str, float]) -> None:
        """The unit's `step`, its images [N, …] so far and the loss terms."""
        at, now = unit.number * self.steps_a_unit + step, time.monotonic()
        for name, value in terms.items():
            self.writer.add_scalar(f"loss/{name}", value, at)
        self.writer.add_scalar("lr", self.lr(step), at)
        if self._last is not None and self._last[0] == unit.number:
            steps_per_second = (step - self._last[1]) / max(now - self._last[2], 1e-9)
            self.writer.add_scalar("pace/steps_per_second", steps_per_second, at)
            self.writer.add_scalar("pace/images_per_second", len(images) * steps_per_second, at)
        self._last = unit.number, step, now

    def close(self) -> None:
        """Flushes what was written; without it the last minutes may be missing."""
        self.writer.close()
