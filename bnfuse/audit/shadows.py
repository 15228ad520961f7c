"""Offline attacks with shadow pipelines: which images each is trained on, and scores against those that have not seen one.

LiRA (Carlini et al., arXiv 2112.03570) and RMIA (Zarifzadeh et al., arXiv 2312.03262), offline: an image is compared with
shadows that were trained without it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .scores import Scores


def halves(labels: Tensor, shadows: int, rng: torch.Generator) -> Tensor:
    """Which images each shadow is trained on: bool [shadows, N].

    Shadows 2j and 2j + 1 share out the images between them, half of each class to each, so that every image is in half of
    the shadows, by the toss of a coin.

    Parameters
    ----------
    labels : int64 [N]
    shadows : even, at least 4
    """
    if shadows < 4 or shadows % 2:
        raise ValueError(f"shadows come in pairs, at least two, got {shadows} shadows")
    inside = torch.zeros(shadows, len(labels), dtype=torch.bool)
    for pair in range(0, shadows, 2):
        for k in labels.unique():
            of_class = (labels == k).nonzero().flatten()
            of_class = of_class[torch.randperm(len(of_class), generator=rng)]
            odd_one = int(torch.randint(2, (1,), generator=rng))  # to either, where the number is odd
            inside[pair, of_class[: (len(of_class) + odd_one) // 2]] = True
        inside[pair + 1] = ~inside[pair]
    return inside


def offline(confidences: Tensor, inside: Tensor) -> dict[str, Scores]:
    """Every shadow in turn is attacked with the help of the others.

    An image is compared with those shadows that were trained without it, but for the target's partner: so they are equally
    many for members and others, shadows / 2 - 1. Membership was tossed anew for each pair, so that, if nothing leaks, the
    scores of a target are as those of any other draw.

    Parameters
    ----------
    confidences : float64 [S, N], see `pipeline.confidence`
    inside : bool [S, N], see `halves`

    Returns
    -------
    "LiRA" : confidence less its mean without the image. With few shadows the variance is taken as the same for all images,
        which orders them as their likelihood does
    "RMIA" : log of the probability's ratio to its mean without the image. The share of the population that an image's ratio
        dominates, which RMIA takes, orders images in the same way
    """
    parts = {"LiRA": ([], []), "RMIA": ([], [])}
    log_p = F.logsigmoid(confidences)
    for target in range(len(confidences)):
        out = ~inside  # [S, N]
        out[[target, target ^ 1]] = False
        count = out.sum(0)  # [N]
        mean = (confidences * out).sum(0) / count
        log_mean_p = torch.where(out, log_p, -torch.inf).logsumexp(0) - count.log()
        for name, values in (("LiRA", confidences[target] - mean), ("RMIA", log_p[target] - log_mean_p)):
            parts[name][0].append(values[inside[target]])
            parts[name][1].append(values[~inside[target]])
    return {name: Scores(torch.cat(members), torch.cat(others)) for name, (members, others) in parts.items()}
