"""What a run will take, before it has taken it: time and disk, and whether the disk has room.

Arithmetic on numbers that others measured; nothing here runs a network or writes a file.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import InputError

_PNG_OVERHEAD = 8 + 25 + 12  # signature, IHDR, IEND
_IDAT_BYTES = 65536  # of a data chunk, as PIL writes them, each with a frame of 12
_BLOCK = 4096  # of most file systems


def png_bytes_bound(channels: int, height: int, width: int) -> int:
    """What a PNG of 8 bits takes at most: nothing of it could be compressed, and a byte a row names its filter."""
    raw = height * (1 + width * channels)
    stored = raw + raw // 128 + 16  # what zlib and zlib-ng add to what they cannot compress is less
    return _PNG_OVERHEAD + stored + 12 * math.ceil(stored / _IDAT_BYTES)


def soft_label_bytes(images: int, num_classes: int, units: int) -> int:
    """Logits of a store, float16, and of each unit's file the header, of at most 96 bytes."""
    return 2 * images * num_classes + 96 * units


def label_bytes(views: int, num_classes: int, config) -> int:
    """What `relabel` writes for so many views, but for its files' headers; `config` is its `RelabelConfig`."""
    drawn = 4  # index
    if config.views:
        drawn += 16 * (config.crop_scale < 1) + config.flip + 20 * bool(config.mixup or config.cutmix)
    return views * (2 * num_classes + drawn)


def seconds_left(steps: Iterable[tuple[int, float]], seconds_a_step: float, pixels_a_step: float, teams: int = 1) -> float:
    """How long steps take, of which one was timed.

    Parameters
    ----------
    steps : (how many steps, pixels in each: images × area) for every stage of every unit that is left; a step's time is taken
        to grow with its pixels
    seconds_a_step, pixels_a_step : of the step that was timed
    teams : groups of ranks that work on units of their own at the same time
    """
    return sum(count * pixels for count, pixels in steps) * seconds_a_step / pixels_a_step / teams


@dataclass(frozen=True)
class Disk:
    """What is still to be written, and what is free.

    Attributes
    ----------
    images, image_bytes : images to come, and bytes of one
    is_bound : whether `image_bytes` is what one takes at most; else it is the mean of real encodings
    label_bytes : of soft labels to come
    free : bytes on the file system
    """

    images: int
    image_bytes: float
    is_bound: bool
    label_bytes: int
    free: int

    @property
    def fits(self) -> bool:
        return self.needed <= self.free

    @property
    def needed(self) -> int:
        """Bytes of the disk: a file takes whole blocks."""
        return self.images * math.ceil(self.image_bytes / _BLOCK) * _BLOCK + self.label_bytes

    def describe(self) -> str:
        about = "at most" if self.is_bound else "about"
        labels = f" and {readable_bytes(self.label_bytes)} of soft labels" if self.label_bytes else ""
        images = readable_bytes(round(self.images * self.image_bytes))
        needed, free = readable_bytes(self.needed), readable_bytes(self.free)
        return f"{about} {images} of images{labels}, {needed} in whole blocks; {free} are free"


def free_bytes(path: str | Path) -> int:
    """Free space where `path` lies or will lie."""
    path = Path(path).expanduser().absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def check_space(path: str | Path, needed: int, what: str) -> None:
    """InputError where `path`'s file system has not `needed` bytes free."""
    if (free := free_bytes(path)) < needed:
        raise InputError(
            f"{what} take {readable_bytes(needed)}, but only {readable_bytes(free)} are free where {os.fspath(path)} lies: "
            "free some space, choose another --out, or ask for less"
        )


def readable_bytes(count: float) -> str:
    """1234567 → "1.2 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def readable_seconds(seconds: float) -> str:
    """9012 → "2 h 30 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // (24 * 60)} days {minutes % (24 * 60) // 60} h"
