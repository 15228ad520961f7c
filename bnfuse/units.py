"""What a unit's images are made of, and the making of them: the same ones at every call, on whatever rank."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import backends
from .datasets import as_spec, load_dataset
from .distributed import ALONE, Team
from .ensemble import Ensemble
from .errors import BnfuseError, InputError, UnitWarning
from .fusion import fuse
from .matching import Matcher
from .models import Teacher, batchnorm_layers
from .objective import Objective
from .optimisation import NonFiniteLoss, check_cuda_graph, optimise
from .plans import SynthesisConfig, Unit, deal, in_runs, plan
from .seeds import derive_seed
from .sites import select
from .snapshots import UnitCheckpoint
from .spectrum import check_colours
from .statistics import ClassStatistics
from .store import ImageRecord
from .targets import TARGET_BYTES, Targets, budget_of_each, row_bytes
from .virtual import check_micro_batch

_CONVERTED_AT_ONCE = 256  # images


class UnitMaker:
    """All that it takes to make the images of a unit, the same ones at every call.

    Parameters
    ----------
    teacher, statistics, config, device, backend, micro_batch, offload, cuda_graph, more_teachers : as in `synthesize`

    Attributes
    ----------
    source : teacher, statistics and classes; more_sources : those of the further teachers
    counts : images of each class
    units : all of them, in their order
    backend : the kernels that run, by name
    """

    def __init__(
        self,
        teacher: Teacher,
        statistics: ClassStatistics | None,
        config: SynthesisConfig,
        device: torch.device,
        backend: str,
        micro_batch: int | None = None,
        offload: bool = False,
        cuda_graph: bool = False,
        more_teachers: Sequence[tuple[Teacher, ClassStatistics | None]] = (),
    ):
        check_micro_batch(micro_batch)
        check_colours(teacher.preprocessing.channels, config.chroma_scale)
        if cuda_graph:
            check_cuda_graph(device, micro_batch is None and not offload)
        self.teacher, self.config, self.device = teacher, config, device
        self.micro_batch, self.offload, self.cuda_graph = micro_batch, offload, cuda_graph
        self.source = Source.of(teacher, statistics, config)
        self.counts = self.source.counts(config)
        self._rows = self.source.target_rows(config, self.counts)
        self.units = plan(config, range(len(self.counts)), self.counts)
        if self.source.has_subclasses(config):
            self.units = [in_runs(unit, self._rows) for unit in self.units]
        self.backend = backends.resolve(backend, device.type)
        self.more_sources = []
        for number, more in enumerate(more_teachers, start=2):
            try:
                other = Source.of(*more, config)
            except InputError as error:
                raise InputError(f"teacher {number} (--more-teachers, --more-statistics): {error}") from error
            self.more_sources.append(other)
            self.source.check_alike(other, number)
            self.source.check_subclasses(other, number, config)
        if not self.more_sources and (config.teacher_weights or config.teacher_priors):
            raise InputError(
                "teacher_weights and teacher_priors are for several teachers: give --more-teachers (more_teachers)"
            )
        sources = [self.source, *self.more_sources]
        config.committee.check(len(sources))
        at_once = max(len(set(self.rows(unit))) for unit in self.units)
        budget = budget_of_each([source.target_bytes(config) for source in sources])
        self.targets = [source.targets(config, at_once, device, budget) for source in sources]
        members = [self._objective(*pair, backend) for pair in zip(sources, self.targets)]
        self.objective = Ensemble(members, config.committee) if self.more_sources else members[0]

    def _objective(self, source: Source, targets: Targets, backend: str) -> Objective:
        config = self.config
        return Objective(
            fuse(source.teacher.model.to(self.device), sites=config.sites, backend=backend),
            targets.matcher,
            config.ce_weight,
            config.bn_weight,
            config.tv_weight,
            config.l2_weight,
            config.precision,
            config.prior_kind,
            config.round_moments,
        )

    def card(self, threads: int | None, ranks_per_batch: int = 1) -> dict:
        """What it takes to make the dataset again."""
        card = self.source.card(self.config, self.backend, threads, self.micro_batch, ranks_per_batch)
        if self.more_sources:
            card["more_teachers"] = [source.of_whom() for source in self.more_sources]
        return card

    def rows(self, unit: Unit) -> list[int]:
        """Of each image of a unit, the row of the statistics that it is matched to; in runs."""
        return [self._rows[k][index] for k, index in zip(unit.classes, unit.indices)]

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
        team: Team = ALONE,
        checkpoint: UnitCheckpoint | None = None,
    ) -> tuple[Tensor, list[ImageRecord]]:
        """The unit's images, uint8 [N, C, H, W], and what is recorded of them.

        Parameters
        ----------
        show : see `optimise`
        retries : how many further attempts there may be where the loss is not finite
        attempt : the first one
        team : the ranks that share the batch
        checkpoint : of this unit; what it holds is gone on from

        Raises
        ------
        BnfuseError : no attempt had a finite loss
        Interrupted : from the checkpoint
        """
        rows = self.rows(unit)
        groups = [targets.groups(rows, self.config.grouping) for targets in self.targets][0]  # the same for all teachers
        outputs = self.source.outputs(torch.tensor([self.source.rows[k] for k in unit.classes], device=self.device))
        state = checkpoint.load() if checkpoint else None
        attempt = checkpoint.attempt if state else attempt
        while True:
            seeds = self.seeds(unit, attempt)
            try:
                images, losses = optimise(
                    self.objective,
                    groups,
                    outputs,
                    seeds,
                    unit.number,
                    self.teacher,
                    self.config,
                    show,
                    micro_batch=self.micro_batch,
                    offload=self.offload,
                    cuda_graph=self.cuda_graph,
                    team=team,
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
        outputs = self.source.outputs(torch.tensor(self.source.rows, device=self.device))
        parts = (part.to(self.device).float() / 255 for part in images.split(self.micro_batch or len(images)))
        return torch.cat([self.objective.teacher(self.teacher.preprocessing.normalize(part))[0][:, outputs] for part in parts])


def outputs_asked(
    teacher: Teacher, statistics: ClassStatistics | None, config: SynthesisConfig, judge: Teacher | None = None
) -> Tensor:
    """The teacher's output for each of the dataset's K classes, or the judge's: int64 [K].

    A judge's output for a class is that of the same name; where it has no such names the teacher's, of as many outputs; else it
    has the dataset's classes in their order. InputError where none of it tells.
    """
    source = Source.of(teacher, statistics, config)
    by_name = judge is not None and set(source.names) <= set(judge.class_names or [])
    if by_name or judge is not None and judge.num_classes != teacher.num_classes:
        try:
            return torch.tensor(judge.outputs_for(source.names) or range(len(source.names)))
        except InputError as error:
            raise InputError(
                f"the judge, {judge.architecture}, tells {judge.num_classes} classes apart and names "
                f"{'none' if judge.class_names is None else 'others'}: one is needed that names all of the dataset's "
                f"{len(source.names)}, or has as many outputs as these or as the teacher"
            ) from error
    return source.outputs(torch.tensor(source.rows))


@torch.no_grad()
def recognised(
    teacher: Teacher,
    statistics: ClassStatistics | None,
    out: str | Path,
    config: SynthesisConfig,
    *,
    micro_batch: int | None = None,
    judge: Teacher | None = None,
) -> float:
    """The fraction of a finished dataset's images, as stored, that a network takes for what was asked of them.

    It is the teacher, or another: `judge`, which is shown them at its own size, see `outputs_asked`.
    """
    network, outputs = judge or teacher, outputs_asked(teacher, statistics, config, judge)
    preprocessing = network.preprocessing
    data = load_dataset(as_spec(Path(out)), image_size=preprocessing.image_size, channels=preprocessing.channels)
    device = next(network.model.parameters()).device
    wanted = outputs[data.labels]  # int64 [N]
    right = 0
    for part in torch.arange(len(data)).split(micro_batch or config.batch_size):
        images, _ = data.batch(part)
        logits = network.model(preprocessing.normalize(images.to(device)))
        right += int((logits.argmax(1).cpu() == wanted[part]).sum())
    return right / len(data)


def to_pixels(images: Tensor, teacher: Teacher) -> Tensor:
    """Normalised [N, C, H, W] → uint8, rounded; some images at a time, for a batch may fill the memory."""
    parts = (teacher.preprocessing.denormalize(part.float()) for part in images.detach().split(_CONVERTED_AT_ONCE))
    return torch.cat([(part.clamp(0, 1) * 255).round().to("cpu", torch.uint8) for part in parts]).contiguous()


@dataclass(frozen=True)
class Source:
    """What the images are made of: teacher, statistics, and the classes chosen from them.

    `names[k]` is class k of the new dataset; `rows[k]` its number among the classes of the statistics, which is also its row in
    their tables, unless those have rows of sub-classes.
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

    def check_alike(self, other: Source, number: int) -> None:
        """InputError where the same images cannot go through another teacher too, or its classes or outputs are others."""
        for what, mine, its in (
            ("preprocessing", self.teacher.preprocessing, other.teacher.preprocessing),
            ("number of classes", self.teacher.num_classes, other.teacher.num_classes),
            ("classes", self.names, other.names),
            ("outputs", *(source.outputs(torch.tensor(source.rows)).tolist() for source in (self, other))),
        ):
            if mine != its:
                raise InputError(f"teacher {number} does not go with the first: its {what} are {its}, expected {mine}")

    def has_subclasses(self, config: SynthesisConfig) -> bool:
        """Whether the images of a class are matched to the statistics of its sub-classes."""
        return config.targets == "class" and self.statistics.row_classes is not None

    def check_subclasses(self, other: Source, number: int, config: SynthesisConfig) -> None:
        """InputError where one of two teachers has sub-classes that are not the other's."""
        either = self.has_subclasses(config) or other.has_subclasses(config)
        if either and self.statistics.grouping != other.statistics.grouping:
            raise InputError(
                f"teacher {number} does not go with the first: an image is of one sub-class for all teachers, and their "
                "statistics have different ones, or one has none. Record those of the further teachers with the same images, "
                "the same --subclasses and the first as --subclass-teacher (subclass_teacher), or all without sub-classes"
            )

    def counts(self, config: SynthesisConfig) -> list[int]:
        """Images to make of each class."""
        if config.class_shares == "equal":
            return [config.images_per_class] * len(self.rows)
        if self.statistics is None:
            raise InputError("class_shares='recorded' needs class statistics, whose images it counts: record them")
        images = self.statistics.class_images()[self.rows].tolist()
        return [max(1, round(config.images_per_class * len(images) * count / sum(images))) for count in images]

    def target_rows(self, config: SynthesisConfig, counts: Sequence[int]) -> list[list[int]]:
        """The row of the statistics that each image of each class is matched to: the class's, or those of its sub-classes in
        proportion to the private images that they have."""
        if not self.has_subclasses(config):
            return [[row] * count for row, count in zip(self.rows, counts)]
        of_class = [self.statistics.rows(k) for k in self.rows]
        shares = [self.statistics.images[rows].tolist() for rows in of_class]
        return [[rows[part] for part in deal(share, count)] for rows, share, count in zip(of_class, shares, counts)]

    def table_rows(self) -> list[int]:
        """All rows of the statistics that are of these classes."""
        return [row for k in self.rows for row in self.statistics.rows(k)]

    def target_bytes(self, config: SynthesisConfig) -> int:
        """What the targets of all classes take on the device."""
        return row_bytes(self.statistics, self._sites(config)) * len(self.table_rows()) if config.targets == "class" else 0

    def targets(self, config: SynthesisConfig, at_once: int, device: torch.device, budget: int = TARGET_BYTES) -> Targets:
        """On the device, in so many bytes of it; `at_once` is the most classes or sub-classes that a unit has."""
        names = self._sites(config)
        options = {"sites": names, **config.matcher_options(self.teacher.model, names)}
        if config.targets == "class":
            options |= {"global_share": config.global_share, "global_blend": config.global_blend}
            options |= {"at_once": at_once, "device": device, "budget": budget}
            targets = Targets.class_wise(self.statistics, self.table_rows(), **options)
        elif config.targets == "global":
            targets = Targets.pooled(Matcher.from_statistics(self.statistics, per_class=False, **options))
        else:
            channels = self.teacher.preprocessing.channels
            targets = Targets.pooled(Matcher.from_running(self.teacher.model, pixel_channels=channels, **options))
        targets.matcher.to(device).scale_first_site(config.first_site_weight)
        return targets

    def _sites(self, config: SynthesisConfig) -> list[str]:
        """The names of the sites to match, in the order that they run in, where that is known from a recording."""
        model, running = self.teacher.model, config.targets == "running"
        chosen = [site.name for site in select(model, config.sites)]
        if self.statistics is None:
            return chosen
        recorded = [name for name in self.statistics.sites if name.split("#")[0] in chosen and not (running and "#" in name)]
        if running:  # layers that did not run in the recording are left out
            others = [name for name in chosen if name not in batchnorm_layers(model)]
            return [*others, *(name for name in recorded if name not in others)]
        for rule in config.sites:
            if not {site.name for site in select(model, [rule])} & {name.split("#")[0] for name in recorded}:
                raise InputError(
                    f"the class statistics have no site that {rule!r} names: they were recorded at "
                    f"{', '.join(list(self.statistics.sites)[:5])} … Record them with `bnfuse record --sites {rule}`"
                )
        return recorded

    def outputs(self, rows: Tensor) -> Tensor:
        """The teacher's output for each of the original classes."""
        if self.statistics is None or self.statistics.outputs is None:
            return rows
        return torch.tensor(self.statistics.outputs, device=rows.device)[rows]

    def card(
        self,
        config: SynthesisConfig,
        backend: str,
        threads: int | None,
        micro_batch: int | None = None,
        ranks_per_batch: int = 1,
    ) -> dict:
        """What it takes to make the dataset again, to the byte: threads, micro_batch and ranks_per_batch decide how sums are
        rounded."""
        return {
            "config": config.to_card(),
            "backend": backend,
            "threads": threads,
            "micro_batch": None if micro_batch is None or micro_batch >= config.batch_size else micro_batch,
            "ranks_per_batch": ranks_per_batch,
            **self.of_whom(),
        }

    def of_whom(self) -> dict:
        """The part of the card that is about this teacher and its statistics."""
        statistics = self.statistics
        return {
            "teacher": {
                "architecture": self.teacher.architecture,
                "fingerprint": self.teacher.fingerprint,
                "num_classes": self.teacher.num_classes,
            },
            "preprocessing": self.teacher.preprocessing.to_dict(),
            "statistics": None
            if statistics is None
            else {
                "sha256": statistics.digest(),
                "dataset": statistics.dataset,
                "images": statistics.images.tolist(),
                **({} if statistics.variance == "pooled" else {"variance": statistics.variance}),
                **({} if statistics.row_classes is None else {"row_classes": statistics.row_classes}),
                **({} if statistics.subclass_teacher is None else {"subclass_teacher": statistics.subclass_teacher}),
            },
        }


def as_begun(card: dict, before: dict) -> dict:
    """A card to hold against that of a dataset begun `before`: what older versions did not note cannot be held against it."""
    return {name: value for name, value in card.items() if name in before or name not in ("micro_batch", "ranks_per_batch")}
