"""The class-wise BatchNorm statistics of a private dataset: record, merge, save, load.

For every BatchNorm input of a frozen network and every class: how many elements were seen, their mean, and M2 (the sum of
squared deviations from that mean), pooled exactly over all images of the class and gathered in float64. Two recordings of
disjoint images merge into the recording of their union.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from .errors import InputError
from .files import atomic_path
from .models import Teacher, batchnorm_layers, check_teacher, fingerprint
from .preprocessing import Preprocessing
from .site_moments import SiteMoments
from .sites import call_name
from .statistics_file import FORMAT, VERSION, SitesOnDisk

MINIMUM_IMAGES = 20  # a class: fewer and its statistics describe single images


@dataclass
class ClassStatistics:
    """Class-wise moments of every BatchNorm input of one network over one dataset.

    Attributes
    ----------
    sites : site name → `SiteMoments`, in the order in which the sites ran; those of a file are read when they are asked for
    images : int64 [K], images of each class
    teacher : fingerprint of the network, see `models.fingerprint`
    preprocessing : of the pixels, or None where the loader normalised by itself
    dataset, class_names : provenance, for people
    outputs : the network's output for each class; None, class k is output k
    """

    sites: Mapping[str, SiteMoments]
    images: Tensor
    teacher: str
    preprocessing: Preprocessing | None = None
    dataset: str = ""
    class_names: list[str] = field(default_factory=list)
    outputs: list[int] | None = None

    @property
    def num_classes(self) -> int:
        return len(self.images)

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
        per_class : False pools all classes into one row
        names : the sites wanted and their order; default all
        classes : the classes wanted and their order, of a file the only ones to be read; default all

        Returns
        -------
        mean, var : float64 [K, T] for K classes, or [1, T] pooled; T is the number of channels of all sites together
        """
        names = list(self.sites) if names is None else list(names)
        rows = (self.num_classes if classes is None else len(classes)) if per_class else 1
        mean = torch.empty(rows, sum(self.site_channels[name] for name in names), dtype=torch.float64)
        var, start = torch.empty_like(mean), 0
        for site in self._of_classes(names, classes):  # site by site: no second copy of them all
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
        InputError : the recordings are of different networks, preprocessings, sites or classes
        """
        self._check_same("teacher", self.teacher, other.teacher)
        self._check_same("preprocessing", self.preprocessing, other.preprocessing)
        self._check_same("number of classes", self.num_classes, other.num_classes)
        self._check_same("class names", self.class_names, other.class_names)
        self._check_same("outputs", self.outputs, other.outputs)
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
        )

    def check(
        self,
        *,
        teacher: nn.Module | str | None = None,
        num_classes: int | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        """Raises InputError where these statistics are not of this network (or fingerprint), classes or preprocessing."""
        if teacher is not None:
            expected = teacher if isinstance(teacher, str) else fingerprint(teacher)
            self._check_same("teacher", expected, self.teacher)
        if num_classes is not None:
            self._check_same("number of classes", num_classes, self.num_classes)
        if preprocessing is not None and self.preprocessing is not None:
            self._check_same("preprocessing", preprocessing, self.preprocessing)

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
            tensors |= {f"count/{name}": site.count, f"mean/{name}": site.mean, f"m2/{name}": site.m2}
        description = {
            "version": VERSION,
            "sites": list(self.sites),
            "teacher": self.teacher,
            "dataset": self.dataset,
            "class_names": self.class_names,
            "outputs": self.outputs,
            "preprocessing": self.preprocessing.to_dict() if self.preprocessing else None,
        }
        with atomic_path(path) as part:
            save_file(tensors, part, metadata={"format": FORMAT, "description": json.dumps(description)})

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        teacher: nn.Module | str | None = None,
        num_classes: int | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> ClassStatistics:
        """Opens a file that `save` wrote; with the keyword arguments also checks that it fits, as `check` does.

        The numbers stay on disk until they are asked for, see `statistics_file`.
        """
        sites = SitesOnDisk(path)
        about = sites.description
        loaded = cls(
            sites,
            sites.images,
            about["teacher"],
            Preprocessing.from_dict(about["preprocessing"]) if about["preprocessing"] else None,
            about["dataset"],
            about["class_names"],
            about["outputs"],
        )
        loaded.check(teacher=teacher, num_classes=num_classes, preprocessing=preprocessing)
        return loaded

    def digest(self) -> str:
        """sha256 over every number: names these statistics in a dataset's card."""
        sha = hashlib.sha256(self.teacher.encode())
        for name, site in self.sites.items():
            sha.update(name.encode())
            for tensor in (site.count, site.mean, site.m2):
                sha.update(tensor.contiguous().numpy())
        return sha.hexdigest()


def record(
    model: nn.Module | Teacher,
    loader: Iterable,
    num_classes: int,
    *,
    preprocessing: Preprocessing | None = None,
    class_names: Sequence[str] | None = None,
    outputs: Sequence[int] | None = None,
    dataset: str = "",
    minimum_images: int = MINIMUM_IMAGES,
    allow_few_images: bool = False,
    progress: bool = False,
) -> ClassStatistics:
    """Records the class-wise statistics of every BatchNorm input in one pass over a dataset.

    Parameters
    ----------
    model : the frozen teacher, see `bnfuse.freeze`; a `Teacher` brings its preprocessing
    loader : yields (images [N, C, H, W] float, labels int [N]); each image must come exactly once
    preprocessing : given, the images are pixels in [0, 1] and normalised by it; None, the loader has normalised them
    outputs : the network's output for each class, where the network knows more classes than the dataset has
    minimum_images : a class with fewer is refused unless `allow_few_images`: statistics of few images describe those images

    Returns
    -------
    ClassStatistics, float64

    Raises
    ------
    InputError : a label out of range, a non-finite pixel or activation, a class with no image or too few; each named
    """
    if isinstance(model, Teacher):
        model, preprocessing = model.model, preprocessing or model.preprocessing
    check_teacher(model)
    if outputs is not None and (len(outputs) != num_classes or len(set(outputs)) != num_classes or min(outputs) < 0):
        raise InputError(
            f"outputs must name one output of the network for each of {num_classes} classes, each once, got "
            f"{list(outputs)[:10]} ({len(outputs)})"
        )
    device = next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    names = list(class_names) if class_names is not None else [str(k) for k in range(num_classes)]
    if len(names) != num_classes:
        raise InputError(f"class_names has {len(names)} entries, num_classes is {num_classes}")
    recorder = _Recorder(model, num_classes)
    images_seen = torch.zeros(num_classes, dtype=torch.int64)
    try:
        for batch, (images, labels) in enumerate(tqdm(loader, desc="recording", unit="batch", disable=not progress)):
            labels = torch.as_tensor(labels).to(torch.int64)
            _check_batch(images, labels, num_classes, batch, first=int(images_seen.sum()))
            images = images.to(device)
            recorder.run(images if preprocessing is None else preprocessing.normalize(images), labels.to(device))
            images_seen += torch.bincount(labels, minlength=num_classes)
    finally:
        recorder.remove()
    _check_counts(images_seen, names, minimum_images, allow_few_images)
    return ClassStatistics(
        recorder.sites,
        images_seen,
        fingerprint(model),
        preprocessing,
        dataset,
        names,
        list(outputs) if outputs is not None else None,
    )


class _Recorder:
    """Hooks every BatchNorm of a model and merges each batch's inputs into that site's class moments."""

    def __init__(self, model: nn.Module, num_classes: int):
        self.model, self.num_classes = model, num_classes
        self.sites: dict[str, SiteMoments] = {}
        self.handles = [layer.register_forward_pre_hook(self._hook(name)) for name, layer in batchnorm_layers(model).items()]

    def _hook(self, name: str):
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x, key = inputs[0], call_name(name, self.ran)
            self.ran.add(key)
            if not torch.isfinite(x).all():
                raise InputError(
                    f"the input of BatchNorm layer {key!r} is not finite although the images are: the teacher "
                    "overflows; check its weights, or record in float32"
                )
            site = self.sites.setdefault(key, SiteMoments.empty(self.num_classes, x.shape[1]))
            site.add_batch(x, self.labels)

        return hook

    @torch.no_grad()
    def run(self, images: Tensor, labels: Tensor) -> None:
        self.ran: set[str] = set()
        self.labels = labels
        self.model(images)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


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


def _check_counts(images: Tensor, names: list[str], minimum: int, allow_few: bool) -> None:
    if len(missing := [names[k] for k in (images == 0).nonzero().flatten().tolist()]):
        raise InputError(
            f"no image of {'class' if len(missing) == 1 else 'classes'} {', '.join(missing[:10])}; every class "
            "needs images, or leave the class out"
        )
    few = [f"{names[k]} ({int(images[k])})" for k in (images < minimum).nonzero().flatten().tolist()]
    if few and not allow_few:
        raise InputError(
            f"fewer than {minimum} images in {len(few)} class(es): {', '.join(few[:10])}. Statistics of few "
            "images give those images away. Gather more, lower minimum_images, or pass allow_few_images "
            "(--allow-few-images) knowing this"
        )
