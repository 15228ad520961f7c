"""One unit of work: from noise to one batch of images. The method itself, in one loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adam import adam

from .augment import Augmentation, View
from .capture import CapturedObjective
from .distributed import ALONE, Team
from .ensemble import Ensemble
from .errors import BnfuseError, InputError
from .models import Teacher
from .objective import Losses, Objective
from .seeds import derive_seed
from .spectrum import StepSpace, starting_noise
from .virtual import MicroBatch, Seen, VirtualBatch

if TYPE_CHECKING:
    from .plans import SynthesisConfig

SHOW_EVERY = 10  # steps between two looks at the losses, each of which waits for the device


class NonFiniteLoss(BnfuseError):
    """A loss became infinite or NaN, or images did in the last step.

    Attributes
    ----------
    unit, step : where, and after how many steps of it
    where : the site or loss term that was the first not to be finite
    """

    def __init__(self, message: str, unit: int, step: int, where: str):
        super().__init__(message)
        self.unit, self.step, self.where = unit, step, where


class Checkpoint(Protocol):
    """Keeps what a unit needs to go on from.

    On a team of ranks `due` is asked every `SHOW_EVERY` steps, and what one rank wants all do.
    """

    def due(self, step: int) -> bool:
        """Whether to save now; asked after every step but the last."""

    def save(self, step: int, state: dict[str, Tensor]) -> None:
        """`state` is on the CPU, contiguous, of the whole batch; an exception from here ends the unit."""


def optimise(
    objective: Objective | Ensemble,
    groups: tuple[Tensor, Tensor],
    outputs: Tensor,
    seeds: Sequence[int],
    unit: int,
    teacher: Teacher,
    config: SynthesisConfig,
    show: Callable[[int, Tensor, dict[str, float]], None],
    *,
    micro_batch: int | None = None,
    offload: bool = False,
    cuda_graph: bool = False,
    team: Team = ALONE,
    state: dict[str, Tensor] | None = None,
    checkpoint: Checkpoint | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """From noise to one batch of images: the whole method.

    Parameters
    ----------
    groups : int64 [G + 1], where each group of the N images that has statistics of its own begins; and each group's row of the
        targets, or a mixture of rows, see `Targets.groups`
    outputs : int64 [N], the logit to raise, or probabilities [N, K]
    seeds : N of them, one an image; `unit` seeds the views
    show : called now and then with the step, this rank's images so far, and the loss terms
    micro_batch : images that are in the network together; None, all. The loss is that of the whole batch, whatever this is
    offload : images and Adam's state stay in the CPU's memory, and on the device is one micro-batch of them at a time
    cuda_graph : the network's part of a step is captured and replayed, see `capture`; for a batch in one piece on a GPU
    team : the ranks that share the batch; each is given all of it here
    state : what a checkpoint was given; images and Adam's state are taken out of it, not to be held twice. With the same
        micro_batch and team the unit ends with the same bits as without a break
    checkpoint : None, nothing is kept

    Returns
    -------
    images : [N, C, H, W] float32, normalised; losses : the terms at the last step

    Raises
    ------
    InputError : a micro_batch that is not positive, a cuda_graph of something else, a state of another unit
    NonFiniteLoss : on all ranks of the team alike
    """
    group_starts, group_classes = groups
    batch = VirtualBatch(group_starts, micro_batch, team, objective.running_means)
    seeds, outputs = seeds[batch.rows], outputs[batch.rows]
    device = group_starts.device
    home = torch.device("cpu") if offload else device
    low, high = _valid_range(teacher, device)
    valid_range = (low, high) if config.clip else None
    captured: dict[int, CapturedObjective] = {}  # by the objective's id: a graph for every choice of teachers
    if cuda_graph:
        check_cuda_graph(device, batch.is_plain and not offload)
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "views", unit))
    watch, images, step, terms = _Watch(unit), None, 0, {}
    objective.begin()
    if state is not None:
        images, step = _restore(state, batch, home, generator, objective, config)

    def losses_and_gradients(active: Objective, view: View) -> tuple[Losses, Iterable[tuple[slice, Tensor]]]:
        """The loss of the whole batch; then, one micro-batch after the other, its rows and their gradient."""

        def look(part: MicroBatch) -> Seen:
            leaf = images.on(device, part.rows).requires_grad_()
            return Seen(leaf, *active.look(leaf, view[part.rows](leaf), outputs[part.rows], part.group_starts))

        if batch.is_plain:
            leaf = images.on(device).requires_grad_()
            if cuda_graph:
                if id(active) not in captured:
                    captured[id(active)] = CapturedObjective(active, outputs, group_starts, group_classes)
                losses, gradient = captured[id(active)](leaf, view(leaf))
                return losses, [(slice(None), gradient)]
            losses = active(leaf, view(leaf), outputs, group_starts, group_classes)
            return losses, [(slice(None), torch.autograd.grad(losses.total, leaf)[0])]
        return batch.gradients(look, lambda means, moments: active.combine(means, moments, group_classes, batch.count))

    def beginning(size: tuple[int, int]) -> Tensor:
        """What a stage starts from: noise, or the images of the stage before. No name holds it, for then it would be kept."""
        return (_start(seeds, teacher, size, config) if images is None else _resize(images.values, size)).to(home)

    end = 0
    for size, steps in stages(teacher.preprocessing.image_size, config):
        begin, end = end, end + steps
        if step >= end:  # the state is of a later stage
            continue
        if step == begin:
            images = Images(beginning(size).clamp_(low.to(home), high.to(home)))
        scale = size[0] / teacher.preprocessing.image_size[0]
        augmentation = Augmentation(round(config.jitter * scale), config.flip, config.crop_scale, config.crop_curriculum)
        space = _step_space(teacher, size, config, device)
        while step < end:
            view = augmentation.draw(images.values, generator, batch.count, (step - begin) / steps)[batch.rows]
            active = objective.at(unit, step)
            active.draw(generator)
            losses, gradients = losses_and_gradients(active, view)
            lr = learning_rate(config, step + 1)
            for rows, gradient in gradients:
                images.adam(rows, gradient, step - begin, lr, config.betas, valid_range, space)
            step += 1
            watch.add(step, losses, active.site_names)
            if step % SHOW_EVERY == 0 or step == end:
                terms = watch.check()
                show(step, images.values, terms)
            if step < config.total_iterations and _wanted(checkpoint, step, team, device):
                watch.check()
                checkpoint.save(step, _state(images, step, batch, generator, objective))
    watch.check_images(images.values, team, device)
    return team.gather_rows(images.values[: batch.owned], batch.count), terms


def check_cuda_graph(device: torch.device, in_one_piece: bool) -> None:
    """InputError unless a step can be captured."""
    if device.type != "cuda" or not in_one_piece:
        given = f"the device {device}" if in_one_piece else "micro-batches, offloading or ranks that share a batch"
        raise InputError(f"cuda_graph needs a batch in one piece on a CUDA device, got {given}; leave it out there")


class Images:
    """Images being optimised, and Adam's state of each: they do not interact, so that any of them may take their step alone.

    Attributes
    ----------
    values, exp_avg, exp_avg_sq : [N, C, H, W] float32, channels_last; the latter two of pixels, or of the coefficients in which
        steps are taken
    """

    def __init__(self, values: Tensor, exp_avg: Tensor | None = None, exp_avg_sq: Tensor | None = None):
        self.values = values.contiguous(memory_format=torch.channels_last)
        self.exp_avg = torch.zeros_like(self.values) if exp_avg is None else exp_avg
        self.exp_avg_sq = torch.zeros_like(self.values) if exp_avg_sq is None else exp_avg_sq

    def on(self, device: torch.device, rows: slice = slice(None)) -> Tensor:
        """Some images on the device: the images themselves where they are there, else a copy."""
        return self.values[rows].to(device)

    @torch.no_grad()
    def adam(
        self,
        rows: slice,
        gradient: Tensor,
        steps: int,
        lr: float,
        betas: tuple[float, float],
        valid_range: tuple[Tensor, Tensor] | None,
        space: StepSpace | None = None,
    ) -> None:
        """One step of Adam (`torch.optim.Adam`'s own) on some images, on the gradient's device, after `steps` others: in their
        pixels, or in the coordinates of `space`."""
        held = [tensor[rows] for tensor in (self.values, self.exp_avg, self.exp_avg_sq)]
        values, exp_avg, exp_avg_sq = here = [tensor.to(gradient.device) for tensor in held]
        moved = values if space is None else torch.zeros_like(values)
        adam(
            [moved],
            [gradient if space is None else space.gradient(gradient)],
            [exp_avg],
            [exp_avg_sq],
            [],
            [torch.tensor(float(steps))],
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=lr,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )
        if space is not None:
            values += space.pixels(moved)
        if valid_range is not None:
            values.clamp_(*valid_range)
        for ours, theirs in zip(held, here):
            if ours is not theirs:  # they live on another device
                ours.copy_(theirs)


# ---- the start, and what changes from step to step ----


def stages(size: tuple[int, int], config: SynthesisConfig) -> Iterator[tuple[tuple[int, int], int]]:
    """(height, width) and steps of each stage: half the size first, if asked for, then the full size."""
    if config.low_resolution_iterations:
        yield (max(1, size[0] // 2), max(1, size[1] // 2)), config.low_resolution_iterations
    yield size, config.iterations


def learning_rate(config: SynthesisConfig, step: int) -> float:
    """Of a unit's `step`, from 1: each stage has a schedule of its own."""
    low = config.low_resolution_iterations
    i, steps = (step - 1, low) if step <= low else (step - 1 - low, config.iterations)
    return config.lr * _schedule(i, steps, config.warmup, config.schedule)


def _start(seeds: Sequence[int], teacher: Teacher, size: tuple[int, int], config: SynthesisConfig) -> Tensor:
    """Each image's own noise: [N, C, *size], normalised units, channels_last."""
    kind = config.noise_scale, config.noise_exponent, config.chroma_scale
    return starting_noise(seeds, teacher.preprocessing.channels, size, *kind)


def _step_space(teacher: Teacher, size: tuple[int, int], config: SynthesisConfig, device: torch.device) -> StepSpace | None:
    """In what Adam's steps are taken; None for the pixels."""
    if config.step_exponent == 0:
        return None
    return StepSpace(teacher.preprocessing.channels, size, config.step_exponent, config.chroma_scale, device)


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size, mode="bilinear", align_corners=False)


def _schedule(i: int, iterations: int, warmup: int, kind: str = "cosine") -> float:
    """Linear warm-up, then half a cosine down to 0, or constant."""
    if i < warmup:
        return (i + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (i - warmup) / max(1, iterations - warmup)))


def _valid_range(teacher: Teacher, device: torch.device) -> tuple[Tensor, Tensor]:
    """The normalised values of black and white: [C, 1, 1] each."""
    black = torch.zeros(teacher.preprocessing.channels, 1, 1, device=device)
    return teacher.preprocessing.normalize(black), teacher.preprocessing.normalize(black + 1)


# ---- going on from where it stopped ----

_TENSORS = ("values", "exp_avg", "exp_avg_sq")


def _wanted(checkpoint: Checkpoint | None, step: int, team: Team, device: torch.device) -> bool:
    """Whether to save; the same on every rank of the team, whose clocks and signals differ."""
    if checkpoint is None or team.size > 1 and step % SHOW_EVERY:
        return False
    due = checkpoint.due(step)
    return due if team.size == 1 else bool(team.sum_(torch.tensor([float(due)], device=device)))


def _state(
    images: Images, step: int, batch: VirtualBatch, generator: torch.Generator, objective: Objective
) -> dict[str, Tensor]:
    """What `_restore` goes on from, of the whole batch: copies, contiguous, on the CPU."""
    kept = {name: value.cpu() for name, value in objective.state().items()}
    state = {"step": torch.tensor(step), "generator": generator.get_state(), **kept}
    for name in _TENSORS:
        whole = batch.team.gather_rows(getattr(images, name)[: batch.owned], batch.count)
        state[name] = whole.clone(memory_format=torch.contiguous_format).cpu()
    return state


def _restore(
    state: dict[str, Tensor],
    batch: VirtualBatch,
    home: torch.device,
    generator: torch.Generator,
    objective: Objective,
    config: SynthesisConfig,
) -> tuple[Images, int]:
    """This rank's images, taken out of the state, and the step they are at; sets the generator and what the loss keeps."""
    if missing := {*_TENSORS, "step", "generator", *objective.state()} - set(state):
        raise InputError(f"the state of a unit lacks {', '.join(sorted(missing))}; begin the unit again")
    step, count = int(state["step"]), len(state["values"])
    if count != batch.count or not 0 < step < config.total_iterations:
        raise InputError(
            f"the state is of {count} images after {step} steps, the unit has {batch.count} images and "
            f"{config.total_iterations} steps: it is another's; begin the unit again"
        )
    generator.set_state(state["generator"])
    objective.restore(state)
    # Laid out as `Images` does it: strides that mean the same (of one channel) may choose another convolution, and other bits.
    own = [state.pop(name)[batch.rows].to(home, copy=True).contiguous(memory_format=torch.channels_last) for name in _TENSORS]
    return Images(*own), step


# ---- losses that are not finite ----


class _Watch:
    """Remembers the losses of the last steps, so that looking at them now and then is enough to say where it began."""

    def __init__(self, unit: int):
        self.unit = unit
        self.seen: list[tuple[int, dict[str, Tensor], Tensor, Sequence[str]]] = []  # step, terms, distances [G, S], sites

    def add(self, step: int, losses: Losses, sites: Sequence[str]) -> None:
        self.seen.append((step, {name: value.detach() for name, value in losses.terms.items()}, losses.distances, sites))

    def check(self) -> dict[str, float]:
        """The terms of the last step; NonFiniteLoss if any step's total, since the last check, was not finite."""
        totals = torch.stack([terms["total"] for _, terms, _, _ in self.seen]).tolist()
        broken = [seen for total, seen in zip(totals, self.seen) if not math.isfinite(total)]
        if broken:
            raise self._error(*broken[0])
        del self.seen[:-1]
        return {name: value.item() for name, value in self.seen[0][1].items()}

    def check_images(self, values: Tensor, team: Team, device: torch.device) -> None:
        """NonFiniteLoss, on all ranks of the team, where the last step, of which no loss was taken, broke some image."""
        broken = (~values.isfinite().all()).to(device, torch.float32)[None]
        if (broken if team.size == 1 else team.sum_(broken)).item():
            step = self.seen[-1][0]
            text = f"unit {self.unit}, step {step}: images are not finite after the last step; lower lr or bn_weight"
            raise NonFiniteLoss(text, self.unit, step, "images")

    def _error(self, step: int, terms: dict[str, Tensor], distances: Tensor, names: Sequence[str]) -> NonFiniteLoss:
        values = {name: value.item() for name, value in terms.items()}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        sites = (~distances.isfinite()).any(0).nonzero().flatten().tolist()
        where = names[sites[0]] if sites else bad[0]
        began = f"it began at site {where!r}, whose statistics or distance are not; " if sites else ""
        return NonFiniteLoss(
            f"unit {self.unit}, step {step}: the loss is not finite ({', '.join(f'{n} = {values[n]}' for n in bad)}); {began}"
            "lower lr or bn_weight, or choose a distance that does not divide by the variance",
            self.unit,
            step,
            where,
        )
