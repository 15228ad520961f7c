"""95 % intervals of what the measures report: shares of trials, and means of values."""

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
    values = torch.as_tensor(values).double().cpu()
    drawn = []
    for start in range(0, resamples, rows := max(1, 2**22 // len(values))):  # indices of at most 32 MB at a time
        indices = torch.randint(len(values), (min(rows, resamples - start), len(values)), generator=rng)
        result = statistic(values[indices], dim=1)
        drawn.append(result if isinstance(result, Tensor) else result.values)  # torch.median returns indices too
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(torch.cat(drawn), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
