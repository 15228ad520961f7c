"""Privacy auditing with one training run: canaries by coin flips, guesses, and the ε that they rule out.

Steinke, Nasr, Jagielski, "Privacy auditing with one (1) training run" (arXiv 2305.08846).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..datasets import ArrayDataset
from .context import Context
from .intervals import CONFIDENCE


@dataclass(frozen=True)
class Canaries:
    """Mislabelled private images, each of which is in the data or left out by the toss of a coin.

    Attributes
    ----------
    images : int64 [m], which of the private images
    labels : int64 [m], their wrong labels
    included : bool [m], the coins
    rest : int64 [N - m], the other private images, in random order
    """

    images: Tensor
    labels: Tensor
    included: Tensor
    rest: Tensor

    @classmethod
    def draw(cls, context: Context, count: int) -> Canaries:
        """Makes canaries of `count` private images."""
        rng, classes = context.rng("canaries"), context.num_classes
        order = torch.randperm(len(context.private), generator=rng)
        images = order[:count]
        labels = (context.private.labels[images] + torch.randint(1, classes, (count,), generator=rng)) % classes
        return cls(images, labels, torch.rand(count, generator=rng) < 0.5, order[count:])

    def dataset(self, context: Context) -> ArrayDataset:
        """All canaries, with their wrong labels."""
        private = context.private
        return ArrayDataset(private.images[self.images], self.labels, private.class_names, name="canaries")


@dataclass(frozen=True)
class Guesses:
    """What the auditor made of the canaries.

    Attributes
    ----------
    right, made : int; on the other canaries he passes
    epsilon : with 95 % confidence, no mechanism of a smaller pure-DP ε lets so many guesses be right
    worst : of the included canaries, the one whose score is the highest: its place among the canaries
    exposure : by how many standard deviations that is above the mean of those left out
    """

    right: int
    made: int
    epsilon: float
    worst: int
    exposure: float


def guess(scores: Tensor, included: Tensor) -> Guesses:
    """Guesses "in" for the highest quarter of the scores and "out" for the lowest, and passes on the rest.

    The number of guesses is set beforehand: chosen by the result, the bound would not hold.

    Parameters
    ----------
    scores : float64 [m], higher reads as "in"
    included : bool [m], with some of each
    """
    quarter, order = max(1, len(scores) // 4), scores.argsort(descending=True, stable=True)
    right = int(included[order[:quarter]].sum() + (~included[order[-quarter:]]).sum())
    left_out = scores[~included]
    worst = int(torch.where(included, scores, -torch.inf).argmax())
    exposure = float((scores[worst] - left_out.mean()) / left_out.std().clamp(min=1e-12))
    return Guesses(right, 2 * quarter, epsilon_lower_bound(right, 2 * quarter), worst, exposure)


def epsilon_lower_bound(right: int, guesses: int, confidence: float = CONFIDENCE) -> float:
    """The ε that so many right guesses rule out: the main result of arXiv 2305.08846 for pure DP (δ = 0).

    Under ε-DP the number of right guesses is at most as large, in distribution, as Binomial(guesses, e^ε / (1 + e^ε)). The
    bound is the largest ε for which P[Binomial ≥ right] is at most 1 − confidence: the logit of the one-sided
    Clopper–Pearson bound on the share of right guesses, and no less than 0.
    """
    from scipy.stats import beta

    if not 0 <= right <= guesses:
        raise ValueError(f"{right} right guesses of {guesses}")
    if right == 0:
        return 0.0
    share = beta.ppf(1 - confidence, right, guesses - right + 1)
    return max(0.0, math.log(share / (1 - share)))
