"""What competes in a whole synthesis step: forward, cross-entropy and BatchNorm loss, backward to the images, Adam.

Every contender optimises its own images [N, 3, H, W] through the same frozen network towards the same labels; the BatchNorm
loss is DeepInversion's, the L2 distance from the network's running statistics at every site.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from contenders import assert_near, hook_distance, relative_error
from sites import NETWORKS
from timing import OURS
from torch import Tensor, nn

from bnfuse import Matcher, freeze, fuse
from bnfuse.fusion import FusedBatchNorm

# Loss and image gradient of a whole network in norm, against the eager hook in float64. In float64 the two only sum in other
# orders; in the timed dtype a ReLU whose input is rounded to the other side of 0 changes what it lets through. What that makes
# of a gradient differs from network to network (in bfloat16, with random weights, MobileNetV2's is off by two thirds of its
# norm): more than these is tolerated only as far as the eager hook in the same dtype is itself away from float64.
WIDE_TOLERANCE = 1e-9
AS_EXACT = 1.25  # times the eager hook's own error
MOST = 0.9  # of what is tolerated at all: a gradient of zeros is 1 away
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
GRADIENT_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 3e-1, torch.float16: 1e-1}


def tolerances(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Of loss and image gradient. Convolutions in TF32, PyTorch's default on a GPU, have float16's mantissa."""
    if dtype == torch.float32 and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        dtype = torch.float16
    return LOSS_TOLERANCE[dtype], GRADIENT_TOLERANCE[dtype]


def make_teacher(name: str, device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format) -> nn.Module:
    """The network with random weights, and the running statistics that noise has in it; frozen."""
    torch.manual_seed(0)
    network = NETWORKS[name]
    model = network.build().to(device)
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for layer in layers:
        layer.momentum = None  # the running statistics become the batch's own
    with torch.no_grad():
        model.train()(torch.randn(8, 3, network.size, network.size).to(device))
    return freeze(model).to(dtype=dtype, memory_format=memory_format)


def make_images(name: str, batch: int, like: nn.Module, memory_format: torch.memory_format) -> tuple[Tensor, Tensor]:
    """Images [N, 3, H, W], brighter and of more contrast than what the statistics were taken of, and labels [N]."""
    generator, weight = torch.Generator().manual_seed(1), next(like.parameters())
    size = NETWORKS[name].size
    images = 1.5 * torch.randn(batch, 3, size, size, generator=generator) + 0.5
    return images.to(weight, memory_format=memory_format), torch.arange(batch, device=weight.device) % 10


class PlainLoss(nn.Module):
    """Images [N, 3, H, W] → a scalar: cross-entropy alone."""

    def __init__(self, model: nn.Module, labels: Tensor):
        super().__init__()
        self.model = model
        self.register_buffer("labels", labels)

    def forward(self, images: Tensor) -> Tensor:
        return F.cross_entropy(self.model(images), self.labels)


class HookLoss(PlainLoss):
    """DeepInversion's: a forward hook on every BatchNorm layer (of a copy)."""

    def __init__(self, model: nn.Module, labels: Tensor):
        super().__init__(copy.deepcopy(model), labels)
        self.distances: list[Tensor] = []
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(self._observe)

    def _observe(self, layer: nn.BatchNorm2d, inputs: tuple[Tensor, ...], _) -> None:
        self.distances.append(hook_distance(inputs[0], layer.running_mean, layer.running_var))

    def forward(self, images: Tensor) -> Tensor:
        self.distances.clear()
        total = super().forward(images) + sum(self.distances)
        self.distances.clear()  # they must not keep the graph alive
        return total


class FusedLoss(PlainLoss):
    """bnfuse's."""

    def __init__(self, model: nn.Module, labels: Tensor, backend: str = "auto"):
        super().__init__(fuse(model, backend=backend), labels)
        self.matcher = Matcher.from_running(model, backend=backend).to(labels.device)

    def forward(self, images: Tensor) -> Tensor:
        logits, moments = self.model(images)
        return F.cross_entropy(logits, self.labels) + self.matcher(moments)


class AutocastLoss(nn.Module):
    """Any of these under autocast: weights and images in float32, what the network computes in `dtype`."""

    def __init__(self, loss: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.loss, self.dtype = loss, dtype

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, self.dtype):
            return self.loss(images)


class _Nothing(nn.Module):
    """In the place of a BatchNorm and its activation; the residual is still added."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return x if residual is None else x + residual


class ConvOnlyLoss(PlainLoss):
    """The network without BatchNorm and activations: what no code that deals with these can go below."""

    def __init__(self, model: nn.Module, labels: Tensor):
        body = fuse(model).body
        for name, module in list(body.named_modules()):
            if isinstance(module, FusedBatchNorm):
                body.set_submodule(name, _Nothing())
        super().__init__(body, labels)


LOSSES = {OURS: FusedLoss, "hook": HookLoss, "plain": PlainLoss, "conv_only": ConvOnlyLoss}


def compiled_hook_loss(model: nn.Module, labels: Tensor) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(HookLoss(model, labels), dynamic=False, fullgraph=True)


def make_step(loss: nn.Module, images: Tensor) -> Callable[[], None]:
    """One step of Adam on a copy of the images."""
    leaf = images.clone().requires_grad_()
    optimizer = torch.optim.Adam([leaf], lr=0.05)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(leaf).backward()
        optimizer.step()

    return step


def value_and_gradient(loss: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    leaf = images.clone().requires_grad_()
    value = loss(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def verify(model: nn.Module, losses: dict, images: Tensor, labels: Tensor, autocast: torch.dtype | None = None) -> None:
    """Raises AssertionError where losses or image gradients disagree.

    On the first two images bnfuse, in float64 and as it is timed, against the eager hook in float64; on the whole batch
    everything else with statistics against bnfuse. `losses`: (name, layout) → the loss, and the images in its layout;
    `autocast`: the dtype that all of them are under autocast to, None where they are not.
    """
    few, wide = images[:2], copy.deepcopy(model).double()
    as_timed = lambda loss: AutocastLoss(loss, autocast) if autocast else loss
    expected = value_and_gradient(HookLoss(wide, labels[:2]), few.double())
    exact = value_and_gradient(FusedLoss(wide, labels[:2]), few.double())
    timed = value_and_gradient(as_timed(FusedLoss(model, labels[:2])), few)
    eager = value_and_gradient(as_timed(HookLoss(model, labels[:2])), few)
    dtype = autocast or images.dtype
    given = tolerances(dtype, images.device)
    own = [AS_EXACT * relative_error(found, wanted) for found, wanted in zip(eager, expected)]
    tolerated = lambda times: [min(max(limit, times * error), MOST) for limit, error in zip(given, own)]
    for computed_in, (loss_limit, gradient_limit), (value, gradient) in (
        (torch.float64, (WIDE_TOLERANCE, WIDE_TOLERANCE), exact),
        (dtype, tolerated(1), timed),
    ):
        assert_near(value, expected[0], loss_limit, f"loss in {computed_in}")
        assert_near(gradient, expected[1], gradient_limit, f"image gradient in {computed_in}")
    ours = value_and_gradient(*losses[OURS, ""])
    between = tolerated(math.sqrt(2))  # what two of them round differs
    for name, layout in losses:
        if name in (OURS, "plain", "conv_only"):
            continue
        value, gradient = value_and_gradient(*losses[name, layout])
        assert_near(ours[0], value, between[0], f"loss against {name}")
        assert_near(ours[1], gradient, between[1], f"image gradient against {name}")
