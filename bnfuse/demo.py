"""`bnfuse demo`: the whole flow on real handwritten digits, in a few minutes on two cores, with nothing to download.

A teacher learns scikit-learn's digits, their statistics are recorded, images are synthesised from noise, and the teacher labels
views of them; then students learn from scratch in the same way, on the real images, on the synthetic ones with these labels and
without, and (the controls) on noise with the same two kinds of labels, and all are tested on real digits that none has seen.
Last, the synthetic images are audited.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from .audit.running import RECORD, audit, command_line
from .audit.summary import verdict_lines
from .datasets import ArrayDataset, ImageDataset, load_dataset
from .files import write_atomically
from .labels import Labels
from .manifest import is_store
from .models import load_teacher
from .pictures import grid, save
from .recipes import recipe
from .relabelling import relabel
from .statistics import record
from .store import write_store
from .synthesis import synthesize
from .training import TrainConfig, train

# Images of 8×8 are too small to share among threads: a second one gains little on a quiet machine and costs much on a busy
# one. One thread also makes the figures independent of the number of cores.
THREADS = 1

TEACHER = TrainConfig(model="resnet20", epochs=30, batch_size=64, lr=0.01, shift=1)
RECIPE = recipe("digits")
SYNTHESIS, VIEWS, STUDENT = RECIPE.synthesis_config(), RECIPE.relabel_config(), RECIPE.train_config()


def run_demo(out: str | Path = "runs/demo", *, seed: int = 0) -> dict:
    """Runs the flow from the start and leaves everything in `out`; an earlier demo there is replaced.

    Returns
    -------
    The content of summary.json: teacher_accuracy, real_student_accuracy, synthetic_student_accuracy,
    synthetic_hard_student_accuracy, noise_student_accuracy, noise_hard_student_accuracy (each a fraction of the held-out
    digits), images, synthesis_seconds, audit (measure → verdict), audit_seconds, seconds, and date, threads and versions
    """
    torch.set_num_threads(THREADS)
    out, started = Path(out), time.monotonic()
    private, heldout = load_dataset("digits:train"), load_dataset("digits:test")
    for earlier in filter(is_store, (out / "synthetic", out / "noise")):
        shutil.rmtree(earlier)
    if (out / "audit" / RECORD).is_file():
        shutil.rmtree(out / "audit")
    summary = {}

    _say(f"1/7 a teacher learns {len(private)} private digits")
    result = train(private, _seeded(TEACHER, seed), test=heldout, out=out / "teacher")
    summary["teacher_accuracy"] = result.accuracy
    teacher = load_teacher(out / "teacher" / "model.safetensors")

    _say("2/7 the statistics of each class are recorded")
    statistics = record(
        teacher,
        DataLoader(private, batch_size=256),
        private.num_classes,
        class_names=private.class_names,
        dataset=private.name,
    )
    statistics.save(out / "statistics.safetensors")

    _say(
        f"3/7 {SYNTHESIS.images_per_class * private.num_classes} images are synthesised from noise; watch them form in "
        f"{out / 'synthetic' / 'contact_sheet.png'}"
    )
    made = synthesize(teacher, statistics, out / "synthetic", _seeded(SYNTHESIS, seed))
    synthetic = load_dataset(str(out / "synthetic"))
    summary["images"], summary["synthesis_seconds"] = made.images, made.seconds

    _say("4/7 the teacher labels views of them, and of noise")
    noise = noise_like(synthetic, seed)
    write_store(noise.images.permute(0, 3, 1, 2), noise.labels, noise.class_names, out / "noise")
    labels = {name: Labels(relabel(out / name, teacher, _seeded(VIEWS, seed)).out) for name in ("synthetic", "noise")}

    _say("5/7 students learn from scratch: on real digits, on synthetic ones, on noise")
    for name, data, learnt in (
        ("real", private, None),
        ("synthetic", synthetic, labels["synthetic"]),
        ("synthetic_hard", synthetic, None),
        ("noise", noise, labels["noise"]),
        ("noise_hard", noise, None),
    ):
        student = train(
            data,
            _seeded(STUDENT, seed + 1),
            test=heldout,
            labels=learnt,
            preprocessing=teacher.preprocessing,
            out=out / f"{name}_student",
        )
        summary[f"{name}_student_accuracy"] = student.accuracy

    _say("6/7 a picture: real digits beside synthetic ones")
    save(real_and_synthetic(private, synthetic), out / "contact_sheet.png")

    _say("7/7 the audit: what the synthetic digits give away of the private ones")
    audited = audit(
        private,
        synthetic,
        heldout,
        out / "audit",
        teacher=teacher,
        statistics=statistics,
        budget="quick",
        seed=seed,
        command=command_line(
            private="digits:train",
            synthetic=out / "synthetic",
            heldout="digits:test",
            teacher=out / "teacher" / "model.safetensors",
            statistics=out / "statistics.safetensors",
            budget="quick",
            seed=seed,
            out=out / "audit",
        ),
    )
    summary["audit"], summary["audit_seconds"] = audited.verdicts, audited.seconds
    summary["seconds"] = time.monotonic() - started
    summary |= {"date": date.today().isoformat(), "threads": THREADS, "torch": torch.__version__, "bnfuse": version("bnfuse")}
    write_atomically(out / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    print(_table(summary, len(heldout)))
    print(
        f"real digits (left) beside synthetic ones (right): {out / 'contact_sheet.png'}\n"
        f"the dataset: {out / 'synthetic'}; the figures: {out / 'summary.json'}\n"
    )
    print(f"The audit ({audited.seconds:.0f} s; it shows private digits)\n{verdict_lines(audited.findings)}\n")
    print(f"to be shown to others, without private digits: {audited.public_report}")
    print(f"read it: {audited.report.resolve().as_uri()}")
    return summary


def noise_like(dataset: ImageDataset, seed: int) -> ArrayDataset:
    """Uniform noise of the same number and size, with the same labels: what a student learns from labels alone."""
    shape = (len(dataset), *dataset[0][0].permute(1, 2, 0).shape)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return ArrayDataset(images, dataset.labels, class_names=dataset.class_names, name="noise")


def real_and_synthetic(real: ImageDataset, synthetic: ImageDataset, each: int = 8):
    """A picture with a row a class: real images, a blank column, synthetic images."""

    def row(dataset: ImageDataset, k: int) -> list:
        first = (dataset.labels == k).nonzero().flatten()[:each].tolist()
        return [(dataset[i][0] * 255).round().to(torch.uint8) for i in first]

    return grid([[*row(real, k), None, *row(synthetic, k)] for k in range(real.num_classes)])


def _seeded(config, seed: int):
    return replace(config, seed=seed)


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)


def _table(summary: dict, tested: int) -> str:
    rows = [
        ("the teacher, on the private digits", "teacher"),
        ("a student, on the private digits", "real_student"),
        (f"a student, on {summary['images']} synthetic images that the teacher labelled", "synthetic_student"),
        ("a student, on them with the classes that they were made for", "synthetic_hard_student"),
        ("a student, on noise that the teacher labelled (a control)", "noise_student"),
        ("a student, on noise with the same classes (the other control)", "noise_hard_student"),
    ]
    lines = [f"\nAccuracy on {tested} real digits that none of them has seen ({summary['seconds']:.0f} s in all)"]
    return "\n".join(lines + [f"  {name:64s} {summary[key + '_accuracy']:6.1%}" for name, key in rows]) + "\n"
