"""Tracing: can whoever has class statistics and the teacher tell whether an image is among those that they were taken of?

A class's statistics are the mean of what its images have: at every BatchNorm input each image's own mean and second moment. An
image that is in that mean has pulled it a little its way. So score each image by the inner product of its own deviation and the
class's, both from the mean of other images of the class and whitened by their covariance (Homer et al. 2008; Dwork et al.,
"Robust traceability from trace amounts", 2015). What an attack on students finds is in `membership`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure as Plot
from sklearn.covariance import ledoit_wolf_shrinkage
from torch import Tensor
from torch.utils.data import DataLoader

from ..batches import Source
from ..datasets import ArrayDataset, class_counts
from ..errors import InputError
from ..models import Teacher
from ..sites import Site, call_name, observe, select
from ..statistics import ClassStatistics, record
from .context import ARMS, Context
from .findings import LEAK, NO_LEAK, Control, Figure, Finding, Row
from .scores import COLOURS, Scores, roc_plot

NAME, TITLE = "tracing", "Tracing in the statistics"
NEEDS = {"heldout", "teacher", "statistics"}
NEEDED = 0.8  # AUC of the positive control
STRICT = 0.999  # confidence of the interval that decides the negative control: with 0.95 one in twenty would fail for nothing


@dataclass(frozen=True)
class Config:
    """How much is tried.

    Attributes
    ----------
    images : at most so many private and so many held-out images are traced; None, all
    folds : the held-out images are dealt to so many parts; those of one part are traced with the others as reference
    few : images of each class in the positive control
    counts : further numbers of images of each class that tracing is tried on, for the picture
    """

    images: int | None
    folds: int = 5
    few: int = 10
    counts: tuple[int, ...] = (5, 20, 40, 80, 160, 320, 640)


BUDGETS = {"quick": Config(images=2000), "standard": Config(images=5000), "full": Config(images=10000)}

_BOUNDS = (
    "What somebody learns about who was in the data, who has the teacher and the class statistics (column: originals), or the "
    "teacher and the published images, whose statistics he records himself (columns: synthetic, noised), and other real images "
    "of the kind. It is the strongest test that is linear in the moments which the synthetic images are made from."
)
_DOES_NOT_BOUND = (
    "Attacks that are not linear in the moments, or that know more of the data than other images like them. The teacher was "
    "trained on the private images, and an image that it knows may differ from one that it does not: an attacker who has the "
    "teacher profits from that, too, and these figures do not tell the two apart."
)


def run(context: Context, config: Config) -> Finding:
    private = _some(context.private, config.images, context.rng(NAME, "private"))
    heldout = _some(context.heldout, config.images, context.rng(NAME, "heldout"))
    _check_classes(private, heldout)
    teacher, device = context.teacher, context.device
    with context.progress(NAME, 3 + 2, "pass") as bar:
        rules = context.statistics.rules
        members, others = (image_moments(teacher, data, device, rules) for data in (private, heldout))
        bar.update(2)
        statistics = {"original": context.statistics}
        for arm in ("synthetic", "noised"):
            statistics[arm] = _recorded(teacher, context.images(arm), rules)
            bar.update()
        scores = {arm: _trace(context, config, statistics[arm], members, others) for arm in ARMS}
        controls, few, curve = _controls(context, config, private, members, others)
        bar.update()
    traced = {arm: scores[arm].auc_interval(context.rng(NAME, "auc", arm))[0] > 0.5 for arm in ARMS}
    rows = [
        Row(arm, _figures(context, scores[arm], arm), "members are traced" if traced[arm] else "no better than chance")
        for arm in ARMS
    ]
    lines = {**scores, f"{config.few} images a class": few}
    notes = [note] if (note := scores["original"].unresolved()) is not None else []
    most, (auc, low, high) = list(curve.items())[-1]
    notes.append(
        f"In statistics of {most:,} private images a class these are told from other private ones, which the teacher knows "
        f"as well, with an AUC of {auc:.3f} ({low:.3f} to {high:.3f}): so much comes from the statistics, and not the teacher."
    )
    what = "class" if context.statistics.row_classes is None else "sub-class"
    notes.append(
        f"{len(private):,} private images are traced against {len(heldout):,} held-out ones. The statistics are of "
        f"{_range(context.statistics.images)} images a {what}. Mean and covariance of each class are those of the other "
        "held-out images, so that no image is compared with itself."
    )
    return Finding(
        NAME,
        TITLE,
        rows,
        controls,
        bounds=_BOUNDS,
        does_not_bound=_DOES_NOT_BOUND,
        sentence=_sentence(scores, traced),
        outcome=LEAK if traced["original"] or traced["synthetic"] else NO_LEAK,
        pictures=[
            context.plot(
                f"{NAME}-roc",
                roc_plot({"Tracing": lines}),
                "ROC curves on logarithmic axes: of images that are not in the statistics, how many are taken for such that "
                "are (across), and of those that are, how many are found (up). On the grey diagonal tracing knows nothing.",
            ),
            context.plot(
                f"{NAME}-images-a-class",
                _curve_plot(curve, scores["original"].auc()),
                "How well an image is traced in statistics of so many images of each class, chosen from the private ones and "
                "told from private ones that were not chosen; bars are 95 % intervals. At 0.5 tracing knows nothing.",
            ),
        ],
        notes=notes,
    )


# ---- moments ----


@dataclass(frozen=True)
class ImageMoments:
    """Every site's mean and mean square of each image by itself: float64 [N, T] each, and its label, int64 [N]."""

    mean: Tensor
    square: Tensor
    labels: Tensor

    def part(self, index: Tensor) -> ImageMoments:
        return ImageMoments(self.mean[index], self.square[index], self.labels[index])

    def about(self, centre: Tensor) -> Tensor:
        """Means and second moments about `centre` [T]: float64 [N, 2T]. A class's row is the mean of its images' rows."""
        return torch.cat([self.mean - centre, self.square - 2 * centre * self.mean + centre.square()], dim=1)


@torch.no_grad()
def image_moments(teacher: Teacher, data: ArrayDataset, device: torch.device, rules: Sequence[str] = ("bn",)) -> ImageMoments:
    """The moments of each image at the teacher's sites that the rules name, in the order of the statistics of these sites."""
    sites: dict[str, list[tuple[Tensor, Tensor]]] = {}
    ran: set[str] = set()

    def keep(site: Site, x: Tensor) -> None:
        key = call_name(site.name, ran)
        ran.add(key)
        x = x.double().flatten(2) if x.dim() > 2 else x.double()[:, :, None]  # [N, C, P]
        sites.setdefault(key, []).append((x.mean(2).cpu(), x.square().mean(2).cpu()))

    observation = observe(teacher.model, select(teacher.model, rules), keep)
    try:
        for _, images in Source(data, teacher.preprocessing, device).batches(list(torch.arange(len(data)).split(256))):
            ran.clear()
            teacher.model(teacher.preprocessing.normalize(images))
    finally:
        observation.remove()
    mean, square = (torch.cat([torch.cat([part[i] for part in parts]) for parts in sites.values()], dim=1) for i in (0, 1))
    return ImageMoments(mean, square, data.labels)


def _class_moments(statistics: ClassStatistics) -> ImageMoments:
    """The same of each class, a row a class or sub-class."""
    mean, var = statistics.moments()
    of = range(statistics.num_classes) if statistics.row_classes is None else statistics.row_classes
    return ImageMoments(mean, var + mean.square(), torch.tensor([*of]))


def _recorded(teacher: Teacher, data: ArrayDataset, rules: Sequence[str]) -> ClassStatistics:
    options = dict(sites=rules, preprocessing=teacher.preprocessing, allow_few_images=True)
    return record(teacher.model, DataLoader(data, batch_size=256), data.num_classes, **options)


# ---- the attack ----


class Reference:
    """Images of the kind that are not in the statistics: each class's mean, and the covariance within classes.

    The covariance is shrunk to its diagonal as Ledoit and Wolf (2004) have it, since there are more moments than images.
    """

    def __init__(self, moments: ImageMoments, num_classes: int):
        self.centre = moments.mean.mean(0)  # [T]
        rows = moments.about(self.centre)  # [N, 2T]
        counts = torch.bincount(moments.labels, minlength=num_classes)
        self.means = torch.zeros(num_classes, rows.shape[1], dtype=torch.float64).index_add_(0, moments.labels, rows)
        self.means /= counts.clamp(min=1)[:, None]  # [K, 2T]
        deviations = rows - self.means[moments.labels]
        freedom = max(1, len(rows) - int((counts > 0).sum()))
        variance = deviations.square().sum(0) / freedom
        self.scale = variance.clamp(min=1e-12 * float(variance.max()) + 1e-300).rsqrt()  # [2T]
        scaled = deviations * self.scale
        self.shrinkage = min(1.0, max(1e-3, float(ledoit_wolf_shrinkage(scaled.numpy(), assume_centered=True))))
        _, singular, self.directions = torch.linalg.svd(scaled, full_matrices=False)  # [R, 2T]
        eigenvalues = (1 - self.shrinkage) * singular.square() / freedom + self.shrinkage  # [R]; the rest are `shrinkage`
        self.correction = eigenvalues.reciprocal() - 1 / self.shrinkage

    def scores(self, images: ImageMoments, classes: ImageMoments) -> Tensor:
        """float64 [N]: (image − mean)ᵀ covariance⁻¹ (class − mean), each image against its own class; of sub-classes, which
        nobody has told of an image, against that of its class which suits it best."""
        image = (images.about(self.centre) - self.means[images.labels]) * self.scale  # [N, 2T]
        of_class = (classes.about(self.centre) - self.means[classes.labels]) * self.scale  # [rows, 2T]
        whitened = of_class / self.shrinkage + ((of_class @ self.directions.T) * self.correction) @ self.directions
        scores = torch.full((len(image),), -torch.inf, dtype=torch.float64)
        for rows in _one_of_each(classes.labels):  # [K]: of every class its first row, then its second …
            scores = torch.maximum(scores, (image * whitened[rows[images.labels]]).sum(1))
        return scores


def _trace(
    context: Context, config: Config, statistics: ClassStatistics, members: ImageMoments, others: ImageMoments
) -> Scores:
    """Scores of all members and others; each of the others is judged by a reference that it is not part of.

    Members are dealt to the same references, as the others are, so that both are judged alike.
    """
    classes = _class_moments(statistics)
    folds = min(config.folds, int(torch.bincount(others.labels)[members.labels.unique()].min()))
    fold_of = {
        name: _dealt(of.labels, folds, context.rng(NAME, "folds", name))
        for name, of in (("members", members), ("others", others))
    }
    found = {"members": torch.zeros(len(members.labels)).double(), "others": torch.zeros(len(others.labels)).double()}
    for fold in range(folds):
        reference = Reference(others.part(fold_of["others"] != fold), context.num_classes)
        for name, of in (("members", members), ("others", others)):
            mine = fold_of[name] == fold
            found[name][mine] = reference.scores(of.part(mine), classes)
    return Scores(found["members"], found["others"])


def _one_of_each(labels: Tensor) -> list[Tensor]:
    """Rows of every class, int64 [K], so often that each row was among them; labels are the rows' classes, ascending."""
    counts = torch.bincount(labels)
    first = counts.cumsum(0) - counts
    return [first + torch.minimum(torch.tensor(turn), counts - 1) for turn in range(int(counts.max()))]


def _dealt(labels: Tensor, folds: int, rng: torch.Generator) -> Tensor:
    """A fold for each image, int64 [N]: at random, and as many of each class in each."""
    dealt = torch.empty(len(labels), dtype=torch.int64)
    for k in labels.unique():
        of_class = (labels == k).nonzero().flatten()
        dealt[of_class[torch.randperm(len(of_class), generator=rng)]] = torch.arange(len(of_class)) % folds
    return dealt


# ---- controls ----


def _controls(
    context: Context, config: Config, private: ArrayDataset, members: ImageMoments, others: ImageMoments
) -> tuple[list[Control], Scores, dict[int, tuple[float, float, float]]]:
    """The controls, the scores of the positive one, and its AUC with its interval by images of each class.

    Some private images of each class are recorded, and told from private images that are not among them: the teacher knows
    both. All held-out images are the reference.
    """
    reference = Reference(others, context.num_classes)
    rank = _dealt(private.labels, len(private), context.rng(NAME, "few"))  # of each image within its class, at random
    smallest = int(class_counts(private)[private.labels.unique()].min())
    curve = {}
    for count in sorted({*(n for n in config.counts if 2 * n < smallest), config.few, max(1, smallest // 2)}):
        chosen = rank < count
        statistics = _recorded(context.teacher, private.subset(chosen.nonzero().flatten()), context.statistics.rules)
        found = reference.scores(members, _class_moments(statistics))
        if not chosen.all():
            scores = Scores(found[chosen], found[~chosen])
            curve[count] = (scores.auc(), *scores.auc_interval(context.rng(NAME, "curve", count)))
            if count == config.few:
                few = scores
    if config.few not in curve:
        raise InputError(
            f"the positive control needs more than {config.few} private images of some class, and the classes have "
            f"{_range(class_counts(private))}"
        )
    auc = curve[config.few][0]
    order = torch.randperm(len(few.others), generator=context.rng(NAME, "negative"))
    halves = Scores(few.others[order[::2]], few.others[order[1::2]])
    low, high = halves.auc_interval(context.rng(NAME, "negative auc"), STRICT, resamples=4000)
    return (
        [
            Control(f"statistics of {config.few} images a class: AUC of tracing", auc, f"at least {NEEDED}", auc >= NEEDED),
            Control(
                "images that are not among them, against others that are not: AUC",
                halves.auc(),
                f"0.5 within the {100 * STRICT:g} % interval, {low:.3f} to {high:.3f}",
                low <= 0.5 <= high,
                kind="negative",
            ),
        ],
        few,
        curve,
    )


# ---- words and pictures ----


def _figures(context: Context, scores: Scores, arm: str) -> list[Figure]:
    *rates, auc = scores.figures(context.rng(NAME, "auc", arm))
    return [auc, *rates]


def _sentence(scores: dict[str, Scores], traced: dict[str, bool]) -> str:
    often = {arm: f"{100 * scores[arm].auc():.0f} times in 100" for arm in scores}
    said = f"a private image looks more like one of theirs than a stranger does {often['original']} (50 is chance)"
    statistics = f"The recorded statistics {'tell' if traced['original'] else 'do not tell'} whose image was in them: {said}"
    if traced["synthetic"]:
        return f"{statistics}; the synthetic images, seen through the teacher, still tell it, {often['synthetic']}."
    return f"{statistics}; the synthetic images, seen through the teacher, do not: {often['synthetic']}."


def _curve_plot(curve: dict[int, tuple[float, float, float]], whole: float) -> Plot:
    plot = Plot(figsize=(5, 3.4), layout="constrained")
    axes = plot.subplots()
    values, lows, highs = (torch.tensor([curve[count][i] for count in curve]) for i in range(3))
    bars = torch.stack([(values - lows).clamp(min=0), (highs - values).clamp(min=0)]).numpy()
    axes.errorbar(
        list(curve),
        values.numpy(),
        yerr=bars,
        marker="o",
        capsize=3,
        color=COLOURS["original"],
        label="statistics of some private images",
    )
    axes.axhline(whole, color=COLOURS["synthetic"], linestyle="--", label="the recorded statistics, held-out strangers")
    axes.axhline(0.5, color="#bbbbbb", label="chance")
    axes.set_xscale("log")
    axes.set_xticks(list(curve), [str(count) for count in curve])
    axes.minorticks_off()
    axes.set(xlabel="images of each class in the statistics", ylabel="AUC of tracing", ylim=(0.45, 1.02))
    axes.legend(fontsize=8)
    return plot


def _some(data: ArrayDataset, count: int | None, rng: torch.Generator) -> ArrayDataset:
    """At most `count` images, drawn at random, in the dataset's order."""
    return data.subset(torch.randperm(len(data), generator=rng)[:count].sort().values)


def _check_classes(private: ArrayDataset, heldout: ArrayDataset) -> None:
    """InputError where a private class has no reference."""
    there, few = class_counts(private) > 0, class_counts(heldout) < 2
    if (missing := (there & few).nonzero().flatten().tolist()) != []:
        names = ", ".join(private.class_names[k] for k in missing[:10])
        raise InputError(
            f"tracing compares with held-out images of each class, at least 2; {heldout.name} has fewer of {names}"
        )


def _range(counts: Tensor) -> str:
    low, high = int(counts.min()), int(counts.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
