"""The measures: which there are, what each needs, and how one is run once and then found again.

A measure is a module with

    NAME, TITLE   its name in `MEASURES`, and its heading in the report
    NEEDS         a set, of "teacher", "statistics" and "heldout": what it cannot do without
    BUDGETS       budget → config, a frozen dataclass of its own
    run(context, config) -> Finding

and imports what it needs of optional packages at its top: where one is missing, the measure is reported as not run.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from ..card import versions
from ..datasets import ArrayDataset
from ..errors import InputError
from ..files import write_atomically
from .context import Context
from .findings import Finding, not_run

# In the report's order: from what is seen by eye, over the attacks on training, to what the statistics give away.
MEASURES = {
    "quality": "bnfuse.audit.quality",
    "neighbours": "bnfuse.audit.neighbours",
    "gradients": "bnfuse.audit.gradients",
    "memorisation": "bnfuse.audit.memorisation",
    "gan": "bnfuse.audit.gan",
    "membership": "bnfuse.audit.membership",
    "tracing": "bnfuse.audit.tracing",
}
PACKAGE = Path(__file__).parent
NEEDS = {
    "heldout": "real images that the synthetic ones were not made from (--heldout)",
    "teacher": "the network that the synthetic images were made with (--teacher)",
    "statistics": "the statistics that they were made from (--statistics)",
}


def chosen(names: Sequence[str] | None) -> list[str]:
    """The measures asked for, in the report's order; None means all. InputError for a name that is none, or for no name."""
    if names is None:
        return list(MEASURES)
    unknown = [name for name in names if name not in MEASURES]
    if unknown or not names:
        raise InputError(f"measures are {', '.join(MEASURES)}; got {', '.join(unknown) or 'none'}")
    return [name for name in MEASURES if name in names]


def check_ready(names: Sequence[str], context: Context) -> None:
    """InputError where one of these, asked for by name, lacks what it needs; among all of them it would be left out."""
    for name in names:
        if isinstance(finding := _ready(name, context), Finding):
            raise InputError(f"the measure {name} was asked for and cannot be made. {finding.sentence}")


def carry_out(name: str, context: Context) -> Finding:
    """Runs a measure, unless its finding for the same inputs is there already.

    The finding of a measure that ran is written to findings/NAME.json, and its scratch folder goes; that of one that was not
    run is not written, so that the next audit tries again.
    """
    module = _ready(name, context)
    if isinstance(module, Finding):
        return module
    config = module.BUDGETS[context.budget]
    context = replace(context, key=_measure_key(context, module, config))
    if (finding := _stored(context, name)) is not None:
        return finding
    started = time.monotonic()
    try:
        finding = module.run(context, config)
    except InputError as error:
        return not_run(name, module.TITLE, f"It does not fit these images: {error}")
    finding = replace(finding, budget=context.budget, seconds=time.monotonic() - started)
    record = {"key": context.key, "finding": finding.to_dict()}
    write_atomically(_path(context, name), to_json(record))
    shutil.rmtree(context.scratch(name))
    return finding


def look_up(name: str, context: Context) -> Finding:
    """The finding of a measure that is not asked for now: from an earlier run with the same inputs, or "not run"."""
    module = _ready(name, context)
    if isinstance(module, Finding):
        return module
    key = _measure_key(context, module, module.BUDGETS[context.budget])
    found = _stored(replace(context, key=key), name)
    return found or not_run(name, module.TITLE, "It was not asked for.")


def to_json(value) -> bytes:
    """As it is written to files that people may read."""
    return (json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def _ready(name: str, context: Context) -> ModuleType | Finding:
    """The measure's module, or the finding that says why it cannot be run."""
    try:
        module = importlib.import_module(MEASURES[name])
    except ModuleNotFoundError as error:
        if error.name == MEASURES[name]:
            reason = "It is not part of this version of bnfuse."
        else:
            reason = f"It needs {error.name}, which is not installed: pip install 'bnfuse[audit]'."
        return not_run(name, name, reason)
    missing = [text for what, text in NEEDS.items() if what in module.NEEDS and getattr(context, what) is None]
    if missing:
        return not_run(name, module.TITLE, f"It needs {' and '.join(missing)}.")
    return module


def _path(context: Context, name: str) -> Path:
    return context.out / "findings" / f"{name}.json"


def _stored(context: Context, name: str) -> Finding | None:
    """The finding that lies there, if it was made from the same inputs and all its pictures are there."""
    try:
        record = json.loads(_path(context, name).read_bytes())
        finding = Finding.from_dict(record["finding"]) if record["key"] == context.key else None
    except (OSError, ValueError, KeyError, TypeError):  # none, or one of another version
        return None
    pictures = [path for picture in (finding.pictures if finding else ()) for path in (picture.path, picture.public) if path]
    if finding is None or not all((context.out / path).is_file() for path in pictures):
        return None
    return finding


def inputs_key(context: Context) -> str:
    """sha256 over all that every finding depends on: datasets, teacher, statistics, noise, budget, seed and versions."""
    statistics = context.statistics
    parts = {
        "private": digest(context.private),
        "synthetic": digest(context.synthetic),
        "heldout": None if context.heldout is None else digest(context.heldout),
        "teacher": None if context.teacher is None else context.teacher.fingerprint,
        "statistics": None if statistics is None else [statistics.digest(), statistics.outputs],
        "noise": context.noise,
        "budget": context.budget,
        "seed": context.seed,
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _measure_key(context: Context, module: ModuleType, config) -> str:
    """The key of one measure's finding: the audit's inputs, and the measure as it is written, with all that it may use here."""
    files = {Path(module.__file__), *PACKAGE.glob("*.py")}
    sources = sorted((path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files)
    return hashlib.sha256(json.dumps([context.key, repr(config), sources]).encode()).hexdigest()


def digest(data: ArrayDataset) -> str:
    """sha256 over a dataset's shape, images, labels and class names."""
    sha256 = hashlib.sha256(json.dumps([list(data.images.shape), data.class_names]).encode())
    sha256.update(data.images.contiguous().numpy())
    sha256.update(data.labels.contiguous().numpy())
    return sha256.hexdigest()
