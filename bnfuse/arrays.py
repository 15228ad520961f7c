"""Datasets that come as plain arrays: scikit-learn's digits, CIFAR-10, npz files. `datasets` makes datasets of them."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .errors import InputError

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# what numpy raises for something else than an .npz file, a damaged one, or one with pickled objects
_NPZ_ERRORS = (OSError, ValueError, EOFError, TypeError, AttributeError, RuntimeError, zipfile.BadZipFile, zlib.error)


def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 8, 8] and labels [N] of one split, or of all if it is empty."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("digits come with scikit-learn, which is not installed: pip install scikit-learn") from error
    found = load_digits()
    images, labels = np.round(found.images * (255 / 16)).astype(np.uint8), found.target  # from 0..16
    if not split:
        return images, labels
    shuffle = np.random.RandomState(0).permutation  # unlike newer generators, the same in every version of numpy
    test = np.zeros(len(labels), dtype=bool)
    for k in range(10):
        members = np.flatnonzero(labels == k)
        test[shuffle(members)[: round(0.2 * len(members))]] = True
    chosen = test if split == "test" else ~test
    return images[chosen], labels[chosen]


def cifar10(split: str, download: bool) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 32, 32, 3] and labels [N] of one split, or of all if it is empty."""
    if not split:
        return tuple(np.concatenate(arrays) for arrays in zip(cifar10("train", download), cifar10("test", download)))
    folders = [Path.home() / ".cache" / "bnfuse"]
    looked_for = []
    if os.environ.get("BNFUSE_DATA"):
        folders.insert(0, Path(os.environ["BNFUSE_DATA"]).expanduser())
        lossless = folders[0] / f"cifar10_lossless_{split}.npz"
        if lossless.is_file():
            arrays = read_npz(lossless)
            require(arrays, ("images", "labels"), lossless)
            return arrays["images"], arrays["labels"]
        looked_for.append(lossless)
    for folder in folders:
        copy_of_torchvision = folder / "cifar-10-batches-py"
        if copy_of_torchvision.is_dir():
            return _torchvision_cifar10(folder, split, download=False)
        looked_for.append(copy_of_torchvision)
    if download:
        return _torchvision_cifar10(folders[0], split, download=True)
    places = "\n".join(f"  {path}" for path in looked_for)
    raise InputError(
        f"CIFAR-10 ({split}) is not on this machine; looked for\n{places}\n"
        "Allow the download (download=True, --download), or set BNFUSE_DATA to the folder that holds one of these."
    )


def _torchvision_cifar10(root: Path, split: str, download: bool) -> tuple[np.ndarray, np.ndarray]:
    """torchvision's copy. Its files are pickles, which torchvision opens only if their MD5 sums are the known ones."""
    try:
        from torchvision.datasets import CIFAR10
    except (ImportError, RuntimeError) as error:  # RuntimeError: one that was built for another torch
        raise InputError(
            f"CIFAR-10 in {root} is read with torchvision, which cannot be imported ({error}): install the one that "
            "belongs to this torch, or set BNFUSE_DATA to a folder with cifar10_lossless_train.npz and _test.npz"
        ) from error
    try:
        part = CIFAR10(str(root), train=split == "train", download=download)
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"CIFAR-10 cannot be {'downloaded to' if download else 'read from'} {root}: {error}. "
            f"Delete {root / 'cifar-10-batches-py'} if it is there, and download it again (download=True, --download)"
        ) from error
    return part.data, np.asarray(part.targets)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Every array of the file; none is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except _NPZ_ERRORS as error:
        raise InputError(f"{path} cannot be read as an .npz file of plain arrays: {error}; write it again") from error


def require(arrays: dict[str, np.ndarray], keys: Sequence[str], path: Path) -> None:
    """InputError unless the arrays, read from `path`, have these keys."""
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}; it holds {names(arrays)}")


def names(arrays: dict[str, np.ndarray]) -> str:
    return ", ".join(arrays) or "nothing"
