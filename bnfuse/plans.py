"""What is to be made: a synthesis's config, and its images dealt to units of work.

A unit is one optimised batch, whose images, seeds and random views depend on nothing but the config.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .augment import Augmentation
from .configs import check_whole
from .errors import InputError
from .objective import PRECISIONS
from .reference import DISTANCES

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
        check_whole(self, dict.fromkeys(("images_per_class", "batch_size", "classes_per_batch", "iterations"), 1))
        check_whole(self, dict.fromkeys(("low_resolution_iterations", "warmup", "jitter", "seed"), 0))
        for name in ("lr", "bn_weight", "first_site_weight", "ce_weight", "tv_weight", "l2_weight", "noise_scale"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (value == 0 and name == "lr"):
                raise InputError(f"{name} must be {'positive' if name == 'lr' else 'at least 0'}, got {value}")
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
