"""Weights in files: anyone's state dicts, and checkpoints of bnfuse's own, which know their network and its images.

No pickle is loaded but with ``weights_only=True``.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from .errors import InputError
from .files import write_atomically
from .preprocessing import Preprocessing

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".th")
CHECKPOINT_FORMAT = "bnfuse checkpoint 1"


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read a state dict from .safetensors, or from .pt, .pth or .th with ``weights_only=True``; no pickle runs.

    The wrappers ``{"state_dict": …}`` and ``{"model": …}`` are taken off, and the prefixes that DistributedDataParallel
    (``module.``) and torch.compile (``_orig_mod.``) put before every name.

    Raises
    ------
    InputError
        The file is missing or damaged, holds other objects than tensors, or is no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is not a file of weights: no such file")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}") from error
    except Exception as error:  # torch.load has no single error for a file that is damaged or refused
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{path} cannot be loaded with weights_only=True ({first_line}). A file of weights holds nothing but "
            "tensors: torch.save(model.state_dict(), path)"
        ) from error

    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path} holds no state dict: expected names and tensors, also under 'state_dict' or 'model'")
    while prefix := next((p for p in ("module.", "_orig_mod.") if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def load_state(model: nn.Module, state: dict[str, Tensor], spec: str, path: str) -> None:
    """Copy `state` into `model`; every name and shape must fit, but for BatchNorm's counter of batches seen."""
    own = model.state_dict()
    in_model, in_file = ({n for n in names if not n.endswith("num_batches_tracked")} for names in (own, state))
    shapes = {n: f"{n} {list(state[n].shape)}, not {list(own[n].shape)}" for n in own if n in state}
    problems = {
        "missing": [name for name in own if name in in_model - in_file],
        "unexpected": [name for name in state if name in in_file - in_model],
        "mis-shaped": [shapes[name] for name in shapes if state[name].shape != own[name].shape],
    }
    found = [
        f"{len(names)} {problem} ({'; '.join(names[:3])}{' …' if len(names) > 3 else ''})"
        for problem, names in problems.items()
        if names
    ]
    if found:
        raise InputError(
            f"the weights in {path} do not fit {spec}: {', '.join(found)}. Is it another architecture, or another "
            "number of classes (num_classes) or channels?"
        )
    model.load_state_dict(state, strict=False)


@dataclass(frozen=True)
class WeightFacts:
    """What a set of weights knows of itself."""

    num_classes: int | None = None
    preprocessing: Preprocessing | None = None
    class_names: list[str] | None = None
    architecture: str | None = None


def save_checkpoint(
    path: str | os.PathLike,
    model: nn.Module,
    *,
    architecture: str,
    num_classes: int,
    preprocessing: Preprocessing,
    class_names: list[str] | None = None,
    metrics: dict | None = None,
) -> None:
    """Write a safetensors file that `models.load_teacher` needs nothing else to load. It appears whole or not at all.

    The state dict, contiguous and on the CPU; and in the metadata, under ``bnfuse``, a JSON object with format,
    architecture, num_classes, in_channels, preprocessing, class_names and metrics.
    """
    about = {
        "format": CHECKPOINT_FORMAT,
        "architecture": architecture,
        "num_classes": num_classes,
        "in_channels": preprocessing.channels,
        "preprocessing": preprocessing.to_dict(),
        "class_names": class_names,
        "metrics": metrics,
    }
    # cloned, since safetensors refuses tensors that share memory, as tied weights do
    state = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in model.state_dict().items()
    }
    write_atomically(path, safetensors_bytes(state, {"bnfuse": json.dumps(about)}))


def read_facts(path: str | os.PathLike) -> WeightFacts | None:
    """What `save_checkpoint` wrote beside the weights; None for a file of another making."""
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("bnfuse")
    except SafetensorError as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}") from error
    if text is None:
        return None
    try:
        about = json.loads(text)
        if about["format"] != CHECKPOINT_FORMAT:
            raise InputError(f"{path} is a {about['format']!r}; this bnfuse reads {CHECKPOINT_FORMAT!r}")
        names = about["class_names"]
        return WeightFacts(
            num_classes=int(about["num_classes"]),
            preprocessing=Preprocessing.from_dict(about["preprocessing"]),
            class_names=None if names is None else [str(name) for name in names],
            architecture=str(about["architecture"]),
        )
    except InputError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the metadata of {path} is damaged: {type(error).__name__}: {error}") from error
