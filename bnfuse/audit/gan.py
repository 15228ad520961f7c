"""The GAN-based attack (Hitaj, Ateniese and Perez-Cruz 2017): can a participant of federated training learn another's class?

The training, and the adversary in it, are in `federation`. Whether he learnt the class is said here by a judge, a network that
has had nothing to do with the federation; and whether he learnt more than the class, an image of it, by distances.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from ..datasets import ArrayDataset
from ..errors import InputError
from ..models import Teacher, load_teacher
from ..training import TrainConfig, train
from .context import ARMS, Context
from .federation import Federation, Generator, attack, untrained_generator
from .findings import DIAGNOSTIC, LEAK, NO_LEAK, Control, Figure, Finding, Picture, Row
from .intervals import bootstrap, clopper_pearson
from .nearest import nearest_of_class
from .recovery import GAIN, LEVEL, bytes_of, median, sheets
from .similarity import METRICS, compare

NAME, TITLE, NEEDS = "gan", "GAN-based attack", {"heldout"}
RECOGNISED, CHANCE = 0.9, 0.2  # probabilities of the class: on originals at least, on noise at most
PERMUTATIONS = 999  # of the test that generated images are nearer to private ones than to held-out ones
JUDGED = "the judge's probability of the class"
NEAREST = "PSNR to the nearest private image of the class"
_COMPARED = 1000  # images of a class and of a kind, at most, that are exchanged in that test
_SHOWN, _COLUMNS = 4, 8  # classes and images of each in a picture
_SSIM = [metric for metric in METRICS if metric.name == "SSIM"]


@dataclass(frozen=True)
class Config:
    """How much is tried.

    Attributes
    ----------
    targets : classes attacked, at most; a federation each
    federation : how it trains
    judge, judge_images : how the judge is trained, and on how many private images at most; None, all
    generated : images that are judged, of each class attacked
    heldout : real images beside them, of each class attacked, at most
    """

    targets: int
    federation: Federation
    judge: TrainConfig
    judge_images: int | None = None
    generated: int = 200
    heldout: int = 1000


BUDGETS = {
    "quick": Config(
        targets=1,
        federation=Federation(rounds=30, steps=4),
        judge=TrainConfig(model="resnet8", epochs=15, batch_size=64, noise=0.1),
    ),
    "standard": Config(
        targets=3,
        federation=Federation(rounds=200, steps=4, waits=100, images=512, fakes=64, generator_channels=16),
        judge=TrainConfig(model="resnet8", epochs=15, batch_size=128, noise=0.05, flip=True, shift=2),
        judge_images=10_000,
    ),
    "full": Config(
        targets=10,
        federation=Federation(rounds=1000, steps=10, waits=200, images=512, fakes=64, participants=5),
        judge=TrainConfig(model="resnet20", epochs=30, batch_size=128, noise=0.05, flip=True, shift=4),
    ),
}


def run(context: Context, config: Config) -> Finding:
    targets = _targets(context, config)
    rounds = config.federation.rounds
    with context.progress(TITLE, len(ARMS) * len(targets) * rounds, "round") as bar:
        judge, parts = trained_judge(context, config), {}
        for arm, target in product(ARMS, targets):
            make = partial(_attacked, context, config, arm, target, bar.update)
            parts[arm, target] = context.kept(NAME, f"{arm}-{target}", make)["images"]
            bar.update(len(parts) * rounds - bar.n)  # those of an earlier run
    labels = torch.tensor(targets).repeat_interleave(config.generated)
    generated = {arm: torch.cat([parts[arm, target] for target in targets]) for arm in ARMS}
    seen = {arm: examined(context, judge, generated[arm], labels) for arm in ARMS}
    real = examined(context, judge, *_drawn(context, context.heldout, targets, config, "held-out"))
    certain, right = competence(judge, context)
    least = needed(certain)
    rows, outcomes = [], {}
    for arm in ARMS:
        trained_on = examined(context, judge, *_drawn(context, context.images(arm), targets, config, arm))
        gain, p = nearer(context, generated[arm], labels, arm)
        outcomes[arm], near = conclude(seen[arm], trained_on, p)
        reading = f"{_learnt(seen[arm], least)}; {near}"
        rows.append(Row(arm, _figures(context, arm, seen[arm], trained_on, gain, p), reading))
    baseline = seen_figures(real, context.rng(NAME, "intervals"))
    rows.append(Row("held-out", baseline, "real images of the class, which nobody trained on"))
    return Finding(
        NAME,
        TITLE,
        rows,
        _controls(context, config, judge, targets, seen["original"], least),
        bounds=BOUNDS,
        does_not_bound=DOES_NOT_BOUND,
        sentence=_sentence(outcomes["synthetic"], seen["synthetic"], least),
        outcome=outcomes["synthetic"],
        pictures=[_picture(context, arm, targets, parts, seen[arm]) for arm in ARMS],
        notes=_notes(context, config, judge, targets, certain, right),
    )


def _attacked(context: Context, config: Config, arm: str, target: int, step: Callable[[], object]) -> dict[str, Tensor]:
    return {"images": attack(context, config.federation, context.images(arm), target, config.generated, arm, target, step=step)}


# ---- the judge ----


def noise_images(count: int, shape: tuple[int, int, int], rng: torch.Generator) -> Tensor:
    """Uniform noise of pixels, or of patches up to the whole image, of any contrast: uint8 [count, H, W, C]."""
    channels, *size = shape
    images = torch.empty(count, channels, *size)
    patches = 2 ** torch.randint(math.ceil(math.log2(max(size))) + 1, (count,), generator=rng)  # a side
    for i, side in enumerate(patches.tolist()):
        images[i] = F.interpolate(torch.rand(1, channels, side, side, generator=rng), size)[0]
    low, high = torch.rand(2, count, 1, 1, 1, generator=rng).sort(0).values
    return bytes_of(low + (high - low) * images)


def trained_judge(context: Context, config: Config) -> Teacher:
    """A network that knows the classes from private images, and noise as one more. Found again where it is there."""
    folder = context.scratch(NAME) / "judge"
    if not (folder / "model.safetensors").exists():
        private, rng = context.private, context.rng(NAME, "judge")
        chosen = torch.randperm(len(private), generator=rng)[: config.judge_images]
        noise = noise_images(max(1, 2 * len(chosen) // private.num_classes), context.image_shape, rng)
        data = ArrayDataset(
            torch.cat([private.images[chosen], noise]),
            torch.cat([private.labels[chosen], torch.full((len(noise),), private.num_classes)]),
            [*private.class_names, "noise"],
            name=f"{private.name} and noise",
        )
        judge = replace(config.judge, seed=context.seed_for(NAME, "judge"))
        train(data, judge, progress=False, out=folder, device=context.device)
    judge = load_teacher(folder / "model.safetensors")
    judge.model.to(context.device)
    return judge


@torch.no_grad()
def probabilities(judge: Teacher, images: Tensor, device: torch.device) -> Tensor:
    """float32 [N, C, H, W] in [0, 1] → float64 [N, K + 1], on the CPU."""
    parts = [judge.model(judge.preprocessing.normalize(part.to(device))) for part in images.split(512)]
    return torch.cat(parts).double().softmax(1).cpu()


def competence(judge: Teacher, context: Context) -> tuple[float, float]:
    """On all held-out images: the mean probability that the judge gives to their class, and the share that it gets right."""
    heldout, found = context.heldout, []
    for indices in torch.arange(len(heldout)).split(512):
        images, labels = heldout.batch(indices)
        said = probabilities(judge, images, context.device)
        found.append(torch.stack([said.gather(1, labels[:, None]).flatten(), (said.argmax(1) == labels).double()]))
    certain, right = torch.cat(found, 1).mean(1).tolist()
    return certain, right


# ---- what was learnt ----


@dataclass(frozen=True)
class Examined:
    """Images that are to be of the classes `labels`, int64 [N], as the judge and the private images have it; float64 [N] each.

    Attributes
    ----------
    probability : of the class, by the judge
    recognised : whether the judge takes an image for the class, bool [N]
    psnr, ssim : to the nearest private image of the class, in pixels; inf and 1 where it is one
    nearest : which that is, int64 [N]
    """

    labels: Tensor
    probability: Tensor
    recognised: Tensor
    psnr: Tensor
    ssim: Tensor
    nearest: Tensor


def examined(context: Context, judge: Teacher, images: Tensor, labels: Tensor) -> Examined:
    """`images` are float32 [N, C, H, W] in [0, 1]."""
    said = probabilities(judge, images, context.device)
    queries, private = images.permute(0, 2, 3, 1).contiguous(), context.private
    distances, nearest = nearest_of_class(queries, labels, private.images, private.labels, device=context.device)
    return Examined(
        labels=labels,
        probability=said.gather(1, labels[:, None]).flatten(),
        recognised=said.argmax(1) == labels,
        psnr=_decibels(distances.square() / queries[0].numel()),
        ssim=compare(bytes_of(images), private.images[nearest], _SSIM)["SSIM"],
        nearest=nearest,
    )


def nearer(context: Context, generated: Tensor, labels: Tensor, *words: str) -> tuple[float, float]:
    """By how many dB generated images are nearer to private images of their class than to as many held-out ones, and p.

    If nothing but the class was learnt, private and held-out images might as well be exchanged, so they are, at random: p is
    the share of exchanges after which the mean is as high. That generated images are alike, or blurred, does not matter.
    """
    rng, found, exchanged = context.rng(NAME, "nearer", *words), 0.0, torch.zeros(PERMUTATIONS, dtype=torch.float64)
    for label in labels.unique():
        real = [data.images[data.labels == label] for data in (context.private, context.heldout)]
        count = min(_COMPARED, *map(len, real))
        both = torch.cat([images[torch.randperm(len(images), generator=rng)[:count]] for images in real])  # [2n, H, W, C]
        own = generated[labels == label][:_COMPARED].permute(0, 2, 3, 1)
        distances = torch.cdist(
            own.flatten(1).double(), both.flatten(1).double() / 255, compute_mode="donot_use_mm_for_euclid_dist"
        )
        near = _decibels((distances.square() / own[0].numel()).clamp(min=1e-12))  # [G, 2n], finite
        found += float(_gain(near, torch.arange(2 * count)))
        orders = (torch.randperm(2 * count, generator=rng) for _ in range(PERMUTATIONS))
        exchanged += torch.stack([_gain(near, order) for order in orders])
    p = (1 + int((exchanged >= found).sum())) / (1 + PERMUTATIONS)
    return found / len(labels.unique()), p


def _gain(near: Tensor, order: Tensor) -> Tensor:
    """How much nearer, in dB, the images of the first half of `order` are than those of the second; near is PSNR [G, 2n]."""
    first, second = order.chunk(2)
    return (near[:, first].amax(1) - near[:, second].amax(1)).mean()


def conclude(generated: Examined, trained_on: Examined, p: float) -> tuple[str, str]:
    """The outcome for an arm, and how its distances read.

    A leak is what is nearer to private images than to held-out ones, by `nearer`, and nearer than what was published by
    `GAIN`: only the former is the published images' doing.
    """
    if p >= LEVEL:
        return NO_LEAK, "no nearer to private images than to held-out ones"
    if float(generated.psnr.median() - trained_on.psnr.median()) > GAIN:
        return LEAK, "nearer to private images than to held-out ones, and than what was trained on"
    return DIAGNOSTIC, "nearer to private images than to held-out ones, but no nearer than what was trained on"


def needed(certain: float) -> float:
    """The judge's probability from which a class counts as learnt, by what it gives to real images' classes on average.

    `RECOGNISED`, or what real images get, if that is less, as of photographs; but no less than one half.
    """
    return min(RECOGNISED, max(0.5, certain))


def _learnt(generated: Examined, least: float) -> str:
    reached = float(generated.probability.mean())
    if reached >= least:
        return "the class is learnt"
    return "the class is learnt in part" if reached > CHANCE else "the class is not learnt"


def _decibels(mse: Tensor) -> Tensor:
    """PSNR of pixels in [0, 1]; what lies within a rounding error of an image counts as equal to it, at inf."""
    return torch.where(mse < 1e-12, torch.inf, -10 * mse.log10())


def _targets(context: Context, config: Config) -> list[int]:
    """The classes to attack, drawn from those that every dataset has images of. InputError where there is none."""
    labels = [data.labels for data in (*map(context.images, ARMS), context.heldout)]
    there = [k for k in range(context.num_classes) if all(bool((some == k).any()) for some in labels)]
    if not there:
        raise InputError("a class is needed of which there are private, synthetic and held-out images, there is none")
    drawn = torch.randperm(len(there), generator=context.rng(NAME, "targets"))[: config.targets]
    return sorted(there[i] for i in drawn.tolist())


def _drawn(context: Context, data: ArrayDataset, targets: list[int], config: Config, word: str) -> tuple[Tensor, Tensor]:
    """At most `config.heldout` images of each class attacked, float32 [N, C, H, W], and their labels."""
    rng, chosen = context.rng(NAME, "drawn", word), []
    for target in targets:
        own = (data.labels == target).nonzero().flatten()
        chosen.append(own[torch.randperm(len(own), generator=rng)[: config.heldout]])
    return data.batch(torch.cat(chosen))


# ---- what is reported ----

BOUNDS = (
    "What a participant of federated training finds out about a class that only the others have images of: what it looks "
    "like, rather than one image. With synthetic images that is what the published ones show to everybody. So this attack "
    "strikes whoever trains on the synthetic images in the place of private ones, and the question is whether it gets any "
    "nearer to the private ones."
)
DOES_NOT_BOUND = (
    "What the synthetic images themselves give away: membership inference and tracing ask for that. That a class of synthetic "
    "images is learnt is no leak; that nothing else is learnt is no proof that the synthetic images are private. An adversary "
    "who takes part for longer, or has a better generator, learns more."
)


def seen_figures(seen: Examined, rng: torch.Generator) -> list[Figure]:
    """The judge's probability first; what a baseline has, too."""
    low, high = bootstrap(seen.probability, rng)
    share, total = int(seen.recognised.sum()), len(seen.recognised)
    ends = (100 * end for end in clopper_pearson(share, total))
    return [
        Figure(JUDGED, float(seen.probability.mean()), low, high, better="lower"),
        Figure("taken for the class by the judge", 100 * share / total, *ends, unit="%", better="lower"),
        median(NEAREST, seen.psnr, rng, unit="dB", better="lower"),
        median("SSIM to the nearest private image of the class", seen.ssim, rng, better="lower"),
    ]


def _figures(context: Context, arm: str, seen: Examined, trained_on: Examined, gain: float, p: float) -> list[Figure]:
    rng = context.rng(NAME, "intervals", arm)
    figures = [
        *seen_figures(seen, rng),
        Figure("nearer to private images of the class than to as many held-out ones by", gain, unit="dB", better="lower"),
        Figure("p of that, were it chance", p, better="higher"),
        Figure(f"the images trained on: {JUDGED}", float(trained_on.probability.mean())),
        median(f"the images trained on: {NEAREST}", trained_on.psnr, rng, unit="dB", better="lower"),
    ]
    labels = seen.labels.unique().tolist()
    if len(labels) > 1:
        for label in labels:
            name = f"{context.private.class_names[label]}: {JUDGED}"
            figures.append(Figure(name, float(seen.probability[seen.labels == label].mean()), better="lower"))
    return figures


def _controls(
    context: Context, config: Config, judge: Teacher, targets: list[int], original: Examined, least: float
) -> list[Control]:
    reached = float(original.probability.mean())
    name = f"generated from training on originals: {JUDGED}"
    controls = [Control(name, reached, f"at least {least:.3g}", reached >= least)]
    rng = context.rng(NAME, "negative")
    untrained = untrained_generator(context, config.federation)
    with torch.no_grad():
        made_up = untrained(torch.randn(config.generated, Generator.inputs, generator=rng).to(context.device))
    noise = torch.rand(config.generated, *context.image_shape, generator=rng)
    for name, images in {"noise": noise, "a generator before its training": made_up}.items():
        value = float(probabilities(judge, images, context.device)[:, targets].mean(0).max())
        most = f"at most {CHANCE:g}"
        controls.append(Control(f"{name}: {JUDGED}", value, most, value <= CHANCE, kind="negative"))
    return controls


def _sentence(outcome: str, synthetic: Examined, least: float) -> str:
    reached = float(synthetic.probability.mean())
    learnt = {
        "the class is learnt": "learns what a class of them looks like, which they show to everybody anyway",
        "the class is learnt in part": "learns in part what a class of them looks like, which they show to everybody anyway",
        "the class is not learnt": "does not even learn what a class of them looks like",
    }[_learnt(synthetic, least)]
    near = {
        NO_LEAK: "What he makes is no nearer to private images than to other real images.",
        DIAGNOSTIC: "What he makes is nearer to private images than to other real ones, but no nearer than what was published.",
        LEAK: "What he makes is nearer to private images than to other real ones, and than what was published.",
    }[outcome]
    return f"Somebody who takes part in federated training on the synthetic images {learnt} (the judge: {reached:.2f}). {near}"


def _notes(context: Context, config: Config, judge: Teacher, targets: list[int], certain: float, right: float) -> list[str]:
    names = context.private.class_names
    federation = config.federation
    how = "go on in turn where the one before stopped" if federation.sharing == "in turn" else "average their parameters"
    return [
        f"Classes attacked: {', '.join(names[target] for target in targets)}. {federation.participants} participants {how}, "
        f"for {federation.rounds} rounds; the adversary has half of the other classes, the victims have all the rest.",
        f"The judge is a {judge.architecture} trained on private images and, as one more class, on noise; it is right on "
        f"{100 * right:.1f} % of the held-out images, and gives their class a probability of {certain:.3f} on average.",
        "Intervals are over the images of the generators of this run; another run's generators would differ by more.",
        f"Nearer to private than to held-out images means: by a test of {PERMUTATIONS} exchanges of the two, at "
        f"{100 * LEVEL:g} %. A leak is that, and nearer by {GAIN:g} dB than the synthetic images are.",
    ]


def _picture(context: Context, arm: str, targets: list[int], parts: dict[tuple[str, int], Tensor], seen: Examined) -> Picture:
    """Some images that were generated of each class, real ones beside them, and the nearest; of a few classes."""
    data, rows = context.images(arm), {}
    for target in targets[:_SHOWN]:
        name = context.private.class_names[target]
        own = (data.labels == target).nonzero().flatten()[:_COLUMNS]
        rows[f"{name}:\ntrained on"] = data.batch(own)[0]
        rows[f"{name}:\ngenerated"] = parts[arm, target][:_COLUMNS]
        rows[f"{name}: nearest\nprivate"] = context.private.batch(seen.nearest[seen.labels == target][:_COLUMNS])[0]
    caption = (
        f"Federated training on {data.name} ({arm}): images of a class that only the victims have, what the adversary's "
        "generator made of it, and the private images of the class that are nearest to that."
    )
    whole, public = sheets(rows, [""] * _COLUMNS, arm)
    return context.picture(f"{NAME}-{arm}", whole, caption, public)
