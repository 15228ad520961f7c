"""`audit`: every measure on one synthetic dataset, into findings, audit.json and the two reports."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch
from tqdm import tqdm

from ..card import versions
from ..datasets import ImageDataset
from ..distributed import choose_device
from ..files import locked_folder, write_atomically
from ..models import Teacher
from ..statistics import ClassStatistics
from .context import NOISE, Context, prepare
from .findings import Finding
from .measure import MEASURES, carry_out, check_ready, chosen, digest, inputs_key, look_up, to_json
from .report import render
from .summary import summarise

REPORT, PUBLIC_REPORT, RECORD = "audit.html", "audit_public.html", "audit.json"
FORMAT, FORMAT_VERSION = "bnfuse-audit", 1


@dataclass(frozen=True)
class AuditResult:
    """What `audit` found and where it is.

    Attributes
    ----------
    out : the folder; it holds pictures of private images, and is not for publication
    findings : of all measures, in the report's order
    summary : {"asked", "found", "not_asked"}, each some sentences for somebody who is no engineer
    seconds : of this call
    """

    out: Path
    findings: list[Finding]
    summary: dict[str, str]
    seconds: float

    @property
    def report(self) -> Path:
        """The page to read, one file with everything in it, private images too."""
        return self.out / REPORT

    @property
    def public_report(self) -> Path:
        """The same page without private images, and without what attacks recovered from networks trained on them."""
        return self.out / PUBLIC_REPORT

    @property
    def verdicts(self) -> dict[str, str]:
        """Measure → its verdict."""
        return {finding.measure: finding.verdict for finding in self.findings}


def audit(
    private: ImageDataset,
    synthetic: ImageDataset,
    heldout: ImageDataset | None,
    out: str | Path,
    *,
    teacher: Teacher | None = None,
    statistics: ClassStatistics | None = None,
    budget: str = "quick",
    measures: Sequence[str] | None = None,
    noise: float = NOISE,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
    command: str | None = None,
) -> AuditResult:
    """Measures what a synthetic dataset gives away of the private one, with controls, and writes the report.

    Every measure is made on the private images themselves, on the synthetic ones, and on the private ones plus noise. Stopped
    and started again with the same arguments, it goes on with the measures that are not done.

    Parameters
    ----------
    private : what the synthetic images were made from
    synthetic : what is to be published
    heldout : real images like the private ones, but not among them: the baseline; None leaves out what needs them
    out : folder of audit.html, audit_public.html, audit.json, findings/, pictures/ and, of measures that take long, scratch/
    teacher, statistics : what the synthetic images were made with; None leaves out the measures that need them
    budget : "quick" for a first look, "standard", "full"
    measures : names from `MEASURES`; None means all that can be made of what is given. Findings of the others that are in
        `out` already stay in the report.
    noise : standard deviation of the noised originals' noise, of pixels in [0, 1]
    device : where networks run; default a GPU where there is one. The teacher is moved there.
    seed : of everything random
    progress : bars, on a terminal
    command : the command line that makes the audit again, for the report; default a call of this function

    Raises
    ------
    InputError
        The datasets, the teacher and the statistics do not fit together, see `context.prepare`; an unknown measure or budget; a
        measure that lacks what it needs, such as a teacher, and was asked for by name;
        another process writes to `out`.
    """
    started = time.monotonic()
    names, out = chosen(measures), Path(out)
    context = prepare(
        private,
        synthetic,
        heldout,
        noise=noise,
        teacher=teacher,
        statistics=statistics,
        budget=budget,
        device=choose_device(device),
        seed=seed,
        out=out,
        show_progress=progress,
    )
    if measures is not None:
        check_ready(names, context)
    context = replace(context, key=inputs_key(context))
    out.mkdir(parents=True, exist_ok=True)
    findings = []
    with locked_folder(out, f"{out} is in use by another audit: wait for it, or choose another folder (out, --out)"):
        with tqdm(total=len(names), desc="audit", unit="measure", disable=None if progress else True) as bar:
            for name in MEASURES:
                if name in names:
                    bar.set_description(f"audit: {name}")
                    findings.append(carry_out(name, context))
                    bar.update()
                else:
                    findings.append(look_up(name, context))
        findings = [replace(finding, command=_command(command, context, finding.measure)) for finding in findings]
        summary = summarise(findings, context)
        record = _record(context, findings, summary, _command(command, context))
        write_atomically(out / RECORD, to_json(record))
        write_atomically(out / PUBLIC_REPORT, render(record, findings, out, public=True).encode())
        write_atomically(out / REPORT, render(record, findings, out).encode())
    return AuditResult(out, findings, summary, time.monotonic() - started)


def _record(context: Context, findings: list[Finding], summary: dict[str, str], command: str) -> dict:
    """The content of audit.json."""
    datasets = {"private": context.private, "synthetic": context.synthetic, "held-out": context.heldout}
    channels, height, width = context.image_shape
    teacher, statistics = context.teacher, context.statistics
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "date": date.today().isoformat(),
        "versions": versions(),
        "summary": summary,
        "datasets": {
            role: {"name": data.name, "images": len(data), "sha256": digest(data)}
            for role, data in datasets.items()
            if data is not None
        },
        "images": {"height": height, "width": width, "channels": channels, "class_names": context.private.class_names},
        "noise": context.noise,
        "teacher": teacher and {"architecture": teacher.architecture, "fingerprint": teacher.fingerprint},
        "statistics": statistics and {"dataset": statistics.dataset, "images": int(statistics.images.sum())},
        "budget": context.budget,
        "seed": context.seed,
        "device": str(context.device),
        "command": command,
        "findings": [finding.to_dict() for finding in findings],
    }


def _command(given: str | None, context: Context, measure: str | None = None) -> str:
    """What makes the audit again, or one measure of it."""
    if given is not None:
        return given if measure is None else f"{given} --only {measure}"
    heldout = None if context.heldout is None else context.heldout.name
    call = f"bnfuse.audit({context.private.name}, {context.synthetic.name}, {heldout}, {str(context.out)!r}, "
    measures = "" if measure is None else f"measures=[{measure!r}], "
    return f"{call}{measures}budget={context.budget!r}, seed={context.seed})"


def command_line(**flags) -> str:
    """`bnfuse audit` with these flags, None and False left out, as a shell takes it."""
    words = ["bnfuse", "audit"]
    for name, value in flags.items():
        if value is None or value is False:
            continue
        values = () if value is True else value if isinstance(value, (list, tuple)) else (value,)
        words += ["--" + name.replace("_", "-"), *map(str, values)]
    return shlex.join(words)
