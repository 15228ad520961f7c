"""A unit of synthesis to be measured: a ResNet-20 with random weights, images [N, 3, 32, 32] of ten classes, step by step."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from steps import make_teacher

from bnfuse import Matcher, SynthesisConfig, fuse, group_by_class
from bnfuse.models import Teacher
from bnfuse.objective import Objective
from bnfuse.optimisation import optimise
from bnfuse.preprocessing import Preprocessing

CLASSES = 10


def resnet20() -> Teacher:
    model = make_teacher("resnet20", torch.device("cpu"), torch.float32, torch.contiguous_format)
    return Teacher(model, "resnet20", CLASSES, Preprocessing((32, 32), [0.5] * 3, [0.25] * 3))


class Enough(Exception):
    """Ends a unit of which all has been seen that was to be seen."""


class Steps:
    """A checkpoint that saves nothing, but calls `see(step)` between two steps and ends the unit after `last` of them."""

    def __init__(self, last: int, see: Callable[[int], None] = lambda step: None):
        self.last, self.see = last, see

    def due(self, step: int) -> bool:
        self.see(step)
        if step >= self.last:
            raise Enough
        return False


class Unit:
    """`batch` images, a tenth of them of each class; `run` takes its first steps."""

    def __init__(self, batch: int):
        self.teacher = resnet20()
        self.objective = Objective(fuse(self.teacher.model), Matcher.from_running(self.teacher.model))
        self.labels = (torch.arange(batch) * CLASSES // batch).sort().values
        self.config = SynthesisConfig(batch_size=batch, iterations=10**6, targets="running")

    def run(self, checkpoint: Steps, **options) -> None:
        labels = self.labels
        try:
            optimise(
                self.objective,
                group_by_class(labels),
                labels,
                range(len(labels)),
                0,
                self.teacher,
                self.config,
                lambda *_: None,
                checkpoint=checkpoint,
                **options,
            )
        except Enough:
            return

    def seconds_a_step(self, first: int = 1, steps: int = 1, **options) -> float:
        """Of the steps after `first`, on the mean."""
        moments = {}
        self.run(Steps(first + steps, lambda step: moments.setdefault(step, time.perf_counter())), **options)
        return (moments[first + steps] - moments[first]) / steps
