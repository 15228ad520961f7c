"""`bnfuse relabel`: a teacher's logits of a finished dataset, of each image or of many augmented views of each.

The second kind is the "relabel" of the SRe2L family (its FKD: Shen and Xing, arXiv 2112.01528; Yin, Xing, Shen, arXiv
2306.13092): the student is shown the very views that the teacher labelled.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from .batches import Source, decoded, even_batches
from .card import card_bytes, refuse_differences, versions
from .configs import check_whole
from .datasets import as_spec, load_dataset
from .errors import InputError
from .estimate import check_space, label_bytes, readable_bytes
from .files import is_temporary, locked_folder, write_atomically
from .labels import (
    FORMAT,
    FORMAT_VERSION,
    LABELS,
    RELABEL,
    images_digest,
    is_labels,
    is_whole,
    labels_file,
    read_labels_card,
    sha256_of,
    write_views,
)
from .manifest import files_in, read_store
from .models import Teacher
from .seeds import derive_seed
from .views import Views

_IMAGES_A_FILE = 4096  # of which logits are held at once; with 1,000 classes 8 MB


@dataclass(frozen=True)
class RelabelConfig:
    """What the teacher is shown.

    Attributes
    ----------
    views : augmented views of each image, one in each pass over the dataset; 0, the image as it is, once
    batch_size : images the teacher is shown at a time, and among which partners to mix with are found: a student that
        trains with the same number needs no other images for it
    crop_scale : lower bound of the area of a view's random resized crop; 1.0 is off
    flip : mirror half of the views, left to right
    mixup, cutmix : alpha of the Beta distribution (arXiv 1710.09412, 1905.04899); 0 is off, of both each gets half
    seed : of the order of the images and their views

    Raises
    ------
    InputError : a value out of its range; the message names the field
    """

    views: int = 0
    batch_size: int = 128
    crop_scale: float = 0.08
    flip: bool = True
    mixup: float = 0.0
    cutmix: float = 0.0
    seed: int = 0

    def __post_init__(self):
        check_whole(self, {"views": 0, "batch_size": 2, "seed": 0})
        if not 0 < self.crop_scale <= 1:
            raise InputError(f"crop_scale must be above 0 and at most 1, got {self.crop_scale!r}")
        for name in ("mixup", "cutmix"):
            if not math.isfinite(getattr(self, name)) or getattr(self, name) < 0:
                raise InputError(f"{name} must be 0 or more, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class RelabelResult:
    """What was done: the folder of the labels, the views in all and those labelled now, the bytes in all, seconds of it."""

    out: Path
    views: int
    made: int
    bytes: int
    seconds: float


def relabel(
    dataset: str | Path,
    teacher: Teacher,
    config: RelabelConfig = RelabelConfig(),
    *,
    out: str | Path | None = None,
    outputs: Sequence[int] | None = None,
    device: str | torch.device | None = None,
    workers: int = 0,
    progress: bool = True,
) -> RelabelResult:
    """Labels a finished dataset with a teacher. Called again after it was stopped, it goes on; called when done, it returns.

    Parameters
    ----------
    dataset : folder of the store; its images are brought to the size that the teacher expects
    teacher : any network that tells its classes apart
    out : folder of the labels; default ``relabel`` in the dataset's
    outputs : the teacher's output for each class of the dataset, where neither number nor names tell
    device : default CUDA where there is one
    workers : processes that read images, where they are too many to be held in memory

    Raises
    ------
    InputError : the dataset is unfinished or damaged, the teacher does not know its classes, `out` holds other labels, the disk
        is too small, a logit is not finite in float16
    """
    started = time.monotonic()
    if workers < 0:
        raise InputError(f"workers must be at least 0, got {workers}")
    contents = read_store(dataset)
    if not contents.complete:
        raise InputError(f"{dataset} is not finished ({len(contents.entries)} images so far): finish it, then relabel it")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    preprocessing, names = teacher.preprocessing, contents.class_names
    columns = teacher.outputs_for(names, outputs)
    out = Path(out).expanduser() if out is not None else contents.root / RELABEL
    card = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": versions(),
        "dataset": {"images": len(contents.entries), "class_names": names, "sha256": images_digest(contents.entries)},
        "teacher": {
            "architecture": teacher.architecture,
            "fingerprint": teacher.fingerprint,
            "num_classes": teacher.num_classes,
        },
        "outputs": columns,
        "preprocessing": preprocessing.to_dict(),
        "config": asdict(config),
    }
    out.mkdir(parents=True, exist_ok=True)
    with locked_folder(out, f"another process is relabelling into {out}: wait until it ends, or choose another --out"):
        for left in filter(is_temporary, files_in(out)):  # by a killed process
            left.unlink()
        complete, hashes = _state(out, card)
        files = _plan(config, len(contents.entries))
        missing = [file for file in files if not is_whole(out / file.name, file.images, len(names))]
        made, total = (sum(file.images for file in some) for some in (missing, files))
        if missing:
            check_space(out, label_bytes(made, len(names), config), f"labels of {made:,} views")
            if complete is None:
                write_atomically(out / LABELS, card_bytes({**card, "complete": False}))
            if progress:
                size = readable_bytes(label_bytes(total, len(names), config))
                print(f"labels of {total:,} views take {size}, {made:,} of them are to be made", flush=True)
            images = load_dataset(as_spec(contents.root), image_size=preprocessing.image_size, channels=preprocessing.channels)
            source = Source(decoded(images), preprocessing, device, workers)
            teacher.model.to(device)
            bar = tqdm(total=total, initial=total - made, desc="relabelling", unit="view", disable=not progress)
            with bar:
                for number, files_of_pass in groupby(missing, lambda file: file.number):
                    batches = _batches(config, number, len(contents.entries))
                    for file in files_of_pass:
                        shown = {b: batches[b] for b in range(file.first, file.last)}
                        views, logits = _labelled(number, shown, source, teacher, columns, config, bar.update)
                        hashes[file.name] = write_views(out / file.name, views, logits)
        if missing or not complete:
            hashes = {file.name: hashes.get(file.name) or sha256_of(out / file.name) for file in files}
            write_atomically(out / LABELS, card_bytes({**card, "complete": True, "files": hashes}))
        size = sum((out / file.name).stat().st_size for file in files)
    return RelabelResult(out, total, made, size, time.monotonic() - started)


def _state(out: Path, card: dict) -> tuple[bool | None, dict[str, str]]:
    """Whether the labels in `out` are complete, None where there are none; and the hashes of its files, if it has them.

    InputError for others than the card's.
    """
    if is_labels(out):
        existing = read_labels_card(out)
        complete, hashes = existing.pop("complete"), existing.pop("files", {})
        refuse_differences(out, json.loads(json.dumps(card)), existing, "a relabelling")
        return complete, hashes
    if others := sorted(path.name for path in out.iterdir() if not path.name.startswith(".")):
        raise InputError(f"{out} is not empty and holds no labels ({', '.join(others[:5])}): choose another --out")
    return None, {}


# ---- what is in which file ----


@dataclass(frozen=True)
class _File:
    """One file of views: batches `first` to `last` (excluded) of pass `number`, so many images in all."""

    name: str
    number: int
    first: int
    last: int
    images: int


def _plan(config: RelabelConfig, images: int) -> list[_File]:
    """Every file, in order: it depends on nothing but the config and the number of images."""
    parts = even_batches(images, config.batch_size)
    at_once = max(1, _IMAGES_A_FILE // config.batch_size)
    of_pass = []  # first and last batch of each file, images in it
    for first in range(0, len(parts), at_once):
        last = min(first + at_once, len(parts))
        of_pass.append((first, last, parts[last - 1].stop - parts[first].start))
    passes = range(max(1, config.views))
    return [_File(labels_file(number, f), number, *file) for number in passes for f, file in enumerate(of_pass)]


def _batches(config: RelabelConfig, number: int, images: int) -> list[Tensor]:
    """The images of each batch of a pass, int64 [B] each: in an order of its own, or in the dataset's for plain labels."""
    order = torch.arange(images)
    if config.views:
        order = torch.randperm(images, generator=_generator(config, "order", number))
    return [order[part] for part in even_batches(images, config.batch_size)]


def _generator(config: RelabelConfig, *parts: str | int) -> Generator:
    return Generator().manual_seed(derive_seed(config.seed, "relabel", *parts))


@torch.no_grad()
def _labelled(
    number: int, batches: dict[int, Tensor], source: Source, teacher: Teacher, columns, config: RelabelConfig, report
) -> tuple[Views, Tensor]:
    """The views of some batches of pass `number`, drawn and shown to the teacher, and its logits float16 [n, K]."""
    drawn, logits = [], []
    for (batch, index), (_, images) in zip(batches.items(), source.batches(list(batches.values()))):
        if config.views:
            views = Views.draw(index, config, _generator(config, "views", number, batch))
            images = views.show(images, slice(0, len(index)))
        else:
            views = Views(index)
        answer = teacher.model(teacher.preprocessing.normalize(images)).float()
        answer = (answer if columns is None else answer[:, columns]).to("cpu", torch.float16)  # [B, K]
        if not answer.isfinite().all():
            raise InputError(
                "the teacher's logits must be finite in float16 (at most 65504); it overflows on some view, check its weights"
            )
        drawn.append(views)
        logits.append(answer)
        report(len(index))
    return Views.joined(drawn), torch.cat(logits)
