"""What each project computes, written down once more in plain PyTorch with forward hooks: the oracle of the presets.

Nothing of bnfuse is used here. A transcription is a function of one step: it is given the networks (frozen, in eval mode), what
they see, the labels, and the tables that the project has recorded; it returns the loss of that step. Those with a moving
average keep it in `memory`, a dict that outlives the step.

Sites are in the order of the network's modules. Tables: site → (mean [K, C], var [K, C]), a row a class; a site is a module's
name, for the cells of a convolution's input "name@cells".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Step:
    """
    Attributes
    ----------
    networks : the teachers
    images, view : [N, 3, H, W], what is optimised, and what the networks see of it
    labels : int64 [N], in runs of one class
    number : of the step, from 0
    classes : tables of each network, a row a class; pooled : the same over all classes, one row
    memory : what outlives the step
    priors : what each of the networks is thought to be worth (CV-DD)
    """

    networks: list[nn.Module]
    images: Tensor
    view: Tensor
    labels: Tensor
    number: int = 0
    classes: list[dict] = field(default_factory=list)
    pooled: list[dict] = field(default_factory=list)
    memory: dict = field(default_factory=dict)
    priors: tuple[float, ...] = ()


def watched(network: nn.Module, view: Tensor) -> tuple[Tensor, list[tuple[str, nn.Module, Tensor]]]:
    """The logits, and every BatchNorm's and convolution's (name, module, input), in the order of the modules."""
    seen, handles = {}, []
    for name, module in network.named_modules():
        if isinstance(module, (nn.BatchNorm2d, nn.Conv2d)):
            hook = lambda _module, inputs, _output, name=name: seen.__setitem__(name, inputs[0])
            handles.append(module.register_forward_hook(hook))
    logits = network(view)
    for handle in handles:
        handle.remove()
    return logits, [(name, module, seen[name]) for name, module in network.named_modules() if name in seen]


def batchnorms(network: nn.Module, view: Tensor):
    logits, seen = watched(network, view)
    return logits, [(name, module, x) for name, module, x in seen if isinstance(module, nn.BatchNorm2d)]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the channels, over batch and positions."""
    flat = x.transpose(0, 1).flatten(1)
    return flat.mean(1), flat.var(1, unbiased=False)


def norms(mean: Tensor, var: Tensor, target_mean: Tensor, target_var: Tensor, var_factor: float = 1.0) -> Tensor:
    """‖Δμ‖₂ + ‖Δv‖₂, not squared: the distance of DeepInversion's hook."""
    return torch.linalg.vector_norm(target_mean - mean) + var_factor * torch.linalg.vector_norm(target_var - var)


def hook_loss(network: nn.Module, view: Tensor, first: float = 10.0, var_factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """DeepInversion's hook on every BatchNorm, the first one times `first`: logits and the sum over layers."""
    logits, layers = batchnorms(network, view)
    total = 0
    for i, (_, bn, x) in enumerate(layers):
        total = total + (first if i == 0 else 1.0) * norms(*moments(x), bn.running_mean, bn.running_var, var_factor)
    return logits, total


def four_differences(x: Tensor) -> list[Tensor]:
    return [
        x[..., :-1] - x[..., 1:],
        x[..., :-1, :] - x[..., 1:, :],
        x[..., 1:, :-1] - x[..., :-1, 1:],
        x[..., :-1, :-1] - x[..., 1:, 1:],
    ]


# ---- whole batches against running statistics ----


def deepinversion(step: Step) -> Tensor:
    """CE + .05 BN + 1e-4 (sum of the norms of four differences) + 1e-5 (mean norm of an image), of the shifted images."""
    logits, bn = hook_loss(step.networks[0], step.view)
    variation = sum(difference.square().sum().sqrt() for difference in four_differences(step.view))
    size = step.view.flatten(1).square().sum(1).sqrt().mean()
    return F.cross_entropy(logits, step.labels) + 0.05 * bn + 1e-4 * variation + 1e-5 * size


def sre2l(step: Step) -> Tensor:
    logits, bn = hook_loss(step.networks[0], step.view)
    return F.cross_entropy(logits, step.labels) + 0.01 * bn


cda = sre2l  # the crop is another, not the loss


def dwa(step: Step) -> Tensor:
    logits, bn = hook_loss(step.networks[0], step.view, var_factor=11.0)
    return F.cross_entropy(logits, step.labels) + 0.01 * bn


def breaching(step: Step) -> Tensor:
    """The prior of GradInversion without the matching of gradients: .1 BN, and smooth small images."""
    _, bn = hook_loss(step.networks[0], step.view)
    x = step.images
    variation = (x[..., 1:, :] - x[..., :-1, :]).square().mean() + (x[..., 1:] - x[..., :-1]).square().mean()
    return 0.1 * bn + 1e-4 * variation + 1e-6 * x.square().mean()


def dp_imgsyn(step: Step) -> Tensor:
    """CE + 10 · (the hook, on layers whose statistics were recorded) + 1e-5 · (absolute differences)."""
    logits, layers = batchnorms(step.networks[0], step.view)
    bn = sum(norms(*moments(x), *(row[0] for row in step.pooled[0][name])) for name, _, x in layers)
    variation = sum(difference.abs().mean() for difference in four_differences(step.images))
    return F.cross_entropy(logits, step.labels) + 10 * bn + 1e-5 * variation


# ---- classes ----


def _per_class(step: Step, bn_weight: float) -> Tensor:
    """CE + weight · (mean over the batch's classes of the hook against that class's own statistics)."""
    logits, layers = batchnorms(step.networks[0], step.view)
    present = step.labels.unique().tolist()
    total = 0
    for k in present:
        for i, (name, _, x) in enumerate(layers):
            mean, var = (table[k] for table in step.classes[0][name])
            total = total + (10.0 if i == 0 else 1.0) * norms(*moments(x[step.labels == k]), mean, var)
    return F.cross_entropy(logits, step.labels) + bn_weight * total / len(present)


def soufleri(step: Step) -> Tensor:
    return _per_class(step, 1.0)


def lpld(step: Step) -> Tensor:
    return _per_class(step, 0.01)


def wmdd(step: Step) -> Tensor:
    return _per_class(step, 10.0)


# ---- several teachers ----


def cvdd(step: Step) -> Tensor:
    """The models that were drawn, two of them, weighted by softmax(prior/5)."""
    weights = torch.tensor(step.priors, dtype=torch.float64).div(5).softmax(0).tolist()
    total = 0
    for network, weight in zip(step.networks, weights):
        logits, bn = hook_loss(network, step.view)
        total = total + weight * (F.cross_entropy(logits, step.labels) + 0.01 * bn)
    return total


def fadrm(step: Step) -> Tensor:
    """The models in turn; the moments are rounded to float16 by autocast, which is straight-through for the gradient."""
    logits, layers = batchnorms(step.networks[step.number % len(step.networks)], step.view)
    total = 0
    for i, (_, bn, x) in enumerate(layers):
        rounded = [value + (value.detach().half().to(value.dtype) - value.detach()) for value in moments(x)]
        total = total + (10.0 if i == 0 else 1.0) * norms(*rounded, bn.running_mean, bn.running_var)
    return F.cross_entropy(logits, step.labels) + 0.01 * total


def cell_moments(x: Tensor, side: int = 16) -> tuple[Tensor, Tensor]:
    """[N, C, H, W], resized to a multiple of 16 → moments of each cell of 16×16 positions, over b, c, h, w: [cells]."""
    height, width = (math.ceil(length / side) * side for length in x.shape[2:])
    if (height, width) != tuple(x.shape[2:]):
        x = F.interpolate(x, (height, width), mode="bilinear", align_corners=False)
    cells = x.unfold(2, side, side).unfold(3, side, side)  # [N, C, rows, columns, side, side]
    flat = cells.permute(2, 3, 0, 1, 4, 5).flatten(0, 1).flatten(1)  # [cells, N·C·side·side]
    return flat.mean(1), flat.var(1, unbiased=False)


def _averaged(memory: dict, key, values: tuple[Tensor, Tensor], alpha: float) -> list[Tensor]:
    """The average's value with the batch's gradient; the average starts at zero."""
    old = memory.get(key, [torch.zeros_like(value) for value in values])
    memory[key] = [alpha * before + (1 - alpha) * value.detach() for before, value in zip(old, values)]
    return [now + (value - value.detach()) for now, value in zip(memory[key], values)]


def _generalised(step: Step, alpha: float, tables_of_site) -> Tensor:
    """BN and convolution inputs, the latter also in cells; everything of the first layer, a convolution, times 10."""
    t = step.number % len(step.networks)
    logits, layers = watched(step.networks[t], step.view)
    total = 0
    for i, (name, module, x) in enumerate(layers):
        values = {name: moments(x)}
        if isinstance(module, nn.Conv2d):
            values[f"{name}@cells"] = cell_moments(x)
        for site, pair in values.items():
            mean, var = _averaged(step.memory, (t, site), pair, alpha)
            for share, target_mean, target_var in tables_of_site(t, site):
                total = total + (10.0 if i == 0 else 1.0) * share * norms(mean, var, target_mean, target_var)
    return F.cross_entropy(logits, step.labels), total


def gvbsm(step: Step) -> Tensor:
    ce, total = _generalised(step, 0.4, lambda t, site: [(1.0, *(table[0] for table in step.pooled[t][site]))])
    return ce + 0.01 * total


def edc(step: Step) -> Tensor:
    """Half the distance to the statistics of all, half that to the mean over the batch's labels of their classes'."""

    def tables(t, site):
        whole, each = step.pooled[t][site], step.classes[t][site]
        return [(0.5, *(table[0] for table in whole)), (0.5, *(table[step.labels].mean(0) for table in each))]

    ce, total = _generalised(step, 0.8, tables)
    return ce + 0.1 * total


# ---- quantisation and distillation without data ----


def zeroq(step: Step) -> Tensor:
    """Per sample, unbiased, √(var + 1e-6); Σ‖·‖²/N over convolution outputs, and the pixels' against mean 0 and variance 1."""
    _, layers = batchnorms(step.networks[0], step.view)
    sites = [(x, bn.running_mean, bn.running_var) for _, bn, x in layers]  # the convolutions' outputs are BN's inputs
    sites.append((step.view, torch.zeros(3, dtype=step.view.dtype), torch.ones(3, dtype=step.view.dtype)))
    total = 0
    for x, running_mean, running_var in sites:
        flat = x.flatten(2)  # [N, C, positions]
        deviation = (flat.var(2, unbiased=True) + 1e-6).sqrt()
        total = total + (flat.mean(2) - running_mean).square().sum() / len(x)
        total = total + (deviation - (running_var + 1e-6).sqrt()).square().sum() / len(x)
    return total


def _mean_squares(step: Step) -> tuple[Tensor, Tensor]:
    logits, layers = batchnorms(step.networks[0], step.view)
    total = 0
    for _, bn, x in layers:
        mean, var = moments(x)
        total = total + F.mse_loss(mean, bn.running_mean) + F.mse_loss(var, bn.running_var)
    return F.cross_entropy(logits, step.labels), total / len(layers)


def gdfq(step: Step) -> Tensor:
    ce, bn = _mean_squares(step)
    return ce + 0.1 * bn


def intraq(step: Step) -> Tensor:
    ce, bn = _mean_squares(step)
    return ce + bn


def fast_datafree(step: Step, m: float = 0.9) -> Tensor:
    """The hook on (1 − m)·batch + m·average, the first batch on itself; the average moves once a step."""
    logits, layers = batchnorms(step.networks[0], step.view)
    total = 0
    for name, bn, x in layers:
        batch = moments(x)
        if name in step.memory:
            matched = [(1 - m) * value + m * old for value, old in zip(batch, step.memory[name])]
        else:
            matched = batch
        step.memory[name] = [value.detach() for value in matched]
        total = total + norms(*matched, bn.running_mean, bn.running_var)
    return 0.4 * F.cross_entropy(logits, step.labels) + 10 * total


def abd(step: Step) -> Tensor:
    """log(σ/σ̂) + (v̂ + (μ̂ − μ)²)/2v − ½, hats for the targets, v + 1e-8: mean over channels and layers, times 50."""
    logits, layers = batchnorms(step.networks[0], step.view)
    total = 0
    for _, bn, x in layers:
        mean, var = moments(x)
        var, target = var + 1e-8, bn.running_var + 1e-8
        total = total + (0.5 * (var / target).log() + (target + (bn.running_mean - mean).square()) / (2 * var) - 0.5).mean()
    return F.cross_entropy(logits, step.labels) + 50 * total / len(layers)


def dsg(step: Step, slack: float = 0.1) -> Tensor:
    """Slack on mean and deviation, of each sample; weights I + 11ᵀ over samples and layers; mean over samples."""
    _, layers = batchnorms(step.networks[0], step.view)
    total = 0
    for sample in range(len(step.view)):
        for i, (_, bn, x) in enumerate(layers):
            mean, var = moments(x[sample : sample + 1])
            gaps = (mean - bn.running_mean, (var + 1e-8).sqrt() - (bn.running_var + 1e-8).sqrt())
            weight = 1.0 + (sample % len(layers) == i)
            total = total + weight * sum((gap.abs() - slack).clamp(min=0).square().sum() for gap in gaps)
    return total / len(step.view)
