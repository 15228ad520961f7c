"""A small part of `make chaos`, with the command line and torchrun as users start them."""

import os
import subprocess
import sys
from pathlib import Path


def test_three_kills():
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, root / "tests" / "chaos.py", "--kills", "3", "--images", "18", "--seed", "3"]
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("3 kills (") and "0 images lost, 0 doubled" in done.stdout
