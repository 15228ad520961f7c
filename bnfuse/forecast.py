"""Says what a synthesis will take while little of it is done: disk before it starts, time after some timed steps.

What is said is reckoned in `estimate`; here it is measured, and told to whoever waits.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from torch import Tensor

from .errors import InputError
from .estimate import Disk, free_bytes, png_bytes_bound, readable_bytes, readable_seconds, seconds_left, soft_label_bytes
from .store import png_bytes

_ENCODED = 4  # images that are encoded to see what one takes


class Forecast:
    """Of one run over units, `done` of which are there already.

    Parameters
    ----------
    out : where the images will lie
    units : all of them, each with `number` and `classes`
    stages : ((height, width), steps) of a unit, in order
    image_shape : (C, H, W)
    logits : soft labels an image; 0, none are stored
    teams : groups of ranks that work on units of their own at the same time
    say : takes a line for people
    """

    def __init__(
        self,
        out: str | Path,
        units: Sequence,
        done: Collection[int],
        stages: Sequence[tuple[tuple[int, int], int]],
        image_shape: tuple[int, int, int],
        *,
        logits: int = 0,
        teams: int = 1,
        say: Callable[[str], object] = lambda line: None,
    ):
        self.out, self.say, self.teams, self.logits, self.image_shape = out, say, teams, logits, image_shape
        self.left = {unit.number: len(unit.classes) for unit in units if unit.number not in done}  # images of each unit
        self.stages = list(stages)
        self._window: tuple[int, int, float] | None = None  # unit, step and time of the last call, until the time is told
        self._encoded = False

    def begin(self) -> None:
        """Before the first step: tells what the disk needs, warns where it may be too small, InputError where it is."""
        if not self.left:
            return
        disk = self._disk(png_bytes_bound(*self.image_shape), is_bound=True)
        if disk.label_bytes > disk.free:
            raise InputError(f"to write to {self.out}: {disk.describe()}. Free some space, or choose another --out")
        self.say(f"to write: {disk.describe()}")
        if not disk.fits:
            warnings.warn(f"the disk may be too small: {disk.describe()}", stacklevel=2)

    def show(self, unit, step: int, images: Tensor) -> None:
        """Called now and then in a unit, as a display is; the first two calls within a stage give the time."""
        now, ends = time.monotonic(), self._ends()
        if self._window is None:
            self._window = unit.number, step, now
        elif self.stages:
            number, before, then = self._window
            stage = next(s for s, end in enumerate(ends) if step <= end)
            begins = ends[stage - 1] if stage else 0
            if number == unit.number and begins < before < step:
                pixels = len(images) * _area(self.stages[stage][0])
                self.say(self._time((now - then) / (step - before), pixels, unit.number, step))
                self.stages = []  # told
            else:
                self._window = unit.number, step, now

    def committed(self, unit, pixels: Tensor) -> None:
        """After a unit: `pixels` are its images, uint8 [N, C, H, W]. InputError where the rest does not fit the disk."""
        self.left.pop(unit.number, None)
        if self._encoded or not self.left:
            return
        self._encoded = True
        sizes = [len(png_bytes(image)) for image in pixels[:_ENCODED].cpu()]
        disk = self._disk(sum(sizes) / len(sizes), is_bound=False)
        self.say(f"still to write: {disk.describe()}")
        if not disk.fits:
            raise InputError(
                f"still to write to {self.out}: {disk.describe()}. What is committed is safe; free "
                f"{readable_bytes(disk.needed - disk.free)} more and run the same command again"
            )

    def _disk(self, image_bytes: float, is_bound: bool) -> Disk:
        images = sum(self.left.values())
        labels = soft_label_bytes(images, self.logits, len(self.left)) if self.logits else 0
        return Disk(images, image_bytes, is_bound, labels, free_bytes(self.out))

    def _time(self, seconds_a_step: float, pixels: float, unit: int, step: int) -> str:
        images = sum(self.left.values())
        steps = [(count, images * _area(size)) for size, count in self.stages]  # every unit at once: pixels add up
        whole = seconds_left(steps, seconds_a_step, pixels, self.teams)
        ranks = f" on {self.teams} ranks" if self.teams > 1 else ""
        pace = f"at {seconds_a_step:.3g} s a step"
        return f"{images:,} images in {len(self.left):,} units: about {readable_seconds(whole)}{ranks}, {pace}"

    def _ends(self) -> list[int]:
        """The last step of each stage, counted from the unit's start."""
        total, ends = 0, []
        for _, count in self.stages:
            total += count
            ends.append(total)
        return ends


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]
