"""The driver: a config, and one readable loop from noise to images on disk.

Work is cut into units, one optimised batch each, whose images, seeds and random views depend on nothing but the config, so
that a run that was stopped goes on with the next unit and ends with the same images.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
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
from .forecast import Forecast
from .fusion import fuse
from .matching import Matcher
from .models import Teacher
from .objective import PRECISIONS, Objective
from .optimisation import learning_rate, optimise, stages
from .pictures import ContactSheet
from .reference import DISTANCES
from .scalars import Scalars
from .seeds import derive_seed
from .statistics import ClassStatistics
from .store import ImageRecord, Store
from .targets import Targets
from .virtual import check_micro_batch
from .writing import BackgroundWriter

TARGETS = ("class", "global", "running")
CLASS_PLANS = ("grouped", "balanced")


@dataclass(frozen=True)
class SynthesisConfig:
    """Everything that decides which images come out, beside the teacher and the statistics.

    Attributes
    ----------
    images_per_class : images of each class
    classes : class numbers to synthesise (default all)
    batch_size : images optimised together
    class_plan : which classes share a batch: classes_per_batch of them, until their images are dealt (grouped), or of every
        class as many as of any other, to one image, in batches of even size (balanced), as SRe2L has one image of each of 100
        classes
    classes_per_batch : classes of a grouped batch, each matched to its own statistics
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
    precision : of activations and their gradients in the teacher: float32, or bfloat16 (autocast), which is faster on hardware
        that has it; moments, losses and images are float32 in both
    soft_labels : also store the teacher's logits of each image
    seed : seed of everything random

    Raises
    ------
    InputError : a value out of its range; the message names the field
    """

    images_per_class: int = 10
    classes: tuple[int, ...] | None = None
    batch_size: int = 100
    class_plan: str = "grouped"
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
    precision: str = "float32"
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
        allowed_values = {"targets": TARGETS, "distance": DISTANCES, "precision": PRECISIONS, "class_plan": CLASS_PLANS}
        for name, allowed in allowed_values.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.class_plan == "balanced" and self.classes_per_batch != 1:
            raise InputError(
                f"a balanced batch has every class; classes_per_batch={self.classes_per_batch} is for grouped ones"
            )
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
    """Deals images_per_class images of each class to batches of at most batch_size, as `class_plan` says.

    Every image is in one unit; in a unit each class is one run, in the order of `classes`.
    """
    batches = _balanced(config, classes) if config.class_plan == "balanced" else _grouped(config, classes)
    return [Unit(number, *zip(*batch)) for number, batch in enumerate(batches)]


def _grouped(config: SynthesisConfig, classes: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """(class, index) of each image of a batch: classes_per_batch classes, the batch shared out evenly."""
    share = config.batch_size // config.classes_per_batch
    for first in range(0, len(classes), config.classes_per_batch):
        together = classes[first : first + config.classes_per_batch]
        for start in range(0, config.images_per_class, share):
            indices = range(start, min(start + share, config.images_per_class))
            yield [(k, index) for k in together for index in indices]


def _balanced(config: SynthesisConfig, classes: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """(class, index) of each image of a batch. One image of each class, then the next of each: a batch is a stretch of that
    sequence, so that in it no class has two images more than another. Batches differ by at most one image."""
    total = config.images_per_class * len(classes)
    batches = math.ceil(total / config.batch_size)
    ends = [total * (i + 1) // batches for i in range(batches)]
    for start, end in zip([0, *ends], ends):
        dealt = [divmod(i, len(classes)) for i in range(start, end)]  # (index, place of the class)
        yield [(classes[place], index) for place, index in sorted((place, index) for index, place in dealt)]


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
    micro_batch: int | None = None,
    offload: bool = False,
    progress: bool = True,
    tensorboard: str | Path | None = None,
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
    micro_batch : images that are in the network together, as many as memory allows; None, the whole batch. It changes rounding
        alone: losses and gradients are those of ``config.batch_size`` images, see `virtual`
    offload : images and the optimiser's state stay in the CPU's memory, and a micro-batch of them is on the device, so that the
        device's memory does not depend on the batch size at all
    tensorboard : folder for the course of the losses, see `scalars`

    Raises
    ------
    InputError : config, statistics and teacher do not fit, `out` holds another dataset, or the disk is too small for it
    """
    check_micro_batch(micro_batch)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    source = _Source.of(teacher, statistics, config)
    units = plan(config, range(len(source.names)))
    targets = source.targets(config, max(len(set(unit.classes)) for unit in units), device)
    objective = Objective(
        fuse(teacher.model.to(device), backend=backend),
        targets.matcher,
        config.ce_weight,
        config.bn_weight,
        config.tv_weight,
        config.l2_weight,
        config.precision,
    )
    card = source.card(config, backends.resolve(backend, device.type))
    counts = [config.images_per_class] * len(source.names)
    started, made, losses = time.monotonic(), 0, {}
    with Store.open(out, card=card, class_names=source.names, counts=counts) as store, BackgroundWriter(store) as writer:
        display = _Display(store, units, config, teacher, progress, tensorboard)
        for unit in units:
            if unit.number in store.done:
                continue
            rows = [source.rows[k] for k in unit.classes]
            seeds = [derive_seed(config.seed, row, index) for row, index in zip(rows, unit.indices)]
            labels, outputs = torch.tensor(targets.rows(rows), device=device), source.outputs(torch.tensor(rows, device=device))
            images, losses = optimise(
                objective,
                labels,
                outputs,
                seeds,
                unit.number,
                teacher,
                config,
                partial(display.show, unit),
                micro_batch=micro_batch,
                offload=offload,
            )
            pixels = _to_pixels(images, teacher)
            records = [ImageRecord(k, i, seed, losses) for k, i, seed in zip(unit.classes, unit.indices, seeds)]
            soft = _soft_labels(objective, pixels, teacher, source, device, micro_batch) if config.soft_labels else None
            writer.commit(unit.number, pixels, records, soft)
            display.committed(unit, pixels)
            made += len(pixels)
        writer.drain()
        store.finish()
        display.close()
    return SynthesisResult(Path(out), sum(counts), made, time.monotonic() - started, losses)


class _Display:
    """What a run shows: the progress bar, the contact sheet, what it will take, and TensorBoard's scalars where asked for."""

    def __init__(
        self,
        store: Store,
        units: list[Unit],
        config: SynthesisConfig,
        teacher: Teacher,
        progress: bool,
        tensorboard: str | Path | None,
    ):
        self.units, self.steps, self.teacher = len(units), config.total_iterations, teacher
        self.sheet = ContactSheet(store.root, store.class_names)
        self.scalars = tensorboard and Scalars(tensorboard, self.steps, partial(learning_rate, config))
        self.units_done = len(store.done)  # or being written
        done, total = self.units_done * self.steps, self.units * self.steps
        self.bar = tqdm(total=total, initial=done, desc="synthesising", unit="it", disable=not progress)
        self.forecast = Forecast(
            store.root,
            units,
            store.done,
            list(stages(teacher.preprocessing.image_size, config)),
            (teacher.preprocessing.channels, *teacher.preprocessing.image_size),
            logits=len(store.class_names) if config.soft_labels else 0,
            say=self.bar.write if progress else lambda line: None,
        )
        self.forecast.begin()

    def show(self, unit: Unit, step: int, images: Tensor, terms: dict[str, float]) -> None:
        self.bar.set_postfix({"unit": f"{unit.number + 1}/{self.units}"} | {k: f"{v:.3g}" for k, v in terms.items()})
        self.bar.update(self.units_done * self.steps + step - self.bar.n)
        self.sheet.refresh(unit, lambda: _to_pixels(images, self.teacher))
        self.forecast.show(unit, step, images)
        if self.scalars:
            self.scalars.show(unit, step, images, terms)

    def committed(self, unit: Unit, pixels: Tensor) -> None:
        self.units_done += 1
        self.forecast.committed(unit, pixels)

    def close(self) -> None:
        self.bar.close()
        self.sheet.final()
        if self.scalars:
            self.scalars.close()


@torch.no_grad()
def recognised(
    teacher: Teacher,
    statistics: ClassStatistics | None,
    out: str | Path,
    config: SynthesisConfig,
    *,
    micro_batch: int | None = None,
) -> float:
    """The fraction of a finished dataset's images, as stored, that the teacher takes for what was asked of them."""
    source = _Source.of(teacher, statistics, config)
    data = load_dataset(str(out))
    device = next(teacher.model.parameters()).device
    wanted = source.outputs(torch.tensor(source.rows))[data.labels]  # int64 [N]
    right = 0
    for part in torch.arange(len(data)).split(micro_batch or config.batch_size):
        images, _ = data.batch(part)
        logits = teacher.model(teacher.preprocessing.normalize(images.to(device)))
        right += int((logits.argmax(1).cpu() == wanted[part]).sum())
    return right / len(data)


def _to_pixels(images: Tensor, teacher: Teacher) -> Tensor:
    """Normalised [N, C, H, W] → uint8, rounded."""
    pixels = teacher.preprocessing.denormalize(images.detach().float())
    return (pixels.clamp(0, 1) * 255).round().to("cpu", torch.uint8).contiguous()


@torch.no_grad()
def _soft_labels(
    objective: Objective, pixels: Tensor, teacher: Teacher, source: _Source, device: torch.device, micro_batch: int | None
) -> Tensor:
    """The teacher's logits of the stored images for the classes of the dataset: [N, K]."""
    outputs = source.outputs(torch.tensor(source.rows, device=device))
    normalised = (
        teacher.preprocessing.normalize(part.to(device).float() / 255) for part in pixels.split(micro_batch or len(pixels))
    )
    return torch.cat([objective.teacher(images)[0][:, outputs] for images in normalised])


@dataclass(frozen=True)
class _Source:
    """What the images are made of: teacher, statistics, and the classes chosen from them.

    `names[k]` is class k of the new dataset; `rows[k]` its number among the classes of the statistics.
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

    def targets(self, config: SynthesisConfig, at_once: int, device: torch.device) -> Targets:
        """On the device; `at_once` is the most classes that a unit has."""
        if config.targets == "class":
            targets = Targets.class_wise(self.statistics, self.rows, at_once=at_once, device=device, distance=config.distance)
        elif config.targets == "global":
            targets = Targets.pooled(Matcher.from_statistics(self.statistics, per_class=False, distance=config.distance))
        else:
            sites = self._sites_that_ran()
            targets = Targets.pooled(Matcher.from_running(self.teacher.model, sites=sites, distance=config.distance))
        targets.matcher.to(device).site_weights[0] *= config.first_site_weight
        return targets

    def _sites_that_ran(self) -> list[str] | None:
        return [name for name in self.statistics.sites if "#" not in name] if self.statistics else None

    def outputs(self, rows: Tensor) -> Tensor:
        """The teacher's output for each of the original classes."""
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
