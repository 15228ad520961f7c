"""Model memorisation (Song, Ristenpart and Shmatikov 2017): a malicious trainer hides its training images in the network.

Four ways to hide them: in the low bits of the weights, in their signs, in their values, or in the labels that the network
gives to inputs made up for it (capacity abuse). The network classifies as an honest one does; whoever knows the trick reads
the images out of it. Bits are hidden under a keystream, so that an honest network gives each with probability one half.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..datasets import ArrayDataset
from ..errors import InputError
from .context import ARMS, Context
from .findings import Control, Figure, Finding, Picture, Row
from .intervals import clopper_pearson
from .recovery import (
    BOUNDS,
    DOES_NOT_BOUND,
    NOTE,
    Comparison,
    compared,
    conclude,
    heldout_baseline,
    heldout_row,
    sentence,
    sheets,
)

NAME, TITLE, NEEDS = "memorisation", "Model memorisation", {"heldout"}
LSB, SIGN, CORRELATED, CAPACITY = "low bits", "signs", "correlated values", "capacity abuse"
ATTACKS = (LSB, SIGN, CORRELATED, CAPACITY)
CHANCE = 4.0  # standard errors within which what an honest network gives counts as chance


@dataclass(frozen=True)
class Config:
    """How much is hidden, and how the networks are trained.

    Attributes
    ----------
    hidden : images hidden by each of `ATTACKS`; fewer where the network or the dataset has room for fewer
    images : of the arm to train on, at most; None, all
    epochs, batch_size, lr : training with Adam
    low_bits : of each weight's 23 bits of mantissa, that hide something
    sign, correlation : weights of the two penalties
    memorising : more epochs of capacity abuse, at most, until every bit is there
    heldout : images of the baseline, at most; all are tested on
    """

    hidden: tuple[int, int, int, int]
    images: int | None
    epochs: int
    batch_size: int = 64
    lr: float = 4e-3
    low_bits: int = 8
    sign: float = 200.0
    correlation: float = 3.0
    memorising: int = 200
    heldout: int = 1000


BUDGETS = {
    "quick": Config(hidden=(40, 20, 40, 2), images=1000, epochs=6),
    "standard": Config(hidden=(40, 20, 100, 1), images=10_000, epochs=10, batch_size=128),
    "full": Config(hidden=(100, 20, 150, 3), images=None, epochs=30, batch_size=128, memorising=1000),
}


def run(context: Context, config: Config) -> Finding:
    if context.num_classes < 2:
        raise InputError(f"capacity abuse hides bits in labels, so at least 2 classes are needed, got {context.num_classes}")
    heldout = heldout_baseline(context, config.heldout, NAME)
    with context.progress(TITLE.lower(), len(ARMS) * len(ATTACKS), "network") as bar:
        parts = {arm: {attack: _part(context, config, arm, attack, bar.update) for attack in ATTACKS} for arm in ARMS}
    comparisons = {
        arm: {attack: compared(context, part["decoded"], part["truth"]) for attack, part in by_attack.items()}
        for arm, by_attack in parts.items()
    }
    rows, outcomes = [], {}
    for arm in ARMS:
        outcomes[arm], reading = conclude(list(comparisons[arm].values()), heldout)
        if arm == "original":
            reading = "private images read out of the network"
        rows.append(Row(arm, _figures(context, arm, parts[arm], comparisons[arm]), reading))
    rows.append(heldout_row(LSB, heldout, context.rng(NAME, "intervals"), "never hidden"))
    return Finding(
        NAME,
        TITLE,
        rows,
        _controls(parts["original"]),
        bounds=BOUNDS,
        does_not_bound=DOES_NOT_BOUND,
        sentence=sentence("A malicious trainer", outcomes["synthetic"]),
        outcome=outcomes["synthetic"],
        pictures=[_picture(context, arm, parts[arm], comparisons[arm]) for arm in ARMS],
        notes=[
            f"The networks have {_parameters(context):,} weights: two convolutions and two linear layers, without batch "
            "normalisation. Accuracy is on the held-out images; the honest network is the same one without anything hidden.",
            "Correlated values hide no bits but the pixels themselves, so the figure is a correlation. Every other attack "
            "hides bits under a keystream, so that chance is one half.",
            NOTE,
        ],
    )


# ---- networks and their training ----


class Network(nn.Sequential):
    """Two convolutions and two linear layers; features are at most about 8 pixels a side."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int):
        channels, *size = image_shape
        first, second = (2 if min(size) > 16 else 1), 2
        size = [math.ceil(math.ceil(side / first) / second) for side in size]
        super().__init__(
            nn.Conv2d(channels, 32, 3, first, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, second, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * math.prod(size), 128),
            nn.ReLU(),
            nn.Linear(128, num_classes),
        )


def _network(context: Context, seed: int) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(context.image_shape, context.num_classes).to(context.device)


def _parameters(context: Context) -> int:
    return sum(parameter.numel() for parameter in _network(context, 0).parameters())


def _matrices(network: nn.Module) -> list[nn.Parameter]:
    """Weight matrices and kernels, the largest first: its weights are small and many, so that they are easily moved."""
    matrices = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    return sorted(matrices, key=lambda matrix: -matrix.numel())


def weights(network: nn.Module) -> Tensor:
    """All of `_matrices` as one vector, with its graph."""
    return torch.cat([matrix.flatten() for matrix in _matrices(network)])


def set_weights(network: nn.Module, vector: Tensor) -> None:
    """The inverse of `weights`."""
    matrices = _matrices(network)
    with torch.no_grad():
        for matrix, part in zip(matrices, vector.split([matrix.numel() for matrix in matrices])):
            matrix.copy_(part.view_as(matrix))


def _batches(inputs: Tensor, labels: Tensor, config: Config, rng: torch.Generator):
    for indices in torch.randperm(len(inputs), generator=rng).split(config.batch_size):
        indices = indices.to(inputs.device)
        yield inputs[indices], labels[indices]


def train(
    network: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    config: Config,
    rng: torch.Generator,
    penalty: Callable[[], Tensor] | None = None,
    unfinished: Callable[[], bool] = lambda: False,
) -> None:
    """Adam on the cross-entropy plus the penalty, with a falling step; then more epochs for as long as it is `unfinished`.

    inputs : float32 [N, C, H, W] and labels int64 [N], on the network's device
    """
    optimizer = torch.optim.Adam(network.parameters(), config.lr)
    for epoch in range(config.epochs + config.memorising):
        if epoch >= config.epochs and not unfinished():
            break
        rate = max(0.1, 1 - epoch / config.epochs) if epoch < config.epochs else 0.5
        optimizer.param_groups[0]["lr"] = config.lr * rate
        for images, targets in _batches(inputs, labels, config, rng):
            loss = F.cross_entropy(network(images), targets)
            if penalty is not None:
                loss = loss + penalty()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()


@torch.no_grad()
def predictions(network: nn.Module, images: Tensor) -> Tensor:
    """int64 [N]"""
    return torch.cat([network(part).argmax(1) for part in images.split(1024)])


def _accuracy(context: Context, network: nn.Module) -> Tensor:
    """Share of the held-out images that are classified as labelled, as float64 []."""
    images, labels = context.heldout.batch(torch.arange(len(context.heldout)))
    return (predictions(network, images.to(context.device)).cpu() == labels).double().mean()


# ---- bits ----


def to_bits(images: Tensor, key: int) -> Tensor:
    """uint8 [...] → bool [8 · elements], the highest bit of each first, under the key's stream."""
    bits = (images.flatten()[:, None] >> torch.arange(7, -1, -1)).bitwise_and(1).bool().flatten()
    return bits ^ _stream(len(bits), key)


def from_bits(bits: Tensor, key: int, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `to_bits`."""
    places = (bits ^ _stream(len(bits), key)).view(-1, 8).int()
    return (places << torch.arange(7, -1, -1)).sum(1).to(torch.uint8).view(shape)


def _stream(length: int, key: int) -> Tensor:
    return torch.randint(2, (length,), generator=torch.Generator().manual_seed(key)).bool()


def hide_in_low_bits(vector: Tensor, bits: Tensor, low_bits: int) -> Tensor:
    """The float32 weights with `bits` in the lowest bits of the first of them."""
    count = math.ceil(len(bits) / low_bits)
    padded = torch.zeros(count * low_bits, dtype=torch.int32)
    padded[: len(bits)] = bits.int()
    values = (padded.view(count, low_bits) << torch.arange(low_bits, dtype=torch.int32)).sum(1).int()
    raw = vector.detach().cpu().contiguous().clone().view(torch.int32)
    raw[:count] = raw[:count].bitwise_and(~((1 << low_bits) - 1)) | values
    return raw.view(torch.float32).to(vector.device)


def read_low_bits(vector: Tensor, length: int, low_bits: int) -> Tensor:
    """The inverse of `hide_in_low_bits`: bool [length]."""
    raw = vector.detach().cpu().contiguous().view(torch.int32)[: math.ceil(length / low_bits)]
    return (raw[:, None] >> torch.arange(low_bits, dtype=torch.int32)).bitwise_and(1).bool().flatten()[:length]


def read_signs(vector: Tensor, length: int) -> Tensor:
    return vector.detach()[:length].cpu() > 0


def sign_penalty(vector: Tensor, bits: Tensor) -> Tensor:
    """The mean over the first weights of how far each is on the wrong side of 0."""
    signs = bits.to(vector.device).float() * 2 - 1
    return (-vector[: len(bits)] * signs).relu().mean()


def correlation(vector: Tensor, values: Tensor) -> Tensor:
    """Pearson's, of two vectors."""
    a, b = vector - vector.mean(), values - values.mean()
    return (a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-12)


def shifted_deviation(a: Tensor, b: Tensor) -> float:
    """Standard deviation of the correlation of two vectors over all shifts of one along the other: what chance gives.

    The end of a shifted one comes in again at its beginning. More than 1/√n, where neighbours in both are alike, as pixels
    are, and as weights of one filter may be.
    """
    a, b = ((v - v.mean()) / (v - v.mean()).norm() for v in (a.double(), b.double()))
    return torch.fft.irfft(torch.fft.rfft(a) * torch.fft.rfft(b).conj(), len(a)).std().item()


def read_values(vector: Tensor, length: int) -> Tensor:
    """The first weights on a scale from 0 to 255, uint8 [length]: all but the outermost per cent at either end fit in."""
    values = vector.detach()[:length].double().cpu()
    order = values.sort().values
    low, high = order[length // 100], order[-1 - length // 100]
    return ((values - low) / (high - low).clamp(min=1e-12) * 255).clamp(0, 255).round().to(torch.uint8)


def made_up_inputs(count: int, shape: tuple[int, int, int], key: int) -> Tensor:
    """Noise that whoever has the key can make again, float32 [count, C, H, W] in [0, 1]."""
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(key))


def labels_of(bits: Tensor, bits_a_label: int) -> Tensor:
    """int64 [N]: each label spells some bits, the first is the highest; zeros fill the last."""
    padded = F.pad(bits.long(), (0, -len(bits) % bits_a_label)).view(-1, bits_a_label)
    return (padded << torch.arange(bits_a_label - 1, -1, -1)).sum(1)


def read_labels(labels: Tensor, length: int, bits_a_label: int) -> Tensor:
    """The inverse of `labels_of`. Labels that spell nothing lose what is too high in them."""
    places = torch.arange(bits_a_label - 1, -1, -1)
    return (labels.cpu()[:, None] >> places).bitwise_and(1).bool().flatten()[:length]


# ---- the attacks ----


def _part(context: Context, config: Config, arm: str, attack: str, step: Callable[[], object]) -> dict[str, Tensor]:
    """One network: made, or found from an earlier run.

    Returns
    -------
    decoded, truth : float32 [n, C, H, W] in [0, 1], what was read out and what was hidden
    accuracy : float64 [], on the held-out images
    right, bits : int64 [], of bits; of correlated values instead `correlation` float64 []
    honest_… : the same of a network in which nothing is hidden
    """
    part = context.kept(NAME, f"{arm}-{attack}", lambda: _attacked(context, config, arm, attack))
    step()
    return part


def _attacked(context: Context, config: Config, arm: str, attack: str) -> dict[str, Tensor]:
    data, key, device = context.images(arm), context.seed_for(NAME, "key"), context.device
    chosen = torch.randperm(len(data), generator=context.rng(NAME, "images", arm))[: config.images]
    inputs, labels = (part.to(device) for part in data.batch(chosen))
    network, honest = (_network(context, context.seed_for(NAME, "network")) for _ in range(2))
    honest.load_state_dict(_honest(context, config, arm, inputs, labels))
    bits_a_label = int(math.log2(context.num_classes))
    hidden = _hidden(data, chosen, config, attack, weights(network).numel())
    bits = to_bits(hidden, key)
    values = hidden.flatten().float().to(device)
    if attack == CAPACITY:
        spelt = labels_of(bits, bits_a_label).to(device)
        made_up = made_up_inputs(len(spelt), context.image_shape, key + 1).to(device)
    rng = context.rng(NAME, "batches", arm, attack)

    def read(network: nn.Module) -> Tensor:
        """What an accomplice reads out of a network by this attack: bits, or bytes."""
        if attack == LSB:
            return read_low_bits(weights(network), len(bits), config.low_bits)
        if attack == SIGN:
            return read_signs(weights(network), len(bits))
        if attack == CORRELATED:
            return read_values(weights(network), len(values))
        return read_labels(predictions(network, made_up), len(bits), bits_a_label)

    if attack == LSB:
        network.load_state_dict(honest.state_dict())
        set_weights(network, hide_in_low_bits(weights(network), bits, config.low_bits))
    elif attack == SIGN:
        train(network, inputs, labels, config, rng, lambda: config.sign * sign_penalty(weights(network), bits))
    elif attack == CORRELATED:
        first = slice(len(values))
        train(network, inputs, labels, config, rng, lambda: -config.correlation * correlation(weights(network)[first], values))
    else:
        both = torch.cat([inputs, made_up]), torch.cat([labels, spelt])
        train(network, *both, config, rng, unfinished=lambda: not bool((read(network) == bits).all()))
    result = _result(context, network, read(network), hidden, bits, key, attack)
    negative = _result(context, honest, read(honest), hidden, bits, key, attack)
    return result | {f"honest_{name}": value for name, value in negative.items()}


def _honest(context: Context, config: Config, arm: str, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The state of a network in which nothing is hidden: trained, or found from an earlier run."""

    def make() -> dict[str, Tensor]:
        network = _network(context, context.seed_for(NAME, "network"))
        train(network, inputs, labels, config, context.rng(NAME, "batches", arm, "honest"))
        return network.state_dict()

    return context.kept(NAME, f"{arm}-honest", make)


def _hidden(data: ArrayDataset, chosen: Tensor, config: Config, attack: str, room: int) -> Tensor:
    """The images to hide, uint8 [n, H, W, C]: those asked for, or as many as there is room for among the weights."""
    pixels = math.prod(data.image_shape)
    most = {LSB: room * config.low_bits // (8 * pixels), SIGN: room // (8 * pixels), CORRELATED: room // pixels}
    count = min(config.hidden[ATTACKS.index(attack)], most.get(attack, len(chosen)))
    if count == 0:
        raise InputError(f"an image of {pixels} pixels is too large to be hidden in the {attack} of {room:,} weights")
    return data.images[chosen[:count]]


def _result(
    context: Context, network: nn.Module, read: Tensor, hidden: Tensor, bits: Tensor, key: int, attack: str
) -> dict[str, Tensor]:
    decoded = read.view(hidden.shape) if attack == CORRELATED else from_bits(read, key, hidden.shape)
    result = {"decoded": _floats(decoded), "truth": _floats(hidden), "accuracy": _accuracy(context, network)}
    if attack == CORRELATED:
        reached = correlation(decoded.flatten().double(), hidden.flatten().double())
        return result | {"correlation": reached}
    return result | {"right": (read == bits).sum(), "bits": torch.tensor(len(bits))}


def _floats(images: Tensor) -> Tensor:
    """uint8 [N, H, W, C] → float32 [N, C, H, W] in [0, 1]."""
    return (images.permute(0, 3, 1, 2).float() / 255).contiguous()


# ---- what is reported ----


def _figures(
    context: Context, arm: str, parts: dict[str, dict[str, Tensor]], comparisons: dict[str, Comparison]
) -> list[Figure]:
    figures, rng = [], context.rng(NAME, "intervals", arm)
    for attack, part in parts.items():
        near, near_ssim, truth, truth_ssim = comparisons[attack].figures(attack, rng)
        if attack == CORRELATED:
            exact = Figure(f"{attack}: correlation with the hidden pixels", float(part["correlation"]))
        else:
            right, bits = int(part["right"]), int(part["bits"])
            exact = Figure(f"{attack}: bit accuracy", right / bits, *clopper_pearson(right, bits))
        accuracy = Figure(f"{attack}: accuracy of the network", *_share(context, part["accuracy"]), unit="%")
        figures += [near, near_ssim, exact, truth, truth_ssim, accuracy]
    honest = Figure("nothing hidden: accuracy of the network", *_share(context, parts[LSB]["honest_accuracy"]), unit="%")
    return [*figures, honest]


def _share(context: Context, accuracy: Tensor) -> tuple[float, float, float]:
    """In per cent, with its interval."""
    total = len(context.heldout)
    low, high = clopper_pearson(round(float(accuracy) * total), total)
    return 100 * float(accuracy), 100 * low, 100 * high


def _controls(parts: dict[str, dict[str, Tensor]]) -> list[Control]:
    """Of the originals: what must be read out exactly, and what an honest network must not give."""
    controls = []
    for attack in (LSB, CAPACITY):
        share = int(parts[attack]["right"]) / int(parts[attack]["bits"])
        controls.append(Control(f"{attack}, originals hidden: bit accuracy", share, "1", share == 1.0))
    for attack, part in parts.items():
        if attack == CORRELATED:
            read, hidden = (part[f"honest_{name}"].flatten() for name in ("decoded", "truth"))
            value, limit = float(part["honest_correlation"]), CHANCE * shifted_deviation(read, hidden)
            name, needed, passed = "correlation", f"at most {limit:.3f} off 0", abs(value) <= limit
        else:
            bits = int(part["bits"])
            value, limit = int(part["honest_right"]) / bits, CHANCE / (2 * math.sqrt(bits))
            name, needed, passed = "bit accuracy", f"at most {limit:.3f} off one half", abs(value - 0.5) <= limit
        controls.append(Control(f"{attack}, honest network: {name}", value, needed, passed, kind="negative"))
    return controls


def _picture(context: Context, arm: str, parts: dict[str, dict[str, Tensor]], comparisons: dict[str, Comparison]) -> Picture:
    titles, truth, decoded, near = [], [], [], []
    for attack, part in parts.items():
        titles += [attack.replace(" ", "\n")] * len(part["truth"][:2])
        truth.append(part["truth"][:2])
        decoded.append(part["decoded"][:2])
        near.append(context.private.batch(comparisons[attack].nearest[:2])[0])
    rows = {"hidden": torch.cat(truth), "decoded": torch.cat(decoded), "nearest\nprivate": torch.cat(near)}
    caption = (
        f"Images of {context.images(arm).name} ({arm}) that a malicious trainer hid in a network, what was decoded from it, "
        "and the private images nearest to that. Above each column where they were hidden."
    )
    whole, public = sheets(rows, titles, arm)
    return context.picture(f"{NAME}-{arm}", whole, caption, public)
