"""The inner loop: one batch of images, from noise to pixels that match."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .augment import Augmentation
from .distributed import Team
from .errors import BnfuseError
from .matching import group_by_class
from .models import Teacher
from .objective import Objective

if TYPE_CHECKING:
    from .synthesis import SynthesisConfig


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2⁶³) that depends on every part, and on nothing else."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class NonFiniteLoss(BnfuseError):
    """The loss of a unit is nan or inf; the message names unit, step and term."""


class Checkpoint(Protocol):
    """What keeps a unit in the making."""

    def due(self, step: int) -> bool:
        """Asked after every step, whether to `save`."""

    def save(self, step: int, state: dict[str, Tensor]) -> None:
        """Keeps the state after `step`; it may end the run by raising Interrupted."""


def optimise(
    objective: Objective,
    labels: Tensor,
    outputs: Tensor,
    seeds: Sequence[int],
    unit: int,
    teacher: Teacher,
    config: SynthesisConfig,
    show: Callable[[int, Tensor, dict[str, float]], None],
    *,
    micro_batch: int | None = None,
    team: Team | None = None,
    state: dict[str, Tensor] | None = None,
    checkpoint: Checkpoint | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """From noise to one batch of images: the whole method.

    Parameters
    ----------
    labels : int64 [N], each image's row of the targets, in runs of one class; outputs : int64 [N], the logit to raise
    seeds : N of them, one an image; `unit` seeds the views
    show : called now and then with the step, the images so far and the loss terms
    state : what `checkpoint` was given, to go on from
    checkpoint : asked after every step whether it wants the state

    Returns
    -------
    images : [N, C, H, W] float32, normalised; losses : the terms at the last step

    Raises
    ------
    NonFiniteLoss
    """
    group_starts, group_classes = group_by_class(labels)
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "views", unit))
    low, high = _valid_range(teacher, labels.device)
    images, step, terms = None, 0, {}
    resumed = int(state["step"]) if state else 0  # steps that were done before
    for size, iterations in _stages(teacher.preprocessing.image_size, config):
        begun = min(iterations, max(0, resumed - step))  # of this stage's
        if step + iterations < resumed:
            step += iterations
            continue
        if begun:
            images = state["images"].to(labels.device)
            generator.set_state(state["generator"])
        else:
            images = _start(seeds, teacher, size, config).to(labels.device) if images is None else _resize(images, size)
        images = images.clamp(low, high).contiguous(memory_format=torch.channels_last).requires_grad_()
        scale = size[0] / teacher.preprocessing.image_size[0]
        augmentation = Augmentation(round(config.jitter * scale), config.flip, config.crop_scale)
        adam = torch.optim.Adam([images], lr=config.lr, betas=config.betas)
        if begun:
            moments = {name: state[name].to(labels.device) for name in ("exp_avg", "exp_avg_sq")}
            adam.state[images] = {"step": torch.tensor(float(begun)), **moments}
        step += begun
        for i in range(begun, iterations):
            adam.param_groups[0]["lr"] = config.lr * _schedule(i, iterations, config.warmup)
            view = augmentation.draw(images, generator)(images)
            terms = objective(images, view, outputs, group_starts, group_classes)
            (images.grad,) = torch.autograd.grad(terms["total"], images)
            adam.step()
            with torch.no_grad():
                images.clamp_(low, high)
            step += 1
            if step % 10 == 0 or i == iterations - 1:
                show(step, images, _finite(terms, unit, step))
            if checkpoint is not None and checkpoint.due(step):
                moments = {name: adam.state[images][name] for name in ("exp_avg", "exp_avg_sq")}
                state = {"images": images, "step": torch.tensor(step), "generator": generator.get_state(), **moments}
                checkpoint.save(step, state)
        images = images.detach()
    return images, _finite(terms, unit, step)


def _stages(size: tuple[int, int], config: SynthesisConfig) -> Iterator[tuple[tuple[int, int], int]]:
    """(height, width) and iterations of each stage: half the size first, if asked for, then the full size."""
    if config.low_resolution_iterations:
        yield (max(1, size[0] // 2), max(1, size[1] // 2)), config.low_resolution_iterations
    yield size, config.iterations


def _start(seeds: Sequence[int], teacher: Teacher, size: tuple[int, int], config: SynthesisConfig) -> Tensor:
    """Each image's own noise: [N, C, *size], normalised units."""
    shape = (teacher.preprocessing.channels, *size)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return config.noise_scale * torch.stack(noise)


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size, mode="bilinear", align_corners=False)


def _schedule(i: int, iterations: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to 0."""
    if i < warmup:
        return (i + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (i - warmup) / max(1, iterations - warmup)))


def _valid_range(teacher: Teacher, device: torch.device) -> tuple[Tensor, Tensor]:
    """The normalised values of black and white: [C, 1, 1] each."""
    black = torch.zeros(teacher.preprocessing.channels, 1, 1, device=device)
    return teacher.preprocessing.normalize(black), teacher.preprocessing.normalize(black + 1)


def _finite(terms: dict[str, Tensor], unit: int, step: int) -> dict[str, float]:
    values = {name: value.item() for name, value in terms.items()}
    if bad := [name for name, value in values.items() if not math.isfinite(value)]:
        raise NonFiniteLoss(
            f"unit {unit}, step {step}: the loss is not finite ({', '.join(f'{n} = {values[n]}' for n in bad)}); "
            "lower lr or bn_weight, or choose a distance that does not divide by the variance"
        )
    return values
