"""The recipe for ImageNet (`bnfuse/recipes.py`), run from end to end, and the accuracies that the README quotes.

    python benchmarks/recipes.py imagenet --data DIR     # DIR has mobilenet_v1.py with its weights, and imagenette_1200.zip
    python benchmarks/recipes.py imagenet --data DIR --split heldout     # to choose by: keeps no figures

Every step is a bnfuse command, printed before it runs. It takes about an hour on one core; the students are trained alike, with
one seed, and tested on real images that were used for nothing else: the last twenty of each class, or, to choose settings by,
the twenty before them, which then are not private. The judge is a network that had no part in making the images. Figures go to
benchmarks/results/, with machine, versions and threads, and into docs/recipes.md. The digits' recipe is what `bnfuse demo`
runs, and CIFAR-10's what `fidelity.py` measures.
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
TESTED = 20  # images of each of ImageNet's classes
SPLITS = ("test", "heldout")
# The control: what images begin as.
NOISE = "--low-resolution-iterations 0 --iterations 1 --bn-weight 0 --ce-weight 0 --tv-weight 0 --no-soft-labels"
JUDGE = "--epochs 40 --labels hard"


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


def imagenet(data: Path, runs: Path, split: str) -> dict:
    """From recorded statistics to students."""
    private, judged = parts(data / "imagenette_1200.zip", runs / "imagenette", split)
    scaling = "--mean 0.5 0.5 0.5 --std 0.5 0.5 0.5"
    teacher = f"--teacher {data / 'mobilenet_v1.py'}:mobilenet_v1 --image-size 224 {scaling}"
    outputs = "--outputs 0 217 482 491 497 566 569 571 574 701"
    train = f"train --recipe {RECIPE} --image-size 64 {scaling} --eval-every 0 --test {judged}"
    accuracy = rf"accuracy on {re.escape(str(judged))}:"
    figures = {"judge": percentage(run(f"{train} --data {private} {JUDGE} --out {runs}/judge"), accuracy)}

    statistics = f"{runs}/statistics.safetensors"
    run(f"record {teacher} --data {private} {outputs} --out {statistics}")
    synthesize = f"synthesize {teacher} --statistics {statistics} --recipe {RECIPE}"
    made = run(f"{synthesize} --judge {runs}/judge/model.safetensors --out {runs}/synthetic")
    figures["recognised_by_teacher"] = percentage(made, "the teacher takes")
    figures["recognised_by_judge"] = percentage(made, r"the judge \(resnet20\) takes")
    run(f"relabel {runs}/synthetic {teacher} {outputs} --recipe {RECIPE}")
    run(f"{synthesize} {NOISE} --out {runs}/noise")
    each = RECIPES[RECIPE].synthesis["images_per_class"]
    for name, options in {
        "synthetic_views": f"--data {runs}/synthetic --labels relabel",
        "synthetic_soft": f"--data {runs}/synthetic --labels soft",
        "synthetic_hard": f"--data {runs}/synthetic --labels hard",
        "real_hard": f"--data {private} --labels hard --limit-per-class {each}",
        "noise_hard": f"--data {runs}/noise --labels hard",
    }.items():
        figures[name] = percentage(run(f"{train} {options} --out {runs}/student_{name}"), accuracy)
    print(f"\n{each} images a class; accuracy on {judged}, and how many images the teacher and the judge recognise")
    print("\n".join(f"  {name:22s} {value:5.1f} %" for name, value in figures.items()))
    return figures


def parts(archive: Path, folder: Path, split: str) -> tuple[Path, Path]:
    """Unpacks the images into folders: private ones, and those to test by, which nothing else is done with."""
    paths = folder / "private", folder / split
    with zipfile.ZipFile(archive) as packed:
        files = sorted(name for name in packed.namelist() if name.endswith(".JPEG"))
        for _, of_class in itertools.groupby(files, key=lambda name: Path(name).parent):
            of_class = list(of_class)
            if split == "heldout":  # as if the last were not there
                of_class = of_class[:-TESTED]
            packed.extractall(paths[0], of_class[:-TESTED])
            packed.extractall(paths[1], of_class[-TESTED:])
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=(RECIPE,))
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("BNFUSE_DATA"), help="folder of the data (default BNFUSE_DATA)"
    )
    parser.add_argument("--split", choices=SPLITS, default="test", help="the real images that students are tested on")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs") / RECIPE, help=f"folder for what is made, by split (default runs/{RECIPE})"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if args.data is None or not Path(args.data).is_dir():
        parser.error(f"--data or BNFUSE_DATA must name the folder of the data, got {args.data}")
    torch.set_num_threads(args.threads)
    figures = imagenet(Path(args.data).resolve(), args.runs / args.split, args.split)
    if args.split != "test":
        return
    path = write_result(f"recipe_{RECIPE}", f"python benchmarks/recipes.py {RECIPE}", percent=figures)
    write_page()
    print(f"wrote {path} and {PAGE}")


if __name__ == "__main__":
    main()
