"""What a network makes of an image before it decides: the input of its last linear layer, its penultimate activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import InputError
from .sites import Observation


class Features(Observation):
    """Looks at a network until `remove` is called, or the ``with`` that it stands in ends.

    Parameters
    ----------
    model : its last linear layer to run is the classifier
    otherwise : what to do where it has no linear layer, for the message
    name : what the message calls it, default its class

    Raises
    ------
    InputError : it has none
    """

    def __init__(self, model: nn.Module, otherwise: str, name: str | None = None):
        self.model = model
        self._seen: list[Tensor] = []  # inputs of the linear layers that ran in this pass
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
        if not layers:
            raise InputError(
                f"features are taken before the teacher's last linear layer, and {name or type(model).__name__} has none: "
                f"{otherwise}"
            )
        keep = lambda _layer, inputs: self._seen.append(inputs[0].detach())
        super().__init__([layer.register_forward_pre_hook(keep) for layer in layers])

    @torch.no_grad()
    def of(self, inputs: Tensor) -> Tensor:
        """Of a batch, normalised [N, C, H, W], on the network's device: float32 [N, D] on the CPU."""
        self._seen.clear()
        self.model(inputs)
        return self._seen[-1].flatten(1).float().cpu()
