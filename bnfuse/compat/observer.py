"""A forward hook that a layer's copies and pickles carry along without what it hangs on."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


class Observer:
    """Calls ``see(module, inputs)`` after each forward pass of a layer; a copy of it, made with the layer, does nothing.

    PyTorch copies a layer's forward hooks with it, and so would copy a hook's r_feature, which hangs on a graph and cannot be.
    """

    def __init__(self, see: Callable[[nn.Module, tuple], None]):
        self.see = see

    def __call__(self, module: nn.Module, inputs: tuple, output) -> None:
        if self.see is not None:
            self.see(module, inputs)

    def __getstate__(self) -> dict:
        return {"see": None}
