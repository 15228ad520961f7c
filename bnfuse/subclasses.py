"""Sub-classes: a class's images in groups that look alike to the teacher, so that each may have statistics of its own.

The groups are k-means clusters of the teacher's features, found for each class by itself. One mean and variance of a class say
nothing of how its images differ; those of its sub-classes do, and so give away more: none has fewer images than a class must.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .errors import InputError
from .features import Features


class SubClasses:
    """The sub-class of every image of a dataset.

    Parameters
    ----------
    model : the frozen teacher
    batches : (its inputs [N, C, H, W], labels int64 [N] on the CPU), every image once; the features of all of them are in
        memory together
    names : of the classes
    most, minimum : as in `clusters`

    Attributes
    ----------
    row_classes : the class of each sub-class, ascending

    Raises
    ------
    InputError : the teacher has no linear layer, before which its features are taken

    Warns
    -----
    UserWarning : some classes have fewer sub-classes than `most`
    """

    def __init__(
        self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], names: Sequence[str], most: int, minimum: int
    ):
        with Features(model, "record it without sub-classes") as features:
            seen = [(features.of(inputs), labels, _sums(inputs)) for inputs, labels in batches]
        points, labels, self._sums = (torch.cat(parts) for parts in zip(*seen))
        self.row_classes: list[int] = []
        self._rows = torch.empty_like(labels)  # [N]
        fewer = []
        for k, name in enumerate(names):
            mine = clusters(points[labels == k], most, minimum)
            self._rows[labels == k] = len(self.row_classes) + mine
            count = int(mine.max()) + 1 if len(mine) else 1  # a class without images keeps its row, and is refused by it
            self.row_classes += [k] * count
            if count < most:
                fewer.append(f"{name} ({count})")
        if fewer:
            warnings.warn(
                f"fewer than {most} sub-classes in {len(fewer)} class(es), since each needs {minimum} images: "
                f"{', '.join(fewer[:10])}{' …' if len(fewer) > 10 else ''}",
                stacklevel=3,
            )

    def of(self, first: int, inputs: Tensor) -> Tensor:
        """int64 [N] of the images from number `first` on; InputError where they are not those that were there before."""
        here = slice(first, first + len(inputs))
        if not self._sums[here].equal(_sums(inputs)):
            raise InputError(
                f"images from number {first} of the dataset on are others when it is gone through again; sub-classes need a "
                "loader that gives the same images in the same order each time (shuffle=False, no random augmentation)"
            )
        return self._rows[here]


def clusters(features: Tensor, most: int, minimum: int) -> Tensor:
    """k-means, the same at every call, and what is too small merged with the cluster whose mean is next to its own.

    Parameters
    ----------
    features : float32 [N, D]
    most : clusters
    minimum : images of a cluster, unless all are one

    Returns
    -------
    int64 [N], the cluster of each image, numbered from 0
    """
    from sklearn.cluster import KMeans  # not at the top: it takes a second
    from sklearn.exceptions import ConvergenceWarning

    wanted = min(most, len(features) // max(1, minimum))
    if wanted < 2:
        return torch.zeros(len(features), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different images than clusters: there are fewer then
        found = KMeans(wanted, n_init=4, random_state=0).fit(features.double().numpy()).labels_
    numbers = torch.from_numpy(found).long()
    while True:
        present, numbers, sizes = numbers.unique(return_inverse=True, return_counts=True)
        if len(present) == 1 or sizes.min() >= minimum:
            return numbers
        means = torch.stack([features[numbers == j].mean(0) for j in range(len(present))])
        small = int(sizes.argmin())
        distances = (means - means[small]).square().sum(1)
        distances[small] = torch.inf
        numbers[numbers == small] = int(distances.argmin())


def _sums(inputs: Tensor) -> Tensor:
    """Of each image, by which it is known again: float64 [N] on the CPU."""
    return inputs.double().flatten(1).sum(1).cpu()
