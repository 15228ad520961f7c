"""Image quality: how much each synthetic image looks like the private image of its class that is nearest to it.

Ten metrics of the field (`similarity`), with held-out real images paired in the same way beside them, since two real images of
a class look alike, too; and FID and KID by the teacher's features, which compare whole sets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..datasets import ArrayDataset
from ..errors import InputError
from .context import ARMS, Context
from .features import features, frechet_distance, kernel_distance
from .findings import DIAGNOSTIC, LEAK, Control, Figure, Finding, Picture, Row
from .intervals import clearly_more, clopper_pearson, median_interval
from .nearest import nearest_of_class
from .plots import histograms, pairs
from .similarity import METRICS, compare, lpips, remarks

NAME, TITLE, NEEDS = "quality", "Image quality", {"heldout"}
HELDOUT = "held-out"
TAIL = 0.01  # of the held-out pairs: a pair is closer than real ones are if it is more alike than the rest of them
JUDGED = ("PSNR", "SSIM")  # both have to say so
SLIGHT = 0.01  # standard deviation of the positive control's noise, of pixels in [0, 1]


@dataclass(frozen=True)
class Config:
    """pairs : of each arm, drawn at random where there are more; features : images of each arm for FID and KID, at most"""

    pairs: int
    features: int


BUDGETS = {"quick": Config(400, 1000), "standard": Config(2000, 5000), "full": Config(20_000, 20_000)}


@dataclass(frozen=True)
class Pairs:
    """Images, the nearest private image of the class of each, and how alike they are.

    Attributes
    ----------
    images, private : uint8 [N, H, W, C]
    indices : int64 [N], of `private` in the private dataset
    values : metric → float64 [N]
    left_out : images whose class has no private image
    """

    images: Tensor
    private: Tensor
    indices: Tensor
    values: dict[str, Tensor]
    left_out: int


def run(context: Context, config: Config) -> Finding:
    paired = {arm: pair(context, _dataset(context, arm), config.pairs, arm) for arm in (*ARMS, HELDOUT)}
    for arm, some in paired.items():
        if not len(some.images):
            raise InputError(f"images are compared with private ones of their class, and there is none for any {arm} image")
    judge = Judge(paired[HELDOUT])
    controls = [*slight_noise(context, config, judge), uniform_noise(context, config, judge)]
    sets, sizes = _distances_of_sets(context, config)
    perceptual = {arm: lpips(some.images, some.private, device=context.device) for arm, some in paired.items()}
    leaks = clearly_more(*judge.share(paired["synthetic"]), *judge.share(paired[HELDOUT]))
    return Finding(
        NAME,
        TITLE,
        rows=[_row(arm, some, judge, sets.get(arm, []), perceptual[arm]) for arm, some in paired.items()],
        controls=controls,
        bounds=(
            "Whether synthetic images look like single private images, as the metrics of the field judge it: more than real "
            "images of the same class, which had no part in them, do anyhow."
        ),
        does_not_bound=(
            "Who was among the private images, or what an attacker makes of all synthetic images together. To be no "
            "closer than held-out images is necessary for privacy, and not sufficient."
        ),
        sentence=_sentence(paired, judge, leaks),
        outcome=LEAK if leaks else DIAGNOSTIC,
        pictures=_pictures(context, paired),
        notes=_notes(context, paired, sizes, perceptual),
    )


def pair(context: Context, data: ArrayDataset, count: int, name: str) -> Pairs:
    """At most `count` images of `data`, each with the private image of its class that is nearest by pixels, and compared."""
    if len(data) > count:
        data = data.subset(torch.randperm(len(data), generator=context.rng(NAME, name))[:count].sort().values)
    private = context.private
    _, indices = nearest_of_class(data.images, data.labels, private.images, private.labels, device=context.device)
    there = (indices >= 0).nonzero()[:, 0]
    images, indices = data.images[there], indices[there]
    partners = private.images[indices]
    with context.progress(f"{NAME}: {name}", len(images), "pair") as bar:
        values = compare(images, partners, device=context.device, step=bar.update)
    return Pairs(images, partners, indices, values, len(data) - len(there))


class Judge:
    """Tells which pairs are more alike than held-out images and their private neighbours are."""

    def __init__(self, heldout: Pairs):
        self.heldout = heldout
        self.thresholds = {m.name: _most_alike(heldout.values[m.name], m) for m in METRICS}

    def closer(self, pairs: Pairs) -> Tensor:
        """By PSNR and by SSIM more alike than all but the most alike 1 % of held-out pairs: bool [N]."""
        verdicts = [pairs.values[name] > self.thresholds[name] for name in JUDGED]
        return torch.stack(verdicts).all(0)

    def share(self, pairs: Pairs) -> tuple[int, int]:
        """(pairs that are closer, pairs)."""
        closer = self.closer(pairs)
        return int(closer.sum()), len(closer)


def slight_noise(context: Context, config: Config, judge: Judge) -> list[Control]:
    """The positive controls: private images with a little noise must find themselves, and be rated near-identical."""
    rng = context.rng(NAME, "slight")
    chosen = torch.randperm(len(context.private), generator=rng)[: config.pairs].sort().values
    own = context.private.subset(chosen)
    shaken = own.images.float() + torch.randn(own.images.shape, generator=rng) * (255 * SLIGHT)
    shaken = ArrayDataset(shaken.round().clamp(0, 255).to(torch.uint8), own.labels, own.class_names, name="slight noise")
    found = pair(context, shaken, config.pairs, "control")
    itself = 100 * float((found.private == own.images).flatten(1).all(1).double().mean())
    closer = 100 * float(judge.closer(found).double().mean())
    medians = {m: (_median(found.values[m.name]), _median(judge.heldout.values[m.name])) for m in METRICS}
    defined = {m: both for m, both in medians.items() if not any(map(math.isnan, both))}
    agree = sum(a > b if m.similar == "higher" else a < b for m, (a, b) in defined.items())
    name = f"private images with noise of {SLIGHT} in the place of the synthetic ones"
    return [
        Control(f"{name}: paired with themselves", itself, "at least 99 %", itself >= 99),
        Control(f"{name}: closer than real images are", closer, "at least 95 %", closer >= 95),
        Control(
            f"{name}: metrics that rate them closer than held-out images, by the median",
            agree,
            f"all {len(defined)} that are defined",
            agree == len(defined) > 0,
        ),
    ]


def uniform_noise(context: Context, config: Config, judge: Judge) -> Control:
    """The negative control: uniform noise resembles nothing."""
    count = min(config.pairs, 500)
    rng = context.rng(NAME, "uniform")
    images = torch.randint(0, 256, (count, *context.private.images.shape[1:]), dtype=torch.uint8, generator=rng)
    labels = context.private.labels[torch.randint(len(context.private), (count,), generator=rng)]
    found = pair(context, ArrayDataset(images, labels, context.private.class_names, name="noise"), count, "noise")
    closer, total = judge.share(found)
    return Control(
        "uniform noise in the place of the synthetic images: closer than real images are",
        100 * closer / total,
        "at most 1 %",
        closer <= TAIL * total,
        kind="negative",
    )


def _dataset(context: Context, arm: str) -> ArrayDataset:
    return context.heldout if arm == HELDOUT else context.images(arm)


def _distances_of_sets(context: Context, config: Config) -> tuple[dict[str, list[Figure]], int]:
    """FID and KID of as many images of each arm to the private ones, and how many; {} and 0 without a teacher."""
    count = min(config.features, *(len(_dataset(context, arm)) for arm in (*ARMS, HELDOUT)))
    if context.teacher is None or count < 2:
        return {}, 0
    whole = _features_of(context, "original", config.features)
    figures = {}
    for arm in (*ARMS, HELDOUT):
        some = _features_of(context, arm, count)
        figures[arm] = [
            Figure("FID, by the teacher's features", frechet_distance(some, whole)),
            Figure("KID, by the teacher's features", kernel_distance(some, whole)),
        ]
    return figures, count


def _features_of(context: Context, arm: str, count: int) -> Tensor:
    data = _dataset(context, arm)
    chosen = torch.randperm(len(data), generator=context.rng(NAME, "features", arm))[:count]
    return features(context.teacher, data.subset(chosen), context.device)


def _row(arm: str, some: Pairs, judge: Judge, sets: list[Figure], perceptual: Tensor | None) -> Row:
    figures = []
    for metric in METRICS:
        values = some.values[metric.name]
        low, high = median_interval(values[~values.isnan()])
        ends = (low, high) if np.isfinite([low, high]).all() else (None, None)
        figures.append(Figure(f"{metric.name}, median", _median(values), *ends, unit=metric.unit, better=metric.private))
        figures.append(
            Figure(f"{metric.name}, most alike 1 %", _most_alike(values, metric), unit=metric.unit, better=metric.private)
        )
    if perceptual is not None:
        figures.append(Figure("LPIPS, median", _median(perceptual), better="higher"))
    count, total = judge.share(some)
    ends = [100 * end for end in clopper_pearson(count, total)]
    figures.append(Figure("closer than real images are", 100 * count / total, *ends, unit="%", better="lower"))
    figures += sets
    if arm == HELDOUT:
        reading = "real images that had no part in it: the baseline"
    elif arm == "original":
        reading = "every image is paired with itself"
    elif clearly_more(count, total, *judge.share(judge.heldout)):
        reading = "more of them resemble a private image closely than held-out ones do"
    else:
        reading = "no more of them resemble a private image closely than held-out ones do"
    return Row(arm, figures, reading)


def _sentence(paired: dict[str, Pairs], judge: Judge, leaks: bool) -> str:
    (count, total), (theirs, others) = judge.share(paired["synthetic"]), judge.share(paired[HELDOUT])
    psnr = {arm: _median(paired[arm].values["PSNR"]) for arm in ("synthetic", HELDOUT)}
    return (
        f"{100 * count / total:.1f} % of the synthetic images look more like a private image than unused real images do, of "
        f"which {100 * theirs / others:.1f} % do: {'clearly more' if leaks else 'not clearly more'} (PSNR to the nearest "
        f"private image {psnr['synthetic']:.1f} dB, of unused real images {psnr[HELDOUT]:.1f} dB)."
    )


def _pictures(context: Context, paired: dict[str, Pairs]) -> list[Picture]:
    arms = ("synthetic", "noised", HELDOUT)
    panels = {
        metric.name + (f" ({metric.unit})" if metric.unit else ""): {arm: paired[arm].values[metric.name] for arm in arms}
        for metric in METRICS
    }
    rows = []
    for arm in ("synthetic", HELDOUT):
        order = paired[arm].values["SSIM"].argsort(descending=True)[:8]
        rows += [paired[arm].images[order], paired[arm].private[order]]
    return [
        context.picture(
            f"{NAME}-pairs",
            pairs(rows),
            "The pairs that are most alike, by SSIM. From above: synthetic images, the nearest private image of the class of "
            "each; held-out images, the nearest private image of the class of each.",
        ),
        context.plot(
            f"{NAME}-metrics",
            histograms(panels),
            "How much images look like the nearest private image of their class; the bars are the medians. Higher is more "
            "alike for PSNR, SSIM, MS-SSIM, UQI, VIF and SCC, lower for MSE, SAM, ERGAS and RASE.",
        ),
    ]


def _notes(context: Context, paired: dict[str, Pairs], sizes: int, perceptual: dict[str, Tensor | None]) -> list[str]:
    said = [
        "Each image is paired with the private image of its class that is nearest by pixels, and compared with that one alone.",
        "A pair is closer than real images are if both its PSNR and its SSIM are higher than those of all but the most alike "
        "1 % of held-out pairs. A leak is called where the 95 % interval of that share lies above that of held-out images.",
        *remarks(context.image_shape),
    ]
    fewer = [f"{len(some.images):,} of {len(_dataset(context, arm)):,} {arm}" for arm, some in paired.items()]
    said.append(f"Pairs compared, drawn at random: {', '.join(fewer)} images.")
    for arm, some in paired.items():
        if some.left_out:
            said.append(f"{some.left_out:,} {arm} images are of a class without private images, and were left out.")
        for metric in METRICS:
            undefined = int(some.values[metric.name].isnan().sum())
            if 0 < undefined and not (metric.name == "SAM" and context.image_shape[0] == 1):
                said.append(f"{metric.name} is undefined for {undefined:,} {arm} pairs, of black images, and left out there.")
    if sizes:
        said.append(
            f"FID and KID compare {sizes:,} images of each arm with the private ones, by the teacher's activations before its "
            "last layer; they cannot be compared with those of the Inception network. They depend on the number of images, "
            "the same here for all arms. KID may be a little below 0."
        )
    else:
        said.append("FID and KID need a teacher's features; none was given.")
    if perceptual["synthetic"] is None:
        said.append(
            "LPIPS is not there: its weights (AlexNet's, of torchvision) are not on this machine, and nothing is downloaded."
        )
    return said


def _median(values: Tensor) -> float:
    values = values[~values.isnan()]
    return float(np.median(values)) if len(values) else math.nan


def _most_alike(values: Tensor, metric) -> float:
    """The value that all but the most alike 1 % of pairs have, or less alike ones; nan where none is defined."""
    values = values[~values.isnan()]
    if not len(values):
        return math.nan
    higher = metric.similar == "higher"
    return float(np.quantile(values, 1 - TAIL if higher else TAIL, method="higher" if higher else "lower"))
