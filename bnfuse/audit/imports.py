"""Imports torchmetrics beside a torchvision that was built for another torch, and so cannot be imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

_NAMES = ("torchvision", "torchvision.models", "torchvision.ops", "torchvision.transforms")


class _Anything(ModuleType):
    """A module that has whatever is imported from it; none of that works."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return None


@contextmanager
def without_broken_torchvision() -> Iterator[None]:
    """While this lasts, torchvision can be imported from, unless it is not installed.

    torchmetrics imports it wherever it is installed, for networks that nothing here uses, and fails with it.
    """
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        yield
        return
    except Exception:  # the operators of a build for another torch are missing: a RuntimeError, or an OSError
        _forget_torchvision()
    else:
        yield
        return
    sys.modules.update({name: _Anything(name) for name in _NAMES})
    try:
        yield
    finally:
        _forget_torchvision()


def _forget_torchvision() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
