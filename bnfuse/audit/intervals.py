"""95 % intervals of what the measures report: shares of trials, means, medians and their ratios."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

CONFIDENCE = 0.95


def clopper_pearson(successes: int, trials: int) -> tuple[float, float]:
    """The exact interval of a share (Clopper and Pearson 1934): it covers the true one at least 95 % of the time.

    (0, 1) where there was no trial.
    """
    from scipy.stats import binomtest

    if trials == 0:
        return 0.0, 1.0
    interval = binomtest(int(successes), int(trials)).proportion_ci(CONFIDENCE, method="exact")
    return float(interval.low), float(interval.high)


def bootstrap(values: Tensor | np.ndarray, rng: torch.Generator, statistic=torch.mean, resamples: int = 2000):
    """The percentile interval of a statistic over independent values (Efron 1979).

    Parameters
    ----------
    values : [N] finite numbers, N ≥ 1
    rng : on the CPU
    statistic : float64 [R, N], dim=1 → [R], as torch.mean is
    resamples : how many

    Returns
    -------
    (low, high)
    """
    return _middle(_resampled(values, rng, statistic, resamples))


def bootstrap_ratio(values: Tensor | np.ndarray, others: Tensor | np.ndarray, rng: torch.Generator, resamples: int = 2000):
    """The percentile interval of median(values) / median(others), both [N] independent; (nan, nan) where others are 0.

    The arguments and the result are those of `bootstrap`.
    """
    above, below = (_resampled(part, rng, torch.median, resamples) for part in (values, others))
    return _middle(above / below)


def _resampled(values: Tensor | np.ndarray, rng: torch.Generator, statistic, resamples: int) -> Tensor:
    """The statistic of each of `resamples` draws with replacement, float64 [R]."""
    values = torch.as_tensor(values).double().cpu()
    drawn = []
    for start in range(0, resamples, rows := max(1, 2**22 // len(values))):  # indices of at most 32 MB at a time
        indices = torch.randint(len(values), (min(rows, resamples - start), len(values)), generator=rng)
        result = statistic(values[indices], dim=1)
        drawn.append(result if isinstance(result, Tensor) else result.values)  # torch.median returns indices too
    return torch.cat(drawn)


def _middle(drawn: Tensor) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(drawn, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def median_interval(values: Tensor | np.ndarray) -> tuple[float, float]:
    """The interval of a median between two of the values themselves, by the binomial distribution of ranks; they may be inf.

    (−inf, inf) where there are so few values, fewer than 6, that no two of them bracket it at 95 %.
    """
    from scipy.stats import binom

    values = np.sort(np.asarray(values, dtype=np.float64))
    low = int(binom.ppf((1 - CONFIDENCE) / 2, len(values), 0.5)) - 1 if len(values) else -1
    if low < 0:
        return -np.inf, np.inf
    return float(values[low]), float(values[len(values) - 1 - low])


def clearly_more(successes: int, trials: int, of_others: int, others: int) -> bool:
    """Whether the interval of one share lies above that of another."""
    return clopper_pearson(successes, trials)[0] > clopper_pearson(of_others, others)[1]
