"""ImageNet from end to end as docs/imagenet.md tells it, disturbed on purpose, and what came of it.

    python benchmarks/imagenet_end_to_end.py --data DIR            # DIR as in BNFUSE_DATA
    python benchmarks/imagenet_end_to_end.py --data DIR --quick    # to see that all of it runs

Of the data it needs mobilenet_v1.py with its weights, and imagenette_1200.zip. Statistics of ten classes are recorded at 224;
two ranks under torchrun synthesise, and are killed, once by SIGKILL and once by SIGTERM; one rank goes on to the end; a bit is
flipped in an image, found, and repaired; a student learns from the images and is tested on real ones. Every step is a bnfuse
command, printed before it runs. Figures go to benchmarks/results/imagenet_end_to_end.json.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from results_file import write_result

from bnfuse.manifest import read_store

IMAGES = "--image-size 224 --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5"
CLASSES = "0 217 482 491 497 566 569 571 574 701"
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2"


class Steps:
    """Runs the commands, and keeps what they printed and how long they took."""

    def __init__(self, data: Path, runs: Path, quick: bool):
        self.runs, self.out = runs, runs / "synthetic"
        self.teacher = f"--teacher {data / 'mobilenet_v1.py'}:mobilenet_v1 {IMAGES}"
        size = (
            "--images-per-class 1 --batch-size 1 --iterations 60"
            if quick
            else "--images-per-class 4 --batch-size 4 --iterations 200"
        )
        self.synthesize = (
            f"-m bnfuse synthesize {self.teacher} --statistics {runs}/statistics.safetensors --out {self.out} {size} --lr 0.2 "
            "--bn-weight 0.01 --first-site-weight 1 --tv-weight 0.1 --jitter 32 --flip --soft-labels --checkpoint-every 20 "
            "--threads 1 --device cpu"
        )
        self.epochs = 3 if quick else 60
        self.seconds: dict[str, float] = {}

    def start(self, command: str) -> subprocess.Popen:
        print(f"\n$ python {command}", flush=True)
        root = Path(__file__).resolve().parents[1]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
        return subprocess.Popen([sys.executable, *shlex.split(command)], env=environment, stdout=subprocess.PIPE, text=True)

    def run(self, name: str, command: str, status: int = 0) -> str:
        """What the command printed. It has to end with `status`."""
        begun = time.monotonic()
        process = self.start(command)
        printed = process.communicate()[0]
        print(printed, end="", flush=True)
        if process.returncode != status:
            raise SystemExit(f"{name} ended with status {process.returncode}, expected {status}")
        self.seconds[name] = time.monotonic() - begun
        return printed

    def run_and_kill(self, name: str, number: signal.Signals, images: int) -> int:
        """Two ranks, killed once so many images are committed and more are half done; returns the images committed then."""
        begun = time.monotonic()
        process = self.start(f"{TORCHRUN} {self.synthesize}")
        while self.committed() < images or not any(self.checkpoints()):
            if process.poll() is not None:
                raise SystemExit(f"{name}: the run ended before it could be killed")
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        everyone = [process.pid, *map(int, children)]
        for pid in everyone if number == signal.SIGKILL else [process.pid]:
            os.kill(pid, number)
        process.communicate()
        while any(Path(f"/proc/{pid}").exists() for pid in everyone):
            time.sleep(0.1)
        kept = [path.stem for path in self.checkpoints()]
        print(f"{number.name}: {self.committed()} images are committed, units {', '.join(kept)} are kept half done", flush=True)
        self.seconds[name] = time.monotonic() - begun
        return self.committed()

    def committed(self) -> int:
        return len(read_store(self.out).entries) if (self.out / "card.json").exists() else 0

    def checkpoints(self) -> list[Path]:
        return sorted((self.out / "checkpoints").glob("*.safetensors"))


def end_to_end(data: Path, runs: Path, quick: bool) -> dict:
    steps = Steps(data, runs, quick)
    with zipfile.ZipFile(data / "imagenette_1200.zip") as archive:
        archive.extractall(runs / "imagenette")
    steps.run(
        "record",
        f"-m bnfuse record {steps.teacher} --data {runs}/imagenette --outputs {CLASSES} --out {runs}/statistics.safetensors",
    )
    share = 1 if quick else 4
    after_sigkill = steps.run_and_kill("two ranks, until SIGKILL", signal.SIGKILL, 2 * share)
    after_sigterm = steps.run_and_kill("two ranks, until SIGTERM", signal.SIGTERM, after_sigkill + 2 * share)
    said = steps.run("one rank, to the end", steps.synthesize)
    steps.run("verify", f"-m bnfuse verify {steps.out}")

    manifest = (steps.out / "manifest.jsonl").read_bytes()
    victim = next(path for path in sorted((steps.out / "images").rglob("*.png")))
    bytes_before = victim.read_bytes()
    victim.write_bytes(bytes_before[:-30] + bytes([bytes_before[-30] ^ 1]) + bytes_before[-29:])
    steps.run("verify, a bit flipped", f"-m bnfuse verify {steps.out}", status=1)
    steps.run(
        "repair",
        f"-m bnfuse verify {steps.out} --repair {steps.teacher} --statistics {runs}/statistics.safetensors --device cpu",
    )
    if (victim.read_bytes(), (steps.out / "manifest.jsonl").read_bytes()) != (bytes_before, manifest):
        raise SystemExit("the repaired image is not the one that was there")

    trained = steps.run(
        "train",
        f"-m bnfuse train --data {steps.out} --test {runs}/imagenette {IMAGES.replace('224', '64')} --model resnet20 "
        f"--epochs {steps.epochs} --batch-size 20 --shift 4 --flip --eval-every 0 --out {runs}/student",
    )
    return {
        "images": {"after SIGKILL": after_sigkill, "after SIGTERM": after_sigterm, "in the end": steps.committed()},
        "percent": {
            "recognised_by_teacher": percentage(said, "the teacher takes"),
            "student_on_real_images": percentage(trained, "accuracy on"),
        },
        "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
        "seconds": steps.seconds,
    }


def percentage(text: str, after: str) -> float:
    return float(re.search(rf"{re.escape(after)}.*? ([\d.]+)%", text)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("BNFUSE_DATA"), help="folder of the data (default BNFUSE_DATA)"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/imagenet_end_to_end"), help="folder, not there yet")
    parser.add_argument("--quick", action="store_true", help="one image a class and few iterations, to see that all of it runs")
    args = parser.parse_args()
    if args.data is None or not Path(args.data).is_dir():
        parser.error(f"--data or BNFUSE_DATA must name the folder of the data, got {args.data}")
    if args.runs.exists():
        parser.error(f"{args.runs} is there already: remove it, or choose another --runs")
    args.runs.mkdir(parents=True)
    figures = end_to_end(Path(args.data).resolve(), args.runs.resolve(), args.quick)
    name = "quick_imagenet_end_to_end" if args.quick else "imagenet_end_to_end"
    path = write_result(name, "python benchmarks/imagenet_end_to_end.py" + " --quick" * args.quick, **figures)
    print("\n".join(f"{seconds:6.0f} s  {step}" for step, seconds in figures["seconds"].items()))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
