"""What `fidelity.py` measures: problems, sets of images, students, and the lists of cases that its commands go through.

A case is one student. Nothing is computed here: the page, which shows the results that are kept, asks the same lists. A result
is kept under a key of everything in this file and in the recipe that decides it, so that what was measured with another recipe
or budget is never shown as this one's.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from fidelity_ablations import ABLATIONS, BASES, Variant
from results_file import RESULTS, slug

from bnfuse.demo import TEACHER as DIGITS_TEACHER
from bnfuse.plans import SynthesisConfig
from bnfuse.recipes import RECIPES
from bnfuse.training import TrainConfig

KEPT = RESULTS / "fidelity"
SPLITS = ("heldout", "test")
LABELS = ("hard", "soft", "views")  # the classes'; the teacher's logits of each image; its logits of each augmented view
NOT_OF_VIEWS = {"shift": 0, "noise": 0.0, "label_smoothing": 0.0}  # a student of labelled views sees what was labelled
VIEWS = 100  # passes that are labelled at most; a student with more epochs begins again with the first
NETWORKS = Path(__file__).with_name("fidelity_networks.py")
STUDENTS = {  # how a result calls a student, and how `bnfuse train --model` does
    "resnet20": "resnet20",
    "convnet3": "convnet3",
    "wide_resnet20": f"{NETWORKS}:wide_resnet20",
    "resnet18": f"{NETWORKS}:resnet18",
}


@dataclass(frozen=True)
class Problem:
    """Whose images, which teacher, and how long students learn.

    Attributes
    ----------
    name, title : in results; on the page
    recipe : the shipped recipe that `curves` measures, and whose training all students have, but for its epochs
    train, test : datasets; {data} is the folder that BNFUSE_DATA names
    heldout : images of each class of `train` that are kept out of everything, to choose by; 0, and nothing is chosen on it
    teacher : the network; weights : its file in {data}, or None, and it learns here from what is not held out
    teacher_training : fields of `TrainConfig` for that, and for the further teachers of an ablation
    student : the network of the curves
    steps : images of each class → optimiser steps of a student; None → those of one that has all real images
    batches : fields of `SynthesisConfig` in which its curves part with the recipe: which images are optimised together
    """

    name: str
    title: str
    recipe: str
    train: str
    test: str
    heldout: int
    teacher: str
    weights: str | None
    teacher_training: dict
    student: str
    steps: dict[int | None, int]
    batches: dict = field(default_factory=dict)

    @property
    def ipcs(self) -> list[int]:
        return [ipc for ipc in self.steps if ipc is not None]

    @property
    def facts(self) -> list:
        """What decides teachers and statistics."""
        return [self.name, self.train, self.heldout, self.teacher, self.weights, self.teacher_training]


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem(
            name="cifar10",
            title="CIFAR-10, lossless part",
            recipe="cifar10",
            train="cifar10:train",
            test="cifar10:test",
            heldout=100,
            teacher="resnet20",
            weights="resnet20-12fca82f.th",
            teacher_training=RECIPES["cifar10"].teacher_training,
            student="resnet20",
            steps={10: 1000, 50: 2000, 200: 2500, None: 6000},
        ),
        Problem(
            name="cifar10_jpeg",
            title="CIFAR-10, all of it as JPEG",
            recipe="cifar10",
            train="{data}/cifar10_jpeg_bytes.npz:train",
            test="{data}/cifar10_jpeg_bytes.npz:test",
            heldout=0,
            teacher="resnet18",
            weights=None,
            teacher_training={"epochs": 30, "batch_size": 256, "lr": 0.003, "shift": 4, "flip": True},
            student="resnet18",
            steps={50: 4000, 500: 8000, 5000: 20000},  # as many as there are real ones
            batches={"batch_size": 500, "classes_per_batch": 10},  # fifty of each class, which fill a GPU
        ),
        Problem(
            name="digits",
            title="scikit-learn's digits",
            recipe="digits",
            train="digits:train",
            test="digits:test",
            heldout=25,
            teacher="resnet20",
            weights=None,
            teacher_training={"epochs": DIGITS_TEACHER.epochs, "batch_size": 64, "lr": 0.01, "shift": 1},
            student="resnet20",
            steps={10: 200, 100: 500, None: 500},
        ),
    )
}


@dataclass(frozen=True)
class ImageSet:
    """A synthetic set, made once; cases with fewer images have the first of each class.

    Attributes
    ----------
    name : of the variant
    synthesis, record : fields of `SynthesisConfig`, arguments of `bnfuse.record`, where they are not the defaults
    micro_batch : images in the network together, or None
    teachers : further ones
    images : of each class
    seed : of the noise that images start from, and of all draws on their way
    """

    name: str
    synthesis: dict
    images: int
    record: dict = field(default_factory=dict)
    micro_batch: int | None = None
    teachers: tuple[str, ...] = ()
    seed: int = 0

    @property
    def key(self) -> str:
        facts = asdict(self)
        del facts["name"]
        return digest(facts)


@dataclass(frozen=True)
class Case:
    """One student, and what it learns from.

    Attributes
    ----------
    problem : whose images
    source : "all_real", "real", "synthetic" or "noise"; made : the set, where it is synthetic
    labels : one of `LABELS`
    ipc : images of each class; None for all real ones
    student : one of `STUDENTS`
    training : fields of its `TrainConfig` but for model, epochs and seed
    seed : of its weights, its augmentation, and of which real images, or what noise, it has; in ablations of the set too
    """

    problem: Problem
    source: str
    labels: str
    ipc: int | None
    student: str
    training: dict
    seed: int
    made: ImageSet | None = None

    @property
    def steps(self) -> int:
        return self.problem.steps[self.ipc]

    @property
    def arm(self) -> str:
        """What the student learns from, in a word."""
        return self.source if self.made is None else self.made.name

    @property
    def key(self) -> str:
        facts = [self.source, self.labels, self.ipc, self.student, self.training, self.steps, self.seed]
        views = VIEWS if self.labels == "views" else None
        return digest([self.problem.facts, facts, views, self.made and self.made.key])

    @property
    def work(self) -> tuple:
        """What is done, defaults written out: the same for cases that differ in nothing but words."""
        training = asdict(TrainConfig(model=self.student, **self.training))
        if self.labels == "views":
            training |= NOT_OF_VIEWS
        made = self.made and replace(self.made, name="", synthesis=asdict(SynthesisConfig(**self.made.synthesis)))
        return self.source, self.labels, self.ipc, self.seed, digest(training), made and made.key

    @property
    def label(self) -> str:
        images = "all" if self.ipc is None else f"{self.ipc} a class"
        return f"{self.problem.name}: {self.student} on {self.arm}, {self.labels} labels, {images}, seed {self.seed}"

    @property
    def stem(self) -> str:
        words = (self.problem.name, self.arm, self.labels, self.ipc or "all", self.student, self.seed)
        return f"{slug(' '.join(map(str, words)))}-{self.key}"

    def kept_at(self, split: str) -> Path:
        return KEPT / f"{self.stem}-{split}.json"

    def kept(self, split: str) -> dict | None:
        """Its result, if it is there."""
        path = self.kept_at(split)
        return json.loads(path.read_text()) if path.is_file() else None


def digest(facts) -> str:
    """The same for the same facts, in every process."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]


# ---- what each command measures ----

SEEDS = 3  # of students; in ablations of their images too

# The ladder: (source, name of the set, labels). "recipe" is the shipped one, "global" the same with targets of all classes
# pooled.
LADDER = (
    ("all_real", None, "hard"),
    ("real", None, "hard"),
    ("synthetic", "recipe", "views"),
    ("synthetic", "recipe", "soft"),
    ("synthetic", "recipe", "hard"),
    ("synthetic", "global", "views"),
    ("synthetic", "global", "soft"),
    ("noise", None, "views"),
    ("noise", None, "soft"),
    ("noise", None, "hard"),
    ("real", None, "views"),
)
CROSS_STUDENTS = ("convnet3", "wide_resnet20")


def curves(problem: Problem) -> list[Case]:
    """Every rung of the ladder at every number of images; the first seed of everything first. Without a number of steps for all
    real images there is no rung of them."""
    return [
        _case(problem, source, variant, labels, ipc, problem.student, seed, images=max(problem.ipcs))
        for seed in range(SEEDS)
        for source, variant, labels in LADDER
        for ipc in ([None] if source == "all_real" else sorted(problem.ipcs, reverse=True))
        if ipc in problem.steps
    ]


def students(problem: Problem) -> list[Case]:
    """The images of the curves with other students, at the second number of images."""
    rungs = [rung for rung in LADDER if rung[:2] in (("real", None), ("synthetic", "recipe"), ("noise", None))]
    return [
        _case(problem, source, variant, labels, sorted(problem.ipcs)[1], student, 0, images=max(problem.ipcs))
        for student in CROSS_STUDENTS
        for source, variant, labels in rungs
        if labels != "views" or source == "synthetic"
    ]


def ablations(problem: Problem) -> list[Case]:
    """A set for each line of `ABLATIONS` and each seed, and a student for each kind of labels, at the second number of images.
    Lines that change nothing of the problem's base are left out."""
    ipc = sorted(problem.ipcs)[1]
    cases = [
        _ablation(problem, variant, labels, ipc, seed)
        for seed in range(SEEDS)
        for variant in ABLATIONS
        if variant.towards in (None, problem.recipe)
        for labels in variant.labels
    ]
    first: dict[tuple, Case] = {}
    for case in cases:
        first.setdefault(case.work, case)
    return list(first.values())


def _case(problem: Problem, source, variant: str | None, labels, ipc, student, seed, images: int) -> Case:
    """With the shipped recipe; `images` of each class are made where the source is synthetic."""
    recipe, made = RECIPES[problem.recipe], None
    if variant is not None:
        synthesis = _without(recipe.synthesis, "images_per_class") | problem.batches
        synthesis |= {"targets": "global"} if variant == "global" else {}
        made = ImageSet(variant, synthesis, images, teachers=recipe.more_teachers)
    training = _without(recipe.training, "model", "epochs")
    return Case(problem, source, labels, ipc, student, training, seed, made)


def _ablation(problem: Problem, variant: Variant, labels: str, ipc: int, seed: int) -> Case:
    base, images = BASES[problem.recipe], max(variant.images, ipc)
    synthesis, training = base.synthesis | changed(variant, problem), base.training | variant.training
    made = ImageSet(variant.name, synthesis, images, variant.record, variant.micro_batch, variant.teachers, seed)
    return Case(problem, "synthetic", labels, ipc, problem.student, training, seed, made)


def changed(variant: Variant, problem: Problem) -> dict:
    """The fields of the synthesis that the variant changes."""
    before = asdict(SynthesisConfig(**BASES[problem.recipe].synthesis))
    return variant.synthesis | {name: type(before[name])(before[name] * times) for name, times in variant.scaled.items()}


def _without(fields: dict, *names: str) -> dict:
    return {name: value for name, value in fields.items() if name not in names}
