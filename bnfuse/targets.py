"""The targets of a run, where its batches are: on the device all at once, or class by class where they are too many."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .matching import Matcher
from .statistics import ClassStatistics

TARGET_BYTES = 2**30  # of targets on the device; those of 1,000 classes of a ResNet-50 are 212 MB


def budget_of_each(statistics: Sequence[ClassStatistics | None], classes: int) -> int:
    """Bytes of the device for the targets of each of several teachers: all that they want if that is `TARGET_BYTES` together,
    else 0, so that all bring them class by class and every teacher's rows are the same. For one teacher it is all there is."""
    if len(statistics) == 1:
        return TARGET_BYTES
    whole = sum(_row_bytes(each) * classes for each in statistics if each is not None)
    return TARGET_BYTES if whole <= TARGET_BYTES else 0


def _row_bytes(statistics: ClassStatistics) -> int:
    return 2 * 4 * sum(statistics.site_channels.values())  # mean and var, float32


class Targets:
    """A `Matcher` and, for each batch, the rows of its table.

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
        options : of the `Matcher`
        """
        if _row_bytes(statistics) * len(classes) <= budget:
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
