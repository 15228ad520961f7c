"""What the images are optimised for: the weighted sum of cross-entropy, BatchNorm-statistic loss and image priors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import priors
from .fusion import FusedModel
from .matching import Matcher
from .moments import Moments

PRECISIONS = ("float32", "bfloat16")


class Losses(NamedTuple):
    """What a batch amounts to.

    Attributes
    ----------
    total : the weighted sum, to be differentiated
    terms : unweighted scalars, and the total, by name
    distances : [G, S], each group's distance at each site, unweighted and without gradient
    """

    total: Tensor
    terms: dict[str, Tensor]
    distances: Tensor


def _with_values(moments: Moments, change: Callable[[Tensor], Tensor]) -> Moments:
    """The same moments with other values."""
    changed = copy.copy(moments)
    changed.update({name: (change(mean), change(var)) for name, (mean, var) in moments.items()})
    return changed


@dataclass(frozen=True)
class Objective:
    """``total = ce·CE(logits, labels) + bn·BN loss + tv·total variation + l2·‖pixels‖²`` (DeepInversion, arXiv 1912.08795,
    eqs. 1–4, with the class-wise targets of arXiv 2210.03205).

    Terms whose weight is 0 are not computed, but for the BN loss, which costs nothing. `prior_kind` is one of `priors.KINDS`.
    With `round_moments` moments have the values of float16, and their own gradient. `precision` is "float32", or "bfloat16" for
    activations and their gradients inside the teacher (autocast); moments, losses and images are in float32 in both.
    """

    teacher: FusedModel
    matcher: Matcher
    ce_weight: float = 1.0
    bn_weight: float = 1.0
    tv_weight: float = 0.0
    l2_weight: float = 0.0
    precision: str = "float32"
    prior_kind: str = "mean_squares"
    round_moments: bool = False

    @property
    def site_names(self) -> list[str]:
        """The sites of `Losses.distances`, in order."""
        return self.matcher.names

    @property
    def has_priors(self) -> bool:
        """Whether there is a term that looks at the images beside the teacher."""
        return bool(self.tv_weight or self.l2_weight)

    def at(self, unit: int, step: int) -> Objective:
        """The objective of a unit's `step`, from 0: this one."""
        return self

    def running_means(self, names: Iterable[str], channels: Iterable[int]) -> Tensor:
        """See `FusedModel.running_means`."""
        return self.teacher.running_means(names, channels)

    def __call__(self, images: Tensor, view: Tensor, labels: Tensor, group_starts: Tensor, group_classes: Tensor) -> Losses:
        """The losses of one batch.

        Parameters
        ----------
        images : [N, C, H, W], normalised; the priors look at these
        view : like images, what the teacher sees
        labels : int64 [N], or probabilities [N, K]
        group_starts, group_classes : what is matched together, see `matching.group_by_class` and `Targets.groups`
        """
        return self.combine(*self.look(images, view, labels, group_starts), group_classes, len(images))

    # What the loss keeps from step to step: a moving average of the moments, and which sites are left out.

    def begin(self) -> None:
        """Forgets what came before: another batch begins."""
        if self.matcher.moving_average is not None:
            self.matcher.moving_average.reset()

    def draw(self, generator: torch.Generator) -> None:
        """What is random about the next step's loss; a generator of the CPU."""
        self.matcher.draw_sites(generator)

    def state(self) -> dict[str, Tensor]:
        """Copies of what is kept from step to step, by name; nothing where nothing is."""
        average = self.matcher.moving_average
        return {} if average is None else {f"average_{name}": value for name, value in average.state().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Goes on from a `state`."""
        if (average := self.matcher.moving_average) is not None:
            average.restore({name: state[f"average_{name}"] for name in average.state()})

    def look(self, images: Tensor, view: Tensor, labels: Tensor, group_starts: Tensor) -> tuple[dict[str, Tensor], Moments]:
        """The forward pass: the terms that each image has of its own, as their means over the images, and the moments."""
        means, moments = self.ask(view, labels, group_starts)
        return means | self.prior_means(images, view), moments

    def ask(self, view: Tensor, labels: Tensor, group_starts: Tensor) -> tuple[dict[str, Tensor], Moments]:
        """What the teacher says of a view: the cross-entropy's mean over the images, and the moments."""
        with torch.autocast(view.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            logits, moments = self.teacher(view, group_starts)
        means = {}
        if self.ce_weight:
            means["ce"] = F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels)
        return means, moments

    def prior_means(self, images: Tensor, view: Tensor) -> dict[str, Tensor]:
        """The image priors that have a weight, see `priors.image_means`."""
        weights = {"tv": self.tv_weight, "l2": self.l2_weight}
        return priors.image_means(images, view, self.prior_kind, {name for name, weight in weights.items() if weight})

    def combine(self, means: dict[str, Tensor], moments: Moments, group_classes: Tensor, count: int) -> Losses:
        """The losses of a batch of `count` images whose means and moments these are."""
        return self.weigh(*self.measure(moments, group_classes), means, count)

    def measure(self, moments: Moments, group_classes: Tensor) -> tuple[Tensor, Tensor]:
        """The BN loss and each group's distance at each site, see `Matcher.measure`."""
        if self.round_moments:
            moments = _with_values(moments, lambda value: value + (value.half().to(value.dtype) - value).detach())
        return self.matcher.measure(moments, group_classes)

    def weigh(self, bn: Tensor, distances: Tensor, means: dict[str, Tensor], count: int) -> Losses:
        """The weighted sum of the terms."""
        terms = {"bn": bn, **priors.combine(means, count)}
        total = sum(getattr(self, f"{name}_weight") * value for name, value in terms.items())
        return Losses(total, terms | {"total": total}, distances)
