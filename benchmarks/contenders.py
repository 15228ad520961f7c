"""What competes at one BatchNorm site, and the check that all compute the same before any is timed.

Every contender is a function of x [N, C, H, W] and a residual (like x, or None) that returns y (like x) and the site's loss
(a scalar, or None): ``act(BN(x) (+ residual))`` and ``‖mean − running_mean‖₂ + ‖var − running_var‖₂``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sites import LAYOUTS, Site
from timing import OURS, Contender
from tolerances import assert_elements_close, assert_moments_close
from torch import Tensor

from bnfuse import backends, ops, reference

EPS = 2**-10
# That the rivals compute the same thing is all that is checked of them: ‖actual − expected‖ ≤ tolerance·‖expected‖. What they
# round on the way is theirs: in 16 bits BN's output, before the residual is added, which moves some elements across a kink.
RIVAL_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.05}
# Of the loss's gradient alone, in norm, everybody's: it is a ten-thousandth of dx, whose check says nothing of it. Seen are up
# to 1e-6 in float32, 5e-3 in bfloat16 and 5e-4 in float16, where it is scaled, as in training: unscaled it is below its numbers.
LOSS_GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 1e-2}
LOSS_SCALE = 2.0**12


class BatchNorm(NamedTuple):
    """The frozen layer, [C] each, in F.batch_norm's order."""

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor
    bias: Tensor


def distance(mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """DeepInversion's distance of moments [C] from running statistics [C]: a scalar."""
    return torch.norm(running_var - var, 2) + torch.norm(running_mean - mean, 2)


def hook_distance(x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """The arithmetic of DeepInversion's hook, line by line, on x [N, C, H, W]: a scalar."""
    channels = x.shape[1]
    mean = x.mean([0, 2, 3])  # [C]
    var = x.permute(1, 0, 2, 3).contiguous().view([channels, -1]).var(1, unbiased=False)  # [C]
    return distance(mean, var, running_mean, running_var)


def plain(x: Tensor, residual: Tensor | None, bn: BatchNorm, act: str) -> tuple[Tensor, None]:
    """The layer without any statistics; in place where eager PyTorch lets it."""
    y = F.batch_norm(x, *bn, training=False, eps=EPS)
    if residual is not None:
        y += residual
    if act != "identity":
        y = {"relu": F.relu, "relu6": F.relu6}[act](y, inplace=True)
    return y, None


def hook(x: Tensor, residual: Tensor | None, bn: BatchNorm, act: str) -> tuple[Tensor, Tensor]:
    """DeepInversion's forward hook beside the layer."""
    loss = hook_distance(x, bn.running_mean, bn.running_var)
    return plain(x, residual, bn, act)[0], loss


def var_mean(x: Tensor, residual: Tensor | None, bn: BatchNorm, act: str) -> tuple[Tensor, Tensor]:
    """The hook as one would write it today: both moments from one call."""
    var, mean = torch.var_mean(x, [0, 2, 3], correction=0)  # [C] each
    loss = distance(mean, var, bn.running_mean, bn.running_var)
    return plain(x, residual, bn, act)[0], loss


def other_backends(device: torch.device) -> list[str]:
    """The GPU backends that could run and that `auto` does not take: they are timed beside it."""
    if device.type != "cuda":
        return []
    chosen = backends.resolve("auto", device.type)
    return [b.name for b in backends.describe() if b.available and b.name in ("cuda", "triton") and b.name != chosen]


@dataclass
class Case:
    """One site with everything that its forward and backward pass take."""

    site: Site
    x: Tensor  # [N, C, H, W], a leaf
    residual: Tensor | None  # like x
    dy: Tensor  # like x
    bn: BatchNorm

    def __post_init__(self):
        self.inputs = [self.x] if self.residual is None else [self.x, self.residual]
        self.group_starts = torch.tensor([0, len(self.x)], device=self.x.device)
        self.one = torch.ones((), dtype=self.bn.weight.dtype, device=self.x.device)
        self.scale = self.bn.weight * (self.bn.running_var + EPS).rsqrt()  # [C]
        self.shift = self.bn.bias - self.bn.running_mean * self.scale  # [C]
        self.targets = self.bn.running_mean[None], self.bn.running_var[None]  # [1, C] each

    def fused(self, x: Tensor, residual: Tensor | None, backend: str = "auto") -> tuple[Tensor, Tensor]:
        """The same through bnfuse."""
        groups = self.group_starts
        return ops.bn_act_loss(
            x, self.scale, self.shift, *self.targets, group_starts=groups, residual=residual, act=self.site.act, backend=backend
        )[:2]

    def functions(self, compiled: bool) -> dict[str, Callable[[], tuple[Tensor, Tensor | None]]]:
        """The forward pass of every contender, by name."""
        calls = {"hook": hook, "var_mean": var_mean, "plain": plain}
        if compiled:
            torch._dynamo.reset()  # each site is a program of its own, not one more variant of the last
            calls |= {f"compiled_{n}": torch.compile(calls[n], dynamic=False, fullgraph=True) for n in ("hook", "var_mean")}
        bind = lambda call: lambda: call(self.x, self.residual, self.bn, self.site.act)
        others = {name: self._through(name) for name in other_backends(self.x.device)}
        return {OURS: self._through("auto"), **others, **{name: bind(call) for name, call in calls.items()}}

    def _through(self, backend: str) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: self.fused(self.x, self.residual, backend)

    def gradients(self, outputs: tuple[Tensor, Tensor | None]) -> tuple[Tensor, ...]:
        """dx (and dresidual) of ``⟨dy, y⟩ + loss``."""
        y, loss = outputs
        if loss is None:
            return torch.autograd.grad(y, self.inputs, self.dy)
        return torch.autograd.grad([y, loss], self.inputs, [self.dy, self.one])

    def loss_gradient(self, loss: Tensor) -> Tensor:
        """d loss/dx alone, like x; in float64, so that the scale can be taken out."""
        return torch.autograd.grad(loss, self.x, torch.full_like(loss, LOSS_SCALE))[0].double() / LOSS_SCALE

    def contenders(self, functions: dict[str, Callable], direction: str) -> dict[str, Contender]:
        """What is timed: "forward" with the graph made, "backward" with the graph made beforehand, or "both"."""
        make = {
            "forward": lambda forward: Contender(lambda _: forward()),
            "backward": lambda forward: Contender(self.gradients, forward),
            "both": lambda forward: Contender(lambda _: self.gradients(forward())),
        }[direction]
        return {name: make(forward) for name, forward in functions.items()}

    def double(self) -> Case:
        """The same values in float64."""
        wide = lambda tensor: None if tensor is None else tensor.detach().double().requires_grad_(tensor.requires_grad)
        return Case(self.site, wide(self.x), wide(self.residual), wide(self.dy), BatchNorm(*map(wide, self.bn)))


def make_case(site: Site, device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format) -> Case:
    """Values that are multiples of 1/8, and a layer for which scale·x + shift (+ residual) is an odd multiple of 1/256.

    It is exact, and at least 1/256 away from the kinks of the activations, so all contenders stand on the same side of them.
    """
    generator = torch.Generator(device).manual_seed(0)

    def integers(*size: int, low: int = 0, high: int) -> Tensor:
        return torch.randint(low, high, size, generator=generator, device=device)

    def eighths(*size: int, low: int = -32, high: int = 33) -> Tensor:
        return integers(*size, low=low, high=high) / 8

    def tensor() -> Tensor:
        return eighths(*site.shape).to(dtype, memory_format=memory_format)

    channels = site.shape[1]
    moments = reference.moment_dtype(dtype)
    bn = BatchNorm(
        running_mean=eighths(channels),
        running_var=torch.tensor([0.25, 1.0, 4.0], device=device)[integers(channels, high=3)] - EPS,
        weight=eighths(channels, low=1, high=17),
        bias=eighths(channels, low=-8, high=9) + 2**-8,
    )
    return Case(
        site,
        tensor().requires_grad_(),
        tensor().requires_grad_() if site.has_residual else None,
        tensor(),
        BatchNorm(*(values.to(moments) for values in bn)),
    )


def verify(case: Case, functions: dict[str, Callable[[], tuple[Tensor, Tensor | None]]]) -> None:
    """Values and gradients of every contender against the reference in float64; AssertionError where they disagree.

    bnfuse is held to the tolerances of the tests, the rivals to RIVAL_TOLERANCE.
    """
    dtype, wide = case.x.dtype, case.double()
    y, mean, var = ops.bn_act(
        wide.x, wide.scale, wide.shift, residual=wide.residual, act=case.site.act, backend="reference"
    )  # y like x; mean, var [1, C]
    loss = distance(mean[0], var[0], wide.bn.running_mean, wide.bn.running_var)
    gradients = torch.autograd.grad(y, wide.inputs, wide.dy, retain_graph=True)
    (through_loss,) = torch.autograd.grad(loss, wide.x)
    y, loss, mean, var = y.detach(), loss.detach(), mean.detach(), var.detach()

    _, our_mean, our_var = ops.bn_act(case.x, case.scale, case.shift, residual=case.residual, act=case.site.act)
    assert_moments_close(our_mean.detach(), mean, dtype)
    assert_moments_close(our_var.detach(), var, dtype)
    for name, forward in functions.items():
        outputs = forward()
        expected = {"y": y, "dx": gradients[0] if outputs[1] is None else gradients[0] + through_loss}
        actual = dict(zip(("dx", "dresidual"), case.gradients(outputs)), y=outputs[0].detach())
        if case.residual is not None:
            expected["dresidual"] = gradients[1]
        if outputs[1] is not None:
            assert_near(outputs[1].detach(), loss, 1e-5 if name == OURS else RIVAL_TOLERANCE[dtype], f"{name}: loss")
            alone = case.loss_gradient(forward()[1])  # of a second pass: compiled ones do not let their graph be kept
            assert_near(alone, through_loss, LOSS_GRADIENT_TOLERANCE[dtype], f"{name}: the loss's gradient")
        for what, values in expected.items():
            if name in (OURS, "cuda", "triton"):
                assert_elements_close(actual[what], values, dtype)
            else:
                assert_near(actual[what], values, RIVAL_TOLERANCE[dtype], f"{name}: {what}")


def precompile(site: Site, device: torch.device, dtype: torch.dtype, layout: str, threads: int) -> None:
    """Fills the compiler's cache on disk, in a process of its own, so that a site's contenders compile in no time later."""
    torch.set_num_threads(threads)  # it is part of the program
    torch._inductor.config.compile_threads = 1  # no pool of processes in each of these
    case = make_case(site, device, dtype, LAYOUTS[layout])
    for name, forward in case.functions(compiled=True).items():
        if name.startswith("compiled"):
            case.gradients(forward())


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """‖actual − expected‖ ≤ tolerance·‖expected‖, in float64."""
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what} is {error:.2e} off in norm, tolerated are {tolerance:.0e}: not timed"


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖, in float64."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
