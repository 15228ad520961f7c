"""What encoding and committing a unit costs the next one's optimisation, in the foreground and in the background.

    python benchmarks/background_writing.py [--quick]

Units of images of noise are committed to a store while a network runs forward and backward; the seconds a unit are printed
for work alone, work and then writing, and both at once. One thread of torch, so that a second core is free.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from bnfuse.networks import CifarResNet
from bnfuse.store import ImageRecord, Store
from bnfuse.writing import BackgroundWriter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few and small images")
    args = parser.parse_args()
    torch.set_num_threads(1)
    units, count, size = (3, 20, 64) if args.quick else (4, 100, 224)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    model, x = CifarResNet(20), torch.randn(2, 3, size, size)

    def work() -> None:
        for _ in range(10 if args.quick else 3):
            model(x).sum().backward()

    def seconds_a_unit(commit, drain=lambda: None) -> float:
        taken = []
        for unit in range(units):
            started = time.perf_counter()
            work()
            commit(unit)
            taken.append(time.perf_counter() - started)
        drain()
        return statistics.median(taken[1:])  # in the background, the first one waits for none before it

    def records(unit: int) -> list[ImageRecord]:
        return [ImageRecord(0, unit * count + i, 0, {}) for i in range(count)]

    work()
    print(f"{count} images of {size}×{size} a unit, median of {units - 1} units, seconds a unit")
    print(f"  work alone                {seconds_a_unit(lambda unit: None):7.2f}")
    with tempfile.TemporaryDirectory() as folder:
        with Store.open(Path(folder) / "a", card={}, class_names=["x"]) as store:
            print(f"  then writing              {seconds_a_unit(lambda unit: store.commit(unit, images, records(unit))):7.2f}")
        with Store.open(Path(folder) / "b", card={}, class_names=["x"]) as store, BackgroundWriter(store) as writer:
            both = seconds_a_unit(lambda unit: writer.commit(unit, images, records(unit)), writer.drain)
            print(f"  writing in the background {both:7.2f}")


if __name__ == "__main__":
    main()
