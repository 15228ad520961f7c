"""How close students trained on synthetic images come to those trained on real ones, and which part of the recipe earns what.

    python benchmarks/fidelity.py curves cifar10 --split test     # accuracy against images per class, beside the ladder
    python benchmarks/fidelity.py students cifar10 --split test   # the same images, students of other kinds
    python benchmarks/fidelity.py ablations cifar10               # a line of fidelity_ablations.py each; on held-out images
    python benchmarks/fidelity.py report                          # what is kept: docs/fidelity.md, docs/recipes.md, README.md

Choices are made on the held-out part of the training images, which neither the statistics nor any student has seen (--split
heldout, the default); the test images are for what is reported at last (--split test). Each case leaves its own file in
benchmarks/results/fidelity and is not run again; what is made on the way stays in --runs, and is not made again: a run may be
stopped at any time, and the same command goes on. Started several times at once, once for each core with --threads 1, the
processes share the cases. BNFUSE_DATA names the folder of CIFAR-10 and its teacher.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import fidelity_cases
import fidelity_page
import recipes_page
import torch
from fidelity_cases import PROBLEMS, SPLITS, Case
from fidelity_runs import Busy, Workshop

from bnfuse.errors import BnfuseError, Interrupted

WAIT_SECONDS = 5.0  # before asking again whether another process has made what is needed


def work(workshop: Workshop, cases: list[Case], split: str, command: str) -> None:
    """Measures every case of which nothing is kept; those that wait for another process come last."""
    left = cases
    while left:
        waiting = []
        for case in left:
            if case.kept_at(split).is_file():
                continue
            started = time.monotonic()
            try:
                workshop.measure(case, split, command)
            except Busy:
                waiting.append(case)
                continue
            found = case.kept(split)
            print(f"{case.label}: {found['accuracy']:.1%} ({time.monotonic() - started:.0f} s)", flush=True)
        if len(waiting) == len(left):
            time.sleep(WAIT_SECONDS)
        left = waiting


def listing(cases: list[Case], split: str) -> str:
    """What there is to do, and what is done."""
    lines = []
    for case in cases:
        found = case.kept(split)
        lines.append(f"{'-' if found is None else format(found['accuracy'], '.1%'):>6s}  {case.label}")
    return "\n".join(lines)


def chosen(args) -> list[Case]:
    """The cases that the command line names."""
    problem = PROBLEMS[args.problem]
    cases = {"curves": fidelity_cases.curves, "students": fidelity_cases.students, "ablations": fidelity_cases.ablations}[
        args.command
    ](problem)
    if args.ipc:
        cases = [case for case in cases if case.ipc in args.ipc or (case.ipc is None and 0 in args.ipc)]
    seeds = args.seeds or (1 if args.command == "ablations" else fidelity_cases.SEEDS)
    cases = [case for case in cases if case.seed < seeds]
    if args.labels:
        cases = [case for case in cases if case.labels in args.labels]
    if args.only:
        unknown = set(args.only) - {case.arm for case in cases}
        if unknown:
            raise SystemExit(f"--only {' '.join(sorted(unknown))}: choose of {', '.join(dict.fromkeys(c.arm for c in cases))}")
        cases = [case for case in cases if case.arm in args.only]
    return cases


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("curves", "students", "ablations", "report"))
    parser.add_argument("problem", nargs="?", choices=PROBLEMS, default="cifar10")
    parser.add_argument("--split", choices=SPLITS, default="heldout", help="the real images that students are tested on")
    parser.add_argument("--ipc", type=int, nargs="+", metavar="N", help="images of each class alone; 0 is all real ones")
    parser.add_argument("--seeds", type=int, metavar="N", help="students with the first N seeds alone (ablations 1, else 3)")
    parser.add_argument("--labels", nargs="+", choices=fidelity_cases.LABELS, help="these labels alone")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these rungs, or lines of the table, alone")
    parser.add_argument("--list", action="store_true", help="show the cases and what is kept, and do nothing")
    parser.add_argument("--runs", type=Path, default=Path("runs/fidelity"), help="folder for what is made on the way")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.command == "report":
        fidelity_page.write_report()
        recipes_page.write_page()
        return 0
    problem = PROBLEMS[args.problem]
    if not problem.heldout and (args.command == "ablations" or args.split == "heldout"):
        parser.error(f"nothing of {problem.name} is held out to choose by: measure its curves and students with --split test")
    cases = chosen(args)
    if args.list:
        print(listing(cases, args.split))
        return 0
    torch.set_num_threads(args.threads)
    workshop = Workshop(problem, args.runs / problem.name, args.device)
    command = f"python benchmarks/fidelity.py {args.command} {args.problem} --split {args.split}"
    try:
        work(workshop, cases, args.split, command)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signal
    except BnfuseError as error:
        print(f"fidelity.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
