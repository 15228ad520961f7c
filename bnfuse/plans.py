"""What is to be made: a synthesis's config, and its images dealt to units of work.

A unit is one optimised batch, whose images, seeds and random views depend on nothing but the config.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice

from . import priors
from .augment import Augmentation
from .configs import check_kinds, check_whole
from .ensemble import TEACHER_PLANS, Committee
from .errors import InputError
from .matching_config import MatchingConfig
from .objective import PRECISIONS
from .sites import SiteRule

CLASS_PLANS = ("grouped", "balanced")
CLASS_SHARES = ("equal", "recorded")
SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class SynthesisConfig(MatchingConfig):
    """Everything that decides which images come out, beside the teacher and the statistics: what is here, and how statistics
    are matched, which `MatchingConfig` has.

    Attributes
    ----------
    images_per_class : images of each class
    class_shares : which classes get how many: images_per_class each (equal), or that on average and each in proportion to its
        images in the statistics, but one at least (recorded)
    classes : class numbers to synthesise (default all)
    batch_size : images optimised together
    class_plan : which classes share a batch: classes_per_batch of them, until their images are dealt (grouped), or of every
        class that has images left as many as of any other, to one image, in batches of even size (balanced), as SRe2L has one
        image of each of 100 classes
    classes_per_batch : classes of a grouped batch, each matched to its own statistics
    iterations : steps at full size
    low_resolution_iterations : steps at half the size before, from which the full size starts
    lr : Adam's learning rate at its peak, in units of the normalised image
    betas : Adam's betas
    warmup : steps over which the learning rate rises
    schedule : then it falls to 0 by a cosine, or is constant
    clip : after each step images are cut to what pixels may be, as the stored ones are
    bn_weight : weight of the BN-statistic loss; negative drives the statistics away
    round_moments : moments are rounded to float16 before they are matched, as in a hook under autocast (FADRM)
    ce_weight : weight of the cross-entropy
    tv_weight : weight of total variation
    l2_weight : weight of the mean squared pixel
    prior_kind : what those two are: mean_squares; norms, as DeepInversion has them; or absolute differences, see `priors`
    jitter : largest random shift, in pixels at full size
    flip : random left-right flips
    crop_scale : least share of the area in random resized crops; 1 for none
    crop_curriculum : share of a stage's steps over which the least crop falls from 1 to crop_scale (CDA); 0, it is constant
    noise_scale : standard deviation of the starting noise, normalised
    noise_exponent : its amplitude falls with the spatial frequency f as 1/f^noise_exponent: 0 is white, 1 as in photographs
    step_exponent : Adam's steps are taken in cosine coefficients, and fall with the frequency likewise; 0, in the pixels
    chroma_scale : amplitude of differences between channels beside their mean, in the starting noise, and in such steps
    precision : of activations and their gradients in the teacher: float32, or bfloat16 (autocast), which is faster on hardware
        that has it; moments, losses and images are float32 in both
    teacher_plan : of several teachers: all at every step (together), one a step (in_turn), or teachers_drawn for each batch
        (drawn)
    teachers_drawn : how many teachers are drawn
    teacher_weights : factor of each teacher's losses (default: those of a step have the same, whose sum is 1)
    teacher_priors : instead, what each teacher is worth in percent; weights are softmax(priors / teacher_temperature)
    teacher_temperature : the larger, the more alike the weights
    soft_labels : also store the teacher's logits of each image
    seed : seed of everything random
    preset : another project's settings, by name, from which these began, see --list-presets
    recipe : this package's own for some kind of images, by name, instead, see --list-recipes

    Raises
    ------
    InputError : a value out of its range; the message names the field
    """

    images_per_class: int = 10
    class_shares: str = "equal"
    classes: tuple[int, ...] | None = None
    batch_size: int = 100
    class_plan: str = "grouped"
    classes_per_batch: int = 1
    iterations: int = 1000
    low_resolution_iterations: int = 0
    lr: float = 0.1
    betas: tuple[float, float] = (0.5, 0.9)
    warmup: int = 0
    schedule: str = "cosine"
    clip: bool = True
    bn_weight: float = 1.0
    round_moments: bool = False
    ce_weight: float = 1.0
    tv_weight: float = 0.0
    l2_weight: float = 0.0
    prior_kind: str = "mean_squares"
    jitter: int = 0
    flip: bool = False
    crop_scale: float = 1.0
    crop_curriculum: float = 0.0
    noise_scale: float = 1.0
    noise_exponent: float = 0.0
    step_exponent: float = 0.0
    chroma_scale: float = 1.0
    precision: str = "float32"
    teacher_plan: str = "together"
    teachers_drawn: int = 2
    teacher_weights: tuple[float, ...] | None = None
    teacher_priors: tuple[float, ...] | None = None
    teacher_temperature: float = 5.0
    soft_labels: bool = False
    seed: int = 0
    preset: str | None = None
    recipe: str | None = None

    def __post_init__(self):
        check_kinds(self)
        super().__post_init__()
        whole = ("images_per_class", "batch_size", "classes_per_batch", "iterations", "teachers_drawn")
        check_whole(self, dict.fromkeys(whole, 1))
        check_whole(self, dict.fromkeys(("low_resolution_iterations", "warmup", "jitter", "seed"), 0))
        positive = ("lr", "teacher_temperature", "chroma_scale")
        for name in (*positive, "ce_weight", "tv_weight", "l2_weight", "noise_scale", "noise_exponent", "step_exponent"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (value == 0 and name in positive):
                raise InputError(f"{name} must be {'positive' if name in positive else 'at least 0'}, got {value}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas must be two numbers from 0 to below 1, got {self.betas}")
        if self.preset is not None and self.recipe is not None:
            raise InputError(
                f"settings begin from one of a preset and a recipe, got both: preset={self.preset!r}, recipe={self.recipe!r}"
            )
        if not math.isfinite(self.bn_weight):
            raise InputError(f"bn_weight must be finite, got {self.bn_weight}")
        allowed_values = {
            "precision": PRECISIONS,
            "class_plan": CLASS_PLANS,
            "class_shares": CLASS_SHARES,
            "schedule": SCHEDULES,
            "prior_kind": priors.KINDS,
            "teacher_plan": TEACHER_PLANS,
        }
        for name, allowed in allowed_values.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.class_plan == "balanced" and self.classes_per_batch != 1:
            raise InputError(
                f"a balanced batch has every class; classes_per_batch={self.classes_per_batch} is for grouped ones"
            )
        if self.classes_per_batch > self.batch_size:
            raise InputError(f"{self.classes_per_batch} classes do not fit a batch of {self.batch_size} images")
        if self.low_resolution_iterations and any(SiteRule.parse(rule).cells for rule in self.sites):
            raise InputError(
                "smaller images have fewer spatial cells, which targets of full size do not fit: leave out "
                f"low_resolution_iterations={self.low_resolution_iterations}, or the sites in cells ({', '.join(self.sites)})"
            )
        Augmentation(self.jitter, self.flip, self.crop_scale, self.crop_curriculum)  # checks its own

    @classmethod
    def from_card(cls, card: dict) -> SynthesisConfig:
        """The config that a dataset was begun with. InputError where the card has none that this version knows."""
        fields = card.get("config", {})
        try:
            return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})
        except TypeError as error:
            raise InputError(f"the card has no config that this bnfuse knows ({error}): use the version on the card") from error

    def to_card(self) -> dict:
        """The fields, in JSON's types."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @property
    def committee(self) -> Committee:
        """What several teachers are to each other."""
        return Committee(
            self.teacher_plan,
            self.teachers_drawn,
            self.teacher_weights,
            self.teacher_priors,
            self.teacher_temperature,
            self.seed,
        )

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


def plan(config: SynthesisConfig, classes: Sequence[int], counts: Sequence[int] | None = None) -> list[Unit]:
    """Deals the images of each class to batches of at most batch_size, as `class_plan` says.

    Every image is in one unit; in a unit each class is one run, in the order of `classes`. `counts` are the images of each,
    default images_per_class.
    """
    counts = [config.images_per_class] * len(classes) if counts is None else counts
    batches = (_balanced if config.class_plan == "balanced" else _grouped)(config, classes, counts)
    return [Unit(number, *zip(*batch)) for number, batch in enumerate(batches)]


def deal(shares: Sequence[int], count: int) -> list[int]:
    """Which of several parts each of `count` images belongs to, in proportion to `shares`, so that the first of them alone are
    in proportion too: each goes to the part that is furthest behind."""
    parts, behind = [], [0] * len(shares)  # by how many images, times the sum of the shares
    for _ in range(count):
        behind = [lag + share for lag, share in zip(behind, shares)]
        part = behind.index(max(behind))
        behind[part] -= sum(shares)
        parts.append(part)
    return parts


def in_runs(unit: Unit, rows: Sequence[Sequence[int]]) -> Unit:
    """The same images in another order: in a class's run those of a row of targets are one run.

    rows : of each class, and in it of each index
    """
    place = {k: i for i, k in enumerate(dict.fromkeys(unit.classes))}
    images = sorted(zip(unit.classes, unit.indices), key=lambda image: (place[image[0]], rows[image[0]][image[1]], image[1]))
    return Unit(unit.number, *zip(*images))


def _grouped(config: SynthesisConfig, classes: Sequence[int], counts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """(class, index) of each image of a batch: classes_per_batch classes, the batch shared out evenly."""
    share = config.batch_size // config.classes_per_batch
    for first in range(0, len(classes), config.classes_per_batch):
        part = slice(first, first + config.classes_per_batch)
        together = list(zip(classes[part], counts[part]))
        for start in range(0, max(counts[part]), share):
            yield [(k, index) for k, count in together for index in range(start, min(start + share, count))]


def _balanced(config: SynthesisConfig, classes: Sequence[int], counts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """(class, index) of each image of a batch. One image of each class, then the next of each: a batch is a stretch of that
    sequence, so that in it no class has two images more than another, as long as it has any. Batches differ by at most one
    image."""
    total = sum(counts)
    batches = math.ceil(total / config.batch_size)
    ends = [total * (i + 1) // batches for i in range(batches)]
    sequence = ((index, place) for index in range(max(counts)) for place, count in enumerate(counts) if index < count)
    for start, end in zip([0, *ends], ends):
        dealt = list(islice(sequence, end - start))  # (index, place of the class)
        yield [(classes[place], index) for place, index in sorted((place, index) for index, place in dealt)]
