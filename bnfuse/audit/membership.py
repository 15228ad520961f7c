"""Membership inference: can whoever has the published images tell whose image was among the private ones?

Three tiers, each stronger and dearer than the one before. Students trained on an arm's images are attacked by their loss, with
and without references (tier 1); the pipeline is rerun once on private images with canaries among them (tier 2, `canaries`);
it is rerun several times on random halves of them, each rerun attacked with the help of the others (tier 3, `shadows`). Scores
become rates in `scores`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure as Plot
from torch import Tensor

from ..datasets import ArrayDataset
from ..errors import InputError
from ..plans import SynthesisConfig
from ..training import TrainConfig, TrainResult
from .canaries import Canaries, Guesses, epsilon_lower_bound, guess
from .context import ARMS, Context
from .findings import LEAK, NO_LEAK, Control, Figure, Finding, Picture, Row
from .intervals import CONFIDENCE, clopper_pearson
from .pipeline import Pipeline, confidence, learn, student
from .scores import COLOURS, Scores, roc_plot
from .shadows import halves, offline

NAME, TITLE = "membership", "Membership inference"
NEEDS = {"heldout"}
_CALIBRATED = "calibrated loss"  # the headline's attack, in words
STRICT = 0.999  # confidence of the intervals that decide negative controls: with 0.95 one in twenty would fail for nothing


@dataclass(frozen=True)
class Config:
    """How much is tried.

    Attributes
    ----------
    student : how the students of tier 1 and the references are trained
    images : at most so many private images for a student of tier 1, and held-out ones for a reference; None, all
    overfitted, overfitted_images : the positive control's network, and how many private images it learns
    canaries, canary_images : how many canaries, and how many private images besides; no canaries, no tier 2
    shadows, shadow_images : how many reruns, each on half of so many private images; no shadows, no tier 3
    pipeline : what is rerun in tiers 2 and 3
    """

    student: TrainConfig
    images: int | None
    overfitted: TrainConfig
    overfitted_images: int
    canaries: int
    canary_images: int
    shadows: int
    shadow_images: int
    pipeline: Pipeline


def _pipeline(epochs: int, images_per_class: int, iterations: int) -> Pipeline:
    training = TrainConfig(model="resnet8", epochs=epochs, batch_size=32, shift=0)
    synthesis = SynthesisConfig(images_per_class=images_per_class, batch_size=100, class_plan="balanced", iterations=iterations)
    return Pipeline(teacher=training, synthesis=synthesis, student=training)


_OVERFITTED = TrainConfig(model="resnet8", epochs=30, batch_size=32, shift=0, weight_decay=0.0)
BUDGETS = {
    "quick": Config(
        student=TrainConfig(model="resnet8", epochs=15, batch_size=64, shift=0),
        images=400,
        overfitted=_OVERFITTED,
        overfitted_images=150,
        canaries=64,
        canary_images=200,
        shadows=0,
        shadow_images=0,
        pipeline=_pipeline(epochs=25, images_per_class=10, iterations=100),
    ),
    "standard": Config(
        student=TrainConfig(model="resnet8", epochs=30, batch_size=64, shift=1),
        images=2000,
        overfitted=_OVERFITTED,
        overfitted_images=500,
        canaries=100,
        canary_images=500,
        shadows=4,
        shadow_images=800,
        pipeline=_pipeline(epochs=40, images_per_class=20, iterations=200),
    ),
    "full": Config(
        student=TrainConfig(model="resnet20", epochs=60, batch_size=128, shift=1),
        images=None,
        overfitted=_OVERFITTED,
        overfitted_images=1000,
        canaries=1000,
        canary_images=10000,
        shadows=16,
        shadow_images=10000,
        pipeline=_pipeline(epochs=60, images_per_class=100, iterations=1000),
    ),
}


@dataclass
class _Result:
    """What all tiers found, arm by arm; `notes` are sentences for the report."""

    loss: dict[str, Scores] = field(default_factory=dict)
    calibrated: dict[str, Scores] = field(default_factory=dict)
    guesses: dict[str, Guesses] = field(default_factory=dict)
    shadows: dict[str, dict[str, Scores]] = field(default_factory=dict)
    controls: list[Control] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    comparable: bool = True  # whether private and held-out images are alike to networks that have seen neither


_BOUNDS = (
    "What somebody learns about who was among the private images, who has the published images, trains a network on them, and "
    "has other real images of the kind. The canaries and the shadows go through the whole pipeline, so they count whatever the "
    "statistics and the teacher put into the images."
)
_DOES_NOT_BOUND = (
    "Somebody who has the teacher or the statistics (see Tracing), or a stronger attack than these. The canaries and the "
    "shadows speak of reruns with fewer images and smaller networks than the published images were made with, not of these "
    "themselves. A lower bound on ε is no upper bound: 0 promises nothing."
)
_INTERVALS = (
    "Intervals and bounds are of 95 %, each by itself: one in twenty lies off chance by luck. The verdict allows for that: an "
    "attack counts as successful where its AUC is above 0.5, its TPR at 1 % FPR above what chance gives or its ε above 0 with "
    "95 % confidence for all of an arm's together."
)


def run(context: Context, config: Config) -> Finding:
    if context.num_classes < 2:
        raise InputError("membership is told by how well images are classified, and there is one class: expected two or more")
    result = _Result()
    trainings = 3 + 2 + 3 + 3 * bool(config.canaries) + 3 * config.shadows
    with context.progress(TITLE.lower(), trainings, "network") as bar:
        parts = _Parts(context, bar.update)
        control = _overfitted(context, config, parts, result)
        members = _chosen(context.private, config.images, context.rng(NAME, "members"))
        canaries = Canaries.draw(context, min(config.canaries, len(context.private) // 3)) if config.canaries else None
        known = {"members": context.private.subset(members), "others": context.heldout}
        more = {} if canaries is None else {"canaries": canaries.dataset(context)}
        half = torch.randperm(len(context.heldout), generator=context.rng(NAME, "reference")) % 2  # [N]: 0 or 1
        references = _references(context, config, parts, half, **known, **more)
        _students(context, config, parts, result, members, known, _unseen(context, references, half))
        if canaries is not None:
            reference = (references[0]["canaries"] + references[1]["canaries"]) / 2
            _canaries(context, config, parts, result, canaries, reference)
        if config.shadows:
            _shadows(context, config, parts, result)
        else:
            result.notes.append("Shadow pipelines, the strongest attack here, were not tried at this budget.")
    panels = {"Loss, calibrated": {**result.calibrated, "overfitted network": control}}
    if result.shadows:
        panels["Shadow pipelines (LiRA)"] = {arm: scores["LiRA"] for arm, scores in result.shadows.items()}
    caption = (
        "ROC curves on logarithmic axes: of those who are not members, how many are taken for members (across), and of the "
        "members, how many are found (up). On the grey diagonal an attack knows nothing; what counts is the left end."
    )
    result.pictures.insert(0, context.plot(f"{NAME}-roc", roc_plot(panels), caption))
    return _finding(context, result)


class _Parts:
    """Networks, each trained once: what is kept of one are its confidences, in a file of its own, for a rerun to find."""

    def __init__(self, context: Context, done: Callable[[], None]):
        self.context, self.done = context, done

    def confidences(self, name: str, make: Callable[[Path], TrainResult], **asked: ArrayDataset) -> dict[str, Tensor]:
        """float64 [N] for each dataset asked about; `make(folder)` trains the network, with a folder for temporary files."""

        def learnt() -> dict[str, Tensor]:
            trained = make(self.context.scratch(NAME))
            return {key: confidence(trained, data, self.context.device) for key, data in asked.items()}

        found = self.context.kept(NAME, name, learnt)
        self.done()
        return found


# ---- tier 1: the published images ----


def _students(
    context: Context,
    config: Config,
    parts: _Parts,
    result: _Result,
    members: Tensor,
    known: dict[str, ArrayDataset],
    reference: Scores,
) -> None:
    """Attacks a student of each arm's images: members are the private images, others the held-out ones."""
    for arm in ARMS:
        data = context.synthetic if arm == "synthetic" else context.images(arm).subset(members)
        found = parts.confidences(
            f"student-{arm}", lambda _, data=data, arm=arm: learn(context, data, config.student, NAME, arm), **known
        )
        result.loss[arm] = Scores(found["members"], found["others"])
        result.calibrated[arm] = Scores(found["members"] - reference.members, found["others"] - reference.others)
    name = "networks that have seen neither, on private against held-out images"
    result.comparable = _negative(context, result, name, reference, "neither")
    others = result.calibrated["synthetic"].others
    order = torch.randperm(len(others), generator=context.rng(NAME, "halves"))
    if len(others) > 1:
        half = Scores(others[order[::2]], others[order[1::2]])
        _negative(context, result, "held-out images against held-out images", half, "halves")
    if (note := reference.unresolved()) is not None:
        result.notes.append(note)
    if config.images is not None and config.images < len(context.private):
        result.notes.append(
            f"Loss attack: of the {len(context.private):,} private images {len(members):,}, drawn at random, are the members, "
            "and what the students of the original and the noised images learn."
        )


def _references(
    context: Context, config: Config, parts: _Parts, half: Tensor, **asked: ArrayDataset
) -> list[dict[str, Tensor]]:
    """The confidences of two networks, which have learnt held-out images of one half each, and no private one."""
    found = []
    for i in range(2):
        data = context.heldout.subset((half == i).nonzero().flatten()[: config.images])

        def make(_, data=data, i=i) -> TrainResult:
            return learn(context, data, config.student, NAME, "reference", i)

        found.append(parts.confidences(f"reference-{i}", make, **asked))
    return found


def _unseen(context: Context, references: list[dict[str, Tensor]], half: Tensor) -> Scores:
    """Each image's confidence in one of the two references that has not seen it.

    A held-out image is asked of the one that it was not given to, a private one of either, by the toss of a coin: so both
    kinds are treated alike.
    """
    coin = torch.randint(2, (len(references[0]["members"]),), generator=context.rng(NAME, "coin"))
    return Scores(
        torch.where(coin == 0, references[0]["members"], references[1]["members"]),
        torch.where(half == 1, references[0]["others"], references[1]["others"]),
    )


def _overfitted(context: Context, config: Config, parts: _Parts, result: _Result) -> Scores:
    """The positive control: a network that has overfitted some of the originals, told from other private images."""
    count = min(config.overfitted_images, len(context.private) // 5)
    order = torch.randperm(len(context.private), generator=context.rng(NAME, "overfitted"))
    learnt, rest = [order[i * count : (i + 1) * count] for i in range(3)], order[3 * count :]
    members, others = context.private.subset(learnt[0]), context.private.subset(rest[: 10 * count])
    found = []
    for i in range(3):  # the network, and two references that have seen neither members nor others
        data = context.private.subset(learnt[i])
        found.append(
            parts.confidences(
                f"overfitted-{i}",
                lambda _, data=data, i=i: learn(context, data, config.overfitted, NAME, "overfitted", i),
                members=members,
                others=others,
            )
        )
    target, first, second = found
    scores = Scores(*(target[key] - (first[key] + second[key]) / 2 for key in ("members", "others")))
    rate = scores.tpr(0.01)
    needed = f"{count} originals, overfitted: TPR at 1 % FPR"
    if rate is None:
        result.controls.append(Control(needed, float("nan"), "at least 100 images to tell it by", False))
    else:
        result.controls.append(
            Control(
                f"{needed} (interval {100 * rate.low:.1f} % to {100 * rate.high:.1f} %)",
                100 * rate.value,
                f"an interval above {100 * rate.chance:.1f} %, the most that chance gives",
                rate.above_chance,
            )
        )
    return scores


def _negative(context: Context, result: _Result, name: str, scores: Scores, word: str) -> bool:
    low, high = scores.auc_interval(context.rng(NAME, "negative", word), STRICT, resamples=4000)
    needed = f"0.5 within the {100 * STRICT:g} % interval, {low:.3f} to {high:.3f}"
    passed = low <= 0.5 <= high
    result.controls.append(Control(f"{name}: AUC", scores.auc(), needed, passed, kind="negative"))
    return passed


def _chosen(data: ArrayDataset, count: int | None, rng: torch.Generator) -> Tensor:
    """At most `count` images, drawn at random, in the dataset's order: int64."""
    return torch.randperm(len(data), generator=rng)[:count].sort().values


# ---- tier 2: canaries ----


def _canaries(context: Context, config: Config, parts: _Parts, result: _Result, canaries: Canaries, reference: Tensor) -> None:
    """Reruns the pipeline with canaries among the private images, once for each arm, and guesses which were in.

    reference : float64 [m], how sure of the canaries' labels networks are that have not seen them
    """
    private, asked, count = context.private, canaries.dataset(context), len(canaries.images)
    base = canaries.rest[: config.canary_images]
    images = torch.cat([base, canaries.images[canaries.included]])
    labels = torch.cat([private.labels[base], canaries.labels[canaries.included]])
    scores = {}
    for arm in ARMS:
        found = parts.confidences(
            f"canaries-{arm}",
            lambda folder, arm=arm: student(context, arm, images, labels, config.pipeline, folder, NAME, "canaries", arm),
            canaries=asked,
        )
        scores[arm] = found["canaries"] - reference
        result.guesses[arm] = guess(scores[arm], canaries.included)
    told, inside = result.guesses["original"], int(canaries.included.sum())
    name = f"{inside} of {count} mislabelled originals learnt: ε lower bound"
    result.controls.append(Control(name, told.epsilon, "above 0", told.epsilon > 0))
    most = epsilon_lower_bound(told.made, told.made)
    result.notes.append(
        f"Canaries: {count} private images got a wrong label, a coin put {inside} of them among {len(base):,} other private "
        "images, and the whole pipeline was rerun on these; the score is the confidence in the wrong label, less that of "
        f"networks that never saw it. With {told.made} guesses the bound is at most {most:.2f}, whatever leaks."
    )
    result.pictures.append(context.plot(f"{NAME}-canaries", _canary_plot(scores, canaries), _CANARY_CAPTION))


_CANARY_CAPTION = (
    "Each canary's score, for each arm: filled marks were among the data, hollow ones were left out. Where the two kinds mix, "
    "the published images do not tell which canaries were in."
)


def _canary_plot(scores: dict[str, Tensor], canaries: Canaries) -> Plot:
    plot = Plot(figsize=(7, 2.8), layout="constrained")
    axes = plot.subplots()
    included = canaries.included.numpy()
    rng = np.random.default_rng(0)
    for row, (arm, values) in enumerate(scores.items()):
        heights = row + rng.uniform(-0.25, 0.25, len(values))
        for kind, fill in ((included, COLOURS[arm]), (~included, "none")):
            axes.scatter(values.numpy()[kind], heights[kind], s=22, facecolors=fill, edgecolors=COLOURS[arm], linewidths=1)
    axes.set_yticks(range(len(scores)), list(scores))
    axes.invert_yaxis()
    axes.set_xlabel("confidence in the wrong label, less that of networks that never saw it")
    return plot


# ---- tier 3: shadow pipelines ----


def _shadows(context: Context, config: Config, parts: _Parts, result: _Result) -> None:
    """Reruns the pipeline on random halves of private images, and attacks each rerun with the help of the others."""
    pool = _chosen(context.private, config.shadow_images, context.rng(NAME, "pool"))
    asked = context.private.subset(pool)
    inside = halves(asked.labels, config.shadows, context.rng(NAME, "inside"))
    for arm in ARMS:
        found = []
        for i in range(config.shadows):
            mine = pool[inside[i]]

            def make(folder: Path, arm=arm, i=i, mine=mine) -> TrainResult:
                labels = context.private.labels[mine]
                return student(context, arm, mine, labels, config.pipeline, folder, NAME, "shadow", arm, i)

            found.append(parts.confidences(f"shadow-{arm}-{i}", make, pool=asked)["pool"])
        result.shadows[arm] = offline(torch.stack(found), inside)
    told = result.shadows["original"]["LiRA"]
    low, _ = told.auc_interval(_auc_rng(context, "original", "LiRA"))
    result.controls.append(
        Control("reruns that publish the originals: AUC of LiRA", told.auc(), "an interval above 0.5", low > 0.5)
    )
    result.notes.append(
        f"Shadows: {config.shadows} reruns of the pipeline on random halves of {len(pool):,} private images, each attacked "
        "with the help of the others; images of all reruns are counted together."
    )


# ---- what it comes to ----


def _attacks(result: _Result, arm: str) -> dict[str, Scores]:
    """Every attack that yields a score for each image, the strongest first, by the name that it has in the report."""
    shadows = {f"{name}, shadows": scores for name, scores in result.shadows.get(arm, {}).items()}
    return shadows | {"": result.calibrated[arm], "loss alone": result.loss[arm]}


def _auc_rng(context: Context, arm: str, attack: str) -> torch.Generator:
    return context.rng(NAME, "auc", arm, attack)


def _figures(context: Context, result: _Result, arm: str) -> list[Figure]:
    figures = []
    for attack, scores in _attacks(result, arm).items():
        figures += scores.figures(_auc_rng(context, arm, attack), attack)
    if (guesses := result.guesses.get(arm)) is not None:
        share = guesses.right / guesses.made
        low, high = clopper_pearson(guesses.right, guesses.made)
        figures += [
            Figure("canaries guessed right", 100 * share, 100 * low, 100 * high, unit="%", better="lower"),
            Figure("ε lower bound, canaries", guesses.epsilon, better="lower"),
            Figure("worst canary, in standard deviations of those left out", guesses.exposure, better="lower"),
        ]
    return figures


def _signs(context: Context, result: _Result, arm: str) -> list[str]:
    """The attacks that told members from others better than chance, in words.

    With 95 % confidence for all looks at an arm together (Bonferroni): many attacks are tried, and one by one each twentieth
    would succeed by luck.
    """
    attacks, signs = _attacks(result, arm), []
    error = (1 - CONFIDENCE) / (2 * len(attacks) + (arm in result.guesses))  # of one look: an AUC, a TPR, an ε
    for attack, scores in attacks.items():
        if "shadows" not in attack and not result.comparable:
            continue
        low, _ = scores.auc_interval(context.rng(NAME, "sign", arm, attack), 1 - 2 * error, resamples=4000)
        rate = scores.tpr(0.01)
        if low > 0.5 or (rate is not None and rate.above_chance):
            signs.append(attack or _CALIBRATED)
    if arm in result.guesses:
        guesses = result.guesses[arm]
        if epsilon_lower_bound(guesses.right, guesses.made, 1 - error) > 0:
            signs.append("canaries")
    return signs


def _sentence(signs: list[str], figures: list[Figure]) -> str:
    """Which attacks on the synthetic images succeeded, and how well the best of them; where none did, the loss attack."""
    named = {figure.name: figure.value for figure in figures}

    def value(name: str, attack: str) -> float:
        return named[name if attack == _CALIBRATED else f"{name}, {attack}"]

    best = max((sign for sign in signs if sign != "canaries"), key=lambda sign: value("AUC", sign), default=_CALIBRATED)
    rate = value("TPR at 1 % FPR", best)
    caught = "" if math.isnan(rate) else f", and of 100 members {rate:.1f} are found at one false alarm in 100"
    by = "a student's loss" if best == _CALIBRATED else _in_words(best)
    how = f"by {by} a member looks more like one than a stranger does {100 * value('AUC', best):.0f} times in 100{caught}"
    told = f"can be told from the synthetic images better than by chance ({', '.join(map(_in_words, signs))})"
    if not signs:
        told = "could not be told from the synthetic images better than by chance"
    return f"Whose image was among the private ones {told}: {how}."


def _in_words(attack: str) -> str:
    return attack.replace(", shadows", " with shadow pipelines")


def _finding(context: Context, result: _Result) -> Finding:
    signs = {arm: _signs(context, result, arm) for arm in ARMS}
    readings = {arm: f"told by {', '.join(map(_in_words, signs[arm]))}" for arm in ARMS if signs[arm]}
    rows = [Row(arm, _figures(context, result, arm), readings.get(arm, "no better than chance")) for arm in ARMS]
    if not result.comparable:
        result.notes.append(
            "Even networks that have seen neither tell the private images from the held-out ones, so these differ in kind, and "
            "the loss attack proves nothing; the verdict rests on the canaries and the shadows alone."
        )
    return Finding(
        NAME,
        TITLE,
        rows,
        result.controls,
        bounds=_BOUNDS,
        does_not_bound=_DOES_NOT_BOUND,
        sentence=_sentence(signs["synthetic"], rows[ARMS.index("synthetic")].figures),
        outcome=LEAK if signs["synthetic"] else NO_LEAK,
        pictures=result.pictures,
        notes=[*result.notes, _INTERVALS],
    )
