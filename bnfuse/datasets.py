"""Labelled images from wherever they are: built-in sets, npz files, folders of images, stores that bnfuse wrote.

`load_dataset` turns what a user names on the command line into an `ImageDataset`: its labels are known at once, its
images are handed out as pixels in [0, 1]. Normalisation is not done here (`preprocessing`), augmentation neither
(`batches`).
"""

from __future__ import annotations

import copy
import os
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .arrays import CIFAR10_CLASSES, cifar10, digits, names, read_npz, require
from .card import CARD
from .decoding import GREY_MODES, IMAGE_SUFFIXES, EncodedBytes, fitted, header, image_files, opened
from .errors import InputError
from .manifest import IMAGES, MANIFEST, is_store, read_store

SPEC_GRAMMAR = """\
digits[:train|:test]     scikit-learn's handwritten digits: 1,797 grey scans of 8x8 pixels; train is 80 % of each class
cifar10[:train|:test]    CIFAR-10: cifar10_lossless_{train,test}.npz in the folder that BNFUSE_DATA names, else
                         torchvision's copy there or in ~/.cache/bnfuse
FILE.npz                 arrays `images` (uint8, [N, H, W, C] or [N, H, W]) and `labels` ([N]), perhaps `class_names`
FILE.npz:SPLIT           encoded images: SPLIT_bytes (uint8), SPLIT_offsets ([N + 1]) and SPLIT_labels ([N]); image i is
                         the file in bytes[offsets[i]:offsets[i + 1]]
FOLDER                   a folder for each class, with image files in it; or a dataset that `bnfuse synthesize` wrote
A folder or file that is called like a built-in dataset is written with a path: ./digits"""


_BUILT_IN = ("digits", "cifar10")
_NOT_CLASSES = {"train", "val", "valid", "validation", "test", IMAGES}  # as folders that hold the class folders are called
_MOST_CLASSES = 2**16  # that are counted up to the largest label, where there are fewer images


def as_spec(path: Path) -> str:
    """What `load_dataset` takes for this path, whatever it is called."""
    return f"./{path}" if str(path).partition(":")[0] in _BUILT_IN else str(path)


def load_dataset(
    spec: str | os.PathLike,
    *,
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
    classes: Sequence[str] | None = None,
    download: bool = False,
) -> ImageDataset:
    """The dataset that `spec` names; `SPEC_GRAMMAR` is what it may be, as the command line prints it.

    Parameters
    ----------
    spec : a built-in dataset, an npz file or a folder
    image_size : (height, width) in pixels: images are resized until they cover it and cropped to its centre. None
        leaves them as they are, and then they must all be of one size.
    channels : 1 (grey) or 3 (RGB), to which images are converted; None leaves what they have
    classes : names of the classes to keep; labels are numbered in this order. None keeps all.
    download : fetch CIFAR-10 if it is not on this machine

    Returns
    -------
    ImageDataset
        Arrays come as `ArrayDataset`, the rest decodes its files when they are asked for: if `nbytes` is small enough,
        `in_memory()` decodes them once and makes training much faster.

    Raises
    ------
    InputError
        There is no such dataset, split or class; a class or the whole has no image; arrays are not as described above;
        images differ in size and no image_size is given.
    """
    _check_options(image_size, channels)
    spec = os.fspath(spec)
    if not spec:
        raise InputError(f"the name of a dataset is empty; expected one of\n{SPEC_GRAMMAR}")
    name, _, split = spec.partition(":")
    if name in _BUILT_IN:
        if split not in ("", "train", "test"):
            raise InputError(f"{spec}: unknown split {split!r}; expected {name}:train, {name}:test, or {name} for all")
        images, labels = digits(split) if name == "digits" else cifar10(split, download)
        class_names = list("0123456789") if name == "digits" else CIFAR10_CLASSES
        dataset = ArrayDataset(images, labels, class_names, name=f"{name}:{split}" if split else name)
        return _adapted(dataset, image_size, channels, classes)

    path, split = Path(spec).expanduser(), ""
    if not path.exists() and ":" in spec:
        head, _, split = spec.rpartition(":")
        path = Path(head).expanduser()
    if not path.exists():
        raise InputError(f"{spec}: there is no such file or folder, nor a built-in dataset; expected\n{SPEC_GRAMMAR}")
    if path.is_dir():
        if split:
            raise InputError(f"{spec}: a folder has no splits; name the one with the class folders, as {path}/{split}")
        if is_store(path):
            dataset = StoreDataset(path, image_size=image_size, channels=channels)
            return dataset if classes is None else dataset.with_classes(classes)
        return FolderDataset(path, image_size=image_size, channels=channels, classes=classes)
    if path.suffix.lower() != ".npz":
        raise InputError(f"{path} is neither a folder nor an .npz file; expected\n{SPEC_GRAMMAR}")
    return _load_npz(path, split, image_size, channels, classes)


def _load_npz(
    path: Path,
    split: str,
    image_size: tuple[int, int] | None,
    channels: int | None,
    classes: Sequence[str] | None,
) -> ImageDataset:
    arrays = read_npz(path)
    name = f"{path.name}:{split}" if split else path.name
    class_names = None
    if "class_names" in arrays:
        said = arrays["class_names"].reshape(-1).tolist()
        class_names = [name.decode() if isinstance(name, bytes) else str(name) for name in said]
    if not split and "images" in arrays:
        require(arrays, ("labels",), path)
        dataset = ArrayDataset(arrays["images"], arrays["labels"], class_names, name=name)
        if not len(dataset):
            raise InputError(f"{path} has no image")
        if (empty := (class_counts(dataset) == 0).nonzero().flatten().tolist()) and class_names is None:
            raise InputError(
                f"{path}: labels run up to {len(dataset.class_names) - 1}, and no image has {', '.join(map(str, empty[:10]))}"
                f"{' …' if len(empty) > 10 else ''}: number the classes from 0 without gaps, or name all of them in class_names"
            )
        return _adapted(dataset, image_size, channels, classes)

    splits = [key[: -len("_bytes")] for key in arrays if key.endswith("_bytes")]
    if split not in splits:
        what = f"has no split {split!r}" if split else "has no `images`"
        there = f"its splits are {', '.join(f'{path}:{s}' for s in splits)}" if splits else f"it holds {names(arrays)}"
        raise InputError(f"{path} {what}; {there}; expected `images` and `labels`, or SPLIT_bytes, _offsets, _labels")
    require(arrays, (f"{split}_offsets", f"{split}_labels"), path)
    data, offsets = arrays[f"{split}_bytes"], arrays[f"{split}_offsets"]
    if data.dtype != np.uint8 or data.ndim != 1 or offsets.dtype.kind not in "iu" or offsets.ndim != 1:
        raise InputError(
            f"{path}: {split}_bytes must be uint8 [bytes] and {split}_offsets integers [N + 1], "
            f"got {data.dtype} {list(data.shape)} and {offsets.dtype} {list(offsets.shape)}"
        )
    offsets = offsets.astype(np.int64)
    if len(offsets) < 2 or offsets[0] < 0 or offsets[-1] > len(data) or (np.diff(offsets) < 0).any():
        raise InputError(f"{path}: {split}_offsets must rise within 0..{len(data)}, the length of {split}_bytes")
    if class_names is None:  # the same for every split of the file
        labels = [_as_integers(arrays[f"{s}_labels"], name) for s in splits if f"{s}_labels" in arrays]
        class_names = _numbered(np.concatenate(labels), name)
    sources = [EncodedBytes(data[a:b], name, i) for i, (a, b) in enumerate(zip(offsets[:-1], offsets[1:]))]
    dataset = EncodedDataset(name, sources, arrays[f"{split}_labels"], class_names, image_size=image_size, channels=channels)
    return dataset if classes is None else dataset.with_classes(classes)


def _adapted(
    dataset: ArrayDataset, image_size: tuple[int, int] | None, channels: int | None, classes: Sequence[str] | None
) -> ImageDataset:
    """The dataset with the size, the channels and the classes asked for."""
    if classes is not None:
        dataset = dataset.with_classes(classes)
    old_channels, *old_size = dataset.image_shape
    channels, image_size = channels or old_channels, image_size or tuple(old_size)
    if (channels, *image_size) == dataset.image_shape:
        return dataset
    images = np.empty((len(dataset), *image_size, channels), dtype=np.uint8)
    for i, image in enumerate(dataset.images.numpy()):
        images[i] = fitted(Image.fromarray(image[..., 0] if old_channels == 1 else image), image_size, channels)
    return ArrayDataset(images, dataset.labels, dataset.class_names, name=dataset.name, soft_labels=dataset.soft_labels)


def class_counts(dataset: ImageDataset) -> Tensor:
    """Images of each class, int64 [K]."""
    return torch.bincount(dataset.labels, minlength=dataset.num_classes)


class ImageDataset(Dataset):
    """Labelled images of one size. A subclass says how to `read` one of them, and how to `_keep` some.

    Attributes
    ----------
    name : short and without folders, since it goes into files that are published
    class_names : list of str, K of them
    labels : int64 [N] on the CPU, in [0, K), known without decoding any image
    image_shape : (C, H, W)
    soft_labels : float32 [N, L] logits of the teacher that the images were made with (L its outputs), or None
    """

    def __init__(
        self,
        name: str,
        class_names: Sequence[str],
        labels: Tensor,
        image_shape: tuple[int, int, int],
        soft_labels: Tensor | None = None,
    ):
        self.name = name
        self.class_names = list(class_names)
        self.labels = _checked_labels(labels, len(self.class_names), name)
        self.image_shape = image_shape
        if soft_labels is not None and (soft_labels.ndim != 2 or len(soft_labels) != len(self.labels)):
            raise InputError(f"{name}: soft labels must be [{len(self.labels)}, K], got {list(soft_labels.shape)}")
        self.soft_labels = None if soft_labels is None else soft_labels.float()

    @abstractmethod
    def read(self, index: int) -> Tensor:
        """Image `index`, uint8 [C, H, W]."""

    @abstractmethod
    def _keep(self, indices: Tensor) -> None:
        """Forget all images but those at `indices`, int64 [M], in their order."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def nbytes(self) -> int:
        """Memory that `in_memory` takes, in bytes."""
        channels, height, width = self.image_shape
        return len(self) * channels * height * width

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """(float32 [C, H, W] in [0, 1], label)."""
        label = int(self.labels[index])  # an index out of range is an IndexError here
        return self.read(index).contiguous().float().div_(255), label

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """(float32 [B, C, H, W] in [0, 1], labels int64 [B])."""
        indices = _checked_indices(indices, len(self), self.name)
        images = torch.stack([self.read(i) for i in indices.tolist()])
        return images.float().div_(255), self.labels[indices]

    def subset(self, indices: Sequence[int] | Tensor) -> ImageDataset:
        """The images at `indices`, in that order, with their labels; class names stay. InputError for a bad index."""
        indices = _checked_indices(indices, len(self), self.name)
        part = copy.copy(self)
        part.labels = self.labels[indices]
        part.soft_labels = None if self.soft_labels is None else self.soft_labels[indices]
        part._keep(indices)
        return part

    def first_per_class(self, count: int) -> ImageDataset:
        """The first `count` images of each class, in the order of the dataset. InputError if a class has fewer."""
        if count < 1:
            raise InputError(f"{self.name}: the images of each class must be 1 or more, got {count}")
        counts = class_counts(self)  # [K]
        short = [f"{name!r} ({n})" for name, n in zip(self.class_names, counts.tolist()) if n < count]
        if short:
            shown = ", ".join(short[:10]) + (" …" if len(short) > 10 else "")
            raise InputError(f"{self.name} has fewer than {count} images of the classes {shown}: ask for fewer")
        by_class = self.labels.argsort(stable=True)  # [N]: all of class 0, then all of class 1 …
        place_in_class = torch.arange(len(self)) - (counts.cumsum(0) - counts)[self.labels[by_class]]  # [N]
        return self.subset(by_class[place_in_class < count].sort().values)

    def with_classes(self, names: Sequence[str]) -> ImageDataset:
        """The images of the classes `names`, with labels numbered in that order, and soft labels cut down to them."""
        chosen = torch.tensor(_class_positions(names, self.class_names, self.name))  # int64 [k]
        new_label = torch.full((self.num_classes,), -1)
        new_label[chosen] = torch.arange(len(chosen))
        part = self.subset((new_label[self.labels] >= 0).nonzero()[:, 0])
        if not len(part):
            raise InputError(f"{self.name} has no image of the classes {', '.join(names)}")
        part.class_names = list(names)
        part.labels = new_label[part.labels]
        if part.soft_labels is not None:
            if part.soft_labels.shape[1] != self.num_classes:
                raise InputError(
                    f"{self.name}: soft labels over {part.soft_labels.shape[1]} outputs cannot be cut down to some of "
                    f"its {self.num_classes} classes; load the dataset with all its classes"
                )
            part.soft_labels = part.soft_labels[:, chosen]
        return part

    def in_memory(self) -> ArrayDataset:
        """The same dataset with every image decoded, `nbytes` of them."""
        channels, height, width = self.image_shape
        images = torch.empty(len(self), height, width, channels, dtype=torch.uint8)
        for i in range(len(self)):
            images[i] = self.read(i).permute(1, 2, 0)
        return ArrayDataset(images, self.labels, self.class_names, name=self.name, soft_labels=self.soft_labels)


class ArrayDataset(ImageDataset):
    """Images in memory.

    Attributes
    ----------
    images : uint8 [N, H, W, C], C = 1 or 3
    """

    def __init__(
        self,
        images: np.ndarray | Tensor,
        labels: np.ndarray | Tensor | Sequence[int],
        class_names: Sequence[str] | None = None,
        *,
        name: str = "arrays",
        soft_labels: Tensor | None = None,
    ):
        """
        Parameters
        ----------
        images : uint8 [N, H, W, C] with C = 1 or 3, or [N, H, W] for grey; not copied where that can be avoided
        labels : integers [N]
        class_names : K names, so that labels are below K; None names the classes 0, 1, … up to the largest label

        Raises
        ------
        InputError
            A dtype, a shape or a label does not fit.
        """
        if not isinstance(images, Tensor):
            images = np.asarray(images)
        if images.dtype not in (torch.uint8, np.uint8):
            raise InputError(f"{name}: images must be uint8, got {images.dtype}; convert pixels to 0..255")
        if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)) or 0 in images.shape[1:]:
            raise InputError(
                f"{name}: images must be [N, H, W, C] with 1 or 3 channels, or [N, H, W], got {list(images.shape)}"
            )
        if not isinstance(images, Tensor):
            images = torch.from_numpy(np.require(images, requirements=["C", "W"]))
        images = images.cpu()
        labels = _as_integers(labels, name)
        if len(labels) != len(images):
            raise InputError(f"{name}: got {len(images)} images and {len(labels)} labels; expected one label an image")
        class_names = _numbered(labels, name) if class_names is None else class_names
        self.images = images if images.ndim == 4 else images[..., None]
        _, height, width, channels = self.images.shape
        super().__init__(name, class_names, labels, (channels, height, width), soft_labels)

    def read(self, index: int) -> Tensor:
        return self.images[index].permute(2, 0, 1)

    def _keep(self, indices: Tensor) -> None:
        self.images = self.images[indices]

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        indices = _checked_indices(indices, len(self), self.name)
        images = self.images[indices].permute(0, 3, 1, 2).contiguous()  # [B, C, H, W]
        return images.float().div_(255), self.labels[indices]

    def in_memory(self) -> ArrayDataset:
        return self


class EncodedDataset(ImageDataset):
    """Images in PNG, JPEG or another format of PIL's, decoded one at a time as they are asked for.

    What is not given is taken from the images: the size from the first one, grey or RGB from the first of each class.
    Pixels are taken as they are stored: the orientation in EXIF data is not applied, transparency is dropped.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[Path | EncodedBytes],
        labels: Tensor,
        class_names: Sequence[str],
        *,
        image_size: tuple[int, int] | None = None,
        channels: int | None = None,
        soft_labels: Tensor | None = None,
    ):
        _check_options(image_size, channels)
        labels = _checked_labels(labels, len(class_names), name)
        if not len(sources):
            raise InputError(f"{name} has no image")
        if len(labels) != len(sources):
            raise InputError(f"{name}: got {len(sources)} images and {len(labels)} labels; expected one label an image")
        self.sources = sources
        self._size_given, self._channels_given = image_size is not None, channels is not None
        self._first = sources[0]
        if channels is None:
            firsts = np.unique(labels.numpy(), return_index=True)[1]  # the first image of each class
            channels = 1 if all(header(sources[i])[0] in GREY_MODES for i in firsts) else 3
        height, width = image_size or header(sources[0])[1]
        super().__init__(name, class_names, labels, (channels, height, width), soft_labels)

    def read(self, index: int) -> Tensor:
        """Image `index`, uint8 [C, H, W]. InputError, naming the file, if it is damaged or does not fit the others."""
        source = self.sources[index]
        channels, height, width = self.image_shape
        with opened(source) as image:
            if not self._channels_given and channels == 1 and image.mode not in GREY_MODES:
                raise InputError(f"{source} is in colour, others of {self.name} are grey: give channels, 1 or 3")
            if not self._size_given and image.size != (width, height):
                raise InputError(
                    f"{source} is {image.height}x{image.width} pixels and {self._first} is {height}x{width}: "
                    f"give an image_size, to which all images of {self.name} are brought"
                )
            return torch.from_numpy(fitted(image, (height, width), channels)).permute(2, 0, 1)

    def _keep(self, indices: Tensor) -> None:
        self.sources = [self.sources[i] for i in indices.tolist()]


class FolderDataset(EncodedDataset):
    """A folder for each class, with image files in it or deeper; class folders may be links. Hidden files are ignored.

    Classes are in the order of their folders' names, as for torchvision's ImageFolder, or in that of `classes`.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        image_size: tuple[int, int] | None = None,
        channels: int | None = None,
        classes: Sequence[str] | None = None,
    ):
        """
        Parameters
        ----------
        root : the folder that holds the class folders
        image_size, channels, classes : as for `load_dataset`

        Raises
        ------
        InputError
            `root` is no folder or has no class folders, a class folder has no image, a class is not there.
        """
        root = Path(root).expanduser()
        if not root.is_dir():
            raise InputError(f"{root} is not a folder; expected one that holds a folder of images for each class")
        name = root.resolve().name
        folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not folders:
            loose = any(path.suffix.lower() in IMAGE_SUFFIXES for path in root.iterdir())
            found = "images, but no folders" if loose else "no folders"
            raise InputError(f"{root} holds {found}; expected a folder of images for each class, as {root}/cat/1.png")
        if set(folders) <= _NOT_CLASSES and not any(_has_images(root / folder) for folder in folders):
            if IMAGES in folders and (root / CARD).exists():
                raise InputError(
                    f"{root} was made by bnfuse and has lost its {MANIFEST}: restore it from a copy, or with "
                    "`bnfuse verify --repair`"
                )
            raise InputError(
                f"{root} holds {', '.join(folders)}, which are no classes: name the folder that holds the class folders, as "
                f"{root / folders[0]}"
            )
        if classes is not None:
            folders = [folders[k] for k in _class_positions(classes, folders, str(root))]
        files, labels = [], []
        for label, folder in enumerate(folders):
            found = image_files(root / folder)
            if not found:
                raise InputError(
                    f"{root / folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}): add some, or leave the "
                    "class out by removing the folder or naming the others as classes"
                )
            files += found
            labels += [label] * len(found)
        super().__init__(name, files, torch.tensor(labels), folders, image_size=image_size, channels=channels)


def _has_images(folder: Path) -> bool:
    """Directly in it."""
    return any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir())


class StoreDataset(EncodedDataset):
    """A synthetic dataset that `store.py` wrote, in the order of its manifest, with soft labels if it has them."""

    def __init__(self, root: str | Path, *, image_size: tuple[int, int] | None = None, channels: int | None = None):
        """InputError where `root` is no store, is damaged or has no image; an unfinished one is read with a warning."""
        contents = read_store(root)
        if not contents.complete:
            warnings.warn(f"{root} is not finished: {len(contents.entries)} images so far", stacklevel=3)
        super().__init__(
            contents.root.resolve().name,
            [contents.root / entry.file for entry in contents.entries],
            torch.tensor([entry.class_index for entry in contents.entries], dtype=torch.int64),
            contents.class_names,
            image_size=image_size,
            channels=channels,
            soft_labels=contents.soft_labels(),
        )


def _class_positions(names: Sequence[str], available: Sequence[str], where: str) -> list[int]:
    """Where each of `names` stands in `available`; an InputError if one is not there, or not just once."""
    names = list(names)
    shown = ", ".join(available[:20]) + (" …" if len(available) > 20 else "")
    if not names or len(set(names)) < len(names):
        raise InputError(f"{where}: classes must be different names, at least one, got {names}; it has {shown}")
    for name in names:
        if list(available).count(name) != 1:
            reason = "more than one class" if name in available else "no class"
            raise InputError(f"{where} has {reason} called {name!r}; it has {shown}")
    return [list(available).index(name) for name in names]


def _numbered(labels: np.ndarray, name: str) -> list[str]:
    """The names "0", "1", … of classes that have none, up to the largest label."""
    largest = int(labels.max(initial=-1))
    if largest >= max(len(labels), _MOST_CLASSES):
        raise InputError(
            f"{name}: the largest of {len(labels)} labels is {largest}: number the classes from 0 without gaps, or give "
            "class_names"
        )
    return [str(k) for k in range(largest + 1)]


def _as_integers(labels: np.ndarray | Tensor | Sequence[int], name: str) -> np.ndarray:
    """Labels as an int64 array [N]."""
    labels = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if labels.ndim != 1 or (labels.dtype.kind not in "iu" and len(labels)):
        raise InputError(f"{name}: labels must be whole numbers [N], got {labels.dtype} {list(labels.shape)}")
    return labels.astype(np.int64)


def _checked_labels(labels: np.ndarray | Tensor | Sequence[int], num_classes: int, name: str) -> Tensor:
    """Labels as int64 [N], each in [0, num_classes)."""
    labels = torch.from_numpy(_as_integers(labels, name))
    wrong = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(wrong):
        index = int(wrong[0])
        raise InputError(
            f"{name}: image {index} has label {int(labels[index])}, expected 0 to {num_classes - 1} "
            f"for {num_classes} classes; {len(wrong)} labels in all are out of range"
        )
    return labels


def _checked_indices(indices: Sequence[int] | Tensor, length: int, name: str) -> Tensor:
    """Indices as int64 [M], each in [0, length)."""
    indices = torch.as_tensor(indices)
    if indices.numel() == 0:
        indices = indices.long()  # an empty list becomes a float tensor
    if indices.ndim != 1 or indices.dtype.is_floating_point or indices.dtype == torch.bool:
        raise InputError(f"{name}: indices must be whole numbers [M], got {indices.dtype} {list(indices.shape)}")
    indices = indices.long().cpu()
    if len(indices) and not (0 <= int(indices.min()) and int(indices.max()) < length):
        raise InputError(f"{name}: indices run from {int(indices.min())} to {int(indices.max())}, expected 0 to {length - 1}")
    return indices


def _check_options(image_size: tuple[int, int] | None, channels: int | None) -> None:
    if channels not in (None, 1, 3):
        raise InputError(f"channels must be 1 (grey) or 3 (RGB), got {channels!r}")
    if image_size is not None and (
        isinstance(image_size, int) or len(image_size) != 2 or not all(isinstance(n, int) and n > 0 for n in image_size)
    ):
        raise InputError(f"image_size must be (height, width), two positive whole numbers, got {image_size!r}")
