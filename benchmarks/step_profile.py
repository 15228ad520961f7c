"""What a synthesis step spends its time on, by PyTorch's profiler: a GPU's kernels, or a CPU's operators, the longest first.

    python benchmarks/step_profile.py --network resnet18                                      # prints a table, writes nothing
    python benchmarks/step_profile.py --network resnet18 --device cuda --batch 256 --dtype bfloat16

Shares are of what all of them take. What a step takes as a whole, and what its rivals do, test_steps.py measures.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from report import markdown
from sites import DTYPES, NETWORKS
from steps import FusedLoss, make_images, make_step, make_teacher
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

WARM_UP, STEPS = 3, 3
LONGEST_NAME = 90


class Spent(NamedTuple):
    """Of one kernel or operator, a step."""

    name: str
    calls: float
    seconds: float


def profiled_step(network: str, batch: int, device: torch.device, dtype: torch.dtype) -> list[Spent]:
    """The longest first."""
    model = make_teacher(network, device, dtype, torch.contiguous_format)
    images, labels = make_images(network, batch, model, torch.contiguous_format)
    step = make_step(FusedLoss(model, labels), images)
    for _ in range(WARM_UP):
        step()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize(device)
    spent = []
    for event in profiler.key_averages():
        if (event.device_type == DeviceType.CUDA) == on_gpu:
            microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            spent.append(Spent(event.key, event.count / STEPS, microseconds / STEPS / 1e6))
    return sorted(spent, key=lambda one: -one.seconds)


def table(spent: list[Spent], rows: int) -> str:
    """The first `rows` of them, the rest together, and the sum."""
    total = sum(one.seconds for one in spent)
    if len(spent) > rows:
        rest = spent[rows:]
        spent = [*spent[:rows], Spent(f"{len(rest)} others", sum(r.calls for r in rest), sum(r.seconds for r in rest))]
    spent = [*spent, Spent("all", sum(one.calls for one in spent), total)]
    cells = [[_shortened(n), f"{calls:g}", f"{1e3 * s:.2f}", f"{s / total:.1%}"] for n, calls, s in spent]
    return markdown([["a step's", "calls", "ms", "share"], *cells])


def _shortened(name: str) -> str:
    name = name.replace("|", "¦")  # which would end a cell
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet18", choices=list(NETWORKS), help="default resnet18")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="of activations and weights (default float32)")
    parser.add_argument("--batch", type=int, help="images (default the network's own, as in test_steps.py)")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch's pool (default 2)")
    parser.add_argument("--rows", type=int, default=25, help="kernels or operators that are shown (default 25)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    batch = arguments.batch or NETWORKS[arguments.network].step_batch
    spent = profiled_step(arguments.network, batch, torch.device(arguments.device), DTYPES[arguments.dtype])
    print(f"{arguments.network}, {batch} images, {arguments.dtype}, {arguments.device}\n\n{table(spent, arguments.rows)}")


if __name__ == "__main__":
    main()
