"""Gradient matching: recover a training batch from one gradient of a network in training, as a federated server sees it.

Three attacks on a network that has been trained on an arm's images for a while: DLG (Zhu et al. 2019), which seeks image and
label together; iDLG (Zhao et al. 2020), which reads the label off the gradient first; and inverting gradients (Geiping et al.
2020). The network is a small one with sigmoids, as DLG's is: the attacks need one that is smooth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ..datasets import ArrayDataset
from .context import ARMS, Context
from .findings import Control, Finding, Row
from .recovery import (
    BOUNDS,
    DOES_NOT_BOUND,
    NEAREST,
    NOTE,
    Comparison,
    compared,
    conclude,
    heldout_baseline,
    heldout_row,
    median,
    psnr,
    sentence,
    sheets,
)

NAME, TITLE, NEEDS = "gradients", "Gradient matching", {"heldout"}
IDLG, DLG, INVERTING = "iDLG", "DLG", "inverting gradients"
RECOVERED = 30.0  # dB at which an image counts as recovered: the positive control
UNRELATED = 20.0  # dB which no image reaches that was recovered from noise


@dataclass(frozen=True)
class Config:
    """How much is tried.

    Attributes
    ----------
    trials : (attack, images in a batch, batches of each arm)
    steps, batch_size, lr : training of the attacked network, with Adam
    evaluations : of the gradient distance, at most, in a run of L-BFGS
    matched : distance of gradients, see `match`, below which a run stops
    restarts : runs from other noise, at most, until the gradient is matched; the best match is kept
    adam_steps : of inverting gradients
    adam_lr, tv : its step, and its weight of the total variation
    heldout : images of the baseline, at most
    """

    trials: tuple[tuple[str, int, int], ...]
    steps: int
    batch_size: int = 64
    lr: float = 3e-3
    evaluations: int = 300
    matched: float = 1e-6
    restarts: int = 2
    adam_steps: int = 200
    adam_lr: float = 0.05
    tv: float = 1e-4
    heldout: int = 1000


BUDGETS = {
    "quick": Config(trials=((IDLG, 1, 6), (DLG, 1, 2), (INVERTING, 1, 1), (INVERTING, 4, 1)), steps=60, tv=1e-5),
    "standard": Config(
        trials=((IDLG, 1, 8), (DLG, 1, 4), (DLG, 2, 2), (INVERTING, 1, 4), (INVERTING, 4, 2)),
        steps=100,
        evaluations=2000,
        matched=1e-10,
        restarts=2,
        adam_steps=1000,
    ),
    "full": Config(
        trials=((IDLG, 1, 50), (DLG, 1, 20), (DLG, 4, 5), (INVERTING, 1, 20), (INVERTING, 8, 5)),
        steps=1000,
        evaluations=5000,
        matched=1e-12,
        restarts=5,
        adam_steps=5000,
    ),
}


def run(context: Context, config: Config) -> Finding:
    heldout = heldout_baseline(context, config.heldout, NAME)
    total = len(ARMS) * sum(batches for _, _, batches in config.trials) + 1
    with context.progress(TITLE.lower(), total, "batch") as bar:
        recovered = {arm: _attacked(context, config, arm, bar.update) for arm in ARMS}
        controls = [_negative(context, config)]
        bar.update()
    comparisons = {
        arm: {what: compared(context, *pair) for what, pair in by_trial.items()} for arm, by_trial in recovered.items()
    }
    first = next(iter(comparisons["original"]))
    reached = float(comparisons["original"][first].psnr.median())
    name = f"{IDLG} on originals, batch of 1: median PSNR to the image trained on, in dB"
    controls.insert(0, Control(name, reached, f"at least {RECOVERED:g} dB", reached >= RECOVERED))
    rows, outcomes = [], {}
    for arm in ARMS:
        rng = context.rng(NAME, "intervals", arm)
        figures = [figure for what, comparison in comparisons[arm].items() for figure in comparison.figures(what, rng)]
        published = torch.cat([comparison.published_psnr for comparison in comparisons[arm].values()])
        figures.insert(1, median(f"the attacked images themselves: {NEAREST}", published, rng, unit="dB", better="lower"))
        outcomes[arm], reading = conclude(list(comparisons[arm].values()), heldout)
        if arm == "original":
            reading = "private images recovered" if reached >= RECOVERED else "private images not recovered"
        rows.append(Row(arm, figures, reading))
    rows.append(heldout_row(first, heldout, context.rng(NAME, "intervals"), "not attacked"))
    return Finding(
        NAME,
        TITLE,
        rows,
        controls,
        bounds=BOUNDS,
        does_not_bound=DOES_NOT_BOUND,
        sentence=sentence("Gradient matching", outcomes["synthetic"]),
        outcome=outcomes["synthetic"],
        pictures=[_picture(context, arm, recovered[arm], comparisons[arm]) for arm in ARMS],
        notes=[
            "The attacked network has three convolutions with sigmoids, as DLG's; with ReLUs, strides, batch normalisation or "
            "larger batches all three attacks recover less.",
            "iDLG and inverting gradients read labels off the last layer's gradient, for which the images of a batch are of "
            "different classes; DLG finds labels by itself. What is recovered of a batch is compared in the best order.",
            NOTE,
        ],
    )


# ---- the attacked network ----


class Network(nn.Sequential):
    """DLG's LeNet: three convolutions of 12 channels with sigmoids and one linear layer; strides only above 8 pixels."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, rng: torch.Generator):
        channels, *size = image_shape
        layers = []
        for _ in range(3):
            stride = 2 if min(size) > 8 else 1
            layers += [nn.Conv2d(channels, 12, 5, stride, padding=2), nn.Sigmoid()]
            channels, size = 12, [math.ceil(side / stride) for side in size]
        super().__init__(*layers, nn.Flatten(), nn.Linear(12 * math.prod(size), num_classes))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5, generator=rng)


def trained(context: Context, data: ArrayDataset, config: Config, *words: str) -> Network:
    """The network after `config.steps` on `data`, float64, since what is attacked are differences of gradients."""
    network = Network(data.image_shape, data.num_classes, context.rng(NAME, "network")).to(context.device)
    optimizer = torch.optim.Adam(network.parameters(), config.lr)
    rng = context.rng(NAME, "batches", *words)
    for _ in range(config.steps):
        images, labels = data.batch(torch.randint(len(data), (config.batch_size,), generator=rng))
        loss = F.cross_entropy(network(images.to(context.device)), labels.to(context.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.double()


def gradient(network: nn.Module, images: Tensor, targets: Tensor, *, differentiable: bool = False) -> tuple[Tensor, ...]:
    """Of the mean cross-entropy, for each parameter. `targets` are probabilities [B, K]."""
    loss = F.cross_entropy(network(images), targets)
    return torch.autograd.grad(loss, tuple(network.parameters()), create_graph=differentiable)


# ---- the attacks ----


def read_labels(shared: tuple[Tensor, ...], count: int) -> Tensor:
    """The labels of `count` images of different classes, int64 [count], from the signs of the last layer's gradient.

    Its row k is the sum over images of (p_k − [label is k]) times features that sigmoids made positive, so of one image only
    the label's is negative (iDLG). Of several, the rows with the lowest elements are taken (Yin et al. 2021), mostly rightly.
    """
    lowest = shared[-2].amin(1)  # [K]
    return lowest.topk(count, largest=False).indices.sort().values


def match(
    network: nn.Module,
    shared: tuple[Tensor, ...],
    shape: tuple[int, ...],
    config: Config,
    rng: torch.Generator,
    labels: Tensor | None,
) -> Tensor:
    """DLG, or iDLG where the labels are given: images whose gradient is the shared one, by L-BFGS, with restarts.

    The distance is Σ ‖g − g*‖² / Σ ‖g*‖². Returns [B, C, H, W] in [0, 1].
    """
    best, least = None, math.inf
    for _ in range(config.restarts):
        images, left = _search(network, shared, shape, config, rng, labels)
        if left < least or best is None:
            best, least = images, left
        if least < config.matched:
            break
    return best


def _search(
    network: nn.Module,
    shared: tuple[Tensor, ...],
    shape: tuple[int, ...],
    config: Config,
    rng: torch.Generator,
    labels: Tensor | None,
) -> tuple[Tensor, float]:
    """`match` without restarts: images, and the distance that is left."""
    device, num_classes = shared[-1].device, len(shared[-1])
    norm = sum(part.square().sum() for part in shared)
    images = torch.rand(shape, generator=rng, dtype=torch.float64).to(device).requires_grad_()
    if labels is None:
        logits = torch.randn(shape[0], num_classes, generator=rng, dtype=torch.float64).to(device).requires_grad_()
        variables, targets = [images, logits], lambda: logits.softmax(1)
    else:
        given = F.one_hot(labels, num_classes).double()
        variables, targets = [images], lambda: given

    def distance() -> Tensor:
        found = gradient(network, images, targets(), differentiable=True)
        return sum((a - b).square().sum() for a, b in zip(found, shared)) / norm

    left = _minimise(distance, variables, config)
    return images.detach().clamp(0, 1), left


def _minimise(distance: Callable[[], Tensor], variables: list[Tensor], config: Config) -> float:
    """L-BFGS with strong Wolfe steps until the gradient is matched; returns the last distance, inf where it is not a number."""
    optimizer = torch.optim.LBFGS(
        variables, max_iter=20, history_size=50, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    count, value = 0, math.inf

    def closure() -> Tensor:
        nonlocal count, value
        count += 1
        loss = distance()
        for variable, slope in zip(variables, torch.autograd.grad(loss, variables)):
            variable.grad = slope
        value = float(loss.detach())
        return loss

    while count < config.evaluations and not value < config.matched:
        before = value
        optimizer.step(closure)
        if not math.isfinite(value) or value == before:
            break
    return value if math.isfinite(value) else math.inf


def invert(
    network: nn.Module,
    shared: tuple[Tensor, ...],
    shape: tuple[int, ...],
    config: Config,
    rng: torch.Generator,
    labels: Tensor,
) -> Tensor:
    """Inverting gradients: cosine distance plus total variation, by Adam on the sign of its gradient, clamped to [0, 1]."""
    targets = F.one_hot(labels, len(shared[-1])).double()
    images = torch.rand(shape, generator=rng, dtype=torch.float64).to(shared[-1].device).requires_grad_()
    optimizer = torch.optim.Adam([images], config.adam_lr)
    milestones = [round(config.adam_steps * part) for part in (3 / 8, 5 / 8, 7 / 8)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    length = sum(part.square().sum() for part in shared).sqrt()
    for _ in range(config.adam_steps):
        found = gradient(network, images, targets, differentiable=True)
        product = sum((a * b).sum() for a, b in zip(found, shared))
        cosine = product / (length * sum(part.square().sum() for part in found).sqrt())
        variation = images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()
        loss = 1 - cosine + config.tv * variation
        images.grad = torch.autograd.grad(loss, images)[0].sign()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            images.clamp_(0, 1)
    return images.detach()


def in_order(recovered: Tensor, truth: Tensor) -> Tensor:
    """The recovered images in the order that fits `truth` best, both [B, C, H, W]: a gradient has no order."""
    errors = (recovered[None] - truth[:, None]).square().flatten(2).mean(2)  # [truth, recovered]
    return recovered[torch.as_tensor(linear_sum_assignment(errors.cpu().numpy())[1], device=recovered.device)]


# ---- the trials ----


def _attacked(context: Context, config: Config, arm: str, step: Callable[[], object]) -> dict[str, tuple[Tensor, Tensor]]:
    """For each kind of trial, by its name: recovered images and those attacked, float32 [N, C, H, W] each.

    Every batch is kept in a file of its own.
    """
    data, results = context.images(arm), {}
    network = cache(lambda: trained(context, data, config, arm))  # not at all where every part is there already

    def kept(attack: str, size: int, i: int) -> dict[str, Tensor]:
        words = (arm, attack, size, i)
        make = lambda: _trial(context, config, network(), data, attack, size, words)
        found = context.kept(NAME, "-".join(map(str, words)), make)
        step()
        return found

    for attack, size, batches in config.trials:
        size = min(size, len(data.labels.unique()))
        parts = [kept(attack, size, i) for i in range(batches)]
        what = f"{attack}, batch of {size}"
        results[what] = tuple(torch.cat([part[key] for part in parts]) for key in ("recovered", "truth"))
    return results


def _trial(
    context: Context, config: Config, network: Network, data: ArrayDataset, attack: str, size: int, words: tuple
) -> dict[str, Tensor]:
    images, labels = data.batch(_batch(data, size, context.rng(NAME, "batch", *words)))
    images, labels = images.to(context.device).double(), labels.to(context.device)
    shared = gradient(network, images, F.one_hot(labels, data.num_classes).double())
    rng = context.rng(NAME, "attack", *words)
    if attack == INVERTING:
        recovered = invert(network, shared, images.shape, config, rng, read_labels(shared, size))
    else:
        read = None if attack == DLG else read_labels(shared, size)
        recovered = match(network, shared, images.shape, config, rng, read)
    recovered = in_order(recovered, images)
    return {"recovered": recovered.float().cpu().contiguous(), "truth": images.float().cpu()}


def _batch(data: ArrayDataset, size: int, rng: torch.Generator) -> Tensor:
    """Indices of images of different classes, int64 [size]."""
    order = torch.randperm(len(data), generator=rng)
    chosen = {}
    for index in order.tolist():
        chosen.setdefault(int(data.labels[index]), index)
        if len(chosen) == size:
            break
    return torch.tensor(list(chosen.values()))


def _negative(context: Context, config: Config) -> Control:
    """iDLG on noise that has the norm of the gradient in every parameter."""
    data = context.private
    network = trained(context, data, config, "original")
    images, labels = data.batch(_batch(data, 1, context.rng(NAME, "negative")))
    images, labels = images.to(context.device).double(), labels.to(context.device)
    shared = gradient(network, images, F.one_hot(labels, data.num_classes).double())
    rng = context.rng(NAME, "negative", "noise")
    noise = [torch.randn(part.shape, generator=rng, dtype=torch.float64).to(part.device) for part in shared]
    noise = tuple(drawn * part.norm() / drawn.norm() for drawn, part in zip(noise, shared))
    recovered = match(network, noise, images.shape, config, rng, read_labels(noise, 1))
    reached = float(psnr(recovered.cpu(), images.cpu()))
    name = f"{IDLG} on noise in the place of an original's gradient: PSNR to that original, in dB"
    return Control(name, reached, f"at most {UNRELATED:g} dB", reached <= UNRELATED, kind="negative")


def _picture(context: Context, arm: str, recovered: dict[str, tuple[Tensor, Tensor]], found: dict[str, Comparison]):
    """A few images of each kind of trial, what was recovered of them, and the nearest private ones."""
    titles, truth, images, near = [], [], [], []
    for what, (got, true) in recovered.items():
        shown = slice(0, 4 if "batch of 1" not in what else 2)
        attack, _, size = what.partition(", batch of ")
        titles += [f"{attack.replace(' ', chr(10))}\n({size})"] * len(got[shown])
        truth.append(true[shown])
        images.append(got[shown])
        near.append(context.private.batch(found[what].nearest[shown])[0])
    rows = {"trained on": torch.cat(truth), "recovered": torch.cat(images), "nearest\nprivate": torch.cat(near)}
    caption = (
        f"Networks trained on {context.images(arm).name} ({arm}): images of an attacked batch, what was recovered from the "
        "gradient, and the private images nearest to that. Above each column the attack, and how many images the batch had."
    )
    whole, public = sheets(rows, titles, arm)
    return context.picture(f"{NAME}-{arm}", whole, caption, public)
