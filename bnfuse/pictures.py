"""Pictures for people: contact sheets of a dataset, also while its images form."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .files import atomic_path
from .manifest import image_file

_GAP = 2  # pixels between tiles
_TILE = 64  # small images are enlarged, by a whole factor, to at least this many pixels
_LARGEST_TILE = 160


def grid(rows: list[list[Tensor | None]], *, gap: int = _GAP) -> Image.Image:
    """Images side by side, a row of the list a row of the picture; None leaves a tile empty.

    Each image is uint8 [C, H, W] with 1 or 3 channels, all of one size.
    """
    tiles = [[None if image is None else _tile(image) for image in row] for row in rows]
    height, width = next(tile.shape[:2] for row in tiles for tile in row if tile is not None)
    columns = max(len(row) for row in tiles)
    sheet = torch.full((len(rows) * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, dtype=torch.uint8)
    for r, row in enumerate(tiles):
        for c, tile in enumerate(row):
            if tile is not None:
                top, left = gap + r * (height + gap), gap + c * (width + gap)
                sheet[top : top + height, left : left + width] = tile
    return Image.fromarray(sheet.numpy())


def _tile(image: Tensor) -> Tensor:
    """uint8 [C, H, W] → [h, w, 3], a small image enlarged by a whole factor, a large one thinned out."""
    factor, step = max(1, _TILE // max(image.shape[1:])), max(1, max(image.shape[1:]) // _LARGEST_TILE)
    image = image[:, ::step, ::step].repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    return image.expand(3, -1, -1).permute(1, 2, 0)


def save(picture: Image.Image, path: Path) -> None:
    """Writes a PNG, whole or not at all."""
    with atomic_path(path) as part:
        picture.save(part, format="PNG")


class ContactSheet:
    """contact_sheet.png of a store: a class a row, its first images, and the batch that is forming now.

    While work goes on it is refreshed every few seconds; `final` makes it from the images on disk alone, so that it is the
    same however often the run was stopped.
    """

    def __init__(self, root: Path, class_names: list[str], *, rows: int = 20, columns: int = 10, every: float = 5.0):
        self.root, self.class_names, self.num_classes = root, class_names, len(class_names)
        self.rows, self.columns, self.every = rows, columns, every
        self.last = time.monotonic()

    def refresh(self, unit, count: int, pixels: Callable[[list[int]], Tensor]) -> None:
        """Shows the unit's first `count` images, if the last picture is some seconds old.

        `pixels` gives some of them, uint8 [n, C, H, W]; it is asked for those alone that have a place on the sheet.
        """
        if time.monotonic() - self.last < self.every:
            return
        places = list(zip(unit.classes, unit.indices))[:count]
        rows = [row for row, (k, i) in enumerate(places) if k < self.rows and i < self.columns]
        forming = {places[row]: image for row, image in zip(rows, pixels(rows) if rows else ())}
        stored = self._stored()
        if shown := {**stored, **forming}:
            size = next(iter((forming or stored).values())).shape
            self._write({key: image for key, image in shown.items() if image.shape == size})
        self.last = time.monotonic()

    def final(self) -> None:
        self._write(self._stored())

    def _write(self, images: dict[tuple[int, int], Tensor]) -> None:
        classes = range(min(self.rows, self.num_classes))
        rows = [[images.get((k, i)) for i in range(self.columns)] for k in classes]
        columns = max((i + 1 for row in rows for i, image in enumerate(row) if image is not None), default=0)
        if columns:
            save(grid([row[:columns] for row in rows]), self.root / "contact_sheet.png")

    def _stored(self) -> dict[tuple[int, int], Tensor]:
        """The first images of each class that are on disk: (class, index) → uint8 [C, H, W]."""
        images = {}
        for k in range(min(self.rows, self.num_classes)):
            for i in range(self.columns):
                path = self.root / image_file(k, i, self.class_names)  # asked for by name: a manifest may be long
                if path.exists():
                    with Image.open(path) as picture:
                        images[k, i] = _to_tensor(picture)
        return images


def _to_tensor(picture: Image.Image) -> Tensor:
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.reshape(picture.height, picture.width, -1).permute(2, 0, 1)
