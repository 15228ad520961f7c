"""Where a benchmark leaves its figures: benchmarks/results/NAME.json, with what they were measured on.

BNFUSE_RESULTS=… names another folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
from datetime import date
from pathlib import Path

import torch

from bnfuse import __version__, backends
from bnfuse.files import write_atomically

RESULTS = Path(os.environ.get("BNFUSE_RESULTS") or Path(__file__).parent / "results")
_ALLOCATOR_VARIABLES = re.compile(r"MALLOC_\w+_|GLIBC_TUNABLES|LD_PRELOAD|THP_MEM_ALLOC_ENABLE|PYTORCH_(CUDA_)?ALLOC_CONF")


def write_result(name: str, command: str, *, device: torch.device | str = "cpu", **figures) -> Path:
    """Writes the figures beside command, date, machine, threads and versions, whole or not at all."""
    result = {"command": command, **figures, **measured_on(torch.device(device))}
    path = RESULTS / f"{name}.json"
    write_atomically(path, (json.dumps(_rounded(result), indent=2) + "\n").encode())
    return path


def measured_on(device: torch.device) -> dict:
    """Date, machine, threads and versions."""
    result = {
        "date": date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "instruction_set": backends.extension.instruction_set() if backends.extension else None,
        "threads": torch.get_num_threads(),
        "allocator": {k: v for k, v in os.environ.items() if _ALLOCATOR_VARIABLES.fullmatch(k)} or "the C library's, as it is",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bnfuse": __version__,
        "backend": backends.resolve("auto", device.type),  # what is called bnfuse; other backends have their own names
    }
    if device.type == "cuda":
        result |= {"gpu": device_name(device), "cuda": torch.version.cuda, "allocator": "PyTorch's caching allocator"}
        if importlib.util.find_spec("triton"):
            result["triton"] = importlib.import_module("triton").__version__
    return result


def measured_before(name: str, *figures: str) -> dict:
    """These figures of a result that is kept, to be written again beside others that are measured now.

    SystemExit where there are none, or where they are of another machine or of other versions.
    """
    path, now = RESULTS / f"{name}.json", measured_on(torch.device("cpu"))
    result = json.loads(path.read_text()) if path.is_file() else {}
    if missing := [figure for figure in figures if not result.get(figure)]:
        raise SystemExit(f"{path} has no {', '.join(missing)} to keep: measure everything")
    if others := [field for field, value in now.items() if field != "date" and result.get(field) != value]:
        raise SystemExit(f"{path} was measured under another {', '.join(others)}: measure everything")
    return {figure: result[figure] for figure in figures}


def file_name(suite: str, device: torch.device, *settings: str | None) -> str:
    """The suite, a GPU's name, and the settings that are not the default: so nothing of others is overwritten."""
    gpu = slug(device_name(device)) if device.type != "cpu" else None
    return "_".join(filter(None, (suite, gpu, *settings)))


def device_name(device: torch.device) -> str:
    """What the figures were measured on, as its maker calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _rounded(value):
    """Four significant digits are more than these machines give."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def _processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
