"""`bnfuse doctor`: what runs here, and why something does not."""

from __future__ import annotations

import importlib
import platform
from importlib import metadata

import torch

from . import __version__, backends
from .errors import BnfuseError

_PACKAGES = ("torch", "triton", "numpy", "safetensors", "pillow", "scikit-learn", "torchvision", "timm")
_BUILT_FOR_A_TORCH = ("torchvision", "timm")


def report() -> str:
    """Versions, threads, instruction sets and backends, as text."""
    lines = [
        f"bnfuse {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        "",
        "packages",
    ]
    lines += [f"  {name:13s} {_version(name)}" for name in _PACKAGES]
    lines += [
        "",
        "processor",
        f"  threads       {torch.get_num_threads()} of PyTorch's pool",
        f"  PyTorch uses  {torch.backends.cpu.get_cpu_capability()}",
    ]
    if backends.extension is not None:
        lines += [
            f"  bnfuse runs   {backends.extension.instruction_set()} "
            f"(built: {', '.join(backends.extension.instruction_sets())})"
        ]
    lines += ["", "GPU", f"  {_gpu()}", "", "backends"]
    lines += [f"  {b.name:13s} {'available' if b.available else 'missing':10s} {b.reason}" for b in backends.describe()]
    lines += [
        f"  auto on {device} takes {_chosen(device)}" for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else []))
    ]
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
    if package in _BUILT_FOR_A_TORCH:
        try:
            importlib.import_module(package)
        except Exception as error:  # a build for another torch fails in many ways
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            return f"{version}, which cannot be imported beside this torch: {reason}"
    return version


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that this PyTorch can use" if torch.version.cuda else "this PyTorch is built for the CPU alone"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _chosen(device: str) -> str:
    try:
        return backends.resolve("auto", device)
    except BnfuseError as error:
        return f"nothing: {error}"
