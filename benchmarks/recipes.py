"""The recipe for ImageNet (`bnfuse/recipes.py`), run from end to end, and the accuracies that the README quotes.

    python benchmarks/recipes.py imagenet --data DIR     # DIR has mobilenet_v1.py with its weights, and imagenette_1200.zip

Every step is a bnfuse command, printed before it runs. It takes about half an hour on one core; the students are trained alike,
with one seed, and tested on real images that were used for nothing else. Figures go to benchmarks/results/, with machine,
versions and threads, and into docs/recipes.md. The digits' recipe is what `bnfuse demo` runs, and CIFAR-10's what `fidelity.py`
measures.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import re
import shlex
import zipfile
from pathlib import Path

import torch
from recipes_page import PAGE, write_page
from results_file import write_result

from bnfuse.cli import main as bnfuse
from bnfuse.recipes import RECIPES

RECIPE = "imagenet"
HELD_OUT = 20  # images of each of ImageNet's classes
NOISE = "--low-resolution-iterations 0 --iterations 1 --bn-weight 0 --ce-weight 0 --tv-weight 0 --no-soft-labels"  # the control


def run(command: str) -> str:
    """Runs one bnfuse command and returns what it printed."""
    print(f"\n$ bnfuse {command}", flush=True)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = bnfuse(shlex.split(command))
    print(out.getvalue(), end="", flush=True)
    if status:
        raise SystemExit(status)
    return out.getvalue()


def percentage(text: str, pattern: str) -> float:
    return float(re.search(pattern + r" ([\d.]+)%", text)[1])


def imagenet(data: Path, runs: Path) -> dict:
    """From recorded statistics to students."""
    private, heldout = split(data / "imagenette_1200.zip", runs / "imagenette")
    scaling = "--mean 0.5 0.5 0.5 --std 0.5 0.5 0.5"
    teacher = f"--teacher {data / 'mobilenet_v1.py'}:mobilenet_v1 --image-size 224 {scaling}"
    statistics = f"{runs}/statistics.safetensors"
    run(f"record {teacher} --data {private} --outputs 0 217 482 491 497 566 569 571 574 701 --out {statistics}")
    synthesize = f"synthesize {teacher} --statistics {statistics} --recipe {RECIPE}"
    made = run(f"{synthesize} --out {runs}/synthetic")
    run(f"{synthesize} {NOISE} --out {runs}/noise")
    figures = {"recognised_by_teacher": percentage(made, "the teacher takes")}
    each = RECIPES[RECIPE].synthesis["images_per_class"]
    learn = f"train --recipe {RECIPE}"
    for name, options in {
        "synthetic_hard": f"--data {runs}/synthetic --labels hard",
        "synthetic_soft": f"--data {runs}/synthetic --labels soft",
        "real_hard": f"--data {private} --labels hard --limit-per-class {each}",
        "noise_hard": f"--data {runs}/noise --labels hard",
    }.items():
        seen = f"--test {heldout} --image-size 64 {scaling} --eval-every 0"
        figures[name] = percentage(run(f"{learn} {options} {seen} --out {runs}/student_{name}"), f"accuracy on {heldout}:")
    print(f"\nstudents ({each} images a class), accuracy on {heldout}")
    print("\n".join(f"  {name:22s} {value:5.1f} %" for name, value in figures.items()))
    return figures


def split(archive: Path, folder: Path) -> tuple[Path, Path]:
    """Unpacks the images: of each class the last twenty are for testing, and for nothing else."""
    parts = folder / "private", folder / "heldout"
    with zipfile.ZipFile(archive) as packed:
        files = sorted(name for name in packed.namelist() if name.endswith(".JPEG"))
        for _, of_class in itertools.groupby(files, key=lambda name: Path(name).parent):
            of_class = list(of_class)
            packed.extractall(parts[0], of_class[:-HELD_OUT])
            packed.extractall(parts[1], of_class[-HELD_OUT:])
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=(RECIPE,))
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("BNFUSE_DATA"), help="folder of the data (default BNFUSE_DATA)"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs") / RECIPE, help=f"folder for what is made (default runs/{RECIPE})"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if args.data is None or not Path(args.data).is_dir():
        parser.error(f"--data or BNFUSE_DATA must name the folder of the data, got {args.data}")
    torch.set_num_threads(args.threads)
    figures = imagenet(Path(args.data).resolve(), args.runs)
    path = write_result(f"recipe_{RECIPE}", f"python benchmarks/recipes.py {RECIPE}", percent=figures)
    write_page()
    print(f"wrote {path} and {PAGE}")


if __name__ == "__main__":
    main()
