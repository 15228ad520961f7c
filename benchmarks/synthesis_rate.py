"""How much faster the demo's synthesis runs with the compiled kernels than with the eager reference, in one run.

    make bench-demo

Both backends take the same steps from the same noise, alternating; the ratio is the median over the pairs. Their losses are
compared first: no rate is printed for a backend that computes something else.
"""

from __future__ import annotations

import argparse
import statistics as stats
import time

import torch
from results_file import write_result
from torch.utils.data import DataLoader

from bnfuse import Matcher, fuse, group_by_class, load_dataset, record
from bnfuse.demo import SYNTHESIS, THREADS
from bnfuse.models import Teacher, freeze
from bnfuse.networks import CifarResNet
from bnfuse.objective import Objective
from bnfuse.optimisation import optimise
from bnfuse.plans import plan
from bnfuse.seeds import derive_seed
from bnfuse.training import measure_preprocessing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9, help="timed runs of each backend (default 9)")
    parser.add_argument("--iterations", type=int, default=20, help="steps in a run (default 20)")
    parser.add_argument("--threads", type=int, default=THREADS, help="default as the demo")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    # An untrained network takes exactly the demo's time a step.
    data = load_dataset("digits:train")
    torch.manual_seed(0)
    teacher = Teacher(freeze(CifarResNet(20, 10, 1)), "resnet20", 10, measure_preprocessing(data))
    statistics = record(teacher, DataLoader(data, batch_size=256), 10)
    unit = plan(SYNTHESIS, range(10))[0]
    labels, seeds = torch.tensor(unit.classes), [derive_seed(0, k, i) for k, i in zip(unit.classes, unit.indices)]

    def run(backend: str) -> tuple[float, float]:
        objective = Objective(fuse(teacher.model, backend=backend), Matcher.from_statistics(statistics, backend=backend))
        config = type(SYNTHESIS)(**{**vars(SYNTHESIS), "iterations": args.iterations})
        started = time.perf_counter()
        _, losses = optimise(objective, group_by_class(labels), labels, seeds, 0, teacher, config, lambda *_: None)
        return args.iterations / (time.perf_counter() - started), losses["total"]

    first = {backend: run(backend)[1] for backend in ("cpp", "reference")}  # warms up, too
    if abs(first["cpp"] - first["reference"]) > 0.01 * abs(first["reference"]):
        raise SystemExit(f"the backends disagree after {args.iterations} steps: {first}")
    rates = {"cpp": [], "reference": []}
    for _ in range(args.pairs):
        for backend, seen in rates.items():
            seen.append(run(backend)[0])
    print(
        f"the demo's synthesis: resnet20, {len(unit.classes)} digits a step, {args.threads} thread(s), median of {args.pairs}"
    )
    for backend, seen in rates.items():
        print(f"  {backend:10s} {stats.median(seen):6.1f} steps/s   (from {min(seen):.1f} to {max(seen):.1f})")
    ratios = [a / b for a, b in zip(rates["cpp"], rates["reference"])]
    write_result(
        "synthesis_rate",
        "make bench-demo",
        steps_per_second={backend: round(stats.median(seen), 1) for backend, seen in rates.items()},
        cpp_over_reference=round(stats.median(ratios), 2),
        pairs=args.pairs,
    )
    print(f"  cpp over reference: {stats.median(ratios):.2f}×   (pairs from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
