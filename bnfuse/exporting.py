"""A finished dataset in the forms that others load: WebDataset tar shards, Hugging Face parquet, a plain image folder.

An export is made in a hidden folder beside its place, read back, and only then named: what bears the name is whole. The
PNG files go over byte for byte, each held against its sha256 in the manifest on the way; the same dataset exported twice
with the same arguments is the same bytes.

Of what `relabel` made, one logit vector an image becomes a field of each sample. Views do not: hundreds of them an image, each
perhaps mixed with another image, are nothing that a sample read by itself could show. Their files go along as they are.
"""

from __future__ import annotations

import filecmp
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import safetensors
import torch
from safetensors.torch import save as safetensors_bytes
from tqdm import tqdm

from .card import CARD, card_bytes
from .errors import InputError
from .files import locked_folder, sync
from .labels import LABELS, RELABEL, Labels, images_digest
from .manifest import Entry, StoreContents, read_store
from .readme import readme

FORMATS = ("webdataset", "parquet", "imagefolder")
IDS = "ids.json"  # beside exported views: the image that each number in their `index` means
_ROWS_AT_ONCE = 100  # images of a parquet file's row group, which a reader takes whole


@dataclass(frozen=True)
class ExportResult:
    """What was written: the folder, its images, its files and their bytes."""

    out: Path
    images: int
    files: int
    bytes: int


def export(
    dataset: str | Path,
    out: str | Path,
    format: str,
    *,
    labels: Labels | None = None,
    images_per_shard: int = 2000,
    seed: int = 0,
    progress: bool = False,
) -> ExportResult:
    """Writes a finished dataset in another format.

    Parameters
    ----------
    dataset : folder of a finished store
    out : folder to make; it must not be there, or be empty
    format : ``webdataset``, tar shards whose samples have the keys ``png``, ``cls``, ``json`` and, with soft labels,
        ``logits.npy``; ``parquet``, as Hugging Face's `datasets` has it, with the columns ``image``, ``label`` and
        ``logits``; ``imagefolder``, a folder for each class below ``train``, and beside it ``soft_labels``, a file a class
    labels : of this dataset, from `relabel`; None leaves out whatever there are. Plain ones take the place of the dataset's own
        soft labels. Labelled views are copied into ``relabel``, where `Labels` opens them, and ``ids.json`` beside them lists
        the ids of the images in the order of their ``index``; the id of a sample is its file's name
    images_per_shard : images of a tar or parquet file
    seed : of the order in which images are dealt to shards, which are read in sequence: mixed, so that a reader's shuffle
        buffer finds all classes

    Returns
    -------
    ExportResult

    Raises
    ------
    InputError : the dataset is unfinished or damaged, the labels are of other images, `out` is taken, a library is missing, or
        what was written does not read back; then nothing is left at `out`
    """
    if format not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if images_per_shard < 1:
        raise InputError(f"images_per_shard must be at least 1, got {images_per_shard}")
    write, read = _FORMATS[format]()
    contents = read_store(dataset)
    if not contents.complete:
        raise InputError(f"{dataset} is not finished ({len(contents.entries)} images so far): finish it, then export it")
    logits = None
    if labels is not None:
        labels.check(images_digest(contents.entries))
        if labels.plain:
            logits = dict(zip((entry.id for entry in contents.entries), labels.logits().half().numpy()))
    entries = sorted(contents.entries, key=lambda entry: entry.id)
    if format != "imagefolder":
        order = torch.randperm(len(entries), generator=torch.Generator().manual_seed(seed))
        entries = [entries[i] for i in order]
    out = Path(out).expanduser().absolute()
    if contents.root.resolve() in out.resolve().parents:
        raise InputError(f"{out} lies in the dataset that is exported, {contents.root}: choose another folder")
    bar = tqdm(total=len(entries), desc=f"exporting {format}", unit="img", disable=not progress)
    with bar, _folder_made_whole(out) as folder:
        write(_Samples(contents, entries, bar.update, logits), folder, images_per_shard)
        about = {"format": format, "images": len(entries)}
        if labels is not None:
            about["labels"] = {name: labels.card[name] for name in ("teacher", "config")}
            if not labels.plain:
                _copy_views(labels, [entry.id for entry in contents.entries], folder / RELABEL)
        (folder / CARD).write_bytes(card_bytes({**contents.card, "export": about}))
        (folder / "README.md").write_bytes(readme(contents, format, labels).encode())
        _refuse_other_images(entries, read(folder), out)
        files = [path for path in folder.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
    return ExportResult(out, len(entries), len(files), size)


@contextmanager
def _folder_made_whole(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, which takes its place once the block is through. A killed one is replaced by the next."""
    if out.is_symlink() or os.path.ismount(out):
        raise InputError(f"{out} is a link or a mount point, whose place no folder can take: export into a new folder in it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already and is not an empty folder: choose another place, or remove it")
    hidden = out.with_name(f".{out.name}.bnfuse-export")
    hidden.mkdir(parents=True, exist_ok=True)
    with locked_folder(hidden, f"another process is exporting to {out}: wait until it ends, or choose another place"):
        try:
            for path in hidden.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            yield hidden
            for path in [*hidden.rglob("*"), hidden]:
                sync(path)
            hidden.rename(out)
            sync(out.parent)
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise


def _refuse_other_images(entries: list[Entry], found: Iterator[tuple[int, str]], out: Path) -> None:
    """InputError unless the images read back, (class index, sha256) each, are those of the manifest, in its order."""
    found, wanted = list(found), [(entry.class_index, entry.sha256) for entry in entries]
    if found != wanted:
        right = sum(a == b for a, b in zip(found, wanted))
        raise InputError(
            f"of {len(wanted)} images {right} read back as they were written ({len(found)} found): the disk of {out} is "
            "damaged, export to another one"
        )


def _copy_views(labels: Labels, ids: list[str], folder: Path) -> None:
    """The files of labelled views, as they are, and the ids of the images that they number. InputError if some are damaged."""
    folder.mkdir()
    files = [labels.root / LABELS]
    for number in range(labels.passes):
        files += labels.views(number).files  # opening them says whether all are there
    for path in files:
        shutil.copyfile(path, folder / path.name)
        if not filecmp.cmp(path, folder / path.name, shallow=False):
            raise InputError(f"{path} did not read back as it was written: export to another disk")
    (folder / IDS).write_text(json.dumps(ids) + "\n")


class _Samples:
    """The images of a store in a given order, each held against the manifest as it is read.

    Yields (entry, the PNG file's bytes, logits float16 [K] or None). `logits` has those of each image by its id; None, they are
    the store's own.
    """

    def __init__(
        self,
        contents: StoreContents,
        entries: list[Entry],
        report: Callable[[], object],
        logits: dict[str, np.ndarray] | None = None,
    ):
        self.contents, self.entries, self.report, self.others = contents, entries, report, logits
        self.classes = contents.class_names
        self.outputs = 0  # K of the logits
        self._whole: set[str] = set()  # files of soft labels that have been held against their sha256
        if logits is not None or contents.has_soft_labels:
            self.outputs = len(self._logits(entries[0]))

    def __len__(self) -> int:
        return len(self.entries)

    def shards(self, size: int) -> Iterator[Iterator[tuple[Entry, bytes, np.ndarray | None]]]:
        for start in range(0, len(self.entries), size):
            yield self._read(self.entries[start : start + size])

    def _read(self, entries: list[Entry]) -> Iterator[tuple[Entry, bytes, np.ndarray | None]]:
        for entry in entries:
            data = self._whole_file(entry.file, entry.sha256)
            yield entry, data, self._logits(entry) if self.outputs else None
            self.report()

    def _logits(self, entry: Entry) -> np.ndarray:
        """float16 [K]: one row of its unit's file, which is read whole only once."""
        if self.others is not None:
            return self.others[entry.id]
        file, row = entry.soft_labels["file"], entry.soft_labels["row"]
        if file not in self._whole:
            self._whole_file(file, entry.soft_labels["sha256"])
            self._whole.add(file)
        try:
            with safetensors.safe_open(self.contents.root / file, "pt") as opened:
                return opened.get_slice("logits")[row : row + 1][0].to(torch.float16).numpy()
        except (OSError, IndexError, safetensors.SafetensorError) as error:
            raise InputError(f"{self.contents.root / file} has no row {row} of soft labels: {error}") from error

    def _whole_file(self, file: str, sha256: str) -> bytes:
        data = (self.contents.root / file).read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise InputError(
                f"{self.contents.root / file} has changed: its sha256 is not the one in the manifest. Restore the file, "
                "or make it again, before the dataset is exported"
            )
        return data


# ---- WebDataset: https://github.com/webdataset/webdataset ----


def _webdataset():
    return _write_tars, _read_tars


def _write_tars(samples: _Samples, folder: Path, size: int) -> None:
    for number, shard in enumerate(samples.shards(size)):
        with tarfile.open(folder / f"train-{number:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for entry, png, logits in shard:
                about = {"id": entry.id, "class_index": entry.class_index, "class_name": entry.class_name}
                about |= {"seed": entry.seed, "sha256": entry.sha256}
                _add(tar, f"{entry.id}.png", png)
                _add(tar, f"{entry.id}.cls", str(entry.class_index).encode())
                _add(tar, f"{entry.id}.json", json.dumps(about).encode())
                if logits is not None:
                    buffer = io.BytesIO()
                    np.save(buffer, logits)
                    _add(tar, f"{entry.id}.logits.npy", buffer.getvalue())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A file without time and owner, so that the same images make the same tar."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _read_tars(folder: Path) -> Iterator[tuple[int, str]]:
    for path in sorted(folder.glob("train-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".png"):
                    sha256 = hashlib.sha256(tar.extractfile(member).read()).hexdigest()
                elif member.name.endswith(".cls"):
                    yield int(tar.extractfile(member).read()), sha256


# ---- parquet: as Hugging Face's `datasets` writes it ----


def _parquet():
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise InputError("--format parquet needs pyarrow: pip install 'bnfuse[parquet]'") from error
    return _write_parquet, _read_parquet


def _write_parquet(samples: _Samples, folder: Path, size: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "label": pa.int64(),
    }
    features = {"image": {"_type": "Image"}, "label": {"names": samples.classes, "_type": "ClassLabel"}}
    if samples.outputs:
        columns["logits"] = pa.list_(pa.float16(), samples.outputs)
        logit = {"dtype": "float16", "_type": "Value"}
        features["logits"] = {"feature": logit, "length": samples.outputs, "_type": "List"}
    # what makes `datasets` decode the images and name the labels
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema(list(columns.items()), metadata=metadata)
    (folder / "data").mkdir()
    shards = -(-len(samples) // size)
    for number, shard in enumerate(samples.shards(size)):
        path = folder / "data" / f"train-{number:05d}-of-{shards:05d}.parquet"
        with pq.ParquetWriter(path, schema, compression="none") as writer:  # PNG cannot be compressed further
            while rows := list(islice(shard, _ROWS_AT_ONCE)):
                table = {
                    "image": [{"bytes": png, "path": Path(entry.file).name} for entry, png, _ in rows],
                    "label": [entry.class_index for entry, _, _ in rows],
                }
                if samples.outputs:
                    flat = pa.array(np.concatenate([logits for _, _, logits in rows]))
                    table["logits"] = pa.FixedSizeListArray.from_arrays(flat, samples.outputs)
                writer.write_table(pa.table(table, schema=schema))


def _read_parquet(folder: Path) -> Iterator[tuple[int, str]]:
    import pyarrow.parquet as pq

    for path in sorted((folder / "data").glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(_ROWS_AT_ONCE, columns=["image", "label"]):
            for row in batch.to_pylist():
                yield row["label"], hashlib.sha256(row["image"]["bytes"]).hexdigest()


# ---- an image folder ----


def _imagefolder():
    return _write_folders, _read_folders


def _write_folders(samples: _Samples, folder: Path, _size: int) -> None:
    (shard,) = samples.shards(len(samples))  # in the order of the classes
    for class_folder, of_class in groupby(shard, lambda sample: Path(sample[0].file).parent.name):
        (folder / "train" / class_folder).mkdir(parents=True)
        rows = []
        for entry, png, logits in of_class:
            (folder / "train" / class_folder / Path(entry.file).name).write_bytes(png)
            rows.append(logits)
        if samples.outputs:
            (folder / "soft_labels").mkdir(exist_ok=True)
            data = safetensors_bytes({"logits": torch.from_numpy(np.stack(rows))})  # [n, K]
            (folder / "soft_labels" / f"{class_folder}.safetensors").write_bytes(data)


def _read_folders(folder: Path) -> Iterator[tuple[int, str]]:
    for path in sorted((folder / "train").glob("*/*.png")):
        yield int(path.name.split("-")[0]), hashlib.sha256(path.read_bytes()).hexdigest()


_FORMATS = {"webdataset": _webdataset, "parquet": _parquet, "imagefolder": _imagefolder}
