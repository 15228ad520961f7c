"""What encoding and committing a unit costs the next one's optimisation, in the foreground and in the background.

    python benchmarks/background_writing.py [--quick]

Units of images of noise, which no encoder can make small, are committed to a store while a network runs forward and backward:
seconds a unit of work alone, of work and then writing, and of both at once. One thread of torch, so that a second core is free.
Figures go to benchmarks/results/background_writing.json; `--quick` takes few and small images and writes nothing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from results_file import write_result

from bnfuse.networks import CifarResNet
from bnfuse.store import ImageRecord, Store
from bnfuse.writing import BackgroundWriter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few and small images")
    args = parser.parse_args()
    torch.set_num_threads(1)
    units, count, size = (3, 20, 64) if args.quick else (10, 100, 224)
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
    seconds = {"work alone": seconds_a_unit(lambda unit: None)}
    with tempfile.TemporaryDirectory() as folder:
        with Store.open(Path(folder) / "a", card={}, class_names=["x"]) as store:
            seconds["then writing"] = seconds_a_unit(lambda unit: store.commit(unit, images, records(unit)))
        with Store.open(Path(folder) / "b", card={}, class_names=["x"]) as store, BackgroundWriter(store) as writer:
            commit = lambda unit: writer.commit(unit, images, records(unit))
            seconds["writing in the background"] = seconds_a_unit(commit, writer.drain)
    print(f"{count} images of {size}×{size} a unit, median of {units - 1} units, seconds a unit")
    for name, value in seconds.items():
        print(f"  {name:25s} {value:7.2f}")
    if not args.quick:
        figures = {"images_a_unit": count, "image_size": size, "units": units - 1, "seconds_a_unit": seconds}
        print(f"wrote {write_result('background_writing', 'python benchmarks/background_writing.py', **figures)}")


if __name__ == "__main__":
    main()
