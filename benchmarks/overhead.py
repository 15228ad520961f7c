"""What a call costs beside its work: a site of next to no elements, from warm and from cold caches.

    python benchmarks/overhead.py [--threads 2]      # prints microseconds, and leaves results/overhead.json

A cold cache is what the operators' benchmark starts every call from, and it holds no code either.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from contenders import make_case
from report import markdown
from results_file import write_result
from sites import Site
from timing import Machine

SITE = Site((16, 8, 2, 2), "relu", False)
ROUNDS = 41


def microseconds(prepare: Callable, run: Callable, machine: Machine, cold: bool) -> float:
    """Of `run(prepare())`, the median."""
    times = []
    for _ in range(ROUNDS):
        given = prepare()
        if cold:
            machine.flush()
        start = time.perf_counter()
        run(given)
        times.append(time.perf_counter() - start)
    return median(times) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch's pool (default 2)")
    torch.set_num_threads(parser.parse_args().threads)
    device = torch.device("cpu")
    case, machine = make_case(SITE, device, torch.float32, torch.contiguous_format), Machine(device)
    figures = {}
    for name, forward in case.functions(compiled=False).items():
        for cold in (False, True):
            cache = "cold" if cold else "warm"
            figures[f"{name}_forward_{cache}"] = microseconds(lambda: None, lambda _, f=forward: f(), machine, cold)
            figures[f"{name}_backward_{cache}"] = microseconds(forward, case.gradients, machine, cold)
    path = write_result("overhead", "python benchmarks/overhead.py", site=str(SITE), microseconds=figures)
    columns = ["forward_warm", "backward_warm", "forward_cold", "backward_cold"]
    rows = [["µs", *(c.replace("_", ", ") for c in columns)]]
    for name in ("bnfuse", "plain", "hook", "var_mean"):
        rows.append([name, *(f"{figures[f'{name}_{c}']:.0f}" for c in columns)])
    print(f"{SITE}\n\n{markdown(rows)}\n\nwrote {path}")


if __name__ == "__main__":
    main()
