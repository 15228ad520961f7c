"""Which implementation of the operators runs: what is available, what was chosen, and why.

    cpp         the compiled kernels for the CPU
    cuda        the compiled kernels for NVIDIA GPUs
    triton      kernels in Triton, for GPUs; where TRITON_INTERPRET=1 is set also for the CPU, very slowly, for tests
    reference   the eager definition, runs anywhere

A backend asked for by name that is not there is an error; only `auto` chooses, the first of these that runs on a device, and
says once when it has to take the slow one.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from dataclasses import dataclass

import torch

from .errors import BackendError, BnfuseError, InputError

BACKENDS = ("auto", "reference", "cpp", "cuda", "triton")
ENVIRONMENT_VARIABLE = "BNFUSE_BACKEND"
INSTRUCTION_SET_VARIABLE = "BNFUSE_INSTRUCTION_SET"  # read by csrc/cpu/instruction_set.cpp when the extension is loaded
OLDEST_TRITON_DEVICE = (8, 0)  # compute capability

try:
    from . import _C as extension

    _extension_error = None
    _environment = extension.environment  # faster than os.environ, which a call of a small site would notice
except ImportError as error:
    extension, _extension_error, _environment = None, error, os.environ.get


@dataclass(frozen=True)
class Backend:
    """One implementation: whether it can run here, on which device types, why, and whether `auto` may take it."""

    name: str
    available: bool
    devices: tuple[str, ...]
    reason: str
    automatic: bool = True


def describe() -> list[Backend]:
    """Every backend, in the order in which `auto` takes them, with why it is or is not available."""
    return [_cpp(), _cuda(), _triton(), Backend("reference", True, ("cpu", "cuda"), "eager PyTorch, runs anywhere")]


def _cpp() -> Backend:
    if extension is None:
        return Backend("cpp", False, ("cpu",), _no_extension())
    reason = f"C++ extension built with {extension.compiler()}, running {extension.instruction_set()}"
    return Backend("cpp", True, ("cpu",), reason)


def _instruction_set_was_refused() -> bool:
    """Whether the extension is there, and what the environment asks of it is not."""
    return extension is None and INSTRUCTION_SET_VARIABLE in str(_extension_error)


def _no_extension() -> str:
    if _instruction_set_was_refused():
        return str(_extension_error)
    return f"the C++ extension cannot be loaded ({_extension_error}); build it with `pip install --no-build-isolation -e .`"


def _cuda() -> Backend:
    missing = functools.partial(Backend, "cuda", False, ("cuda",))
    if extension is None:
        return missing(_no_extension())
    built = getattr(extension, "cuda_architectures", list)()
    if not built:
        return missing(
            "the C++ extension was built without CUDA; build it again with a torch that has CUDA, and nvcc, and BNFUSE_CUDA=1"
        )
    if not torch.cuda.is_available():
        return missing(f"built for {', '.join(built)}, but this PyTorch ({torch.__version__}) sees no CUDA device")
    devices = _visible_devices()
    # Machine code runs on devices of the same generation, of the same or a later version.
    runs = {(major, minor) for major, minor in devices for name in built if int(name[3:-1]) == major and int(name[-1]) <= minor}
    if strange := [device for device in devices if device not in runs]:
        return missing(
            f"built for {', '.join(built)}, the device is {_architectures(strange)}; set TORCH_CUDA_ARCH_LIST and build again"
            + _hide(devices, strange)
        )
    return Backend("cuda", True, ("cuda",), f"CUDA kernels built for {', '.join(built)}, running on {_architectures(devices)}")


def _visible_devices() -> list[tuple[int, int]]:
    """The compute capability of each. A backend is chosen for all of them at once, so it must run on every one."""
    return [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]


def _architectures(devices: list[tuple[int, int]]) -> str:
    return ", ".join(f"sm_{major}{minor}" for major, minor in dict.fromkeys(devices))


def _hide(devices: list[tuple[int, int]], strange: list[tuple[int, int]]) -> str:
    """What to do besides where other devices would do."""
    if len(strange) == len(devices):
        return ""
    indices = ", ".join(f"cuda:{index}" for index, device in enumerate(devices) if device in strange)
    return f", or leave {indices} out of CUDA_VISIBLE_DEVICES"


def _triton() -> Backend:
    missing = functools.partial(Backend, "triton", False, ("cuda",))
    if not triton_is_installed():
        return missing("Triton is not installed; PyTorch's CUDA builds bring it, elsewhere `pip install triton`")
    if _triton_interprets():
        return Backend("triton", True, ("cuda", "cpu"), "interpreted (TRITON_INTERPRET=1): for tests, very slow", False)
    if not torch.cuda.is_available():
        return missing(
            f"this PyTorch ({torch.__version__}) sees no CUDA device; TRITON_INTERPRET=1 interprets the kernels on the CPU"
        )
    devices = _visible_devices()
    if old := [device for device in devices if device < OLDEST_TRITON_DEVICE]:
        hide = _hide(devices, old)
        return missing(f"the device is {_architectures(old)}, the kernels need sm_80 or newer{hide}")
    return Backend("triton", True, ("cuda",), f"compiled for {_architectures(devices)} when first called")


def _triton_interprets() -> bool:
    """As Triton itself reads the variable, without importing it, which takes a while."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def check_name(backend: str) -> None:
    if backend not in BACKENDS:
        raise InputError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")


@torch.compiler.assume_constant_result
def resolve(backend: str, device_type: str) -> str:
    """The backend that runs on a device type.

    `backend` may be a name or "auto"; "auto" first asks the environment variable BNFUSE_BACKEND, then takes the fastest
    available. Raises BackendError when a backend or an instruction set asked for by name cannot run there, InputError when
    there is no such backend.
    """
    asked = _environment(ENVIRONMENT_VARIABLE) or "auto" if backend == "auto" else backend
    try:
        return _resolve(asked, device_type)
    except BnfuseError as error:
        if asked == backend:
            raise
        raise type(error)(f"{ENVIRONMENT_VARIABLE}={asked} in the environment: {error}") from None


@functools.cache
def _resolve(backend: str, device_type: str) -> str:
    check_name(backend)
    if backend == "auto":
        if _instruction_set_was_refused():
            raise BackendError(_no_extension())
        candidates = [b for b in describe() if device_type in b.devices and b.automatic]
        chosen = next((b for b in candidates if b.available), _description("reference"))
        if chosen.name == "reference" and len(candidates) > 1:
            reasons = "; ".join(f"{b.name}: {b.reason}" for b in candidates if not b.available)
            warnings.warn(f"running on the slow reference backend on {device_type} ({reasons})", stacklevel=3)
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
