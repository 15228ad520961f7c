"""The features of whole datasets, and how far two sets of them are apart."""

from __future__ import annotations

import torch
from torch import Tensor

from ..datasets import ArrayDataset
from ..features import Features
from ..models import Teacher


def features(teacher: Teacher, data: ArrayDataset, device: torch.device, batch_size: int = 256) -> Tensor:
    """The penultimate activations of every image.

    Parameters
    ----------
    teacher : on `device`; its last linear layer to run is the classifier
    data : images that fit it
    device : where the teacher is
    batch_size : images at a time

    Returns
    -------
    float32 [N, D] on the CPU

    Raises
    ------
    InputError
        The teacher has no linear layer.
    """
    otherwise = "leave the teacher out, and images are compared by their pixels alone"
    with Features(teacher.model, otherwise, teacher.architecture) as taken:
        batches = (data.batch(part)[0] for part in torch.arange(len(data)).split(batch_size))
        return torch.cat([taken.of(teacher.preprocessing.normalize(images.to(device))) for images in batches])


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½), of Gaussians fitted to two sets of features (Heusel et al. 2017), FID.

    The trace of the root is the sum of the singular values of √Σ₁ √Σ₂, so that no covariance need be of full rank.
    a [N, D], b [M, D], at least two each.
    """
    means, roots, traces = [], [], []
    for x in (a.double(), b.double()):
        means.append(x.mean(0))
        values, vectors = torch.linalg.eigh(torch.cov(x.T).reshape(x.shape[1], x.shape[1]))
        values = values.clamp(min=0)
        roots.append(vectors * values.sqrt() @ vectors.T)
        traces.append(values.sum())
    cross = torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    return float(((means[0] - means[1]).square().sum() + traces[0] + traces[1] - 2 * cross).clamp(min=0))


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """The unbiased squared MMD of two sets of features, kernel (x·y/D + 1)³ (Bińkowski et al. 2018), KID; may be negative.

    a [N, D], b [M, D], at least two each.
    """
    a, b = a.double(), b.double()
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3  # noqa: E731
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (kernel(a, a), kernel(b, b))]
    return float(within[0] + within[1] - 2 * kernel(a, b).mean())
