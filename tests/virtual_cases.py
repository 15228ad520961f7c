"""Batches, losses and units that the tests of virtual batches share, in one process and on many ranks."""

import torch
import torch.nn.functional as F
from networks import Chains, settle

from bnfuse import Matcher, SynthesisConfig, fuse, group_by_class
from bnfuse.averaging import MovingAverage
from bnfuse.distributed import ALONE
from bnfuse.ensemble import Committee, Ensemble
from bnfuse.models import Teacher, batchnorm_layers, freeze
from bnfuse.networks import CifarResNet
from bnfuse.objective import Objective
from bnfuse.optimisation import optimise
from bnfuse.preprocessing import Preprocessing
from bnfuse.reference import DISTANCES
from bnfuse.virtual import Seen, VirtualBatch

CLASSES = 5
SITES = ("bn", "pixels", "name=skip@cells=4", "name=conv4:output")
STARTS = [0, 3, 3, 8, 11]  # 11 images in four groups, one of them empty


# ---- gradients ----


def network(dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    return fuse(settle(Chains()).to(dtype), sites=SITES)


def batch(count: int = 11, dtype: torch.dtype = torch.float64):
    """Images, soft targets [N, K], group_starts of the first `count` images of a batch."""
    generator = torch.Generator().manual_seed(1)
    images = 1.5 * torch.randn(11, 3, 6, 6, dtype=torch.float64, generator=generator) + 0.5
    targets = torch.softmax(torch.randn(11, CLASSES, dtype=torch.float64, generator=generator), 1)
    starts = torch.tensor(STARTS).clamp(max=count)
    return images[:count].to(dtype), targets[:count].to(dtype), starts


def matcher(distance: str = "l2", **options) -> Matcher:
    """A table of two classes near what the batch's statistics are."""
    layers = batchnorm_layers(settle(Chains()))
    channels = [layer.num_features for layer in layers.values()]
    if options.pop("all_sites", False):
        layers |= {"pixels": None, "skip:input@cells=4": None, "conv4:output": None}
        channels += [3, 4, 6]
    generator = torch.Generator().manual_seed(2)
    mean = 0.3 * torch.randn(2, sum(channels), generator=generator)
    var = 0.5 + torch.rand(2, sum(channels), generator=generator)
    return Matcher(list(layers), channels, mean, var, distance=distance, **options)


GROUP_CLASSES = torch.tensor([1, 0, 0, 1])


def _matched(distance: str, **options):
    match = matcher(distance, **options)
    return lambda means, moments: (0.5 * means["ce"] + match(moments, GROUP_CLASSES),)


def _moving_average(straight_through: bool):
    """Fast-Datafree's: (1 − m)·batch + m·average; G-VBSM's: the average's value, the batch's gradient at full weight."""
    match, m = matcher("l2"), 0.9

    def loss(means, moments):
        averaged = {}
        for name, pair in moments.items():
            mixed = [(1 - m) * value + m * torch.full_like(value, 0.2) for value in pair]
            if straight_through:
                mixed = [value + (mix - value).detach() for value, mix in zip(pair, mixed)]
            averaged[name] = tuple(mixed)
        return (means["ce"] + match(averaged, GROUP_CLASSES),)

    return loss


def _options(classes: torch.Tensor = GROUP_CLASSES, **options):
    """Options of the matcher, at every kind of site."""

    def loss(means, moments):
        average = MovingAverage(0.4, **options["average"]) if "average" in options else None
        given = {name: value for name, value in options.items() if name != "average"}
        match = matcher("l2", all_sites=True, moving_average=average, **given)
        if average is not None:  # it is in its second step
            match.measure(type(moments)({k: (v[0].detach() / 2, v[1].detach() / 3) for k, v in moments.items()}), classes)
        match.draw_sites(torch.Generator().manual_seed(3))
        return (means["ce"] + match.measure(moments, classes)[0],)

    return loss


def _mixture(means, moments):
    """A product of terms, of one site alone, and no term of its own: nothing about the loss may be assumed."""
    mean, var = moments["bn1"]
    return ((mean * var).square().sum() * (1 + means["ce"]).log(),)


LOSSES = {distance: _matched(distance, slack=0.1 if distance == "hinge" else 0.0) for distance in DISTANCES} | {
    "l2 of std": _matched("l2", use_std=True),
    "moving average, gradient scaled": _moving_average(False),
    "moving average, straight through": _moving_average(True),
    "mixture": _mixture,
    "unbiased, relative": _options(unbiased=True, relative=True, use_std=True),
    "sites left out, samples and sites enhanced": _options(site_drop=0.4, enhancement=1.0, site_weights={"pixels": -1.0}),
    "mixture of classes": _options(torch.tensor([[0.2, 0.8], [1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], dtype=torch.float64)),
    "average of the matcher, gradient scaled": _options(average={"start": "first"}),
    "average of the matcher, straight through": _options(average={"gradient": "straight_through"}),
}


def big_batch(fused, loss, images, targets, starts):
    """Loss and gradient of all images at once, by plain autograd."""
    leaf = images.clone().requires_grad_()
    logits, moments = fused(leaf, starts)
    total = loss({"ce": F.cross_entropy(logits, targets)}, moments)[0]
    return total.detach(), torch.autograd.grad(total, leaf)[0]


def virtual_batch(fused, loss, images, targets, starts, micro_batch=None, team=ALONE):
    """The same by `VirtualBatch`, and how often a micro-batch was looked at."""
    virtual, looks = VirtualBatch(starts, micro_batch, team, fused.running_means), 0
    images, targets = images[virtual.rows], targets[virtual.rows]
    gradient = torch.full_like(images, float("nan"))

    def look(part):
        nonlocal looks
        looks += 1
        leaf = images[part.rows].clone().requires_grad_()
        logits, moments = fused(leaf, part.group_starts)
        return Seen(leaf, {"ce": F.cross_entropy(logits, targets[part.rows])}, moments)

    losses, gradients = virtual.gradients(look, loss)
    for rows, part in gradients:
        gradient[rows] = part
    return losses[0].detach(), team.gather_rows(gradient[: virtual.owned], virtual.count), looks


def worst(actual, expected) -> float:
    """The largest error, against the largest element expected."""
    return float((actual - expected).abs().max() / expected.abs().max())


# ---- units ----

CONFIG = SynthesisConfig(
    batch_size=7,
    low_resolution_iterations=6,
    iterations=14,
    warmup=2,
    jitter=2,
    flip=True,
    crop_scale=0.5,
    tv_weight=0.1,
    l2_weight=0.1,
    first_site_weight=10.0,
)
LABELS = torch.tensor([1, 1, 1, 0, 0, 0, 0])
SEEDS = list(range(100, 107))


def teacher(channels: int = 1, seed: int = 0, width: int = 8) -> Teacher:
    torch.manual_seed(seed)
    model = CifarResNet(8, 10, channels, width=width)
    with torch.no_grad():
        for _ in range(30):
            model(torch.randn(32, channels, 8, 8))
    return Teacher(freeze(model), "custom", 10, Preprocessing((8, 8), [0.3] * channels, [0.35] * channels))


def objective(teacher: Teacher, **options) -> Objective:
    """Two classes' targets, each a little off the running statistics."""
    running = Matcher.from_running(teacher.model)
    off = torch.tensor([[0.9], [1.2]])
    match = Matcher(running.names, running.channels, running.target_mean + off - 1, running.target_var * off)
    return Objective(fuse(teacher.model), match, **options)


def ensemble(teacher: Teacher, plan: str = "in_turn", **options) -> Ensemble:
    """That teacher, and one of other width."""
    members = [objective(teacher, **options), objective(other_teacher(teacher.preprocessing.channels), **options)]
    return Ensemble(members, Committee(plan, drawn=1))


def other_teacher(channels: int) -> Teacher:
    return teacher(channels, seed=1, width=6)


class Keep:
    """A checkpoint that keeps the states of the steps it is told to."""

    def __init__(self, *steps: int):
        self.steps, self.states = steps, {}

    def due(self, step: int) -> bool:
        return step in self.steps

    def save(self, step: int, state: dict) -> None:
        self.states[step] = state


def make_unit(objective, teacher, config=CONFIG, show=lambda *_: None, outputs=LABELS, **options):
    return optimise(objective, groups(), outputs, SEEDS, 5, teacher, config, show, **options)


def groups():
    return group_by_class(LABELS)
