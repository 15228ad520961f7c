"""What a step holds: bytes kept for backward, and the peak of a step. See step_memory.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from step_memory import child_environment, kept_bytes, peak_bytes
from steps import LOSSES, make_images, make_step, make_teacher, verify

CONTENDERS = ("bnfuse", "hook", "plain")


def test_memory(network, settings, record):
    batch = settings.step_batch(network)
    model = make_teacher(network, *settings.tensors)
    images, labels = make_images(network, batch, model, settings.memory_format)
    losses = {name: LOSSES[name](model, labels) for name in CONTENDERS}
    verify(model, {(name, ""): (loss, images) for name, loss in losses.items()}, images, labels)
    case = {"network": network, "batch": batch}
    case["kept_bytes"] = {name: kept_bytes(loss, images) for name, loss in losses.items()}
    if settings.device.type == "cuda":  # its allocator counts; what else lives here does not matter
        peaks = {name: peak_bytes(make_step(loss, images), settings.device) for name, loss in losses.items()}
        case["peak_bytes"] = peaks
    elif not settings.quick:
        del model, losses, images
        case["peak_bytes"] = {name: _peak_bytes(name, network, batch, settings) for name in CONTENDERS}
    record.cases["memory"].append(case)


def _peak_bytes(contender: str, network: str, batch: int, settings) -> int:
    """Of one step, measured in a fresh process."""
    script = Path(__file__).with_name("step_memory.py")
    dtype = settings.describe()["dtype"]
    arguments = [network, contender, str(batch), str(settings.device), str(settings.threads), dtype, settings.layout]
    ran = subprocess.run(
        [sys.executable, str(script), *arguments], env=child_environment(), capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, f"{' '.join(arguments)} failed:\n{ran.stderr}"
    return json.loads(ran.stdout.splitlines()[-1])
