"""A step's network part as one CUDA graph: what a GPU of today does in less time than Python takes to ask for it.

Views and the optimiser stay outside: crops change shapes from step to step, shifts and learning rates are numbers of the host.
They are a few launches, where the network is some hundreds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .objective import Losses, Objective

_WARM_UP = 3  # calls before capture: libraries choose their algorithms and allocate their workspaces in these


class Replayed:
    """A function of tensors on a GPU, captured once and replayed.

    Parameters
    ----------
    function : Tensors → tensors, without waiting for the device; what else it reads is read where it lies now
    inputs : examples, whose shapes, dtypes and layouts are those of every call
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]):
        self._inputs = [tensor.detach().clone() for tensor in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                function(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """The outputs, which the next call overwrites."""
        for ours, given in zip(self._inputs, inputs):
            ours.copy_(given.detach())
        self._graph.replay()
        return self._outputs


class CapturedObjective:
    """An `Objective` for one batch, and its gradient, from a graph that is captured at the first call for each shape.

    Parameters
    ----------
    labels, group_starts, group_classes : as the objective is given them, of the whole batch
    """

    def __init__(self, objective: Objective, labels: Tensor, group_starts: Tensor, group_classes: Tensor):
        self.objective, self.batch = objective, (labels, group_starts, group_classes)
        self._replayed: dict[torch.Size, Replayed] = {}
        self._names: list[str] = []

    def __call__(self, images: Tensor, view: Tensor) -> tuple[Losses, Tensor]:
        """The losses, and the gradient of their total by `images` [N, C, H, W], of which `view` was made."""
        replayed = self._replayed.get(images.shape)
        if replayed is None:
            kept = self.objective.state()
            replayed = self._replayed[images.shape] = Replayed(self._differentiate, (images, view))
            self.objective.restore(kept)  # the calls before the capture were no steps
        by_images, by_view, total, distances, *terms = replayed(images, view)
        through_view = torch.autograd.grad(view, images, by_view)[0]
        losses = Losses(total.clone(), {name: term.clone() for name, term in zip(self._names, terms)}, distances.clone())
        return losses, through_view + by_images if self.objective.has_priors else through_view

    def _differentiate(self, images: Tensor, view: Tensor) -> Sequence[Tensor]:
        images, view = images.detach().requires_grad_(), view.detach().requires_grad_()
        losses = self.objective(images, view, *self.batch)
        by_images, by_view = torch.autograd.grad(losses.total, (images, view), allow_unused=True, materialize_grads=True)
        self._names = list(losses.terms)
        return [by_images, by_view, losses.total.detach(), losses.distances, *(v.detach() for v in losses.terms.values())]
