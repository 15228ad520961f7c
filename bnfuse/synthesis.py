"""The driver: a config, and one readable loop from noise to images on disk.

Work is cut into units, one optimised batch each, whose images, seeds and random views depend on nothing but the config, so
that a run that was stopped goes on with the next unit and ends with the same images.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from . import backends
from .augment import Augmentation
from .datasets import load_dataset
from .errors import InputError
from .fusion import fuse
from .matching import Matcher
from .models import Teacher
from .objective import Objective
from .optimisation import derive_seed, optimise
from .pictures import ContactSheet
from .reference import DISTANCES
from .statistics import ClassStatistics
from .store import ImageRecord, Store

TARGETS = ("class", "global", "running")


@dataclass(frozen=True)
class SynthesisConfig:
    """Everything that decides which images come out, beside the teacher and the statistics.

    Attributes
    ----------
    images_per_class : images of each class
    classes : class numbers to synthesise (default all)
    batch_size : images optimised together
    classes_per_batch : classes that share a batch, each matched to its own statistics
    iterations : steps at full size
    low_resolution_iterations : steps at half the size before, from which the full size starts
    lr : Adam's learning rate at its peak, in units of the normalised image
    betas : Adam's betas
    warmup : steps over which the learning rate rises; then it falls to 0 by a cosine
    targets : statistics to match: each class's own, all classes pooled (global), or the network's running averages
        (running, needs no recording)
    distance : distance between statistics: see `reference.bn_distance`
    bn_weight : weight of the BN-statistic loss
    first_site_weight : weight of the first BN layer, where the other layers have 1; it alone sees the pixels' statistics
    ce_weight : weight of the cross-entropy
    tv_weight : weight of total variation
    l2_weight : weight of the mean squared pixel
    jitter : largest random shift, in pixels at full size
    flip : random left-right flips
    crop_scale : least share of the area in random resized crops; 1 for none
    noise_scale : standard deviation of the starting noise, normalised
    soft_labels : also store the teacher's logits of each image
    seed : seed of everything random

    Raises
    ------
    InputError : a value out of its range; the message names the field
    """

    images_per_class: int = 10
    classes: tuple[int, ...] | None = None
    batch_size: int = 100
    classes_per_batch: int = 1
    iterations: int = 1000
    low_resolution_iterations: int = 0
    lr: float = 0.1
    betas: tuple[float, float] = (0.5, 0.9)
    warmup: int = 0
    targets: str = "class"
    distance: str = "l2"
    bn_weight: float = 1.0
    first_site_weight: float = 10.0
    ce_weight: float = 1.0
    tv_weight: float = 0.0
    l2_weight: float = 0.0
    jitter: int = 0
    flip: bool = False
    crop_scale: float = 1.0
    noise_scale: float = 1.0
    soft_labels: bool = False
    seed: int = 0

    def __post_init__(self):
        positive = ("images_per_class", "batch_size", "classes_per_batch", "iterations", "lr")
        not_negative = (
            "low_resolution_iterations",
            "warmup",
            "bn_weight",
            "first_site_weight",
            "ce_weight",
            "tv_weight",
            "l2_weight",
            "noise_scale",
        )
        for name in positive + not_negative:
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (value == 0 and name in positive):
                raise InputError(f"{name} must be {'positive' if name in positive else 'at least 0'}, got {value}")
        for name, allowed in (("targets", TARGETS), ("distance", DISTANCES)):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.classes_per_batch > self.batch_size:
            raise InputError(f"{self.classes_per_batch} classes do not fit a batch of {self.batch_size} images")
        Augmentation(self.jitter, self.flip, self.crop_scale)  # checks its own

    @property
    def total_iterations(self) -> int:
        return self.low_resolution_iterations + self.iterations


@dataclass(frozen=True)
class Unit:
    """One batch of work.

    Attributes
    ----------
    number : from 0, the order of the units
    classes : int, the class of each of its N images, in runs; indices : their numbers within the class
    """

    number: int
    classes: tuple[int, ...]
    indices: tuple[int, ...]


def plan(config: SynthesisConfig, classes: Sequence[int]) -> list[Unit]:
    """Deals images_per_class images of each class to batches of at most batch_size, classes_per_batch classes in each."""
    share = config.batch_size // config.classes_per_batch
    units: list[Unit] = []
    for first in range(0, len(classes), config.classes_per_batch):
        together = classes[first : first + config.classes_per_batch]
        for start in range(0, config.images_per_class, share):
            indices = range(start, min(start + share, config.images_per_class))
            units.append(Unit(len(units), tuple(k for k in together for _ in indices), tuple(indices) * len(together)))
    return units


@dataclass(frozen=True)
class SynthesisResult:
    """What a run did: the store's folder, images in all, images made now, seconds of it, and the last loss terms."""

    out: Path
    images: int
    made: int
    seconds: float
    losses: dict[str, float]


def synthesize(
    teacher: Teacher,
    statistics: ClassStatistics | None,
    out: str | Path,
    config: SynthesisConfig = SynthesisConfig(),
    *,
    device: str | torch.device | None = None,
    backend: str = "auto",
    progress: bool = True,
) -> SynthesisResult:
    """Makes a synthetic dataset from noise and stores it, one unit after the other.

    Called again with the same arguments after it was stopped, it continues; called when done, it returns at once.

    Parameters
    ----------
    teacher : the frozen network and its preprocessing
    statistics : recorded with that teacher; None only with ``config.targets == "running"``
    out : folder of the dataset, see `store`; its contact_sheet.png is refreshed while the images form
    device : default CUDA where there is one
    backend : see `bnfuse.backends`

    Raises
    ------
    InputError : config, statistics and teacher do not fit, or `out` holds another dataset
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    source = _Source.of(teacher, statistics, config)
    matcher = source.matcher(config)
    objective = Objective(
        fuse(teacher.model.to(device), backend=backend),
        matcher.to(device),
        config.ce_weight,
        config.bn_weight,
        config.tv_weight,
        config.l2_weight,
    )
    units = plan(config, range(len(source.names)))
    card = source.card(config, backends.resolve(backend, device.type))
    counts = [config.images_per_class] * len(source.names)
    started, made, losses = time.monotonic(), 0, {}
    with Store.open(out, card=card, class_names=source.names, counts=counts) as store:
        display = _Display(store, len(units), config, teacher, progress)
        for unit in units:
            if unit.number in store.done:
                continue
            rows = [source.rows[k] for k in unit.classes]
            seeds = [derive_seed(config.seed, row, index) for row, index in zip(rows, unit.indices)]
            labels = torch.tensor(rows, device=device)
            images, losses = optimise(
                objective, labels, source.outputs(labels), seeds, unit.number, teacher, config, partial(display.show, unit)
            )
            pixels = _to_pixels(images, teacher)
            records = [ImageRecord(k, i, seed, losses) for k, i, seed in zip(unit.classes, unit.indices, seeds)]
            soft = _soft_labels(objective, pixels, teacher, source, device) if config.soft_labels else None
            store.commit(unit.number, pixels, records, soft)
            made += len(pixels)
        store.finish()
        display.close()
    return SynthesisResult(Path(out), sum(counts), made, time.monotonic() - started, losses)


class _Display:
    """The progress bar of a run, and its contact sheet."""

    def __init__(self, store: Store, units: int, config: SynthesisConfig, teacher: Teacher, progress: bool):
        self.store, self.units, self.steps, self.teacher = store, units, config.total_iterations, teacher
        self.sheet = ContactSheet(store.root, store.class_names)
        done = len(store.done) * self.steps
        self.bar = tqdm(total=units * self.steps, initial=done, desc="synthesising", unit="it", disable=not progress)

    def show(self, unit: Unit, step: int, images: Tensor, terms: dict[str, float]) -> None:
        self.bar.set_postfix({"unit": f"{unit.number + 1}/{self.units}"} | {k: f"{v:.3g}" for k, v in terms.items()})
        self.bar.update(len(self.store.done) * self.steps + step - self.bar.n)
        self.sheet.refresh(unit, lambda: _to_pixels(images, self.teacher))

    def close(self) -> None:
        self.bar.close()
        self.sheet.final()


@torch.no_grad()
def recognised(teacher: Teacher, statistics: ClassStatistics | None, out: str | Path, config: SynthesisConfig) -> float:
    """The fraction of a finished dataset's images, as stored, that the teacher takes for what was asked of them."""
    source = _Source.of(teacher, statistics, config)
    data = load_dataset(str(out))
    device = next(teacher.model.parameters()).device
    wanted = source.outputs(torch.tensor(source.rows))[data.labels]  # int64 [N]
    right = 0
    for part in torch.arange(len(data)).split(config.batch_size):
        images, _ = data.batch(part)
        logits = teacher.model(teacher.preprocessing.normalize(images.to(device)))
        right += int((logits.argmax(1).cpu() == wanted[part]).sum())
    return right / len(data)


def _to_pixels(images: Tensor, teacher: Teacher) -> Tensor:
    """Normalised [N, C, H, W] → uint8, rounded."""
    pixels = teacher.preprocessing.denormalize(images.detach().float())
    return (pixels.clamp(0, 1) * 255).round().to("cpu", torch.uint8).contiguous()


@torch.no_grad()
def _soft_labels(objective: Objective, pixels: Tensor, teacher: Teacher, source: _Source, device: torch.device) -> Tensor:
    """The teacher's logits of the stored images for the classes of the dataset: [N, K]."""
    logits, _ = objective.teacher(teacher.preprocessing.normalize(pixels.to(device).float() / 255))
    return logits[:, source.outputs(torch.tensor(source.rows, device=device))]


@dataclass(frozen=True)
class _Source:
    """What the images are made of: teacher, statistics, and the classes chosen from them.

    `names[k]` is class k of the new dataset; `rows[k]` its row in the target table, the class's number in the original.
    """

    teacher: Teacher
    statistics: ClassStatistics | None
    names: list[str]
    rows: list[int]

    @classmethod
    def of(cls, teacher: Teacher, statistics: ClassStatistics | None, config: SynthesisConfig) -> _Source:
        if statistics is None:
            if config.targets != "running":
                raise InputError(
                    f"targets={config.targets!r} needs class statistics: record them (`bnfuse record`), or match "
                    "the network's running averages with targets='running'"
                )
            names = teacher.class_names or [str(k) for k in range(teacher.num_classes)]
        else:
            statistics.check(teacher=teacher.model, preprocessing=teacher.preprocessing)
            names = statistics.class_names
            if max(statistics.outputs or [len(names) - 1]) >= teacher.num_classes:
                raise InputError(
                    f"the statistics have classes for outputs up to {max(statistics.outputs or [len(names) - 1])}, "
                    f"the teacher has {teacher.num_classes}; record them with outputs= (--outputs)"
                )
        rows = list(config.classes) if config.classes is not None else list(range(len(names)))
        if not rows or len(set(rows)) != len(rows) or not all(0 <= row < len(names) for row in rows):
            raise InputError(f"classes must be different numbers from 0 to {len(names) - 1}, got {rows}")
        return cls(teacher, statistics, [names[row] for row in rows], rows)

    def matcher(self, config: SynthesisConfig) -> Matcher:
        if config.targets == "running":
            matcher = Matcher.from_running(self.teacher.model, sites=self._sites_that_ran(), distance=config.distance)
        else:
            matcher = Matcher.from_statistics(self.statistics, per_class=config.targets == "class", distance=config.distance)
        matcher.site_weights[0] *= config.first_site_weight
        return matcher

    def _sites_that_ran(self) -> list[str] | None:
        return [name for name in self.statistics.sites if "#" not in name] if self.statistics else None

    def outputs(self, rows: Tensor) -> Tensor:
        """The teacher's output for each row of the targets."""
        if self.statistics is None or self.statistics.outputs is None:
            return rows
        return torch.tensor(self.statistics.outputs, device=rows.device)[rows]

    def card(self, config: SynthesisConfig, backend: str) -> dict:
        """What it takes to make the dataset again."""
        statistics = self.statistics
        return {
            "config": {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(config).items()},
            "backend": backend,
            "teacher": {
                "architecture": self.teacher.architecture,
                "fingerprint": self.teacher.fingerprint,
                "num_classes": self.teacher.num_classes,
            },
            "preprocessing": self.teacher.preprocessing.to_dict(),
            "statistics": None
            if statistics is None
            else {"sha256": statistics.digest(), "dataset": statistics.dataset, "images": statistics.images.tolist()},
        }
