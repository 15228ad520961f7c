"""A synthetic dataset being written: files appear whole or not at all, and a killed run continues where it stopped.

Work comes in *units*, one optimised batch each. A unit counts once its lines are in the manifest, which is the last
step of its commit; whatever a killed process left of an uncommitted unit is removed when the store is opened again.
Nothing in a finished store depends on the time or on the processes, so a run that was killed and resumed, by however many
ranks, ends with the same bytes as one that never was.

Several ranks write to one store without a word between them: the first, which opened it, to manifest.jsonl, every other one
to a shard of its own. A manifest is held open and locked by the one that writes to it. Whoever opens the store next, and
`finish`, folds the shards in: the whole manifest is written anew beside the old one and takes its place, then the shards are
removed. A process killed in between leaves lines that are in both, which count once.

What the files are and how they are read is in `manifest`; what is in the images is for `synthesis` to decide.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from .card import CARD, card_bytes, identity, read_card, refuse_other_identity
from .errors import InputError
from .files import atomic_path, is_temporary, lock, sync, write_atomically
from .manifest import (
    CHECKPOINTS,
    IMAGES,
    MANIFEST,
    SOFT_LABELS,
    Entry,
    StoreContents,
    checkpoint_file,
    class_counts,
    class_folder,
    files_in,
    image_file,
    image_id,
    is_store,
    read_entries,
    read_manifest,
    read_store,
    refuse_missing_files,
    shard_file,
    shards_in,
    soft_label_file,
    some,
    verify,
)

# with what a user of stores needs for reading them
__all__ = ["ImageRecord", "Store", "StoreContents", "is_store", "read_store", "verify"]


@dataclass(frozen=True)
class ImageRecord:
    """What is recorded of one synthetic image.

    Attributes
    ----------
    class_index : position of its class in the store's class names
    index : number of the image within its class, from 0
    seed : of the noise that it was made from
    losses : the terms of the objective at its last step
    """

    class_index: int
    index: int
    seed: int
    losses: dict[str, float]


class Store:
    """A synthetic dataset that is being written. Made by `Store.open`, to be closed, best by a `with` block.

    One process opens a store; under torchrun, further ranks `join` it.

    Attributes
    ----------
    root : Path
    card : dict, what card.json holds
    class_names : list of str
    done : set of int, the numbers of the units that are wholly committed
    counts : list of int, the images of each class that were there when the store was opened, and those committed since
    """

    @classmethod
    def open(cls, root: str | Path, *, card: dict, class_names: Sequence[str], counts: Sequence[int] | None = None) -> Store:
        """Create the store `root`, or resume it where it was begun with the same card.

        Parameters
        ----------
        root : the folder; it is made if need be
        card : what the dataset is made from (configuration, provenance of teacher and statistics), in JSON's types.
            Together with the class names, the counts and the versions of bnfuse and torch it is the store's identity.
        class_names : one name a class; any text, also the same twice
        counts : images of each class that the finished dataset shall have, if known; `finish` holds it to them

        Raises
        ------
        InputError
            The folder holds something else, or a dataset with another card; another process is writing to it; its
            manifest is damaged; it cannot be written to.
        """
        root = Path(root).expanduser()
        given = identity(card, class_names, counts)
        with writing(root, "Nothing that was there before is lost."):
            existed = root.is_dir()
            if existed:
                _refuse_foreign_folder(root)
            root.mkdir(parents=True, exist_ok=True)
            # The manifest is held open and locked for as long as the store is: no lock file is left behind.
            manifest = open_locked(root, MANIFEST, create=True)
        store = cls(root, MANIFEST, manifest)
        try:
            with writing(root, "Nothing that was there before is lost."):
                if not existed:
                    sync(root.parent)
                store._resume(given)
        except BaseException:
            store.close()
            raise
        return store

    def _resume(self, given: dict) -> None:
        if (self.root / CARD).exists():
            self._take_card(read_card(self.root))
            refuse_other_identity(self.root, given, self.card)
        else:
            self._take_card({**given, "complete": False})
            write_atomically(self.root / CARD, card_bytes(self.card))
        with self._shards() as shards:
            if shards and not self.complete:
                entries = read_entries(self.root, self.card)
                refuse_missing_files(self.root, entries)
                self._fold(entries, shards)
            else:
                entries, size = read_manifest(self.root, self.card)
                refuse_missing_files(self.root, entries)
                os.ftruncate(self._manifest, size)
                os.fsync(self._manifest)
        self._know(entries)
        self._remove_uncommitted()

    @classmethod
    def join(cls, root: str | Path, rank: int, done: Sequence[int]) -> Store:
        """Write to a store that another process has opened, as its rank `rank` ≥ 1: into a shard of the manifest.

        Parameters
        ----------
        root : the folder
        rank : no other process may join with the same one
        done : the units that were there when the store was opened, as that process found them

        Raises
        ------
        InputError
            There is no such store, it cannot be written to, or another process has joined with this rank.
        """
        root = Path(root).expanduser()
        card, name = read_card(root), shard_file(rank)
        with writing(root, "Nothing that was there before is lost."):
            shard = open_locked(root, name, create=True)
        if os.fstat(shard).st_size:
            os.close(shard)
            raise InputError(f"{root / name} holds images of an earlier run: stop all ranks and run the same command again")
        store = cls(root, name, shard)
        store._take_card(card)
        store._know([])
        store.done = set(done)
        return store

    def __init__(self, root: Path, name: str, manifest: int):
        self.root = root
        self._name = name  # of the manifest, or of the shard, that this process writes to
        self._manifest = manifest  # its file descriptor, locked; -1 once closed
        self._read: dict[Path, int] = {}  # bytes of each shard that `committed_by_others` has counted, and
        self._others = 0  # the lines in them

    def _take_card(self, card: dict) -> None:
        self.card, self.class_names = card, list(card["class_names"])

    def _know(self, entries: Sequence[Entry]) -> None:
        """Takes in what is committed."""
        self.done = {entry.unit for entry in entries}
        self.counts = class_counts(entries, len(self.class_names))
        self._ids = {entry.id for entry in entries}
        self._has_soft_labels = entries[0].soft_labels is not None if entries else None
        self._image_shape = _png_shape(self.root / entries[0].file) if entries else None  # (C, H, W)

    @contextmanager
    def _shards(self) -> Iterator[list[Path]]:
        """The shards, locked, so that nobody adds to them. InputError where one is still being written."""
        paths = shards_in(self.root)
        with ExitStack() as held:
            for path in paths:
                held.callback(os.close, open_locked(self.root, path.name))
            yield paths

    def _fold(self, entries: Sequence[Entry], shards: Sequence[Path]) -> None:
        """Brings manifest and shards, which hold `entries`, into one manifest in the order of the units."""
        replaced = replace_manifest(self.root, entries)
        if replaced is not None:
            os.close(self._manifest)
            self._manifest = replaced
        for path in shards:
            path.unlink()
        if shards:
            sync(self.root)

    def committed_by_others(self) -> int:
        """The images that other ranks have committed since the store was opened."""
        for path in shards_in(self.root):
            with open(path, "rb") as file:
                file.seek(self._read.get(path, 0))
                data = file.read()
            self._read[path] = self._read.get(path, 0) + len(data)
            self._others += data.count(b"\n")
        return self._others

    @property
    def complete(self) -> bool:
        return self.card["complete"]

    def commit(self, unit: int, images: Tensor, records: Sequence[ImageRecord], soft_labels: Tensor | None = None) -> None:
        """Write one unit to disk; when this returns, the unit is there for good.

        The order is what makes it safe: every PNG, then the soft labels, each written under a temporary name, flushed
        and renamed; then the folders are flushed; then the manifest gets the unit's lines, in one write.

        Parameters
        ----------
        unit : number of the unit, not in `done`
        images : uint8 [n, C, H, W], C = 1 or 3, on any device
        records : n of them, in the order of the images
        soft_labels : logits [n, K] of any floating dtype, kept as float16; for all units of a store or for none

        Raises
        ------
        InputError
            An argument does not fit, the store is closed or complete, or the disk refuses; then the store is as before.
        """
        self._check_unit(unit, images, records, soft_labels)
        images = images.detach().cpu()
        with writing(self.root, f"The {len(self._ids)} images committed so far are safe."):
            labels_sha256 = None
            digests = []
            for image, record in zip(images, records):
                path = self.root / image_file(record.class_index, record.index, self.class_names)
                data = png_bytes(image)
                write_atomically(path, data, sync_folder=False)
                digests.append(hashlib.sha256(data).hexdigest())
            if soft_labels is not None:
                path = self.root / soft_label_file(unit)
                data = soft_label_bytes(soft_labels)
                write_atomically(path, data, sync_folder=False)
                labels_sha256 = hashlib.sha256(data).hexdigest()

            entries = [
                make_entry(unit, len(records), row, record, digest, labels_sha256, self.class_names)
                for row, (record, digest) in enumerate(zip(records, digests))
            ]
            folders = {(self.root / entry.file).parent for entry in entries} | {self.root / IMAGES, self.root}
            if soft_labels is not None:
                folders.add(self.root / SOFT_LABELS)
            for folder in sorted(folders):
                sync(folder)
            self._append("".join(entry.to_line() for entry in entries).encode())

        self.done.add(unit)
        self._ids.update(entry.id for entry in entries)
        for entry in entries:
            self.counts[entry.class_index] += 1
        self._has_soft_labels = soft_labels is not None
        self._image_shape = tuple(images.shape[1:])
        with suppress(OSError):  # whoever opens the store next tries again
            (self.root / checkpoint_file(unit)).unlink(missing_ok=True)

    def finish(self) -> None:
        """Check that the dataset is whole and mark its card complete, with the images of each class in `counts`.

        Raises
        ------
        InputError
            There is no image, a class has gaps in its numbering, the counts given to `open` are not reached, a file
            that the manifest names is gone, or another rank is still writing.
        """
        self._check_open()
        if self.complete:
            return
        with writing(self.root, "The images committed so far are safe."), self._shards() as shards:
            entries = read_store(self.root).entries
            self._fold(entries, shards)
            self._know(entries)
        if not entries:
            raise InputError(f"{self.root} holds no image yet: commit at least one unit before it is finished")
        wanted = self.card["counts"]
        if wanted is not None and wanted != self.counts:
            short = [
                f"class {k} ({self.class_names[k]!r}): {have} of {want}"
                for k, (have, want) in enumerate(zip(self.counts, wanted))
                if have != want
            ]
            raise InputError(f"{self.root} is not whole, commit what is missing: {some(short)}")
        last = [-1] * len(self.class_names)
        for entry in entries:
            last[entry.class_index] = max(last[entry.class_index], entry.index)
        gaps = [f"{k} ({self.class_names[k]!r})" for k, n in enumerate(self.counts) if n != last[k] + 1]
        if gaps:
            raise InputError(f"{self.root}: a class's images must be numbered 0, 1, 2 …; gaps in class {some(gaps)}")
        card = {**self.card, "counts": self.counts, "complete": True}
        with writing(self.root, f"The {len(entries)} images committed so far are safe."):
            self._remove_uncommitted()
            if (self.root / CHECKPOINTS).is_dir() and not any((self.root / CHECKPOINTS).iterdir()):
                (self.root / CHECKPOINTS).rmdir()
            write_atomically(self.root / CARD, card_bytes(card))
        self.card = card

    def close(self) -> None:
        """Let other processes have the store. What is committed is on disk already."""
        if self._manifest >= 0:
            os.close(self._manifest)
            self._manifest = -1

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._manifest < 0:
            raise InputError(f"the store {self.root} is closed: open it again with Store.open")

    def _check_unit(self, unit: int, images: Tensor, records: Sequence[ImageRecord], soft_labels: Tensor | None) -> None:
        self._check_open()
        if self.complete:
            raise InputError(f"{self.root} is complete: more images need a store of their own")
        if unit < 0 or unit in self.done:
            reason = "negative" if unit < 0 else "committed already"
            raise InputError(f"unit {unit} is {reason}; expected the number of a unit that is not in Store.done")
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
            raise InputError(f"images must be uint8 [n, C, H, W] with 1 or 3 channels, got {images.dtype} {list(images.shape)}")
        if self._image_shape not in (None, tuple(images.shape[1:])):
            raise InputError(f"the store's images are {list(self._image_shape)}, got {list(images.shape[1:])}")
        if len(records) != len(images):
            raise InputError(f"got {len(images)} images and {len(records)} records; expected one record an image")
        ids = set()
        for record in records:
            if not 0 <= record.class_index < len(self.class_names) or record.index < 0:
                raise InputError(f"{record} does not fit a store of {len(self.class_names)} classes")
            name = image_id(record.class_index, record.index, len(self.class_names))
            if name in ids or name in self._ids:
                raise InputError(f"class {record.class_index} has an image {record.index} already; number them afresh")
            ids.add(name)
        if self._has_soft_labels not in (None, soft_labels is not None):
            raise InputError(f"unit {unit}: soft labels must come with all units of {self.root}, or with none")
        if soft_labels is not None:
            if soft_labels.ndim != 2 or len(soft_labels) != len(images) or not soft_labels.is_floating_point():
                raise InputError(
                    f"soft labels must be floating-point logits [{len(images)}, K], "
                    f"got {soft_labels.dtype} {list(soft_labels.shape)}"
                )
            if not soft_labels.to(torch.float16).isfinite().all():
                raise InputError("soft labels must be finite in float16 (at most 65504); shift or scale the logits")

    def _append(self, lines: bytes) -> None:
        """Add a unit's lines to the manifest and flush them; on failure the manifest is as it was."""
        size = os.fstat(self._manifest).st_size
        try:
            written = os.write(self._manifest, lines)
            if written < len(lines):  # how a full disk shows
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.root / self._name))
            os.fsync(self._manifest)
        except BaseException:
            try:
                os.ftruncate(self._manifest, size)
            except OSError:
                self.close()  # opening the store again repairs it; another commit here would not
            raise

    def _remove_uncommitted(self) -> None:
        """Remove what a killed or failed commit left: temporary files, images and soft labels that the manifest lacks, and
        checkpoints of units that it has.

        Only files named as the store names its own are touched.
        """
        images = re.compile(r"\d+-\d{6,}\.png")
        for k, name in enumerate(self.class_names):
            folder = self.root / IMAGES / class_folder(k, name, len(self.class_names))
            for path in files_in(folder):
                if images.fullmatch(path.name) and path.stem not in self._ids or is_temporary(path):
                    path.unlink()
        for path in files_in(self.root / SOFT_LABELS):
            unit = re.fullmatch(r"(\d{6,})\.safetensors", path.name)
            if unit and (int(unit[1]) not in self.done or not self._has_soft_labels) or is_temporary(path):
                path.unlink()
        for path in files_in(self.root / CHECKPOINTS):
            unit = re.fullmatch(r"(\d{6,})\.safetensors", path.name)
            if unit and int(unit[1]) in self.done or is_temporary(path):
                path.unlink()
        for path in files_in(self.root):
            if is_temporary(path):
                path.unlink()


def write_store(images: Tensor, labels: Tensor, class_names: Sequence[str], root: str | Path) -> None:
    """Finished images as a dataset of their own, in their order, so that a teacher can label them as synthetic ones.

    Parameters
    ----------
    images : uint8 [N, C, H, W]
    labels : int64 [N]
    root : its folder, which is made
    """
    counts = [0] * len(class_names)
    records = []
    for label in labels.tolist():
        records.append(ImageRecord(label, counts[label], seed=0, losses={}))
        counts[label] += 1
    with Store.open(root, card={}, class_names=class_names, counts=counts) as store:
        store.commit(0, images, records)
        store.finish()


def make_entry(
    unit: int,
    unit_size: int,
    row: int,
    record: ImageRecord,
    sha256: str,
    labels_sha256: str | None,
    class_names: Sequence[str],
) -> Entry:
    """The manifest's line for the image that is number `row` of its unit."""
    soft_labels = None
    if labels_sha256 is not None:
        soft_labels = {"file": soft_label_file(unit), "row": row, "sha256": labels_sha256}
    return Entry(
        id=image_id(record.class_index, record.index, len(class_names)),
        file=image_file(record.class_index, record.index, class_names),
        class_index=int(record.class_index),
        class_name=class_names[record.class_index],
        index=int(record.index),
        seed=int(record.seed),
        unit=int(unit),
        unit_size=unit_size,
        losses={name: float(value) for name, value in record.losses.items()},
        sha256=sha256,
        soft_labels=soft_labels,
    )


def replace_manifest(root: Path, entries: Sequence[Entry]) -> int | None:
    """Makes manifest.jsonl hold `entries` in the order of their units; None where it does already.

    Returns the new manifest's file descriptor. It is locked before it takes the place of the old one, so that whoever has
    locked the old one may let it go, and no other process can come between.
    """
    path = root / MANIFEST
    lines = "".join(entry.to_line() for entry in sorted(entries, key=lambda entry: entry.unit)).encode()
    if path.read_bytes() == lines:
        return None
    descriptor = -1
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(lines)
            descriptor = open_locked(root, temporary.name)
    except BaseException:
        if descriptor >= 0:
            os.close(descriptor)
        raise
    return descriptor


@contextmanager
def writing(root: Path, consolation: str) -> Iterator[None]:
    """Turns the operating system's refusals into an InputError that names the path and says what became of the rest."""
    try:
        yield
    except OSError as error:
        remedy = {
            errno.ENOSPC: "free some space",
            errno.EDQUOT: "free some of the quota",
            errno.EACCES: "make it writable",
            errno.EPERM: "make it writable",
            errno.EROFS: "choose an --out that is not read-only",
        }.get(error.errno, "mend that")
        raise InputError(
            f"cannot write {error.filename or root}: {error.strerror or error}. {consolation} "
            f"To go on, {remedy} and run the same command again."
        ) from error


def open_locked(root: Path, name: str, *, create: bool = False) -> int:
    """Opens a manifest or a shard for appending, and locks it until it is closed, or its process ends.

    Raises InputError where another process has it, OSError where it cannot be opened.
    """
    path = root / name
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | (os.O_CREAT if create else 0), 0o666)
        try:
            _lock(descriptor, root, name)
            # Another process may have put a new manifest in the place of this one before it let go of the lock.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, root: Path, name: str) -> None:
    taken = f"another process is writing to {root} ({name} is locked): wait until it ends, stop it, or choose another --out"
    try:
        if lock(descriptor, taken):
            return
    except OSError as error:
        raise InputError(f"cannot lock {root / name}: {error.strerror}; choose another --out") from error
    warnings.warn(f"{root}: no locks on this file system; see to it that no second process writes", stacklevel=5)


def _refuse_foreign_folder(root: Path) -> None:
    """A folder may become a store if it is empty, is one, or is what a process killed in `open` has left."""
    if (root / CARD).exists() and is_store(root):
        return
    ours = {path.name for path in root.iterdir() if is_temporary(path)}
    if is_store(root) and not (root / MANIFEST).stat().st_size:
        ours.add(MANIFEST)
    others = sorted({path.name for path in root.iterdir()} - ours)
    if others:
        raise InputError(
            f"{root} is not empty and is not a bnfuse dataset (it holds {some(others)}): choose another --out, or empty it"
        )


def png_bytes(image: Tensor) -> bytes:
    """uint8 [C, H, W] → a PNG file's bytes."""
    pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)  # [H, W] or [H, W, 3]
    buffer = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def soft_label_bytes(logits: Tensor) -> bytes:
    """Floating [n, K] → a safetensors file's bytes."""
    return safetensors.torch.save({"logits": logits.detach().to("cpu", torch.float16).contiguous()})


def _png_shape(path: Path) -> tuple[int, int, int]:
    """(C, H, W) from a PNG file's header."""
    try:
        with Image.open(path) as image:
            return len(image.getbands()), image.height, image.width
    except OSError as error:
        raise InputError(f"{path} is not a PNG file: restore it, or delete the dataset") from error
