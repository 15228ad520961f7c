"""The class-wise statistics of a private dataset inside a network: record, merge, save, load.

For every site of a frozen network (the inputs of its BatchNorm layers, or what else `sites` can name) and every class: how many
elements were seen, their mean, and M2 (the sum of squared deviations from that mean), pooled exactly over all images of the
class and gathered in float64. Two recordings of disjoint images merge into the recording of their union. What other programs
take for a class's variance is in `estimators`.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from .batches import read
from .errors import InputError
from .estimators import ImageCounts, SiteEstimator, check_variance
from .files import atomic_path
from .models import Teacher, check_teacher, fingerprint
from .preprocessing import Preprocessing
from .site_moments import SiteMoments
from .sites import Site, SiteRule, call_name, observe, select
from .statistics_file import FORMAT, PARTS, SUBCLASSES_VERSION, VERSION, WHOLE_PARTS, SitesOnDisk
from .subclasses import SubClasses

MINIMUM_IMAGES = 20  # a class: fewer and its statistics describe single images
_NO_MERGE = {  # of a variance that is not pooled: why
    "images": "they hold averages of the images' own variances, not sums of squares about a common mean",
    "batches": "they are of the batches that the images came in, not of the images alone",
    "ema": "they depend on the order in which the batches came",
}


@dataclass
class ClassStatistics:
    """Class-wise moments of one network's sites over one dataset.

    Attributes
    ----------
    sites : site name → `SiteMoments`, in the order in which the sites ran; those of a file are read when they are asked for
    images : int64 [K], images of each class, or (of `row_classes`) of each sub-class
    teacher : fingerprint of the network, see `models.fingerprint`
    preprocessing : of the pixels, or None where the loader normalised by itself
    dataset, class_names : provenance, for people
    outputs : the network's output for each class; None, class k is output k
    rules : what the sites were chosen by, see `sites.SiteRule`
    variance : how the moments of a class were gathered, one of `estimators.VARIANCES`
    whole : where `variance` is not "pooled", the exact moments [1, C] of all images at once, by site name
    row_classes : the class of each row of the tables, ascending, where rows are sub-classes (see `subclasses`); None, row k is
        class k. Whatever is said of a class's row then holds for a sub-class's
    subclass_teacher : fingerprint of the network whose features the sub-classes are clusters of; None, that is `teacher`
    """

    sites: Mapping[str, SiteMoments]
    images: Tensor
    teacher: str
    preprocessing: Preprocessing | None = None
    dataset: str = ""
    class_names: list[str] = field(default_factory=list)
    outputs: list[int] | None = None
    rules: tuple[str, ...] = ("bn",)
    variance: str = "pooled"
    whole: Mapping[str, SiteMoments] = field(default_factory=dict)
    row_classes: list[int] | None = None
    subclass_teacher: str | None = None

    @property
    def num_classes(self) -> int:
        return len(self.images) if self.row_classes is None else self.row_classes[-1] + 1

    def rows(self, k: int) -> list[int]:
        """The rows of class k in the tables."""
        return [k] if self.row_classes is None else [row for row, of in enumerate(self.row_classes) if of == k]

    def class_images(self) -> Tensor:
        """int64 [number of classes], images of each class, whatever the rows are."""
        of = torch.arange(self.num_classes) if self.row_classes is None else torch.tensor(self.row_classes)
        return torch.zeros(self.num_classes, dtype=torch.int64).index_add_(0, of, self.images)

    @property
    def grouping(self) -> tuple[str, list[int], list[int]] | None:
        """What two recordings of the same images have in common where their sub-classes are the same; None without any."""
        if self.row_classes is None:
            return None
        return self.subclass_teacher or self.teacher, self.row_classes, self.images.tolist()

    @property
    def site_channels(self) -> dict[str, int]:
        if isinstance(self.sites, SitesOnDisk):
            return dict(self.sites.channels)
        return {name: site.mean.shape[1] for name, site in self.sites.items()}

    def moments(
        self, *, per_class: bool = True, names: Iterable[str] | None = None, classes: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Every site's mean and biased variance side by side.

        Parameters
        ----------
        per_class : False pools all images into one row, exactly, whatever `variance` is
        names : the sites wanted and their order; default all
        classes : the rows wanted and their order, of a file the only ones to be read; default all

        Returns
        -------
        mean, var : float64 [K, T] for K classes, or [1, T] pooled; T is the number of channels of all sites together

        Raises
        ------
        InputError : some classes are to be pooled, of statistics that do not hold their exact moments
        """
        names = list(self.sites) if names is None else list(names)
        rows = (len(self.images) if classes is None else len(classes)) if per_class else 1
        mean = torch.empty(rows, sum(self.site_channels[name] for name in names), dtype=torch.float64)
        var, start = torch.empty_like(mean), 0
        if not per_class and self.variance != "pooled":
            if classes is not None:
                raise InputError(
                    f"the moments of some classes together are not known from class-wise {self.variance!r} statistics; pool "
                    "all classes, or record with variance='pooled'"
                )
            tables = (self.whole[name] for name in names)
        else:
            tables = self._of_classes(names, classes)
        for site in tables:  # site by site: no second copy of them all
            site = site if per_class else site.pooled()
            part = slice(start, start := start + site.mean.shape[1])
            mean[:, part] = site.mean
            torch.div(site.m2, site.count.clamp(min=1)[:, None], out=var[:, part])
        return mean, var

    def _of_classes(self, names: list[str], classes: Sequence[int] | None) -> Iterator[SiteMoments]:
        if classes is None:
            return (self.sites[name] for name in names)
        if isinstance(self.sites, SitesOnDisk):
            return self.sites.of_classes(names, classes)
        return (self.sites[name].of_classes(classes) for name in names)

    def merge(self, other: ClassStatistics) -> ClassStatistics:
        """The statistics of both recordings' images together: exact, and in any order. They must be of disjoint images.

        Raises
        ------
        InputError : the recordings are of different networks, preprocessings, sites or classes, or are not pooled
        """
        self._check_same("way of taking the variance", self.variance, other.variance)
        if self.variance != "pooled":
            raise InputError(
                f"class statistics with variance={self.variance!r} cannot be merged, pooled ones alone can: "
                f"{_NO_MERGE[self.variance]}. Record all the images in one pass, or both parts with variance='pooled'"
            )
        if self.row_classes is not None or other.row_classes is not None:
            raise InputError(
                "statistics of sub-classes cannot be merged: every recording finds clusters of its own. Record all the images "
                "at once, or both parts without sub-classes"
            )
        self._check_same("teacher", self.teacher, other.teacher)
        self._check_same("preprocessing", self.preprocessing, other.preprocessing)
        self._check_same("number of classes", self.num_classes, other.num_classes)
        self._check_same("class names", self.class_names, other.class_names)
        self._check_same("outputs", self.outputs, other.outputs)
        if _parsed(self.rules) != _parsed(other.rules):
            self._check_same("set of sites", " ".join(self.rules), " ".join(other.rules))
        self._check_same("sites", self.site_channels, other.site_channels)
        sites = {name: site.merge(other.sites[name]) for name, site in self.sites.items()}
        names = [self.dataset] if self.dataset == other.dataset else [self.dataset, other.dataset]
        return ClassStatistics(
            sites,
            self.images + other.images,
            self.teacher,
            self.preprocessing,
            " + ".join(filter(None, names)),
            self.class_names,
            self.outputs,
            self.rules,
        )

    def check(
        self,
        *,
        teacher: nn.Module | str | None = None,
        num_classes: int | None = None,
        preprocessing: Preprocessing | None = None,
        sites: Sequence[str] | None = None,
    ) -> None:
        """Raises InputError where these statistics are not of this network (or fingerprint), classes, preprocessing or sites.

        `sites` are rules, see `sites.SiteRule`, in any order.
        """
        if teacher is not None:
            expected = teacher if isinstance(teacher, str) else fingerprint(teacher)
            self._check_same("teacher", expected, self.teacher)
        if num_classes is not None:
            self._check_same("number of classes", num_classes, self.num_classes)
        if preprocessing is not None and self.preprocessing is not None:
            self._check_same("preprocessing", preprocessing, self.preprocessing)
        if sites is not None and _parsed(sites) != _parsed(self.rules):
            raise InputError(
                f"these class statistics are of the sites {' '.join(self.rules)}, expected {' '.join(sites)}: match the former "
                f"(--sites {' '.join(self.rules)}), or record the latter with `bnfuse record --sites {' '.join(sites)}`"
            )

    @staticmethod
    def _check_same(what: str, expected, given) -> None:
        if expected != given:
            raise InputError(
                f"these class statistics do not fit: {what} is {given}, expected {expected}; record them again "
                "with `bnfuse record` and the same teacher, dataset and preprocessing"
            )

    # ---- the file: safetensors, see DESIGN "Files" ----

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, whole or not at all."""
        tensors = {"images": self.images}
        for name, site in self.sites.items():
            tensors |= {f"{part}/{name}": getattr(site, part) for part in PARTS}
        for name, site in self.whole.items():
            tensors |= {f"{key}/{name}": getattr(site, part) for key, part in zip(WHOLE_PARTS, PARTS)}
        description = {
            "version": VERSION if self.row_classes is None else SUBCLASSES_VERSION,
            "rules": self.rules,
            "variance": self.variance,
            "sites": list(self.sites),
            "teacher": self.teacher,
            "dataset": self.dataset,
            "class_names": self.class_names,
            "outputs": self.outputs,
            "preprocessing": self.preprocessing.to_dict() if self.preprocessing else None,
        }
        if self.row_classes is not None:
            description["row_classes"] = self.row_classes
        if self.subclass_teacher is not None:
            description["subclass_teacher"] = self.subclass_teacher
        try:
            with atomic_path(path) as part:
                save_file(tensors, part, metadata={"format": FORMAT, "description": json.dumps(description)})
        except SafetensorError as error:  # what it makes of a full disk
            raise InputError(f"cannot write {path}: {error}; free some space, or choose another place") from error

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        teacher: nn.Module | str | None = None,
        num_classes: int | None = None,
        preprocessing: Preprocessing | None = None,
        sites: Sequence[str] | None = None,
    ) -> ClassStatistics:
        """Opens a file that `save` wrote; with the keyword arguments also checks that it fits, as `check` does.

        The numbers stay on disk until they are asked for, see `statistics_file`.
        """
        sites_on_disk = SitesOnDisk(path)
        about = sites_on_disk.description
        loaded = cls(
            sites_on_disk,
            sites_on_disk.images,
            about["teacher"],
            Preprocessing.from_dict(about["preprocessing"]) if about["preprocessing"] else None,
            about["dataset"],
            about["class_names"],
            about["outputs"],
            tuple(about["rules"]),
            about["variance"],
            sites_on_disk.whole(),
            about["row_classes"],
            about["subclass_teacher"],
        )
        loaded.check(teacher=teacher, num_classes=num_classes, preprocessing=preprocessing, sites=sites)
        return loaded

    def digest(self) -> str:
        """sha256 over every number: names these statistics in a dataset's card."""
        sha = hashlib.sha256(self.teacher.encode())
        if self.variance != "pooled":
            sha.update(self.variance.encode())
        if self.row_classes is not None:
            sha.update(json.dumps(self.row_classes).encode())
        for name, site in chain(self.sites.items(), self.whole.items()):  # a site of a file at a time
            sha.update(name.encode())
            for tensor in (site.count, site.mean, site.m2):
                sha.update(tensor.contiguous().numpy())
        return sha.hexdigest()


def record(
    model: nn.Module | Teacher,
    loader: Iterable,
    num_classes: int,
    *,
    sites: Sequence[str] = ("bn",),
    variance: str = "pooled",
    preprocessing: Preprocessing | None = None,
    class_names: Sequence[str] | None = None,
    outputs: Sequence[int] | None = None,
    dataset: str = "",
    minimum_images: int = MINIMUM_IMAGES,
    allow_few_images: bool = False,
    subclasses: int = 1,
    subclass_teacher: nn.Module | Teacher | None = None,
    progress: bool = False,
) -> ClassStatistics:
    """Records the class-wise statistics of a network's sites, by default its BatchNorm inputs, in one pass over a dataset (two
    with sub-classes).

    Parameters
    ----------
    model : the frozen teacher, see `bnfuse.freeze`; a `Teacher` brings its preprocessing
    loader : yields (images [N, C, H, W] float, labels int [N]); each image must come exactly once
    sites : rules that name the sites, see `sites.SiteRule`; a network without BatchNorm needs others than "bn"
    variance : how a class's moments are gathered, see `estimators`. For all but "pooled" and "images" the loader's batches and
        their order matter
    preprocessing : given, the images are pixels in [0, 1] and normalised by it; None, the loader has normalised them
    outputs : the network's output for each class, where it has others than the dataset; None, a `Teacher` finds them by the
        classes' names, see `Teacher.outputs_for`
    minimum_images : a class with fewer is refused unless `allow_few_images`: statistics of few images describe those images.
        A moving average counts for as many images as it effectively averages, see `estimators.ImageCounts`
    subclasses : of each class at most so many, each with statistics of its own: k-means clusters of the teacher's features,
        none with fewer than `minimum_images`, see `subclasses`. The loader is gone through twice
    subclass_teacher : the network whose features those are, on the device of `model` and shown the same inputs; None, `model`
        itself. Several teachers of one synthesis must have the sub-classes of one of them

    Returns
    -------
    ClassStatistics, float64

    Raises
    ------
    InputError : a label out of range, a non-finite pixel or activation, pixels that the preprocessing is not for, a class with
        no image or too few, a rule that finds no site; each named. With sub-classes also a loader that can be gone through
        once, a network without a linear layer before which its features are, and one whose preprocessing is another

    Warns
    -----
    UserWarning : a moving average still is of its start to more than a hundredth; a class has fewer sub-classes than asked for
    """
    names = list(class_names) if class_names is not None else [str(k) for k in range(num_classes)]
    if len(names) != num_classes:
        raise InputError(f"class_names has {len(names)} entries, num_classes is {num_classes}")
    if isinstance(model, Teacher):
        outputs = model.outputs_for(names, outputs)
        model, preprocessing = model.model, preprocessing or model.preprocessing
    check_variance(variance)
    check_teacher(model, needs_batchnorm=any(SiteRule.parse(rule).kind == "bn" for rule in sites))
    if outputs is not None and (len(outputs) != num_classes or len(set(outputs)) != num_classes or min(outputs) < 0):
        raise InputError(
            f"outputs must name one output of the network for each of {num_classes} classes, each once, got "
            f"{list(outputs)[:10]} ({len(outputs)})"
        )
    device = next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    if subclasses < 1 or subclasses > 1 and isinstance(loader, Iterator):
        raise InputError(
            "subclasses must be at least 1, and for more than that the loader is gone through twice, as a DataLoader or a list "
            f"can be: got {subclasses} of a {type(loader).__name__}"
        )

    grouping = _grouping_model(model, subclass_teacher, preprocessing, subclasses)

    def inputs(what: str) -> Iterator[tuple[Tensor, Tensor]]:
        """(what the teacher is shown, on its device, labels int64 [N] on the CPU) of every batch."""
        first = 0
        for batch, (images, labels) in enumerate(read(tqdm(loader, desc=what, unit="batch", disable=not progress))):
            labels = torch.as_tensor(labels).to(torch.int64)
            _check_batch(images, labels, num_classes, batch, first)
            if preprocessing is not None:
                _check_pixels(images, preprocessing, batch)
            first += len(labels)
            images = images.to(device)
            yield images if preprocessing is None else preprocessing.normalize(images), labels

    found = SubClasses(grouping, inputs("clustering"), names, subclasses, minimum_images) if subclasses > 1 else None
    row_names = names if found is None else _row_names(found.row_classes, names)
    recorder = _Recorder(model, len(row_names), sites, variance)
    counts = ImageCounts(variance, len(row_names))
    try:
        for shown, labels in inputs("recording"):
            rows = labels if found is None else found.of(int(counts.images.sum()), shown)
            recorder.run(shown, rows.to(device))
            counts.add_batch(rows)
    finally:
        recorder.remove()
    _check_counts(counts, row_names, minimum_images, allow_few_images)
    return ClassStatistics(
        {name: site.finish() for name, site in recorder.sites.items()},
        counts.images,
        fingerprint(model),
        preprocessing,
        dataset,
        names,
        list(outputs) if outputs is not None else None,
        tuple(sites),
        variance,
        {name: site.whole for name, site in recorder.sites.items() if site.whole is not None},
        None if found is None else found.row_classes,
        None if grouping is model else fingerprint(grouping),
    )


def _grouping_model(
    model: nn.Module, subclass_teacher: nn.Module | Teacher | None, preprocessing: Preprocessing | None, subclasses: int
) -> nn.Module:
    """The network whose features sub-classes are clusters of."""
    if subclass_teacher is None:
        return model
    if subclasses < 2:
        raise InputError(
            f"subclass_teacher (--subclass-teacher) needs subclasses (--subclasses) of 2 or more, got {subclasses}"
        )
    if isinstance(subclass_teacher, Teacher):
        if subclass_teacher.preprocessing != preprocessing:
            raise InputError(
                f"both teachers must be shown the same: the preprocessing of the one whose sub-classes are taken is "
                f"{subclass_teacher.preprocessing}, expected {preprocessing}"
            )
        subclass_teacher = subclass_teacher.model
    check_teacher(subclass_teacher, needs_batchnorm=False)
    return subclass_teacher


class _Recorder:
    """Merges each batch's tensors at every site of a model into that site's class tables."""

    def __init__(self, model: nn.Module, num_classes: int, rules: Sequence[str], variance: str):
        self.model, self.num_classes, self.variance = model, num_classes, variance
        self.sites: dict[str, SiteEstimator] = {}
        self.observation = observe(model, select(model, rules), self._take)

    def _take(self, site: Site, x: Tensor) -> None:
        key = call_name(site.name, self.ran)
        self.ran.add(key)
        if len(x) != len(self.labels):
            raise InputError(
                f"site {key!r} has {len(x)} samples in a pass over {len(self.labels)} images: what takes a batch apart has no "
                "statistics of classes; leave the site out"
            )
        if not torch.isfinite(x).all():
            raise InputError(
                f"site {key!r} is not finite although the images are: the teacher overflows; check its weights, or record in "
                "float32"
            )
        if key not in self.sites:
            self.sites[key] = SiteEstimator(self.variance, self.num_classes, x.shape[1])
        self.sites[key].add_batch(x, self.labels)

    @torch.no_grad()
    def run(self, images: Tensor, labels: Tensor) -> None:
        self.ran: set[str] = set()
        self.labels = labels
        self.model(images)

    def remove(self) -> None:
        self.observation.remove()


def _parsed(rules: Sequence[str]) -> set[SiteRule]:
    return {SiteRule.parse(rule) for rule in rules}


def _row_names(row_classes: Sequence[int], names: Sequence[str]) -> list[str]:
    """Of each sub-class, for people: the class's name, and which of several it is."""
    several, place = Counter(row_classes), Counter()
    row_names = []
    for k in row_classes:
        place[k] += 1
        row_names.append(f"{names[k]}, sub-class {place[k]}" if several[k] > 1 else names[k])
    return row_names


def _check_batch(images: Tensor, labels: Tensor, num_classes: int, batch: int, first: int) -> None:
    def where(i: int) -> str:
        return f"image {first + i} of the dataset (batch {batch}, position {i})"

    if labels.dim() != 1 or len(labels) != len(images):
        raise InputError(
            f"batch {batch} of the loader has {len(images)} images and labels of shape {list(labels.shape)}; "
            "expected one label an image"
        )
    outside = ((labels < 0) | (labels >= num_classes)).nonzero().flatten()
    if len(outside):
        i = int(outside[0])
        raise InputError(
            f"{where(i)} has label {int(labels[i])}, expected 0 to {num_classes - 1}; check the labels or num_classes"
        )
    broken = (~torch.isfinite(images).flatten(1).all(1)).nonzero().flatten()
    if len(broken):
        raise InputError(f"{where(int(broken[0]))} has a NaN or infinite pixel; remove or repair it")


def _check_pixels(images: Tensor, preprocessing: Preprocessing, batch: int) -> None:
    """What the teacher's normalisation is for. Some way beyond [0, 1] is let in: images may be resized smoothly, or noised."""
    if not images.is_floating_point() or images.dim() != 4 or images.shape[1] != preprocessing.channels:
        raise InputError(
            f"batch {batch} of the loader is {images.dtype} {list(images.shape)}; expected pixels in [0, 1], float "
            f"[N, {preprocessing.channels}, H, W]"
        )
    low, high = images.aminmax() if images.numel() else (0, 0)
    if low < -0.5 or high > 1.5:
        raise InputError(
            f"batch {batch} of the loader has pixels from {float(low):.3g} to {float(high):.3g}; expected [0, 1], for "
            "they are normalised as the teacher expects it: leave out Normalize, and divide bytes by 255"
        )


def check_images_of_classes(
    images: Tensor, names: Sequence[str], minimum: int, allow_few: bool, *, in_effect: Tensor | None = None
) -> None:
    """InputError where a class has no image, or too few.

    Parameters
    ----------
    images : int64 [K], of each class
    in_effect : of a moving average, how many its statistics amount to: [K]
    """
    if len(missing := [names[k] for k in (images == 0).nonzero().flatten().tolist()]):
        raise InputError(
            f"no image of {'class' if len(missing) == 1 else 'classes'} {', '.join(missing[:10])}; every class "
            "needs images, or leave the class out"
        )
    counted = images if in_effect is None else in_effect
    few = [f"{names[k]} ({_number(counted[k])})" for k in (counted < minimum).nonzero().flatten().tolist()]
    if few and not allow_few:
        moving = ", or larger batches, or variance='pooled': a moving average is of the last batches for the most part"
        raise InputError(
            f"fewer than {minimum} images in {len(few)} class(es){'' if in_effect is None else ' in effect'}: "
            f"{', '.join(few[:10])}. Statistics of few images give those images away. Gather more"
            f"{'' if in_effect is None else moving}, lower minimum_images, or pass allow_few_images "
            "(--allow-few-images) knowing this"
        )


def _check_counts(counts: ImageCounts, names: list[str], minimum: int, allow_few: bool) -> None:
    effective = counts.effective if counts.variance == "ema" else None
    check_images_of_classes(counts.images, names, minimum, allow_few, in_effect=effective)
    start, k = counts.of_the_start.max(0)
    if start > 0.01:
        warnings.warn(
            f"{float(start):.0%} of the statistics of class {names[int(k)]} is what the moving average starts from (mean 0, "
            f"variance 1), since {int(counts.batches[k])} batches had images of it: smaller batches leave less, "
            "variance='pooled' nothing",
            stacklevel=3,
        )


def _number(effective: Tensor) -> str:
    return f"{float(effective):.1f}".removesuffix(".0")
