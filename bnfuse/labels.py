"""What a teacher said of a dataset's images, on disk: `relabelling` writes it, `training` learns it.

A folder of labels::

    labels.json                  what they were made from: teacher, images, settings; whether they are complete, and then the
                                 sha256 of each file
    0003-00001.safetensors       views of pass 3, some thousand images a file: `index` and `logits` (float16 [n, K]), and what
                                 was drawn, `crops`, `flips`, `mixes`, `partners` (see `views`; a partner is in the same file)

Plain labels have one pass, over the images as they are.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from .card import read_bytes
from .errors import InputError
from .files import write_atomically
from .manifest import Entry
from .views import Views

LABELS, RELABEL = "labels.json", "relabel"
FORMAT, FORMAT_VERSION = "bnfuse-labels", 1
# how what was drawn is kept
_DTYPES = {
    "index": torch.int32,
    "crops": torch.float32,
    "flips": torch.bool,
    "mixes": torch.float32,
    "partners": torch.int32,
}
_PLACES = ("index", "partners")
_SAID = (  # in a card beside `complete`
    ("config", "views"),
    ("dataset", "images"),
    ("dataset", "class_names"),
    ("dataset", "sha256"),
    ("preprocessing", "image_size"),
)


class Labels:
    """A finished folder of labels.

    Attributes
    ----------
    root : the folder
    card : what labels.json holds
    passes : over the dataset, each with its own views
    plain : whether it is one pass over the images as they are
    images, num_classes : N and K
    image_size : (height, width) of what the teacher saw
    """

    def __init__(self, root: str | Path):
        """InputError where `root` holds no labels, or unfinished ones."""
        self.root = Path(root).expanduser()
        self.card = read_labels_card(self.root)
        if not self.card["complete"]:
            raise InputError(f"{self.root} is not finished: run the same `bnfuse relabel` again, it goes on where it stopped")
        self.plain = not self.card["config"]["views"]
        self.passes = max(1, self.card["config"]["views"])
        self.images, self.num_classes = self.card["dataset"]["images"], len(self.card["dataset"]["class_names"])
        self.image_size = tuple(self.card["preprocessing"]["image_size"])

    def check(self, images_sha256: str) -> None:
        """InputError unless the labels are of the images with this `images_digest`."""
        if self.card["dataset"]["sha256"] != images_sha256:
            raise InputError(
                f"{self.root} has the labels of other images: relabel this dataset, or name the folder of its labels"
            )

    def logits(self) -> Tensor:
        """Of plain labels: the teacher's logits, float32 [N, K], in the order of the dataset."""
        labelled = self.views(0)
        logits = torch.empty(self.images, self.num_classes)
        logits[labelled.views.index] = labelled.logits(slice(0, self.images))
        return logits

    def views(self, number: int) -> LabelledViews:
        """Pass `number` over the dataset, from 0."""
        return LabelledViews(self.root, number, self.images, self.num_classes)


class LabelledViews:
    """One pass over a dataset: its views, and their logits, which stay on disk until they are asked for.

    Attributes
    ----------
    views : Views, N of them
    """

    def __init__(self, root: Path, number: int, images: int, num_classes: int):
        parts, self.files, self.num_classes = [], sorted(root.glob(f"{number:04d}-*.safetensors")), num_classes
        for path in self.files:
            with _opened(path) as file:
                drawn = {name: file.get_tensor(name) for name in _DTYPES if name in file.keys()}
            parts.append(Views(**{name: value.long() if name in _PLACES else value for name, value in drawn.items()}))
        self.starts = torch.tensor([0, *map(len, parts)]).cumsum(0).tolist()
        if self.starts[-1] != images:
            raise InputError(
                f"{root}: pass {number} has {self.starts[-1]} images, expected {images}: run the same `bnfuse relabel` again"
            )
        self.views = Views.joined(parts)

    def logits(self, part: slice) -> Tensor:
        """The teacher's logits of the views of `part`: float32 [B, K]. Only these are read."""
        rows = []
        for path, start, end in zip(self.files, self.starts, self.starts[1:]):
            first, last = max(part.start, start) - start, min(part.stop, end) - start
            if first < last:
                with _opened(path) as file:
                    rows.append(file.get_slice("logits")[first:last].float())
        logits = torch.cat(rows)
        if logits.shape != (part.stop - part.start, self.num_classes):
            raise InputError(f"{self.files[0].parent} is damaged: logits of shape {list(logits.shape)}; delete and relabel")
        return logits


def labels_file(number: int, part: int) -> str:
    """Name of a file of views: pass, then place in the pass."""
    return f"{number:04d}-{part:05d}.safetensors"


def write_views(path: Path, views: Views, logits: Tensor) -> str:
    """One file of views with their logits [n, K], whole or not at all; returns its sha256."""
    drawn = {name: getattr(views, name) for name in _DTYPES if getattr(views, name) is not None}
    tensors = {name: value.to(_DTYPES[name]).contiguous() for name, value in drawn.items()}
    data = safetensors_bytes({**tensors, "logits": logits.to("cpu", torch.float16).contiguous()})
    write_atomically(path, data)
    return hashlib.sha256(data).hexdigest()


def is_whole(path: Path, images: int, num_classes: int) -> bool:
    """Whether a file of views is there, with the logits of so many. One that is torn is not there."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return file.get_slice("logits").get_shape() == [images, num_classes]
    except (OSError, safetensors.SafetensorError):
        return False


def is_labels(root: Path) -> bool:
    """Whether `relabel` wrote into this folder."""
    return (root / LABELS).is_file()


def sha256_of(path: Path) -> str:
    """Of a file, which may be larger than memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def label_problems(root: Path) -> list[str]:
    """What is wrong with the labels in `root`, a line each: a file that is missing, or no longer what was written."""
    try:
        card = read_labels_card(root)
    except InputError as error:
        return [str(error)]
    if not card["complete"]:
        return [f"{root} is not finished: run the same `bnfuse relabel` again"]
    if "files" not in card:
        return [f"{root} has no hashes, for an earlier version wrote it, and cannot be checked: relabel into another folder"]
    problems = []
    for name, sha256 in card["files"].items():
        path = root / name
        wrong = "is missing" if not path.is_file() else "is not what was written" if sha256_of(path) != sha256 else None
        if wrong:
            problems.append(f"{path} {wrong}: remove what is left of it, and run the same `bnfuse relabel` again")
    return problems


def images_digest(entries: list[Entry]) -> str:
    """sha256 over a store's images in the order of its manifest: what labels are held against."""
    return hashlib.sha256("".join(f"{entry.id} {entry.sha256}\n" for entry in entries).encode()).hexdigest()


def read_labels_card(root: Path) -> dict:
    """What labels.json holds. InputError where there is none, or of another format."""
    if not is_labels(root):
        raise InputError(f"{root} holds no labels: make them with `bnfuse relabel`")
    content = read_bytes(root / LABELS)
    try:
        card = json.loads(content)
    except ValueError as error:
        raise InputError(f"{root / LABELS} is not JSON ({error}): delete {root} and relabel") from error
    if not isinstance(card, dict) or (card.get("format"), card.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise InputError(f"{root / LABELS} is not of the format {FORMAT} {FORMAT_VERSION}: relabel with this bnfuse")
    try:
        for name, part in _SAID:
            card[name][part]
        card["complete"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{root / LABELS} is damaged, it does not say {error}: delete {root} and relabel") from error
    return card


def _opened(path: Path):
    try:
        return safetensors.safe_open(path, "pt")
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"cannot read labels from {path} ({error}): delete it and relabel, the rest is kept") from error
