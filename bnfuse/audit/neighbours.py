"""Nearest neighbours: whether synthetic images are copies of private ones, or single one of them out.

For each image, the distance to the closest private record (DCR) and the ratio of the distances to the closest and to the next
(NNDR), by pixels and by the teacher's features. Held-out images are the baseline: a real image that was not used has
neighbours, too. An image like the mean of many is near to all of them, and its NNDR is near 1; a copy's is near 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..datasets import ArrayDataset
from ..errors import InputError
from .context import ARMS, Context
from .features import features
from .findings import DIAGNOSTIC, LEAK, Control, Figure, Finding, Picture, Row
from .intervals import bootstrap_ratio, clearly_more, clopper_pearson, median_interval
from .nearest import nearest
from .plots import histograms, pairs

NAME, TITLE, NEEDS = "neighbours", "Nearest neighbours", {"heldout"}
HELDOUT = "held-out"
PLANTED = 0.01  # of the synthetic images, in the positive control
TAIL = 0.01  # of the held-out images: an image is singled out if its NNDR is among theirs


@dataclass(frozen=True)
class Config:
    """images : of each arm, drawn at random where there are more; resamples : of the bootstrap"""

    images: int
    resamples: int = 1000


BUDGETS = {"quick": Config(1000, 500), "standard": Config(10_000), "full": Config(10**9)}


@dataclass(frozen=True)
class Neighbours:
    """The two nearest private images of each image of a set, in one space: distances and indices, [N, 2] each."""

    distances: Tensor
    indices: Tensor

    @property
    def closest(self) -> Tensor:
        """DCR, float64 [N]."""
        return self.distances[:, 0]

    @property
    def ratio(self) -> Tensor:
        """NNDR, float64 [N] in [0, 1]; 0 for the copy of an image that is there twice."""
        near, next_ = self.distances.unbind(1)
        return torch.where(next_ > 0, near / next_.clamp(min=torch.finfo(torch.float64).tiny), 0)

    def replaced(self, places: Tensor, other: Neighbours) -> Neighbours:
        """These, but those of `other` at `places`: each image's neighbours are its own affair."""
        put = lambda own, new: own.index_copy(0, places, new)  # noqa: E731
        return Neighbours(put(self.distances, other.distances), put(self.indices, other.indices))


class Search:
    """Finds neighbours among the private images, by pixels and, with a teacher, by its features."""

    def __init__(self, context: Context):
        self.context, self.private = context, context.private
        self.references = {"pixels": self.private.images}
        if context.teacher is not None:
            self.references["features"] = features(context.teacher, self.private, context.device)

    def __call__(self, data: ArrayDataset, name: str) -> dict[str, Neighbours]:
        """Space → the neighbours of every image of `data`."""
        found = {}
        for space, references in self.references.items():
            own = data.images if space == "pixels" else features(self.context.teacher, data, self.context.device)
            with self.context.progress(f"{NAME}: {name}, {space}", len(own) * len(references), "pair") as bar:
                found[space] = Neighbours(*nearest(own, references, 2, device=self.context.device, step=bar.update))
        return found


def run(context: Context, config: Config) -> Finding:
    if len(context.private) < 2:
        raise InputError("the ratio of the distances to the two closest private images needs two of them, got 1")
    search = Search(context)
    data = {arm: drawn(context, arm, config.images) for arm in (*ARMS, HELDOUT)}
    found = {arm: search(data[arm], arm) for arm in data}
    judge = Judge(found[HELDOUT])
    controls, picture = planted(context, search, judge, data["synthetic"], found["synthetic"])
    controls.append(noise(context, search, judge, len(data["synthetic"])))
    leaks = judge.leaks(found["synthetic"])
    return Finding(
        NAME,
        TITLE,
        rows=[_row(arm, found[arm], judge, context, config) for arm in data],
        controls=controls,
        bounds=(
            "Copies: whether a private image, or one that differs from it by a little noise, is among the synthetic ones, and "
            "whether synthetic images lie closer to single private ones than real images do that had no part in them."
        ),
        does_not_bound=(
            "Anything that is not seen as distance. What an image shows of a private one may survive in parts, blended with "
            "another (the mean of two private images is not found), or after a shift; and whose image was used can be told "
            "from images that are near to none. Distances alone clear nobody."
        ),
        sentence=_sentence(found, judge, leaks),
        outcome=LEAK if leaks else DIAGNOSTIC,
        pictures=[*_pictures(context, data, found), picture],
        notes=_notes(context, data, found),
    )


def drawn(context: Context, arm: str, count: int) -> ArrayDataset:
    """At most `count` images of an arm, or of the held-out ones: all, or as many at random, the same ones for every measure."""
    data = context.heldout if arm == HELDOUT else context.images(arm)
    if len(data) <= count:
        return data
    return data.subset(torch.randperm(len(data), generator=context.rng("drawn", arm))[:count].sort().values)


class Judge:
    """Holds a set of images against the held-out ones."""

    def __init__(self, heldout: dict[str, Neighbours]):
        self.heldout = heldout
        self.thresholds = {space: np.quantile(n.ratio, TAIL, method="lower") for space, n in heldout.items()}

    def singled_out(self, found: dict[str, Neighbours], space: str) -> Tensor:
        """Which images have an NNDR like that of the lowest 1 % of held-out ones, or lower: bool [N]."""
        return found[space].ratio <= self.thresholds[space]

    def share(self, found: dict[str, Neighbours], space: str) -> tuple[int, int]:
        """(images that single out a private one, images)."""
        singled = self.singled_out(found, space)
        return int(singled.sum()), len(singled)

    def leaks(self, found: dict[str, Neighbours]) -> bool:
        """Whether there are copies, or images that single out a private one, clearly more often than among held-out ones.

        One exact copy is enough where held-out images are none.
        """
        copied, theirs = copies(found), copies(self.heldout)
        if copied and (not theirs or clearly_more(copied, _size(found), theirs, _size(self.heldout))):
            return True
        return any(clearly_more(*self.share(found, s), *self.share(self.heldout, s)) for s in found)


def copies(found: dict[str, Neighbours]) -> int:
    """How many images are equal to a private one, pixel by pixel."""
    return int((found["pixels"].closest == 0).sum())


def _size(found: dict[str, Neighbours]) -> int:
    return len(found["pixels"].distances)


def planted(context: Context, search: Search, judge: Judge, synthetic: ArrayDataset, found: dict[str, Neighbours]):
    """The positive controls: 1 % of the synthetic images give way to private ones, as they are and with tiny noise.

    Returns
    -------
    (controls, picture of what was planted and what was found)
    """
    count = min(max(1, round(PLANTED * len(synthetic))), len(context.private), len(synthetic))
    rng = context.rng(NAME, "planted")
    places = torch.randperm(len(synthetic), generator=rng)[:count]
    sources = torch.randperm(len(context.private), generator=rng)[:count]
    exact = context.private.subset(sources)
    shaken = exact.images.float() + torch.randn(exact.images.shape, generator=rng) * 2
    noisy = ArrayDataset(shaken.round().clamp(0, 255).to(torch.uint8), exact.labels, exact.class_names, name="planted")
    controls, nearest_noisy = [], None
    for name, data in {"exact copies": exact, "copies with noise of 2/255": noisy}.items():
        replaced = {
            space: found[space].replaced(places, neighbours) for space, neighbours in search(data, f"planted {name}").items()
        }
        for space, neighbours in replaced.items():
            nearest_ = neighbours.indices[places, 0]
            hits = (context.private.images[nearest_] == exact.images).flatten(1).all(1)  # the source, or its equal
            hits &= judge.singled_out(replaced, space)[places]
            if data is exact and space == "pixels":
                hits &= neighbours.closest[places] == 0
            said = f"1 % of the synthetic images replaced by {name} of private ones, by {space}"
            controls.append(Control(said, int(hits.sum()), f"all {count} found", bool(hits.all())))
            if data is noisy and space == "pixels":
                nearest_noisy = context.private.images[nearest_]
    picture = context.picture(
        f"{NAME}-planted",
        pairs([noisy.images, nearest_noisy]),
        "The control. Above: private images with a little noise, hidden among the synthetic ones. Below: the private image "
        "that was found nearest to each.",
    )
    return controls, picture


def noise(context: Context, search: Search, judge: Judge, count: int) -> Control:
    """The negative control: uniform noise must not be called a leak."""
    count = min(count, 500)
    shape = (count, *context.private.images.shape[1:])
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=context.rng(NAME, "noise"))
    labels = torch.zeros(count, dtype=torch.int64)
    found = search(ArrayDataset(images, labels, context.private.class_names, name="noise"), "noise")
    return Control(
        "uniform noise in the place of the synthetic images: images that single out a private one, in any space",
        max(judge.share(found, space)[0] for space in found),
        f"not clearly more often than held-out images, of {count}",
        not judge.leaks(found),
        kind="negative",
    )


def _row(arm: str, found: dict[str, Neighbours], judge: Judge, context: Context, config: Config) -> Row:
    figures = [Figure("exact copies of private images", copies(found), unit="images", better="lower")]
    for space, neighbours in found.items():
        closest, theirs = neighbours.closest, judge.heldout[space].closest
        ratio = float(closest.median() / theirs.median())
        interval = bootstrap_ratio(closest, theirs, context.rng(NAME, arm, space), config.resamples) if arm != HELDOUT else None
        low, high = interval if interval and np.isfinite(interval).all() else (None, None)
        count, total = judge.share(found, space)
        ends = [100 * end for end in clopper_pearson(count, total)]
        figures += [
            Figure(f"{space}: distance to the closest record, ratio to held-out", ratio, low, high, better="higher"),
            Figure(f"{space}: distance to the closest record, median", _median(closest), *_ends(closest), better="higher"),
            Figure(f"{space}: distance to the closest record, lowest 1 %", _lowest(closest), better="higher"),
            Figure(f"{space}: NNDR, median", _median(neighbours.ratio), *_ends(neighbours.ratio), better="higher"),
            Figure(f"{space}: NNDR, lowest 1 %", _lowest(neighbours.ratio), better="higher"),
            Figure(f"{space}: images that single out a private one", 100 * count / total, *ends, unit="%", better="lower"),
        ]
    if arm == HELDOUT:
        reading = "real images that had no part in it: the baseline"
    elif arm == "original":
        reading = "every image is its own closest record"
    else:
        reading = _reading(found, judge)
    return Row(arm, figures, reading)


def _reading(found: dict[str, Neighbours], judge: Judge) -> str:
    if copied := copies(found):
        return f"{copied} are copies"
    singled = [space for space in found if clearly_more(*judge.share(found, space), *judge.share(judge.heldout, space))]
    if singled:
        return f"more of them single out a private image than held-out ones do, by {' and '.join(singled)}"
    return "no copies, and they single out private images no more often than held-out ones do"


def _sentence(found: dict[str, dict[str, Neighbours]], judge: Judge, leaks: bool) -> str:
    synthetic, heldout = found["synthetic"], found[HELDOUT]
    size, copied = _size(synthetic), copies(synthetic)
    shares = [100 * judge.share(which, space)[0] / _size(which) for space in synthetic for which in (synthetic, heldout)]
    by = " and ".join(
        f"{shares[2 * i]:.1f} % by {space} ({shares[2 * i + 1]:.1f} % of real images that were not used)"
        for i, space in enumerate(synthetic)
    )
    copied = (
        f"{copied:,} of {size:,} synthetic images are exact copies of a private one"
        if copied
        else (f"None of {size:,} synthetic images is a copy of a private one")
    )
    return f"{copied}; {by} lie conspicuously close to one private image{', which is clearly more' if leaks else ''}."


def _pictures(context: Context, data: dict[str, ArrayDataset], found: dict[str, dict[str, Neighbours]]) -> list[Picture]:
    names = {"closest": "distance to the closest record", "ratio": "NNDR"}
    panels = {
        f"{title}, by {space}": {arm: getattr(found[arm][space], field) for arm in ("synthetic", "noised", HELDOUT)}
        for field, title in names.items()
        for space in found[HELDOUT]
    }
    pictures = [
        context.plot(
            f"{NAME}-distances",
            histograms(panels),
            "How far images are from private ones; the bars are the medians. NNDR: a copy has 0, an image as near to one "
            "private image as to the next has 1.",
        )
    ]
    for space in found["synthetic"]:
        rows = []
        for arm in ("synthetic", HELDOUT):
            neighbours = found[arm][space]
            order = neighbours.ratio.argsort()[:8]
            rows += [data[arm].images[order], context.private.images[neighbours.indices[order, 0]]]
        pictures.append(
            context.picture(
                f"{NAME}-{space}",
                pairs(rows),
                f"The images that single out a private one most, by {space}. From above: synthetic images, the private image "
                "closest to each; held-out images, the private image closest to each.",
            )
        )
    return pictures


def _notes(context: Context, data: dict[str, ArrayDataset], found: dict[str, dict[str, Neighbours]]) -> list[str]:
    said = [
        "Distances are Euclidean, of pixels in [0, 1] and of the teacher's activations before its last layer; the eight "
        "closest candidates of each image are ranked again by exact differences. Neighbours may be of any class.",
        "An image singles out a private one if its NNDR is no higher than that of the lowest 1 % of held-out images. "
        "A leak is called for copies, or where that share's 95 % interval lies above that of held-out images.",
    ]
    if "features" not in found[HELDOUT]:
        said.append("No teacher was given, so images were compared by their pixels alone.")
    everything = {arm: context.heldout if arm == HELDOUT else context.images(arm) for arm in data}
    fewer = [f"{len(data[arm]):,} of {len(whole):,} {arm}" for arm, whole in everything.items() if len(data[arm]) < len(whole)]
    if fewer:
        said.append(f"Drawn at random within the budget: {', '.join(fewer)} images; all private images are searched.")
    return said


def _median(values: Tensor) -> float:
    return float(np.median(values))


def _lowest(values: Tensor) -> float:
    return float(np.quantile(values, TAIL, method="lower"))


def _ends(values: Tensor) -> tuple[float | None, float | None]:
    low, high = median_interval(values)
    return (low, high) if np.isfinite([low, high]).all() else (None, None)
