"""How a case of `fidelity_cases` comes to its figures: teacher, statistics, images, student, judgement.

Everything is made once and kept in a folder: what is there is not made again, what another process is making is left to it
(`Busy`). So the work may be stopped at any time and goes on, and may be started once for each core.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from fidelity_cases import STUDENTS, VIEWS, Case, ImageSet, Problem, digest
from fidelity_measures import diversity, figures, logits_of
from results_file import write_result
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader

from bnfuse.batches import even_batches
from bnfuse.checkpoints import read_facts
from bnfuse.datasets import ArrayDataset, load_dataset
from bnfuse.demo import noise_like
from bnfuse.errors import InputError
from bnfuse.files import write_atomically
from bnfuse.labels import Labels
from bnfuse.models import Teacher, build_model, freeze, load_teacher
from bnfuse.plans import SynthesisConfig
from bnfuse.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from bnfuse.relabelling import RelabelConfig, relabel
from bnfuse.statistics import ClassStatistics, record
from bnfuse.store import write_store
from bnfuse.synthesis import synthesize
from bnfuse.training import TrainConfig, train


class Busy(Exception):
    """Another process is making what is needed."""


def once(path: Path, make: Callable[[], object]) -> Path:
    """Calls `make`, which writes `path` as the last thing it does, unless it is there. Raises Busy."""
    if not path.is_file():
        with claimed(path):
            if not path.is_file():  # another process may just have made it
                make()
    return path


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Holds the making of `path` against other processes, until the block or the process ends. Raises Busy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(path) from None
        yield
    finally:
        os.close(descriptor)


@dataclass
class Workshop:
    """One problem's data, and a folder for what is made of them.

    Attributes
    ----------
    problem : whose images
    folder : of what is made
    device : of all computing
    """

    problem: Problem
    folder: Path
    device: torch.device

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)

    # ---- real images ----

    @cached_property
    def _train_parts(self) -> tuple[ArrayDataset, ArrayDataset]:
        dataset = _load(self.problem.train)
        rows = drawn(dataset.labels, self.problem.heldout, seed=0)
        rest = torch.ones(len(dataset), dtype=torch.bool)
        rest[rows] = False
        return dataset.subset(rows), dataset.subset(rest.nonzero()[:, 0])

    @property
    def real(self) -> ArrayDataset:
        """What statistics are of, and what students trained on real images see."""
        return self._train_parts[1]

    @cached_property
    def _test(self) -> ArrayDataset:
        return _load(self.problem.test)

    def judged(self, split: str) -> ArrayDataset:
        """The real images that students are tested on."""
        return self._train_parts[0] if split == "heldout" else self._test

    # ---- teachers and statistics ----

    @cached_property
    def teacher(self) -> Teacher:
        p = self.problem
        if p.weights is None:
            return self._trained_teacher(p.teacher)
        preprocessing = Preprocessing(self.real.image_shape[1:], IMAGENET_MEAN, IMAGENET_STD)
        teacher = load_teacher(p.teacher, weights=data_folder() / p.weights, preprocessing=preprocessing)
        teacher.model.to(self.device)
        return teacher

    def _trained_teacher(self, name: str) -> Teacher:
        config = TrainConfig(model=STUDENTS.get(name, name), eval_every=0, **self.problem.teacher_training)
        out = self.folder / "teachers" / f"{name}-{digest(self.problem.facts)}"
        preprocessing = None if name == self.problem.teacher else self.teacher.preprocessing
        model, preprocessing, _ = self._trained(out, lambda: (self.real, {}), config, preprocessing)
        return Teacher(freeze(model), config.model, self.real.num_classes, preprocessing, self.real.class_names)

    def statistics(self, teacher: Teacher, arguments: dict) -> ClassStatistics:
        """Of the teacher on what is not held out; `arguments` of `bnfuse.record`."""

        def make() -> None:
            real = self.real
            loader, options = DataLoader(real, batch_size=256), dict(class_names=real.class_names, dataset=real.name)
            if "subclasses" in arguments and teacher is not self.teacher:
                options["subclass_teacher"] = self.teacher  # images are of one sub-class for all teachers
            record(teacher, loader, real.num_classes, **options, **arguments).save(path)

        path = self.folder / "statistics" / f"{digest([self.problem.facts, teacher.fingerprint, arguments])}.safetensors"
        return ClassStatistics.load(once(path, make))

    # ---- images to learn from ----

    def synthetic(self, wanted: ImageSet) -> tuple[ArrayDataset, float]:
        """The set, and the seconds that it took."""

        def make() -> None:
            config = SynthesisConfig(**wanted.synthesis, images_per_class=wanted.images, seed=wanted.seed)
            teachers = [self.teacher, *(self._trained_teacher(name) for name in wanted.teachers)]
            first, *more = [(teacher, self.statistics(teacher, wanted.record)) for teacher in teachers]
            options = dict(device=self.device, micro_batch=wanted.micro_batch, more_teachers=more, progress=False)
            started, before = time.monotonic(), float(spent.read_text()) if spent.is_file() else 0.0
            try:
                synthesize(*first, out, config, **options)
            finally:
                write_atomically(spent, str(before + time.monotonic() - started).encode())
            write_atomically(done, spent.read_bytes())

        out = self.folder / "sets" / digest([self.problem.facts, wanted.key])
        spent, done = (out.with_name(f"{out.name}.{what}") for what in ("spent", "seconds"))
        seconds = float(once(done, make).read_text())
        return load_dataset(str(out)).in_memory(), seconds

    def images(self, case: Case) -> tuple[ArrayDataset, float]:
        """What the case's student learns from, with hard labels, and the seconds that it took to make."""
        if case.source == "synthetic":
            made, seconds = self.synthetic(case.made)
            return made.first_per_class(case.ipc), seconds
        if case.source == "all_real":
            return self.real, 0.0
        real = self.as_many_real(case)
        return (real if case.source == "real" else noise_like(real, case.seed)), 0.0

    def as_many_real(self, case: Case) -> ArrayDataset:
        """So many real images as the case has, drawn by its seed."""
        return self.real if case.ipc is None else self.real.subset(drawn(self.real.labels, case.ipc, case.seed))

    # ---- students ----

    def student(self, case: Case, images: ArrayDataset) -> tuple[nn.Module, Preprocessing, float]:
        """The network, how it takes images, and the seconds that it took to train."""
        batches = len(even_batches(len(images), case.training["batch_size"]))
        config = TrainConfig(
            model=STUDENTS[case.student],
            epochs=max(1, round(case.steps / batches)),
            seed=case.seed,
            eval_every=0,
            **case.training,
        )
        out, preprocessing = self.folder / "students" / case.key, self.teacher.preprocessing
        if case.labels == "views":
            with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                views = lambda: self._labelled_views(images, config, Path(folder) / "images")
                return self._trained(out, views, config, preprocessing)
        options = {}
        if case.labels == "soft":
            options["soft_labels"] = True
            logits = logits_of(self.teacher.model, preprocessing, images, self.device)
            images = ArrayDataset(images.images, images.labels, images.class_names, name=images.name, soft_labels=logits)
        return self._trained(out, lambda: (images, options), config, preprocessing)

    def _labelled_views(self, images: ArrayDataset, config: TrainConfig, folder: Path) -> tuple[ArrayDataset, dict]:
        """The images as a store, and the teacher's logits of views of them: the student's crops and flips."""
        write_store(images.images.permute(0, 3, 1, 2), images.labels, images.class_names, folder)
        augmentation = {name: getattr(config, name) for name in ("crop_scale", "flip", "mixup", "cutmix", "batch_size")}
        asked = RelabelConfig(views=min(config.epochs, VIEWS), seed=config.seed, **augmentation)
        relabel(folder, self.teacher, asked, device=self.device, progress=False)
        return load_dataset(str(folder)).in_memory(), {"labels": Labels(folder / "relabel")}

    def _trained(
        self,
        out: Path,
        learnt: Callable[[], tuple[ArrayDataset, dict]],
        config: TrainConfig,
        preprocessing: Preprocessing | None,
    ) -> tuple[nn.Module, Preprocessing, float]:
        """(model in eval mode, its preprocessing, seconds) from `out`, where it learns what `learnt` returns, once: images, and
        options of `train`."""

        def make() -> None:
            images, options = learnt()
            train(images, config, preprocessing=preprocessing, out=out, device=self.device, progress=False, **options)

        metrics = once(out / "metrics.json", make)  # which `train` writes last
        weights = out / "model.safetensors"
        model = build_model(config.model, self.real.num_classes, self.real.image_shape[0], str(weights))
        return model.to(self.device).eval(), read_facts(weights).preprocessing, json.loads(metrics.read_text())["seconds"]

    # ---- the whole ----

    def measure(self, case: Case, split: str, command: str) -> Path:
        """Makes whatever the case needs, judges its student, and keeps the figures."""
        images, synthesis_seconds = self.images(case)
        model, preprocessing, train_seconds = self.student(case, images)
        judged = self.judged(split)
        of_teacher = logits_of(self.teacher.model, self.teacher.preprocessing, judged, self.device)
        found = figures(logits_of(model, preprocessing, judged, self.device), of_teacher, judged.labels)
        found["diversity"] = diversity(self.teacher, images, self.as_many_real(case), self.device)
        return write_result(
            f"fidelity/{case.stem}-{split}",
            command,
            device=self.device,
            case={
                "problem": case.problem.name,
                "split": split,
                "arm": case.arm,
                "source": case.source,
                "labels": case.labels,
                "ipc": case.ipc,
                "images": len(images),
                "student": case.student,
                "seed": case.seed,
                "steps": case.steps,
                "training": case.training,
                "synthesis": case.made and case.made.synthesis,
            },
            **found,
            train_seconds=train_seconds,
            synthesis_seconds=synthesis_seconds,
        )


def drawn(labels: Tensor, count: int, seed: int) -> Tensor:
    """Rows of `count` images of each class, at random, in the order of the dataset: int64."""
    order = torch.randperm(len(labels), generator=Generator().manual_seed(seed))
    of_class = [order[labels[order] == k] for k in labels.unique()]
    fewest = min(map(len, of_class))
    if fewest < count:
        raise InputError(f"{count} images of each class are asked for, and one has {fewest}: ask for fewer")
    return torch.cat([rows[:count] for rows in of_class]).sort().values


def _load(spec: str) -> ArrayDataset:
    return load_dataset(spec.format(data=data_folder()) if "{data}" in spec else spec).in_memory()


def data_folder() -> Path:
    """The folder that BNFUSE_DATA names."""
    folder = os.environ.get("BNFUSE_DATA")
    if not folder or not Path(folder).is_dir():
        raise InputError(f"BNFUSE_DATA must name the folder of the data, got {folder!r}")
    return Path(folder).resolve()
