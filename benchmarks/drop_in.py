"""What a script gains by changing its import: the examples' loops with the eager hook and with bnfuse.compat's.

    python benchmarks/drop_in.py             # into benchmarks/results and docs/drop_in.md
    python benchmarks/drop_in.py --quick     # one round of ResNet-20, printed; nothing is written
    python benchmarks/drop_in.py --report    # the page once more, from the results

The scripts run as they are, on the default layout, float32. Time: the two versions take turns, two steps each. Memory: the peak
of a step over what lived before it, in a process of its own. Loss: how far apart the two versions' losses are.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics as stats
import subprocess
import sys
import time

import torch
from report import NAMES, ROOT, circumstances, markdown, times, write_block
from results_file import RESULTS, write_result
from step_memory import child_environment, peak_bytes

PAGE = ROOT / "docs/drop_in.md"
NAME, COMMAND = "drop_in", "python benchmarks/drop_in.py"
LOOPS = {"recover_sre2l": "recover", "invert_deepinversion": "invert"}
VERSIONS = {"eager": "", "bnfuse": "_bnfuse"}
STEPS = 2  # a run; neither loop is at half resolution then


class Case:
    """One loop on one network: `run(version)` makes some steps and returns their losses."""

    def __init__(self, loop: str, network: str):
        from sites import NETWORKS
        from steps import make_teacher

        sys.path.append(str(ROOT / "examples"))
        self.loop, self.network = loop, network
        self.teacher = make_teacher(network, torch.device("cpu"), torch.float32, torch.contiguous_format)
        self.size, self.batch = NETWORKS[network].size, NETWORKS[network].batch
        self.labels = torch.arange(self.batch) % 10

    def run(self, version: str, steps: int = STEPS) -> list[float]:
        script = importlib.import_module(self.loop + VERSIONS[version])
        loop = getattr(script, LOOPS[self.loop])
        return loop(self.teacher, self.labels, (3, self.size, self.size), steps)[1]

    def times(self, rounds: int) -> dict:
        """Medians of the seconds of a step and of their ratio, and the largest relative difference of the losses."""
        seconds, apart = {version: [] for version in VERSIONS}, 0.0
        for k in range(rounds + 1):  # the first round warms up
            losses = {}
            for version in sorted(VERSIONS, reverse=k % 2 == 0):
                started = time.perf_counter()
                losses[version] = self.run(version)
                seconds[version].append((time.perf_counter() - started) / STEPS)
            apart = max(apart, *(abs(a - b) / abs(a) for a, b in zip(*losses.values())))
        pairs = list(zip(seconds["eager"], seconds["bnfuse"]))[1:]
        return {
            "loop": self.loop,
            "network": self.network,
            "batch": self.batch,
            "rounds": rounds,
            "seconds": {version: stats.median(values[1:]) for version, values in seconds.items()},
            "eager_over_bnfuse": stats.median(eager / ours for eager, ours in pairs),
            "losses_apart": apart,
        }


def measure_memory(loop: str, network: str, version: str) -> int:
    case = Case(loop, network)
    return peak_bytes(lambda: case.run(version, steps=1), torch.device("cpu"))


def memory_of(loop: str, network: str, version: str, threads: int) -> int:
    command = [sys.executable, __file__, "--measure", loop, network, version, "--threads", str(threads)]
    return int(subprocess.run(command, env=child_environment(), check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(networks: list[str], rounds: int, threads: int) -> list[dict]:
    cases = []
    for network in networks:
        for loop in LOOPS:
            case = Case(loop, network).times(rounds)
            case["peak_bytes"] = {version: memory_of(loop, network, version, threads) for version in VERSIONS}
            print(table([case]), flush=True)
            cases.append(case)
    return cases


# ---- the page ----


def table(cases: list[dict]) -> str:
    rows = [["loop", "step, eager", "step, bnfuse", "faster", "peak, eager", "peak, bnfuse", "less", "losses apart"]]
    for case in cases:
        seconds, peak = case["seconds"], case["peak_bytes"]
        rows.append(
            [
                f"`{case['loop']}`, {NAMES[case['network']]}, {case['batch']} images",
                *(f"{seconds[version] * 1e3:.0f} ms" for version in VERSIONS),
                times(case["eager_over_bnfuse"]),
                *(f"{peak[version] / 1e6:,.0f} MB" for version in VERSIONS),
                times(peak["eager"] / peak["bnfuse"]),
                f"{case['losses_apart']:.0e}" if case["losses_apart"] else "0",
            ]
        )
    return markdown(rows)


def write_report(result: dict) -> None:
    rounds = result["cases"][0]["rounds"]
    where = f"float32, medians of {rounds} rounds, {circumstances(result, NAME)}"
    write_block(PAGE, "figures", f"{where}\n\n{table(result['cases'])}")
    print(f"wrote {PAGE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of ResNet-20; prints, writes nothing")
    parser.add_argument("--report", action="store_true", help="measure nothing, write the page from the results")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of two steps of either version (default 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--measure", nargs=3, metavar=("LOOP", "NETWORK", "VERSION"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        print(measure_memory(*args.measure))
        return
    if args.report:
        write_report(json.loads((RESULTS / f"{NAME}.json").read_text()))
        return
    if args.quick:
        measure(["resnet20"], 1, args.threads)
        return
    path = write_result(NAME, COMMAND, cases=measure(["resnet18", "resnet20"], args.rounds, args.threads))
    write_report(json.loads(path.read_text()))


if __name__ == "__main__":
    main()
