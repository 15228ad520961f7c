"""Several teachers that look at the same images: all of them at every step, one after the other, or some drawn for each unit.

An `Ensemble` stands where an `Objective` does. Every teacher has targets of its own; its sites' names begin with its number,
from 1: "2/layer1.0.bn1". What a batch's groups are, and their rows in the tables, is the same for all.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from .errors import InputError
from .fusion import FusedModel
from .moments import Moments
from .objective import Losses, Objective
from .seeds import derive_seed

TEACHER_PLANS = ("together", "in_turn", "drawn")


@dataclass(frozen=True)
class Committee:
    """Which teachers look at a step, and what each one's word weighs.

    Attributes
    ----------
    plan : "together", all at every step; "in_turn", one a step, the first at a unit's first; "drawn", some for each unit
    drawn : how many
    weights : factor of each teacher's cross-entropy and BN loss; None, those of a step have equal ones, whose sum is 1
    priors : instead, what each is thought to be worth (percent, CV-DD's are accuracies of students): those of a step have
        weights ``softmax(priors / temperature)``
    seed : of the draws

    Raises
    ------
    InputError : a plan of another name, too few teachers to draw, both weights and priors, or not one a teacher (`check`)
    """

    plan: str = "together"
    drawn: int = 2
    weights: tuple[float, ...] | None = None
    priors: tuple[float, ...] | None = None
    temperature: float = 5.0
    seed: int = 0

    def check(self, teachers: int) -> None:
        if self.plan not in TEACHER_PLANS:
            raise InputError(f"teacher_plan must be one of {', '.join(TEACHER_PLANS)}, got {self.plan!r}")
        if self.weights is not None and self.priors is not None:
            raise InputError("teacher_weights are the factors, teacher_priors are what they follow from: give one of them")
        for name, values in (("teacher_weights", self.weights), ("teacher_priors", self.priors)):
            if values is not None and len(values) != teachers:
                raise InputError(f"{name} must be one a teacher ({teachers}), got {list(values)}")
        if self.plan == "drawn" and not 1 <= self.drawn <= teachers:
            raise InputError(f"teachers_drawn must be from 1 to the number of teachers ({teachers}), got {self.drawn}")

    def at(self, unit: int, step: int, teachers: int) -> tuple[int, ...]:
        """The teachers, from 0, of a unit's `step`, from 0."""
        if self.plan == "in_turn":
            return (step % teachers,)
        if self.plan == "drawn":
            return tuple(sorted(random.Random(derive_seed(self.seed, "teachers", unit)).sample(range(teachers), self.drawn)))
        return tuple(range(teachers))

    def weights_of(self, chosen: Sequence[int]) -> list[float]:
        """The factor of each of the chosen teachers."""
        if self.weights is not None:
            return [self.weights[k] for k in chosen]
        priors = [self.priors[k] if self.priors is not None else 0.0 for k in chosen]
        return torch.tensor(priors, dtype=torch.float64).div(self.temperature).softmax(0).tolist()


class Ensemble:
    """``total = Σ weight[t] · (ce·CE_t + bn·BN loss_t) + image priors`` over the teachers t of a step.

    Parameters
    ----------
    members : one a teacher, alike but for teacher and matcher; the first one's prior weights hold
    committee : which of them a step has
    chosen : which it has now; None, what an ensemble is made with: `at` says it for each step
    """

    def __init__(self, members: Sequence[Objective], committee: Committee, chosen: Sequence[int] | None = None):
        committee.check(len(members))
        self.members, self.committee = list(members), committee
        self.chosen = tuple(range(len(members)) if chosen is None else chosen)
        self.weights = committee.weights_of(self.chosen)
        self._choose = lru_cache(maxsize=None)(lambda chosen: Ensemble(members, committee, chosen))

    @property
    def teacher(self) -> FusedModel:
        """The first one, whose logits are stored as soft labels."""
        return self.members[0].teacher

    @property
    def site_names(self) -> list[str]:
        return [_prefixed(k, name) for k in self.chosen for name in self.members[k].site_names]

    @property
    def has_priors(self) -> bool:
        return self.members[0].has_priors

    def at(self, unit: int, step: int) -> Ensemble:
        """The ensemble of a unit's `step`, from 0: the same object for the same teachers."""
        return self._choose(self.committee.at(unit, step, len(self.members)))

    def running_means(self, names: Iterable[str], channels: Iterable[int]) -> Tensor:
        """See `FusedModel.running_means`: [T], of whichever teachers the names are of."""
        means = []
        for number, part in groupby(zip(names, channels), key=lambda pair: pair[0].partition("/")[0]):
            own, sizes = zip(*part)
            means.append(self.members[int(number) - 1].running_means([name.partition("/")[2] for name in own], sizes))
        return torch.cat(means)

    def begin(self) -> None:
        """See `Objective`."""
        for member in self.members:
            member.begin()

    def draw(self, generator: torch.Generator) -> None:
        for k in self.chosen:
            self.members[k].draw(generator)

    def state(self) -> dict[str, Tensor]:
        states = ((k, name, value) for k, member in enumerate(self.members) for name, value in member.state().items())
        return {_prefixed(k, name): value for k, name, value in states}

    def restore(self, state: dict[str, Tensor]) -> None:
        for k, member in enumerate(self.members):
            member.restore({name: state[_prefixed(k, name)] for name in member.state()})

    def __call__(self, images: Tensor, view: Tensor, labels: Tensor, group_starts: Tensor, group_classes: Tensor) -> Losses:
        """See `Objective`; the terms are sums over the teachers, weighted by what their words weigh."""
        return self.combine(*self.look(images, view, labels, group_starts), group_classes, len(images))

    def look(self, images: Tensor, view: Tensor, labels: Tensor, group_starts: Tensor) -> tuple[dict[str, Tensor], Moments]:
        means, moments = {}, Moments(group_starts=group_starts)
        for k, weight in zip(self.chosen, self.weights):
            own, seen = self.members[k].ask(view, labels, group_starts)
            for name, value in own.items():
                means[name] = means.get(name, 0) + weight * value
            moments.update({_prefixed(k, name): pair for name, pair in seen.items()})
            moments.positions |= {_prefixed(k, name): count for name, count in seen.positions.items()}
        return means | self.members[0].prior_means(images, view), moments

    def combine(self, means: dict[str, Tensor], moments: Moments, group_classes: Tensor, count: int) -> Losses:
        bn, distances = 0, []
        for k, weight in zip(self.chosen, self.weights):
            member = self.members[k]
            value, each = member.measure(_of_teacher(k, moments), group_classes)
            bn, distances = bn + weight * value, [*distances, each]
        return self.members[0].weigh(bn, torch.cat(distances, dim=1), means, count)


def _prefixed(k: int, name: str) -> str:
    return f"{k + 1}/{name}"


def _of_teacher(k: int, moments: Moments) -> Moments:
    """Its moments among those of several, under the names that it knows."""
    start = _prefixed(k, "")
    own = {name: pair for name, pair in moments.items() if name.startswith(start)}
    counts = {name.removeprefix(start): count for name, count in moments.positions.items() if name.startswith(start)}
    return Moments({name.removeprefix(start): pair for name, pair in own.items()}, counts, moments.group_starts)
