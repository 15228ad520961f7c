"""ZeroQ's hook, which keeps what a layer returns; the script itself makes a loss of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import InputError


class output_hook:  # noqa: N801
    """Keeps a layer's output, as ZeroQ's does, and has its moments of each sample in one pass.

    ``handle = layer.register_forward_hook(hook.hook)`` as in ZeroQ; `mean_and_std` is what its loss then finds by hand.

    Attributes
    ----------
    outputs : what the layer returned last, or None
    """

    def __init__(self, *, backend: str = "auto"):
        self.outputs, self.backend = None, backend

    def hook(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.outputs = output

    def clear(self) -> None:
        self.outputs = None

    def mean_and_std(self, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
        """Of each sample and channel over its positions: the mean, and √(var + eps) with the unbiased variance; [N, C] each."""
        return mean_and_std(self.outputs, eps, backend=self.backend)


def mean_and_std(x: Tensor, eps: float = 1e-6, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """`output_hook.mean_and_std` of any tensor [N, C, *spatial], such as the images themselves."""
    samples = torch.arange(len(x) + 1, device=x.device)
    mean, var = ops.group_moments(x, samples, backend=backend)
    positions = x.numel() // max(1, mean.numel())
    if positions < 2:
        raise InputError(
            f"the unbiased variance over positions needs two of them at least, got {list(x.shape)}: leave out what has no "
            "positions, such as linear layers"
        )
    return mean, (var * (positions / (positions - 1)) + eps).sqrt()
