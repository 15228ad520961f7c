"""The driver: a config, and one readable loop from noise to images on disk.

Work is cut into units, one optimised batch each, whose images, seeds and random views depend on nothing but the config, so
that a run that was stopped goes on where it was and ends with the same images. Under torchrun the units are dealt to the ranks,
or to teams of ranks, which need not talk while they work.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from . import backends
from .augment import Augmentation
from .card import CARD, read_card
from .datasets import load_dataset
from .distributed import Ranks, Team, choose_device, noticing_lost_ranks
from .errors import BnfuseError, InputError, Interrupted, UnitWarning
from .fusion import fuse
from .matching import Matcher
from .models import Teacher
from .objective import Objective
from .optimisation import NonFiniteLoss, derive_seed, optimise
from .pictures import ContactSheet
from .reference import DISTANCES
from .signals import Stop
from .snapshots import UnitCheckpoint
from .statistics import ClassStatistics
from .store import ImageRecord, Store, is_store

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

    @classmethod
    def from_card(cls, card: dict) -> SynthesisConfig:
        """The config that a dataset was begun with. InputError where the card has none that this version knows."""
        fields = card.get("config", {})
        try:
            return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})
        except TypeError as error:
            raise InputError(f"the card has no config that this bnfuse knows ({error}): use the version on the card") from error

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
    ranks_per_batch: int = 1,
    checkpoint_every: int = 0,
    retries: int = 2,
    threads: int | None = None,
) -> SynthesisResult:
    """Makes a synthetic dataset from noise and stores it, one unit after the other.

    Called again with the same arguments after it was stopped, it continues; called when done, it returns at once. Called on
    every rank under torchrun, it deals the units to the ranks; the number of ranks may be another each time. On the CPU the
    images are the same, byte for byte, whatever the number of ranks and however often they were stopped.

    Parameters
    ----------
    teacher : the frozen network and its preprocessing
    statistics : recorded with that teacher; None only with ``config.targets == "running"``
    out : folder of the dataset, see `store`; all ranks must see it. Its contact_sheet.png is refreshed while the images form
    device : default CUDA where there is one, under torchrun the one of LOCAL_RANK
    backend : see `bnfuse.backends`
    progress : show a bar, on the first rank
    ranks_per_batch : ranks that share each batch; then the images are the same to rounding
    checkpoint_every : steps from one checkpoint of a unit to the next, 0 for none; when a SIGTERM or SIGINT comes one is
        written in any case
    retries : how often a unit whose loss is not finite is made again, each time from other seeds
    threads : with which the CPU computes, on each rank; they decide how sums are rounded, so a dataset is continued with the
        number that it was begun with (default that, or torch's number)

    Raises
    ------
    InputError : config, statistics and teacher do not fit, or `out` holds another dataset
    Interrupted : a SIGTERM or SIGINT came; what was made is safe
    BnfuseError : a unit's loss was not finite, however it was begun
    """
    out = Path(out).expanduser()
    ranks = Ranks.start(ranks_per_batch)
    device = choose_device(device)
    maker = UnitMaker(teacher, statistics, config, device, backend)
    names = maker.source.names
    units = plan(config, range(len(names)))
    counts = [config.images_per_class] * len(names)
    started, losses = time.monotonic(), {}
    store: Store | None = None
    display: _Display | None = None

    def begin() -> dict:
        nonlocal store
        card = maker.source.card(config, maker.backend, _threads(threads, device, out))
        store = Store.open(out, card=card, class_names=names, counts=counts)
        return {"threads": card["threads"], "done": sorted(store.done)}

    with Stop(quiet=not ranks.first) as stop, ranks:
        try:
            begun = ranks.from_first(begin, stop)
            done = set(begun["done"])
            todo = [unit for unit in units if unit.number not in done]
            mine = todo[ranks.team_number :: ranks.teams]
            if ranks.first:
                display = _Display(store, sum(counts), len(units), config, teacher, progress)
            elif ranks.writes and mine:
                store = Store.join(out, ranks.rank, begun["done"])
            with computing_with(begun["threads"]), noticing_lost_ranks():
                for unit in mine:
                    show = partial(display.show, unit) if display else (lambda *_: None)
                    checkpoint = UnitCheckpoint(
                        out, unit.number, config.total_iterations, every=checkpoint_every, stop=stop, team=ranks.team
                    )
                    images, records = maker.make(unit, show, retries, team=ranks.team, checkpoint=checkpoint)
                    losses = records[0].losses
                    if ranks.writes:
                        store.commit(unit.number, images, records, maker.soft_labels(images))
                    stop.check()
            if not ranks.first and store is not None:
                store.close()  # the first rank waits for this, to fold the shards in
            ranks.wait(stop, display.count if display else lambda: None)
            if ranks.first:
                store.finish()
                display.finish()
        except Interrupted as stopped:
            safe = f"{display.committed()} of {sum(counts)} images are safe in {out}" if display else ""
            kept = "; ".join(filter(None, (stopped.kept, safe, "the same command goes on")))
            raise Interrupted(stopped.signal, kept) from None
        finally:
            if display is not None:
                display.bar.close()
            if store is not None:
                store.close()
    made = sum(len(unit.classes) for unit in todo)
    return SynthesisResult(out, sum(counts), made, time.monotonic() - started, losses)


def _threads(asked: int | None, device: torch.device, out: Path) -> int | None:
    """With how many threads the dataset `out` is made; None for GPUs, where it does not matter."""
    if asked is not None and asked < 1:
        raise InputError(f"threads must be at least 1, got {asked}")
    if device.type != "cpu":
        return None
    before = read_card(out).get("threads") if asked is None and is_store(out) and (out / CARD).exists() else None
    return asked or before or torch.get_num_threads()


@contextmanager
def computing_with(threads: int | None) -> Iterator[None]:
    """torch computes with so many threads on the CPU; None leaves their number as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Display:
    """The progress bar of a run, which shows the work of all ranks, and its contact sheet."""

    def __init__(self, store: Store, images: int, units: int, config: SynthesisConfig, teacher: Teacher, progress: bool):
        self.store, self.units, self.steps, self.teacher = store, units, config.total_iterations, teacher
        self.sheet = ContactSheet(store.root, store.class_names)
        self.others, self.asked = 0, time.monotonic()
        self.bar = tqdm(
            total=images, initial=self.committed(), desc="synthesising", unit="img", unit_scale=True, disable=not progress
        )

    def committed(self) -> int:
        """The images that all ranks have committed."""
        return sum(self.store.counts) + self.store.committed_by_others()

    def show(self, unit: Unit, step: int, images: Tensor, terms: dict[str, float]) -> None:
        self.bar.set_postfix({"unit": f"{unit.number + 1}/{self.units}"} | {k: f"{v:.3g}" for k, v in terms.items()}, False)
        self.count(len(images) * step / self.steps)
        self.sheet.refresh(unit, lambda: to_pixels(images, self.teacher))

    def count(self, forming: float = 0) -> None:
        """Moves the bar to what all ranks have committed, and the share of the batch that is forming on this one."""
        if time.monotonic() - self.asked > 2:
            self.others, self.asked = self.store.committed_by_others(), time.monotonic()
        self.bar.update(sum(self.store.counts) + self.others + forming - self.bar.n)

    def finish(self) -> None:
        self.bar.update(self.bar.total - self.bar.n)
        self.sheet.final()


class UnitMaker:
    """All that it takes to make the images of a unit, the same ones at every call.

    Attributes
    ----------
    source : teacher, statistics and classes
    backend : the kernels that run, by name
    """

    def __init__(
        self,
        teacher: Teacher,
        statistics: ClassStatistics | None,
        config: SynthesisConfig,
        device: torch.device,
        backend: str,
    ):
        self.teacher, self.config, self.device = teacher, config, device
        self.source = Source.of(teacher, statistics, config)
        matcher = self.source.matcher(config)
        self.backend = backends.resolve(backend, device.type)
        self.objective = Objective(
            fuse(teacher.model.to(device), backend=backend),
            matcher.to(device),
            config.ce_weight,
            config.bn_weight,
            config.tv_weight,
            config.l2_weight,
        )

    def seeds(self, unit: Unit, attempt: int = 0) -> list[int]:
        """One an image; those of the first attempt, and others for every further one."""
        more = ("attempt", attempt) if attempt else ()
        rows = [self.source.rows[k] for k in unit.classes]
        return [derive_seed(self.config.seed, row, index, *more) for row, index in zip(rows, unit.indices)]

    def make(
        self,
        unit: Unit,
        show: Callable[[int, Tensor, dict[str, float]], None] = lambda *_: None,
        retries: int = 0,
        *,
        attempt: int = 0,
        team: Team | None = None,
        checkpoint: UnitCheckpoint | None = None,
    ) -> tuple[Tensor, list[ImageRecord]]:
        """The unit's images, uint8 [N, C, H, W], and what is recorded of them.

        Parameters
        ----------
        show : see `optimise`
        retries : how many further attempts there may be where the loss is not finite
        attempt : the first one
        team : the ranks that share the batch, default this one alone
        checkpoint : of this unit; what it holds is gone on from

        Raises
        ------
        BnfuseError : no attempt had a finite loss
        Interrupted : from the checkpoint
        """
        labels = torch.tensor([self.source.rows[k] for k in unit.classes], device=self.device)
        state = checkpoint.load() if checkpoint else None
        attempt = checkpoint.attempt if state else attempt
        while True:
            seeds = self.seeds(unit, attempt)
            try:
                images, losses = optimise(
                    self.objective,
                    labels,
                    self.source.outputs(labels),
                    seeds,
                    unit.number,
                    self.teacher,
                    self.config,
                    show,
                    team=team or Team(),
                    state=state,
                    checkpoint=checkpoint,
                )
                break
            except NonFiniteLoss as error:
                if attempt >= retries:
                    tried = f" {attempt + 1} different sets of seeds all came to this." if attempt else ""
                    raise BnfuseError(
                        f"{error}.{tried} What was committed is safe. Let it try more often (retries, --retries), or make a "
                        "new dataset with other settings"
                    ) from error
                attempt, state = attempt + 1, None
                warnings.warn(f"{error}. Unit {unit.number} begins anew from other seeds", UnitWarning, stacklevel=2)
                if checkpoint is not None:
                    checkpoint.remove()
                    checkpoint.attempt = attempt
        records = [ImageRecord(k, i, seed, losses) for k, i, seed in zip(unit.classes, unit.indices, seeds)]
        return to_pixels(images, self.teacher), records

    @torch.no_grad()
    def soft_labels(self, images: Tensor) -> Tensor | None:
        """The teacher's logits of stored images, uint8 [N, C, H, W], for the classes of the dataset: [N, K]; None where the
        config wants none."""
        if not self.config.soft_labels:
            return None
        logits, _ = self.objective.teacher(self.teacher.preprocessing.normalize(images.to(self.device).float() / 255))
        return logits[:, self.source.outputs(torch.tensor(self.source.rows, device=self.device))]


@torch.no_grad()
def recognised(teacher: Teacher, statistics: ClassStatistics | None, out: str | Path, config: SynthesisConfig) -> float:
    """The fraction of a finished dataset's images, as stored, that the teacher takes for what was asked of them."""
    source = Source.of(teacher, statistics, config)
    data = load_dataset(str(out))
    device = next(teacher.model.parameters()).device
    wanted = source.outputs(torch.tensor(source.rows))[data.labels]  # int64 [N]
    right = 0
    for part in torch.arange(len(data)).split(config.batch_size):
        images, _ = data.batch(part)
        logits = teacher.model(teacher.preprocessing.normalize(images.to(device)))
        right += int((logits.argmax(1).cpu() == wanted[part]).sum())
    return right / len(data)


def to_pixels(images: Tensor, teacher: Teacher) -> Tensor:
    """Normalised [N, C, H, W] → uint8, rounded."""
    pixels = teacher.preprocessing.denormalize(images.detach().float())
    return (pixels.clamp(0, 1) * 255).round().to("cpu", torch.uint8).contiguous()


@dataclass(frozen=True)
class Source:
    """What the images are made of: teacher, statistics, and the classes chosen from them.

    `names[k]` is class k of the new dataset; `rows[k]` its row in the target table, the class's number in the original.
    """

    teacher: Teacher
    statistics: ClassStatistics | None
    names: list[str]
    rows: list[int]

    @classmethod
    def of(cls, teacher: Teacher, statistics: ClassStatistics | None, config: SynthesisConfig) -> Source:
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

    def card(self, config: SynthesisConfig, backend: str, threads: int | None) -> dict:
        """What it takes to make the dataset again."""
        statistics = self.statistics
        return {
            "config": {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(config).items()},
            "backend": backend,
            "threads": threads,
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
