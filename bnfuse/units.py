"""What a unit's images are made of, and the making of them: the same ones at every call, on whatever rank."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import backends
from .datasets import load_dataset
from .distributed import ALONE, Team
from .errors import BnfuseError, InputError, UnitWarning
from .fusion import fuse
from .matching import Matcher
from .models import Teacher
from .objective import Objective
from .optimisation import NonFiniteLoss, check_cuda_graph, optimise
from .plans import SynthesisConfig, Unit, plan
from .seeds import derive_seed
from .snapshots import UnitCheckpoint
from .statistics import ClassStatistics
from .store import ImageRecord
from .targets import Targets
from .virtual import check_micro_batch

_CONVERTED_AT_ONCE = 256  # images


class UnitMaker:
    """All that it takes to make the images of a unit, the same ones at every call.

    Parameters
    ----------
    teacher, statistics, config, device, backend, micro_batch, offload, cuda_graph : as in `synthesize`

    Attributes
    ----------
    source : teacher, statistics and classes
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
    ):
        check_micro_batch(micro_batch)
        if cuda_graph:
            check_cuda_graph(device, micro_batch is None and not offload)
        self.teacher, self.config, self.device = teacher, config, device
        self.micro_batch, self.offload, self.cuda_graph = micro_batch, offload, cuda_graph
        self.source = Source.of(teacher, statistics, config)
        self.units = plan(config, range(len(self.source.names)))
        self.backend = backends.resolve(backend, device.type)
        self.targets = self.source.targets(config, max(len(set(unit.classes)) for unit in self.units), device)
        self.objective = Objective(
            fuse(teacher.model.to(device), backend=backend),
            self.targets.matcher,
            config.ce_weight,
            config.bn_weight,
            config.tv_weight,
            config.l2_weight,
            config.precision,
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
        rows = [self.source.rows[k] for k in unit.classes]
        labels = torch.tensor(self.targets.rows(rows), device=self.device)
        outputs = self.source.outputs(torch.tensor(rows, device=self.device))
        state = checkpoint.load() if checkpoint else None
        attempt = checkpoint.attempt if state else attempt
        while True:
            seeds = self.seeds(unit, attempt)
            try:
                images, losses = optimise(
                    self.objective,
                    labels,
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
    source = Source.of(teacher, statistics, config)
    data = load_dataset(str(out))
    device = next(teacher.model.parameters()).device
    wanted = source.outputs(torch.tensor(source.rows))[data.labels]  # int64 [N]
    right = 0
    for part in torch.arange(len(data)).split(micro_batch or config.batch_size):
        images, _ = data.batch(part)
        logits = teacher.model(teacher.preprocessing.normalize(images.to(device)))
        right += int((logits.argmax(1).cpu() == wanted[part]).sum())
    return right / len(data)


def to_pixels(images: Tensor, teacher: Teacher) -> Tensor:
    """Normalised [N, C, H, W] → uint8, rounded; some images at a time, for a batch may fill the memory."""
    parts = (teacher.preprocessing.denormalize(part.float()) for part in images.detach().split(_CONVERTED_AT_ONCE))
    return torch.cat([(part.clamp(0, 1) * 255).round().to("cpu", torch.uint8) for part in parts]).contiguous()


@dataclass(frozen=True)
class Source:
    """What the images are made of: teacher, statistics, and the classes chosen from them.

    `names[k]` is class k of the new dataset; `rows[k]` its number among the classes of the statistics.
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
        statistics = self.statistics
        return {
            "config": {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(config).items()},
            "backend": backend,
            "threads": threads,
            "micro_batch": None if micro_batch is None or micro_batch >= config.batch_size else micro_batch,
            "ranks_per_batch": ranks_per_batch,
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


def as_begun(card: dict, before: dict) -> dict:
    """A card to hold against that of a dataset begun `before`: what older versions did not note cannot be held against it."""
    return {name: value for name, value in card.items() if name in before or name not in ("micro_batch", "ranks_per_batch")}
