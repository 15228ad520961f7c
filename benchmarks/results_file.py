"""Where a benchmark leaves its figures: benchmarks/results/NAME.json, with what they were measured on."""

from __future__ import annotations

import json
import platform
from datetime import date
from pathlib import Path

import torch

from bnfuse import __version__, backends

RESULTS = Path(__file__).parent / "results"


def write_result(name: str, command: str, **figures) -> Path:
    """Writes the figures beside command, date, processor, threads and versions."""
    result = {
        "command": command,
        **figures,
        "date": date.today().isoformat(),
        "processor": _processor(),
        "instruction_set": backends.extension.instruction_set() if backends.extension else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bnfuse": __version__,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def _processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
