"""Lists of classes, which are numbered by their places, held against each other."""

from __future__ import annotations

from collections.abc import Sequence


def misplaced(names: Sequence[str], known: Sequence[str]) -> tuple[int, int] | None:
    """Where two lists of classes contradict each other: (i, j) of the first names[i] that is known[j], elsewhere; None where
    they do not. A name that is there several times, as some of ImageNet's are, says nothing."""
    for i, name in enumerate(names):
        if names.count(name) == known.count(name) == 1 and (j := known.index(name)) != i:
            return i, j
    return None
