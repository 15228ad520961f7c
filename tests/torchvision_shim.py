"""Imports torchvision beside a torch build that its compiled operators do not fit (a CPU torch, for one).

torchvision registers shape functions and gradients for operators such as ``torchvision::nms`` while it is imported, and
fails where its compiled library could not be loaded. The tests need only its datasets, transforms and models, so here
the missing operators are declared by name, without an implementation. Not for use outside the tests.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

_declared = None  # torch drops a Library's operators with the object, so it lives as long as the process


def import_torchvision() -> ModuleType:
    """torchvision, imported with or without its compiled operators; skips the test where it is not installed."""
    global _declared
    spec = importlib.util.find_spec("torchvision")  # finds a top-level package without importing it
    if spec is None:
        pytest.skip("torchvision is not installed")
    try:
        import torchvision
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declared = torch.library.Library("torchvision", "FRAGMENT")
        for name in _operators_named_in(Path(spec.origin).parent):
            if not hasattr(torch.ops.torchvision, name):
                _declared.define(f"{name}(Tensor x) -> Tensor")
        import torchvision
    return torchvision


def _operators_named_in(package: Path) -> list[str]:
    """The operators that torchvision registers something for during its import, found in its source."""
    sources = (package / file for file in ("_meta_registrations.py", "_autograd_registrations.py"))
    text = "\n".join(source.read_text() for source in sources if source.is_file())
    return sorted(set(re.findall(r'"torchvision::(\w+)"', text)))
