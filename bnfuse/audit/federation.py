"""Federated training with an adversary among the participants, who learns to generate a class he has no image of.

Hitaj, Ateniese and Perez-Cruz, "Deep models under the GAN" (arXiv 1702.07464). Participants train one network, each on images
of its own, and share its parameters. The adversary trains a generator until the shared network takes what it makes for the
class that only the others hold, and in his turn trains the network to call these images by a class of his own: so they have to
teach it what sets theirs apart. Whether that was any use is for `gan` to judge.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..datasets import ArrayDataset
from ..errors import InputError
from .context import Context

_WIDEST = 256  # channels


@dataclass(frozen=True)
class Federation:
    """How participants train together, and the adversary among them his generator.

    Attributes
    ----------
    rounds : in each every participant trains once
    waits : rounds before the adversary begins, as the paper has it: a network that knows nothing has nothing to teach
    steps : of the generator in a round
    images : that a participant trains on in a round, at most
    fakes : of the adversary's, that are generated; fewer than `images`
    participants : 2 or more, one of them the adversary
    sharing : "in turn", each goes on where the one before stopped, as in the paper; "averaging", all begin with the same
        parameters, and go on with the mean of what they end with
    channels : of the first convolution of the shared network
    generator_channels : of the generator's last convolution but one
    batch_size, lr, generator_lr : with Adam
    """

    rounds: int
    steps: int
    waits: int = 0
    images: int = 256
    fakes: int = 32
    participants: int = 2
    sharing: Literal["in turn", "averaging"] = "in turn"
    channels: int = 32
    generator_channels: int = 32
    batch_size: int = 64
    lr: float = 1e-3
    generator_lr: float = 1e-3

    def __post_init__(self):
        if self.participants < 2:
            raise InputError(f"participants must be 2 or more, an adversary and a victim, got {self.participants}")
        if not self.waits < self.rounds:
            raise InputError(f"waits must be fewer than the {self.rounds} rounds, or no attack begins, got {self.waits}")


# ---- networks ----


class Network(nn.Sequential):
    """What is shared: convolutions without batch normalisation, of stride 2 until at most 4 pixels a side are left."""

    def __init__(self, image_shape: tuple[int, int, int], outputs: int, channels: int):
        last, *size = image_shape
        layers, stride, width = [], 2 if min(size) > 16 else 1, channels
        while not layers or max(size) > 4:
            layers += [nn.Conv2d(last, width, 3, stride, padding=1), nn.LeakyReLU(0.2)]
            size = [math.ceil(side / stride) for side in size]
            last, width, stride = width, min(2 * width, _WIDEST), 2
        super().__init__(
            *layers, nn.Flatten(), nn.Linear(last * math.prod(size), 128), nn.LeakyReLU(0.2), nn.Linear(128, outputs)
        )


class Generator(nn.Sequential):
    """Noise [N, 32] → images [N, C, H, W] in [0, 1], enlarged twofold from at most 4 pixels a side."""

    inputs = 32

    def __init__(self, image_shape: tuple[int, int, int], channels: int):
        out, *self.size = image_shape
        stages = max(1, math.ceil(math.log2(max(self.size) / 4)))
        small = [math.ceil(side / 2**stages) for side in self.size]
        widths = [min(channels * 2**stage, _WIDEST) for stage in range(stages, -1, -1)]
        layers = [nn.Linear(self.inputs, widths[0] * math.prod(small)), nn.Unflatten(1, (widths[0], *small))]
        layers += [nn.BatchNorm2d(widths[0]), nn.ReLU()]
        for width, narrower in pairwise(widths):
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, narrower, 3, padding=1)]
            layers += [nn.BatchNorm2d(narrower), nn.ReLU()]
        super().__init__(*layers, nn.Conv2d(channels, out, 3, padding=1), nn.Sigmoid())

    def forward(self, noise: Tensor) -> Tensor:
        height, width = self.size
        return super().forward(noise)[..., :height, :width]


def random_weights(context: Context, make: Callable[[], nn.Module], *words: int | str) -> nn.Module:
    """A network with the random weights that `words` name, on the device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed_for(*words))
        return make().to(context.device)


def untrained_generator(context: Context, config: Federation) -> Generator:
    make = lambda: Generator(context.image_shape, config.generator_channels)
    return random_weights(context, make, "federation", "generator")


# ---- participants ----


class Participant:
    """Trains the shared network on images of its own, float32 [N, C, H, W] and int64 [N], and keeps its optimizer's moments."""

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor, config: Federation, rng: torch.Generator):
        self.network, self.images, self.labels, self.config, self.rng = network, images, labels, config, rng
        self.optimizer = torch.optim.Adam(network.parameters(), config.lr)

    def take_part(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """A round: the shared parameters come in, those after the participant's training go out."""
        self.network.load_state_dict(parameters)
        images, labels = self.batch()
        for part in self.order(len(images)).split(self.config.batch_size):
            loss = F.cross_entropy(self.network(images[part]), labels[part])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return self.network.state_dict()

    def batch(self) -> tuple[Tensor, Tensor]:
        """What this round trains on."""
        return self.draw(self.config.images)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        chosen = self.order(len(self.images))[:count]
        return self.images[chosen], self.labels[chosen]

    def order(self, length: int) -> Tensor:
        return torch.randperm(length, generator=self.rng).to(self.images.device)


class Adversary(Participant):
    """One that learns to generate the class `target`, and gives what it generates the label `fake`."""

    def __init__(self, *arguments, generator: Generator, target: int, fake: int):
        super().__init__(*arguments)
        self.generator, self.target, self.fake, self.waits = generator, target, fake, self.config.waits
        self.generator_optimizer = torch.optim.Adam(generator.parameters(), self.config.generator_lr, betas=(0.5, 0.999))

    def batch(self) -> tuple[Tensor, Tensor]:
        """Teaches the generator to please the shared network, then mixes what it generates into images of his own."""
        if self.waits > 0:
            self.waits -= 1
            return super().batch()
        size = self.config.batch_size
        wanted = torch.full((size,), self.target, device=self.images.device)
        for _ in range(self.config.steps):
            loss = F.cross_entropy(self.network(self.generator(self.noise(size))), wanted)
            slopes = torch.autograd.grad(loss, tuple(self.generator.parameters()))
            for parameter, slope in zip(self.generator.parameters(), slopes):
                parameter.grad = slope
            self.generator_optimizer.step()
        images, labels = self.draw(self.config.images - self.config.fakes)
        fakes = self.generate(self.config.fakes)
        return torch.cat([images, fakes]), torch.cat([labels, labels.new_full((len(fakes),), self.fake)])

    @torch.no_grad()
    def generate(self, count: int) -> Tensor:
        """float32 [count, C, H, W] in [0, 1]"""
        return self.generator(self.noise(count))

    def noise(self, count: int) -> Tensor:
        return torch.randn(count, Generator.inputs, generator=self.rng).to(self.images.device)


def attack(
    context: Context,
    config: Federation,
    data: ArrayDataset,
    target: int,
    count: int,
    *words: int | str,
    step: Callable[[], object] = lambda: None,
) -> Tensor:
    """What the adversary generates of the class `target` after the last round: float32 [count, C, H, W] in [0, 1], on the CPU.

    data : that is dealt out to the participants, see `deal`; all labels below `context.num_classes`
    words : name the federation, see `Context.seed_for`
    step : called after every round
    """
    fake, rng = context.num_classes, context.rng("federation", *words)

    def network() -> Network:
        return random_weights(context, lambda: Network(context.image_shape, fake + 1, config.channels), "federation", "network")

    generator = untrained_generator(context, config)
    shares = [
        [part.to(context.device) for part in data.batch(indices)] for indices in deal(data, target, config.participants, rng)
    ]
    victims = [Participant(network(), *share, config, rng) for share in shares[1:]]
    adversary = Adversary(network(), *shares[0], config, rng, generator=generator, target=target, fake=fake)
    shared = network().state_dict()
    for _ in range(config.rounds):
        if config.sharing == "averaging":
            ended = [one.take_part(shared) for one in (*victims, adversary)]
            shared = {name: torch.stack([parameters[name] for parameters in ended]).mean(0) for name in shared}
        else:
            for one in (*victims, adversary):
                shared = one.take_part(shared)
        step()
    return adversary.generate(count).cpu().contiguous()


def deal(data: ArrayDataset, target: int, participants: int, rng: torch.Generator) -> list[Tensor]:
    """Which images each participant has, int64 [n] each; the first is the adversary.

    He has half of the classes, and not the target; the others share the images of the rest. InputError where one would have
    none.
    """
    classes = data.labels.unique()
    others = classes[classes != target]
    others = others[torch.randperm(len(others), generator=rng)]
    his = torch.isin(data.labels, others[: math.ceil(len(others) / 2)])
    rest = (~his).nonzero().flatten()
    shares = [his.nonzero().flatten(), *rest[torch.randperm(len(rest), generator=rng)].tensor_split(participants - 1)]
    if not all(len(share) for share in shares):
        raise InputError(
            f"{data.name} is to be dealt out to {participants} participants, of whom the adversary gets no image of the class "
            f"{data.class_names[target]!r}: expected 2 classes or more, and an image for each participant"
        )
    return shares
