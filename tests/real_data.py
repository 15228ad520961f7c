"""Where the tests find third-party data that the project does not ship."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_BESIDE_THE_REPOSITORY = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"


def real_data(name: str) -> Path:
    """The file `name` in the folder that BNFUSE_DATA names, else in ../shared/data; skips the test without one."""
    folders = [Path(os.environ["BNFUSE_DATA"])] if os.environ.get("BNFUSE_DATA") else []
    for folder in [*folders, _BESIDE_THE_REPOSITORY]:
        if (folder / name).is_file():
            return (folder / name).resolve()
    pytest.skip(f"{name} is needed, in the folder that the environment variable BNFUSE_DATA names or in ../shared/data")
