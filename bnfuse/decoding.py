"""Image files, in a folder or in memory: found, opened, brought to a size. `datasets` makes datasets of them."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .errors import InputError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})
GREY_MODES = {"1", "L", "LA"}  # of PIL
_DEEP_MODES = {"I", "F", "I;16", "I;16L", "I;16B", "I;16N"}  # more than 8 bits, which PIL would clip


@dataclass(frozen=True, eq=False)
class EncodedBytes:
    """An image file that lies in memory, and where it came from."""

    data: np.ndarray  # uint8 [bytes of the file]
    origin: str
    index: int

    def __str__(self) -> str:
        return f"image {self.index} of {self.origin}"


def image_files(folder: Path) -> list[Path]:
    """The image files in `folder` and below, sorted; links to files are followed, links to deeper folders are not."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name)
            for name in files
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
        ]
    return sorted(found)


@contextmanager
def opened(source: Path | EncodedBytes) -> Iterator[Image.Image]:
    """The image, not decoded yet. Whatever PIL has against it, here or in the block, is an InputError naming it."""
    try:
        with Image.open(io.BytesIO(source.data) if isinstance(source, EncodedBytes) else source) as image:
            if image.mode in _DEEP_MODES:
                raise InputError(f"{source} has more than 8 bits a pixel (mode {image.mode}): convert it to 8 bits")
            yield image
    except InputError:
        raise
    except Exception as error:  # a damaged file makes PIL raise almost anything
        raise InputError(f"{source} cannot be decoded as an image ({error}): replace or remove it") from error


def header(source: Path | EncodedBytes) -> tuple[str, tuple[int, int]]:
    """(PIL's mode, (height, width)) of an image, without decoding it."""
    with opened(source) as image:
        return image.mode, (image.height, image.width)


def fitted(image: Image.Image, size: tuple[int, int], channels: int) -> np.ndarray:
    """The image as grey or RGB, scaled (bicubic, antialiased) to just cover `size`, cropped to its centre.

    Returns uint8 [H, W, C].
    """
    image = image.convert("L" if channels == 1 else "RGB")
    height, width = size
    if (image.height, image.width) != (height, width):
        scale = max(height / image.height, width / image.width)
        covering = max(width, round(scale * image.width)), max(height, round(scale * image.height))
        image = image.resize(covering, Image.Resampling.BICUBIC)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    return np.array(image).reshape(height, width, channels)
