"""The same work on 1, 2 and 4 ranks of this machine, over gloo, in both modes.

    python benchmarks/scaling.py             # into benchmarks/results and docs/scaling.md
    python benchmarks/scaling.py --quick     # a small part, printed; nothing is written
    python benchmarks/scaling.py --report    # the page once more, from the results
    python benchmarks/scaling.py --mode independent # the other mode stays as it was measured before

Synchronised: one batch spread over the ranks, a fixed number of images in all; the time that rank 0 spends in the all-reduce,
in which it also waits for the slowest, and that of the all-reduce alone. Independent: `bnfuse synthesize` under torchrun on a
fixed number of units, less what the same command takes when there is nothing left to do. Each rank has one thread, so that more
ranks than cores share them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics as stats
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from report import ROOT, circumstances, markdown, times, write_block
from results_file import RESULTS, measured_before, write_result

from bnfuse.distributed import Team

PAGE, NAME, COMMAND = ROOT / "docs/scaling.md", "scaling", "python benchmarks/scaling.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


@dataclass(frozen=True)
class TimedTeam(Team):
    """Notes the seconds and the bytes of each of its all-reduces."""

    calls: list[tuple[float, int]] = field(default_factory=list)

    def sum_(self, tensor):
        started = time.perf_counter()
        super().sum_(tensor)
        self.calls.append((time.perf_counter() - started, tensor.nbytes))
        return tensor


# ---- synchronised ----


def rank_work(batch: int, micro_batch: int, repeats: int) -> None:
    """What each rank does under torchrun; rank 0 prints what it found."""
    from units import Unit

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    team = TimedTeam(dist.get_rank(), dist.get_world_size())
    unit, steps, shares = Unit(batch), [], []
    for _ in range(repeats):
        team.calls.clear()
        steps.append(unit.seconds_a_step(10, 10, micro_batch=micro_batch, team=team))  # a team is asked every tenth step
        moments = [seconds for seconds, size in team.calls if size == max(size for _, size in team.calls)]
        shares.append(sum(moments[10:20]) / 10 / steps[-1] if team.size > 1 else 0.0)
    size = max((size for _, size in team.calls), default=0)
    alone = all_reduce_alone(team, size) if team.size > 1 else 0.0
    if team.rank == 0:
        found = dict(seconds=steps, share_in_all_reduce=shares, all_reduce_bytes=size, all_reduce_alone_seconds=alone)
        print(json.dumps(found))
    dist.destroy_process_group()


def all_reduce_alone(team: TimedTeam, size: int, calls: int = 50) -> float:
    """Seconds of one when all ranks arrive together, median."""
    seconds = []
    for _ in range(calls):
        dist.barrier()
        started = time.perf_counter()
        team.sum_(torch.zeros(size // 8, dtype=torch.float64))
        seconds.append(time.perf_counter() - started)
    return stats.median(seconds)


def synchronised(ranks: int, batch: int, micro_batch: int, repeats: int) -> dict:
    work = [__file__, "--rank-work", *map(str, (batch, micro_batch, repeats))]
    found = json.loads(run([*TORCHRUN, f"--nproc-per-node={ranks}", *work]).splitlines()[-1])
    medians = {name: stats.median(value) if isinstance(value, list) else value for name, value in found.items()}
    case = {"ranks": ranks, "batch": batch, "micro_batch": micro_batch, "repeats": repeats, **medians}
    print(
        f"  {ranks} ranks: {case['seconds']:.3f} s a step, {case['share_in_all_reduce']:.1%} of rank 0's in the all-reduce of "
        f"{case['all_reduce_bytes'] / 1e3:.0f} kB, which alone takes {case['all_reduce_alone_seconds'] * 1e3:.2f} ms",
        flush=True,
    )
    return case


# ---- independent ----


def independent(ranks: int, units: int, batch: int, iterations: int, folder: Path) -> dict:
    from units import CLASSES, resnet20

    from bnfuse.checkpoints import save_checkpoint

    path = folder / "teacher.safetensors"
    if not path.exists():
        teacher = resnet20()
        about = dict(architecture=teacher.architecture, num_classes=CLASSES, preprocessing=teacher.preprocessing)
        save_checkpoint(path, teacher.model, **about)
    options = f"--teacher {path} --targets running --images-per-class {units * batch} --batch-size {batch}"
    options += f" --classes 0 --iterations {iterations} --device cpu --out {folder / str(ranks)}"
    command = [*TORCHRUN, f"--nproc-per-node={ranks}", "-m", "bnfuse", "synthesize", *options.split()]
    seconds = []
    for _ in ("the work", "nothing left to do"):
        started = time.perf_counter()
        run(command)
        seconds.append(time.perf_counter() - started)
    case = {"ranks": ranks, "units": units, "batch": batch, "iterations": iterations}
    case |= {"seconds": seconds[0] - seconds[1], "start_seconds": seconds[1]}
    print(f"  {ranks} ranks: {case['seconds']:.1f} s, beside {case['start_seconds']:.1f} s of starting and ending", flush=True)
    return case


def run(command: list[str]) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


# ---- the page ----


def write_report(result: dict) -> None:
    one, *_ = result["synchronised"]
    rows = [["one batch over the ranks", "seconds a step", "over one rank", "rank 0 in the all-reduce", "the all-reduce alone"]]
    for case in result["synchronised"]:
        together = ["", ""]
        if case["ranks"] > 1:
            together = [f"{case['share_in_all_reduce']:.1%}", f"{case['all_reduce_alone_seconds'] * 1e3:.2f} ms"]
        rows.append([_ranks(case), f"{case['seconds']:.3f}", times(one["seconds"] / case["seconds"]), *together])
    size = max(case["all_reduce_bytes"] for case in result["synchronised"])
    text = (
        f"{circumstances(result, NAME)} {result['cores']} cores, one thread a rank. ResNet-20, {one['batch']} images of 32×32 "
        f"in all, {one['micro_batch']} at a time; an all-reduce of {size / 1e3:.0f} kB."
    )
    blocks = [text, markdown(rows)]
    one, *_ = result["independent"]
    rows = [["units dealt to the ranks", "seconds", "over one rank"]]
    rows += [[_ranks(c), f"{c['seconds']:.1f}", times(one["seconds"] / c["seconds"])] for c in result["independent"]]
    blocks += [f"{one['units']} units of {one['batch']} images, {one['iterations']} steps each:", markdown(rows)]
    write_block(PAGE, "measured", "\n\n".join(blocks))
    print(f"wrote {PAGE}")


def _ranks(case: dict) -> str:
    return f"{case['ranks']} rank{'s' * (case['ranks'] > 1)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="little work on 1 and 2 ranks; prints, writes nothing")
    parser.add_argument("--report", action="store_true", help="measure nothing, write the page from the results")
    parser.add_argument("--mode", choices=("synchronised", "independent", "both"), default="both")
    parser.add_argument("--batch", type=int, default=256, help="images of the synchronised batch (default 256)")
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3, help="times that ten steps are timed (default 3)")
    parser.add_argument("--units", type=int, default=8, help="units of the independent mode, of 64 images (default 8)")
    parser.add_argument("--rank-work", type=int, nargs=3, metavar=("BATCH", "MICRO_BATCH", "REPEATS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_work:
        rank_work(*args.rank_work)
        return
    if args.report:
        write_report(json.loads((RESULTS / f"{NAME}.json").read_text()))
        return
    torch.set_num_threads(1)  # as the ranks have, and the result says
    ranks = (1, 2) if args.quick else (1, 2, 4)
    batch, repeats, units, iterations = (32, 1, 2, 5) if args.quick else (args.batch, args.repeats, args.units, 40)
    modes = ("synchronised", "independent")
    kept = [] if args.quick or args.mode == "both" else [mode for mode in modes if mode != args.mode]
    result = measured_before(NAME, *kept) if kept else {}
    if args.mode != "independent":
        print("one batch over the ranks:")
        result["synchronised"] = [synchronised(n, batch, min(batch, args.micro_batch), repeats) for n in ranks]
    if args.mode != "synchronised":
        print("units dealt to the ranks:")
        with tempfile.TemporaryDirectory() as folder:
            result["independent"] = [independent(n, units, 16 if args.quick else 64, iterations, Path(folder)) for n in ranks]
    if not args.quick:
        path = write_result(NAME, COMMAND, **{mode: result[mode] for mode in modes})
        write_report(json.loads(path.read_text()))


if __name__ == "__main__":
    main()
