"""What an attack's scores on members and non-members amount to: ROC, AUC, and the true-positive rate at few false alarms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure as Plot
from torch import Tensor

from .findings import Figure
from .intervals import CONFIDENCE, clopper_pearson

FALSE_POSITIVE_RATES = (0.01, 0.001)  # Carlini et al., "Membership inference from first principles" (arXiv 2112.03570)
COLOURS = {"original": "#1d4ed8", "synthetic": "#c2410c", "noised": "#6b7280"}
_STYLES = {"original": "--", "synthetic": "-", "noised": "-."}


@dataclass(frozen=True)
class Rate:
    """The share of members caught at a threshold that few non-members pass.

    Attributes
    ----------
    value, low, high : the share, and its Clopper–Pearson interval, given the threshold
    chance : what the share would at most be (97.5 %) if scores told nothing: so uncertain is the false-positive rate itself,
        since the threshold is that of a sample of non-members
    """

    value: float
    low: float
    high: float
    chance: float

    @property
    def above_chance(self) -> bool:
        return self.low > self.chance


@dataclass(frozen=True)
class Scores:
    """An attack's scores; higher reads as "member".

    Attributes
    ----------
    members : float64 [M]
    others : float64 [N], of those who are no members
    """

    members: Tensor
    others: Tensor

    def __post_init__(self):
        for name in ("members", "others"):
            values = torch.as_tensor(getattr(self, name)).double().cpu()
            if values.ndim != 1 or not len(values) or values.isnan().any():
                raise ValueError(f"scores of {name} must be numbers [N], at least one, got {list(values.shape)}")
            object.__setattr__(self, name, values)

    def tpr(self, fpr: float) -> Rate | None:
        """The true-positive rate where at most `fpr` of the others pass; None with fewer than 1 / fpr of them."""
        allowed = math.floor(fpr * len(self.others) * (1 + 1e-9))
        if allowed < 1:
            return None
        threshold = self.others.sort(descending=True).values[min(allowed, len(self.others) - 1)]
        caught = int((self.members > threshold).sum())
        low, high = clopper_pearson(caught, len(self.members))
        return Rate(caught / len(self.members), low, high, clopper_pearson(allowed, len(self.others))[1])

    def auc(self) -> float:
        """The chance that a member's score is above another's; ties count half."""
        ones_members, ones_others = torch.ones(1, len(self.members)), torch.ones(1, len(self.others))
        return self._weighted_auc(ones_members.double(), ones_others.double()).item()

    def auc_interval(self, rng: torch.Generator, confidence: float = CONFIDENCE, resamples: int = 1000) -> tuple[float, float]:
        """The percentile interval of `auc`, members and others resampled each for themselves."""
        drawn, size = [], len(self.members) + len(self.others)
        for start in range(0, resamples, rows := max(1, 2**22 // size)):
            count = min(rows, resamples - start)
            drawn.append(self._weighted_auc(_draws(count, len(self.members), rng), _draws(count, len(self.others), rng)))
        tail = (1 - confidence) / 2
        low, high = torch.quantile(torch.cat(drawn), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
        return low, high

    def _weighted_auc(self, members: Tensor, others: Tensor) -> Tensor:
        """The AUC [R] where each score counts as often as members [R, M] and others [R, N] say."""
        values, places = torch.cat([self.members, self.others]).unique(return_inverse=True)
        blank = torch.zeros(len(members), len(values), dtype=torch.float64)
        of_members = blank.index_add(1, places[: len(self.members)], members)  # [R, distinct values]
        of_others = blank.index_add(1, places[len(self.members) :], others)
        below = of_others.cumsum(1) - of_others / 2
        return (of_members * below).sum(1) / (members.sum(1) * others.sum(1))

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """The ROC: false- and true-positive rates, each [T], from (0, 0) to (1, 1)."""
        from sklearn.metrics import roc_curve

        truth = np.r_[np.ones(len(self.members)), np.zeros(len(self.others))]
        fpr, tpr, _ = roc_curve(truth, torch.cat([self.members, self.others]).numpy(), drop_intermediate=False)
        return fpr, tpr

    def figures(self, rng: torch.Generator, attack: str = "") -> list[Figure]:
        """TPR at each of `FALSE_POSITIVE_RATES`, nan where there are too few others to tell, then the AUC."""
        suffix, figures = f", {attack}" if attack else "", []
        for fpr in FALSE_POSITIVE_RATES:
            name, rate = f"TPR at {100 * fpr:g} % FPR{suffix}", self.tpr(fpr)
            if rate is None:
                figures.append(Figure(name, math.nan, better="lower"))
            else:
                percent = [100 * value for value in (rate.value, rate.low, rate.high)]
                figures.append(Figure(name, *percent, unit="%", better="lower"))
        return [*figures, Figure(f"AUC{suffix}", self.auc(), *self.auc_interval(rng), better="lower")]

    def unresolved(self) -> str | None:
        """A sentence on the rates that cannot be told with so few others; None if all can."""
        missing = [fpr for fpr in FALSE_POSITIVE_RATES if self.tpr(fpr) is None]
        if not missing:
            return None
        rates = " and ".join(f"{100 * fpr:g} % FPR (needs {math.ceil(1 / fpr - 1e-9):,})" for fpr in missing)
        return f"There are {len(self.others):,} non-members, too few to tell the TPR at {rates}: it is given as undefined."


def _draws(count: int, size: int, rng: torch.Generator) -> Tensor:
    """How often each of `size` is drawn in `size` draws with replacement: float64 [count, size]."""
    indices = torch.randint(size, (count, size), generator=rng)
    ones = torch.ones(1, dtype=torch.float64).expand(count, size)
    return torch.zeros(count, size, dtype=torch.float64).scatter_add_(1, indices, ones)


def roc_plot(panels: Mapping[str, Mapping[str, Scores]]) -> Plot:
    """ROC curves on logarithmic axes: a panel for each title, a line for each name (an arm, or a control)."""
    plot = Plot(figsize=(4.4 * len(panels), 4.2), layout="constrained")
    for axes, (title, lines) in zip(np.atleast_1d(plot.subplots(1, len(panels))), panels.items()):
        floor = 0.5 / max(len(scores.others) for scores in lines.values())
        floor = min(floor, 0.5 / max(len(scores.members) for scores in lines.values()))
        for name, scores in lines.items():
            fpr, tpr = scores.curve()
            axes.step(
                np.maximum(fpr, floor),
                np.maximum(tpr, floor),
                where="post",
                label=name,
                color=COLOURS.get(name, "#15803d"),
                linestyle=_STYLES.get(name, ":"),
                linewidth=1.6,
            )
        axes.plot([floor, 1], [floor, 1], color="#d1d5db", linewidth=1, label="chance")
        for fpr in FALSE_POSITIVE_RATES:
            axes.axvline(fpr, color="#dddddd", linewidth=0.8, zorder=0)
        axes.set(xscale="log", yscale="log", xlim=(floor, 1), ylim=(floor, 1.15), title=title)
        axes.set(xlabel="false-positive rate", ylabel="true-positive rate")
        axes.legend(fontsize=8, loc="lower right")
    return plot
