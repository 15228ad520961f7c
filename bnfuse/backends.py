"""Which implementation of the operators runs: what is available, what was chosen, and why.

`reference` is the eager definition and runs anywhere; `cpp` is the compiled CPU extension. A backend asked for by name that
is not there is an error; only `auto` chooses, and says once when it has to take the slow one.
"""

from __future__ import annotations

import functools
import os
import warnings
from dataclasses import dataclass

import torch

from .errors import BackendError, InputError

BACKENDS = ("auto", "reference", "cpp")
ENVIRONMENT_VARIABLE = "BNFUSE_BACKEND"

try:
    from . import _C as extension

    _extension_error = None
except ImportError as error:
    extension, _extension_error = None, error


@dataclass(frozen=True)
class Backend:
    """One implementation: whether it can run here, on which device types, and the reason in words."""

    name: str
    available: bool
    devices: tuple[str, ...]
    reason: str


def describe() -> list[Backend]:
    """Every backend, fastest first, with why it is or is not available."""
    if extension is None:
        cpp = Backend(
            "cpp",
            False,
            ("cpu",),
            f"the C++ extension cannot be loaded ({_extension_error}); build it with `pip install --no-build-isolation -e .`",
        )
    else:
        cpp = Backend(
            "cpp",
            True,
            ("cpu",),
            f"C++ extension built with {extension.compiler()}, running {extension.instruction_set()}",
        )
    return [cpp, Backend("reference", True, ("cpu", "cuda"), "eager PyTorch, runs anywhere")]


def check_name(backend: str) -> None:
    if backend not in BACKENDS:
        raise InputError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")


@torch.compiler.assume_constant_result
def resolve(backend: str, device_type: str) -> str:
    """The backend that runs on a device type.

    `backend` may be a name or "auto"; "auto" first asks the environment variable BNFUSE_BACKEND, then takes the fastest
    available. Raises BackendError when a backend asked for by name cannot run there, InputError when there is no such name.
    """
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    return _resolve(backend, device_type)


@functools.cache
def _resolve(backend: str, device_type: str) -> str:
    check_name(backend)
    if backend == "auto":
        chosen = next(b for b in describe() if b.available and device_type in b.devices or b.name == "reference")
        if chosen.name == "reference" and device_type == "cpu":
            warnings.warn(f"running on the slow reference backend: {_description('cpp').reason}", stacklevel=3)
        return chosen.name
    wanted = _description(backend)
    if not wanted.available:
        raise BackendError(f"backend {backend!r} was asked for and is not available: {wanted.reason}")
    if backend != "reference" and device_type not in wanted.devices:
        raise BackendError(
            f"backend {backend!r} was asked for a tensor on {device_type!r} but runs on "
            f"{', '.join(wanted.devices)}; use backend='auto' or move the tensor"
        )
    return backend


def _description(name: str) -> Backend:
    return next(b for b in describe() if b.name == name)


def release_memory() -> None:
    """Gives the memory that the compiled kernels keep for the next activations back to the system."""
    if extension is not None:
        extension.empty_pool()
