"""A unit in the making, kept on disk: what a stopped run goes on from in the middle of a unit.

`optimisation` decides what is in it; here it becomes a file that appears whole or not at all, and says what it belongs to. One
that is damaged, or belongs to something else, is never used: its unit begins anew, with the same images in the end.
"""

from __future__ import annotations

import hashlib
import json
import signal
import warnings
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .card import read_card
from .distributed import Team, any_of
from .errors import InputError, Interrupted, UnitWarning
from .files import write_atomically
from .manifest import checkpoint_file
from .signals import Stop
from .store import writing

_FORMAT = "bnfuse.unit.1"


class UnitCheckpoint:
    """The checkpoint of one unit: when it is due, and the file.

    Every rank of a team has one; the first writes it.

    Parameters
    ----------
    root : the store; its card is part of the identity
    unit : the unit's number; steps : of how many it consists
    every : steps from one checkpoint to the next, 0 for none but that of a run that is asked to stop
    stop : says whether it is
    team : the ranks that make the unit

    Attributes
    ----------
    attempt : which of its seeds the unit is being made from, part of the identity
    """

    def __init__(self, root: Path, unit: int, steps: int, *, every: int, stop: Stop, team: Team):
        self.root, self.path = root, root / checkpoint_file(unit)
        self.unit, self.steps, self.every, self.stop, self.team = unit, steps, every, stop, team
        self.attempt = 0
        self._card = hashlib.sha256(json.dumps({**read_card(root), "complete": False}).encode()).hexdigest()
        self._stopping = False
        self._kept = 0  # the step that is on disk

    def due(self, step: int) -> bool:
        """Asked now and then between steps. On all ranks of a team the answer is the same."""
        if step >= self.steps:  # the unit is about to be committed
            return False
        self._stopping = any_of(self.team, bool(self.stop.signal))
        return self._stopping or bool(self.every) and step - self._kept >= self.every

    def save(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Keeps the state after `step`.

        Raises
        ------
        Interrupted : the run was asked to stop; the state is safe, or the message says why it is not
        InputError : the disk refuses, and the run was not asked to stop
        """
        kept = f"unit {self.unit} goes on after step {step} of {self.steps}"
        try:
            if self.team.rank == 0:
                state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
                metadata = {**self._identity(), "step": str(step)}
                metadata["digest"] = _digest(state, metadata)
                with writing(self.root, "The images committed so far are safe."):
                    write_atomically(self.path, safetensors.torch.save(state, metadata))
            self._kept = step
        except InputError as error:
            if not self._stopping:
                raise
            kept = f"unit {self.unit} begins anew: {error}"
        if self._stopping:
            raise Interrupted(self.stop.signal or signal.SIGTERM, kept)

    def load(self) -> dict[str, Tensor] | None:
        """The state to go on from, having set `attempt`; None where there is none that can be used.

        Warns
        -----
        UnitWarning : there is one, and why it cannot be used
        """
        if not self.path.exists():
            return None
        try:
            with safetensors.safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, safetensors.SafetensorError) as error:
            return self._unusable(f"it is damaged ({error})")
        own = self._identity()
        if any(metadata.get(name) != own[name] for name in own if name != "attempt"):
            return self._unusable("it belongs to another dataset or another unit")
        if metadata.pop("digest", None) != _digest(state, metadata):
            return self._unusable("its content is not what was written")
        self.attempt, self._kept = int(metadata["attempt"]), int(metadata["step"])
        return state

    def remove(self) -> None:
        """When what it holds has led to nothing; that of a unit which is committed is removed by the store."""
        self._kept = 0
        if self.team.rank == 0:
            self.path.unlink(missing_ok=True)

    def _identity(self) -> dict[str, str]:
        return {"format": _FORMAT, "card": self._card, "unit": str(self.unit), "attempt": str(self.attempt)}

    def _unusable(self, why: str) -> None:
        warnings.warn(f"{self.path} is not used, and unit {self.unit} begins anew: {why}", UnitWarning, stacklevel=3)


def _digest(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over the metadata, and every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
