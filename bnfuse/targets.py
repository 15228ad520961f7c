"""The targets of a run, where its batches are: on the device all at once, or class by class where they are too many."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .matching import Matcher, group_by_class
from .statistics import ClassStatistics

TARGET_BYTES = 2**30  # of targets on the device; those of 1,000 classes of a ResNet-50 are 212 MB


def budget_of_each(wanted: Sequence[int]) -> int:
    """Bytes of the device for the targets of each of several teachers, who want so many: all that there are where everything
    fits, else 0, so that all bring them class by class, and every teacher's rows are the same."""
    return TARGET_BYTES if len(wanted) == 1 or sum(wanted) <= TARGET_BYTES else 0


def row_bytes(statistics: ClassStatistics, sites: Sequence[str] | None = None) -> int:
    """Of a class's targets at these sites: mean and variance, float32."""
    return 2 * 4 * sum(statistics.site_channels[name] for name in sites or statistics.sites)


class Targets:
    """A `Matcher` and, for each batch, the rows of its table.

    A class here is a row of the statistics: where those have sub-classes, each is one of its own.

    Attributes
    ----------
    matcher : its table holds every class of the run, or (what does not fit `budget`) those of one batch at a time
    """

    def __init__(self, matcher: Matcher, row_of: dict[int, int] | None, statistics: ClassStatistics | None = None):
        """row_of : class → row of the table; None where the table has one row for all. statistics : to bring other classes
        from; None where all are there."""
        self.matcher, self._row_of, self._statistics = matcher, row_of, statistics

    @classmethod
    def pooled(cls, matcher: Matcher) -> Targets:
        """Of a matcher with one row, for a batch as a whole."""
        return cls(matcher, None)

    @classmethod
    def class_wise(
        cls,
        statistics: ClassStatistics,
        classes: Sequence[int],
        *,
        at_once: int,
        device: torch.device | str = "cpu",
        budget: int = TARGET_BYTES,
        **options,
    ) -> Targets:
        """
        Parameters
        ----------
        classes : all that the run makes images of
        at_once : the most that one batch has
        budget : bytes of targets that the device may hold; one batch's are held in any case
        options : of `Matcher.from_statistics`
        """
        if row_bytes(statistics, options.get("sites")) * len(classes) <= budget:
            matcher = Matcher.from_statistics(statistics, classes=classes, **options).to(device)
            return cls(matcher, {k: row for row, k in enumerate(classes)})
        matcher = Matcher.from_statistics(statistics, classes=classes[:at_once], **options).to(device)
        return cls(matcher, {k: row for row, k in enumerate(classes[:at_once])}, statistics)

    def rows(self, classes: Sequence[int]) -> list[int]:
        """Each image's row of the table, given its class: equal numbers are one group. Brings the batch's targets there.

        With one row for all it is 0 for every image: the batch is one group, as DeepInversion and SRe2L have it.
        """
        if self._row_of is None:
            return [0] * len(classes)
        if self._statistics is not None and not set(classes) <= set(self._row_of):
            present = list(dict.fromkeys(classes))
            self.matcher.load_classes(self._statistics, present)  # in place: a captured graph reads the same memory
            self._row_of = {k: row for row, k in enumerate(present)}
        return [self._row_of[k] for k in classes]

    def groups(self, classes: Sequence[int], by: str) -> tuple[Tensor, Tensor]:
        """What has statistics of its own in a batch, and its targets, which are brought there.

        Parameters
        ----------
        classes : the class of each of N images, in runs
        by : "class", "sample", or "batch" for all of them together, which are matched to the mixture of their rows

        Returns
        -------
        group_starts : int64 [G + 1]; rows : of the table, int64 [G], or their weights in a mixture, float32 [1, K]. On the
            matcher's device
        """
        rows, count, device = torch.tensor(self.rows(classes)), len(classes), self.matcher.target_mean.device
        if by == "class":
            starts, _ = group_by_class(torch.tensor(classes))
            rows = rows[starts[:-1]]
        elif by == "sample":
            starts = torch.arange(count + 1)
        else:
            starts = torch.tensor([0, count])
            shares = torch.bincount(rows, minlength=len(self.matcher.target_mean)) / count
            rows = rows[:1] if (rows == rows[0]).all() else shares[None]
        return starts.to(device), rows.to(device)
