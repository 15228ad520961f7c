"""What a unit in micro-batches of 64 takes of memory, batch by batch; run by test_virtual in a process of its own. Linux.

Prints a line a batch: images, bytes that they take, bytes held between two steps, and bytes more that a step leaves resident.
Pages of files are not counted: the system takes and brings them as it likes.
"""

import ctypes
import re
from pathlib import Path

import torch
from torch import Tensor

from bnfuse import Matcher, SynthesisConfig, fuse
from bnfuse.models import Teacher, freeze
from bnfuse.networks import CifarResNet
from bnfuse.objective import Objective
from bnfuse.optimisation import optimise
from bnfuse.preprocessing import Preprocessing

CHANNELS, SIZE = 3, 24


def resident() -> int:
    """Bytes of this process's own memory, less what is free at the moment."""
    ctypes.CDLL(None).malloc_trim(0)
    return anonymous()


def anonymous() -> int:
    return 1024 * int(re.search(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())[1])


class Meter:
    """A checkpoint and a display that measure from the first step to the second."""

    def __init__(self, images: int):
        self.images, self.start = images, resident()

    def due(self, step: int) -> bool:
        self.before = resident()
        return False

    def show(self, step: int, images: Tensor, terms: dict[str, float]) -> None:
        print(self.images, images.nbytes, self.before - self.start, anonymous() - self.before)


def main() -> None:
    torch.set_num_threads(1)
    model = freeze(CifarResNet(8, 10, CHANNELS, width=2))
    teacher = Teacher(model, "custom", 10, Preprocessing((SIZE, SIZE), [0.5] * CHANNELS, [0.25] * CHANNELS))
    objective = Objective(fuse(model), Matcher.from_running(model))
    for images in (64, 64, 4096):  # the first one loads what any needs
        config, labels = SynthesisConfig(batch_size=images, iterations=2, targets="running"), torch.zeros(images, dtype=int)
        groups, meter = (torch.tensor([0, images]), labels[:1]), Meter(images)
        optimise(objective, groups, labels, range(images), 0, teacher, config, meter.show, micro_batch=64, checkpoint=meter)


if __name__ == "__main__":
    main()
