"""The nearest private images of each image: in chunks, by fast distances, then ranked again by exact ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_CANDIDATES = 8  # that are ranked again
_QUERIES, _ELEMENTS = 2048, 2**25  # at a time; float32 elements of a chunk of references, 128 MB


def nearest(
    queries: Tensor,
    references: Tensor,
    count: int = 2,
    *,
    device: torch.device | str = "cpu",
    step: Callable[[int], object] = lambda comparisons: None,
) -> tuple[Tensor, Tensor]:
    """The `count` nearest references of each query, by Euclidean distance.

    Fast distances come from a matrix product, whose rounding gives equal images a distance above 0 (0.02 was seen), so that a
    copy might not be found to be one. They choose candidates, and those are ranked by differences taken element by element.

    Parameters
    ----------
    queries, references : [N, ...] and [M, ...], uint8 images (then in units of the pixel's range, as if they were in [0, 1]) or
        float32 features; M at least 1
    count : at most `_CANDIDATES`
    device : where
    step : called with the number of distances computed since the last call

    Returns
    -------
    distances : float64 [N, k], rising; k = min(count, M)
    indices : int64 [N, k], into the references
    """
    queries, references = queries.flatten(1), references.flatten(1)
    candidates = min(_CANDIDATES, len(references))
    best = torch.full((len(queries), candidates), torch.inf)
    indices = torch.zeros(len(queries), candidates, dtype=torch.int64)
    chunk = max(_CANDIDATES, _ELEMENTS // (references.shape[1] + _QUERIES))
    for r in range(0, len(references), chunk):
        some = _floats(references[r : r + chunk], device)
        for q in range(0, len(queries), _QUERIES):
            rows = slice(q, q + _QUERIES)
            distances = torch.cdist(_floats(queries[rows], device), some)
            found = distances.topk(min(candidates, len(some)), largest=False)
            both = torch.cat([best[rows], found.values.cpu()], 1), torch.cat([indices[rows], found.indices.cpu() + r], 1)
            best[rows], order = both[0].topk(candidates, largest=False)
            indices[rows] = both[1].gather(1, order)
            step(distances.numel())
    return _ranked(queries, references, indices, min(count, candidates), device)


def _ranked(queries: Tensor, references: Tensor, indices: Tensor, count: int, device) -> tuple[Tensor, Tensor]:
    """The first `count` of the candidates `indices`, by exact distance; of equals, the first in the dataset."""
    indices = indices.sort(1).values
    exact = []
    for q in range(0, len(queries), rows := max(1, _ELEMENTS // (indices.shape[1] * queries.shape[1]))):
        some = _floats(references[indices[q : q + rows].flatten()], device).unflatten(0, (-1, indices.shape[1]))
        own = _floats(queries[q : q + rows], device)[:, None]
        exact.append(torch.cdist(own, some, compute_mode="donot_use_mm_for_euclid_dist")[:, 0].double().cpu())
    distances = torch.cat(exact) if exact else torch.empty(0, indices.shape[1], dtype=torch.float64)
    distances, order = distances.sort(dim=1, stable=True)
    return distances[:, :count], indices.gather(1, order)[:, :count]


def nearest_of_class(
    queries: Tensor, query_labels: Tensor, references: Tensor, reference_labels: Tensor, **options
) -> tuple[Tensor, Tensor]:
    """The nearest reference of the same class.

    Returns
    -------
    distances : float64 [N], inf where there is no reference of the class
    indices : int64 [N], −1 there
    """
    distances = torch.full((len(queries),), torch.inf, dtype=torch.float64)
    indices = torch.full((len(queries),), -1)
    for label in query_labels.unique():
        own, there = (query_labels == label).nonzero()[:, 0], (reference_labels == label).nonzero()[:, 0]
        if len(there):
            found, which = nearest(queries[own], references[there], 1, **options)
            distances[own], indices[own] = found[:, 0], there[which[:, 0]]
    return distances, indices


def _floats(part: Tensor, device: torch.device | str) -> Tensor:
    part = part.to(device)
    return part.float().div_(255) if part.dtype == torch.uint8 else part.float()
