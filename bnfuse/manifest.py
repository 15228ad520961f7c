"""What a synthetic dataset on disk consists of, and how it is read and checked. `store` writes it.

A store is a folder that any image-folder loader reads::

    images/03-cat/03-000017.png       lossless PNG, mode L for one channel, RGB for three
    soft_labels/000004.safetensors    optional: `logits`, float16 [n, K], one file a unit
    manifest.jsonl                    one line an image, once the dataset is finished in the order of the units
    card.json                         all that is needed to make the dataset again

and, while it is unfinished, perhaps of

    manifest.0003.jsonl               a shard: lines of the units that rank 3 has committed
    checkpoints/000004.safetensors    a unit in the making, see `snapshots`

Read it from the top: what a line of the manifest is, what files are called, how a store is read and how verified.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from .card import CARD, read_bytes, read_card
from .errors import InputError

MANIFEST, IMAGES, SOFT_LABELS, CHECKPOINTS = "manifest.jsonl", "images", "soft_labels", "checkpoints"

_LONGEST_SLUG = 40  # characters of a class name that go into its folder's name


@dataclass(frozen=True)
class Entry:
    """One line of a manifest: an image, where it lies, and how it was made.

    Attributes
    ----------
    id : unique in the store
    file : path of the PNG, relative to the store, with forward slashes
    class_index, class_name, index, seed, losses : as in `ImageRecord`; a loss may be nan or inf
    unit, unit_size : the batch that it was optimised in, and the number of images of that batch
    sha256 : of the PNG file, in hexadecimal
    soft_labels : None, or {"file": path relative to the store, "row": row of its `logits`, "sha256": of the file}
    """

    id: str
    file: str
    class_index: int
    class_name: str
    index: int
    seed: int
    unit: int
    unit_size: int
    losses: dict[str, float]
    sha256: str
    soft_labels: dict | None = None

    def to_line(self) -> str:
        fields = {name: value for name, value in vars(self).items() if value is not None}
        # JSON has no nan: a term that diverged is written as "nan", "inf" or "-inf", which float() reads back
        fields["losses"] = {name: v if math.isfinite(v) else str(v) for name, v in self.losses.items()}
        return json.dumps(fields) + "\n"

    @classmethod
    def from_line(cls, line: str | bytes, class_names: Sequence[str]) -> Entry:
        """The entry that `line` holds. A ValueError says what is wrong with it.

        A manifest may come from anywhere, so the paths in it are not believed but compared with those that the store
        itself would choose: none can lead out of the store.
        """
        fields = json.loads(line)
        if not isinstance(fields, dict):
            raise ValueError("not a JSON object")
        wanted = set(cls.__dataclass_fields__)
        if set(fields) | {"soft_labels"} != wanted:
            raise ValueError(f"it has the fields {sorted(fields)}, expected {sorted(wanted)}, soft_labels optional")
        for name in ("class_index", "index", "unit", "unit_size", "seed"):
            if type(fields[name]) is not int or (name != "seed" and fields[name] < (name == "unit_size")):
                raise ValueError(f"{name} is {fields[name]!r}, expected a whole number")
        if not isinstance(fields["losses"], dict) or not isinstance(fields["sha256"], str):
            raise ValueError("losses must be an object and sha256 a string")
        try:
            fields["losses"] = {name: float(value) for name, value in fields["losses"].items()}
        except (TypeError, OverflowError) as error:
            raise ValueError(f"losses must be numbers, got {fields['losses']}") from error
        entry = cls(**fields)

        if entry.class_index >= len(class_names):
            raise ValueError(f"class index {entry.class_index}, but the card names {len(class_names)} classes")
        expected = {
            "class_name": class_names[entry.class_index],
            "id": image_id(entry.class_index, entry.index, len(class_names)),
            "file": image_file(entry.class_index, entry.index, class_names),
        }
        for name, value in expected.items():
            if getattr(entry, name) != value:
                raise ValueError(f"{name} is {getattr(entry, name)!r}, expected {value!r}")
        if entry.soft_labels is not None:
            labels = entry.soft_labels
            if not isinstance(labels, dict) or set(labels) != {"file", "row", "sha256"}:
                raise ValueError(f"soft_labels is {labels!r}, expected file, row and sha256")
            if labels["file"] != soft_label_file(entry.unit) or type(labels["row"]) is not int or labels["row"] < 0:
                raise ValueError(f"soft_labels is {labels!r}, expected a row of {soft_label_file(entry.unit)}")
        return entry


def class_folder(class_index: int, class_name: str, num_classes: int) -> str:
    """Folder name of a class: its index, zero-padded so that folders sort as classes do, and what is safe of its name.

    Only ASCII letters, digits and single hyphens remain of the name, at most 40 of them and perhaps none; the index
    alone keeps the folders apart. So no class name is ever a path.
    """
    plain = unicodedata.normalize("NFKD", class_name).encode("ascii", "ignore").decode()
    slug = re.sub("[^A-Za-z0-9]+", "-", plain).strip("-")[:_LONGEST_SLUG].strip("-")
    return "-".join(filter(None, (_padded(class_index, num_classes), slug)))


def image_id(class_index: int, index: int, num_classes: int) -> str:
    return f"{_padded(class_index, num_classes)}-{index:06d}"


def image_file(class_index: int, index: int, class_names: Sequence[str]) -> str:
    """Path of an image relative to the store, with forward slashes."""
    folder = class_folder(class_index, class_names[class_index], len(class_names))
    return f"{IMAGES}/{folder}/{image_id(class_index, index, len(class_names))}.png"


def soft_label_file(unit: int) -> str:
    return f"{SOFT_LABELS}/{unit:06d}.safetensors"


def checkpoint_file(unit: int) -> str:
    return f"{CHECKPOINTS}/{unit:06d}.safetensors"


def shard_file(rank: int) -> str:
    return f"manifest.{rank:04d}.jsonl"


def _padded(class_index: int, num_classes: int) -> str:
    return f"{class_index:0{max(2, len(str(num_classes - 1)))}d}"


@dataclass(frozen=True)
class StoreContents:
    """A store as `read_store` found it.

    Attributes
    ----------
    root : the folder
    card : what card.json holds
    class_names : one name a class
    entries : one an image, in the order of the manifest
    """

    root: Path
    card: dict
    class_names: list[str]
    entries: list[Entry]

    @property
    def complete(self) -> bool:
        return self.card["complete"]

    @property
    def has_soft_labels(self) -> bool:
        return bool(self.entries) and self.entries[0].soft_labels is not None

    def soft_labels(self) -> Tensor | None:
        """Logits, float32 [N, K], in the order of `entries`; None for a store without. InputError if one is damaged."""
        if not self.has_soft_labels:
            return None
        units: dict[str, Tensor] = {}  # file → logits [n, K]
        rows = []
        for entry in self.entries:
            file, row = entry.soft_labels["file"], entry.soft_labels["row"]
            if file not in units:
                units[file] = _read_logits(self.root / file)
            if row >= len(units[file]):
                raise InputError(f"{self.root / file} has {len(units[file])} rows, image {entry.id} needs row {row}")
            rows.append(units[file][row])
        if len({len(row) for row in rows}) > 1:
            raise InputError(f"{self.root / SOFT_LABELS}: files with {sorted({len(row) for row in rows})} columns")
        return torch.stack(rows).float()


def is_store(root: str | Path) -> bool:
    return (Path(root) / MANIFEST).is_file()


def read_store(root: str | Path) -> StoreContents:
    """Card and manifest of a store, finished or not. Of an unfinished one, what is wholly committed.

    Raises
    ------
    InputError
        `root` is no store, a line of the manifest is damaged (its number is given), or a file that it names is gone.
    """
    root = Path(root).expanduser()
    card = read_card(root)
    entries = read_entries(root, card)
    refuse_missing_files(root, entries)
    return StoreContents(root, card, list(card["class_names"]), entries)


def read_entries(root: Path, card: dict) -> list[Entry]:
    """The entries of all whole units, those of the manifest first, then those of its shards.

    A shard that is being folded into the manifest may be there beside its lines in the manifest: they count once.
    """
    # Before the manifest: a unit that is folded in meanwhile is then seen twice. The other way round it would be missed.
    shards = [] if card["complete"] else [(path, data) for path in shards_in(root) if (data := _bytes_if_there(path))]
    entries, _ = read_manifest(root, card)
    units: dict[int, list[Entry]] = {}
    for entry in entries:
        units.setdefault(entry.unit, []).append(entry)
    ids = {entry.id for entry in entries}
    for path, data in shards:
        added: dict[int, list[Entry]] = {}
        for entry in parse_lines(path, data, card)[0]:
            added.setdefault(entry.unit, []).append(entry)
        for unit, lines in added.items():
            if unit not in units and ids.isdisjoint(entry.id for entry in lines):
                units[unit] = lines
                ids.update(entry.id for entry in lines)
            elif _lines(units.get(unit, [])) != _lines(lines):
                raise InputError(
                    f"{path}: unit {unit} is in another manifest too, with other images. Restore the files from a copy, "
                    f"or delete {root} and make the dataset again"
                )
    return [entry for lines in units.values() for entry in lines]


def _lines(entries: Sequence[Entry]) -> list[str]:
    return [entry.to_line() for entry in entries]  # to be compared: entries with a nan differ from themselves


def shards_in(root: Path) -> list[Path]:
    return [path for path in files_in(root) if re.fullmatch(r"manifest\.\d{4,}\.jsonl", path.name)]


def _bytes_if_there(path: Path) -> bytes | None:
    """None for a shard that has been folded into the manifest since its name was read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def read_manifest(root: Path, card: dict) -> tuple[list[Entry], int]:
    """`parse_lines` of manifest.jsonl, without its shards."""
    return parse_lines(root / MANIFEST, read_bytes(root / MANIFEST), card)


def parse_lines(path: Path, data: bytes, card: dict) -> tuple[list[Entry], int]:
    """The entries of all whole units in `data`, which `path` holds, and the size in bytes of the lines that hold them.

    While a dataset is unfinished, a manifest may end in a line cut short or in a unit that lacks lines: that is what
    a killed process leaves, and it is passed over. Anything else that is wrong is an InputError with the line's number.
    """
    *lines, torn = data.split(b"\n")
    entries: list[Entry] = []
    whole, size = 0, 0  # entries and bytes up to the end of the last whole unit
    offset = 0
    ids: set[str] = set()
    units: set[int] = set()

    def damaged(number: int, what: str) -> InputError:
        return InputError(
            f"{path} line {number}: {what}. Restore the file from a copy, or delete {path.parent} and make the dataset again; "
            "`bnfuse verify --repair` mends what it can"
        )

    for number, line in enumerate(lines, 1):
        try:
            entry = Entry.from_line(line, card["class_names"])
        except ValueError as error:
            raise damaged(number, str(error)) from error
        if entry.id in ids:
            raise damaged(number, f"image {entry.id} is there twice")
        if (entry.soft_labels is None) != ((entries or [entry])[0].soft_labels is None):
            raise damaged(number, "some images have soft labels and some have none")
        if len(entries) > whole:  # inside a unit
            first = entries[whole]
            if (entry.unit, entry.unit_size) != (first.unit, first.unit_size):
                raise damaged(number, f"unit {entry.unit} begins, but unit {first.unit} lacks lines")
        elif entry.unit in units:
            raise damaged(number, f"unit {entry.unit} is there twice, or has more lines than its {entry.unit_size}")
        ids.add(entry.id)
        units.add(entry.unit)
        entries.append(entry)
        offset += len(line) + 1
        if len(entries) - whole == entry.unit_size:
            whole, size = len(entries), offset
    if card["complete"] and (torn or len(entries) > whole):
        raise damaged(len(lines) + bool(torn), "the end is missing, though the card says that the dataset is complete")
    return entries[:whole], size


def refuse_missing_files(root: Path, entries: Sequence[Entry]) -> None:
    """InputError where a file that the manifest names is gone."""
    missing = [file for file in _named_files(entries) if not (root / file).is_file()]
    if missing:
        raise InputError(
            f"{root} is damaged: {MANIFEST} names files that are not there: {some(missing)}. `bnfuse verify "
            f"--repair` makes them again; or restore them from a copy, or delete {root} and make the dataset again"
        )


def _named_files(entries: Sequence[Entry]) -> dict[str, str]:
    """Every file that the manifest names, relative to the store, and its sha256."""
    files = {entry.file: entry.sha256 for entry in entries}
    files.update((e.soft_labels["file"], e.soft_labels["sha256"]) for e in entries if e.soft_labels is not None)
    return files


def class_counts(entries: Sequence[Entry], num_classes: int) -> list[int]:
    """Images of each class."""
    counts = Counter(entry.class_index for entry in entries)
    return [counts[k] for k in range(num_classes)]


def _read_logits(path: Path) -> Tensor:
    """Logits of one unit, [n, K]."""
    try:
        logits = safetensors.torch.load(path.read_bytes())["logits"]
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} holds no soft labels ({error}). Restore it, or make the dataset again") from error
    if logits.ndim != 2:
        raise InputError(f"{path}: `logits` must be [n, K], got {list(logits.shape)}")
    return logits


@dataclass(frozen=True)
class Findings:
    """What `inspect` found of a store.

    Attributes
    ----------
    problems : everything that is wrong, one sentence each
    entries : every line that is well-formed, those of the shards last; a doubled line is there twice
    damaged : the files that the manifest names and that are gone or have another hash, relative to the store
    """

    problems: list[str]
    entries: list[Entry]
    damaged: set[str]


def verify(root: str | Path) -> list[str]:
    """Everything that is wrong with a store, one sentence each; an empty list if nothing is. Reads every file."""
    return inspect(root).problems


def inspect(root: str | Path, *, progress: bool = False) -> Findings:
    """Holds every file of a store against its manifest, and the manifest against the card; nothing is changed."""
    root = Path(root).expanduser()
    try:
        card = read_card(root)
        manifests = {MANIFEST: read_bytes(root / MANIFEST)}
    except InputError as error:
        return Findings([str(error)], [], set())
    problems = [] if card["complete"] else ["the dataset is not finished"]
    shards = {path.name: path.read_bytes() for path in shards_in(root)}
    if card["complete"]:
        problems += [f"{name} is there, though the card says that the dataset is complete" for name in shards]
    else:
        manifests |= shards
    entries: list[Entry] = []
    folded: set[str] = set()  # what a process killed while it folded a shard has left in both
    for name, data in manifests.items():
        if name != MANIFEST:
            folded.update(_lines(entries))
        *lines, torn = data.split(b"\n")
        if torn:
            problems.append(f"{name} line {len(lines) + 1} is malformed: cut short")
        for number, line in enumerate(lines, 1):
            try:
                entry = Entry.from_line(line, card["class_names"])
                if name == MANIFEST or entry.to_line() not in folded:
                    entries.append(entry)
            except ValueError as error:
                problems.append(f"{name} line {number} is malformed: {error}")
    lines_of = Counter(entry.id for entry in entries)
    problems += [f"{MANIFEST}: {n} lines for image {name}" for name, n in lines_of.items() if n > 1]
    sizes = {entry.unit: entry.unit_size for entry in entries}
    for unit, n in sorted(Counter(entry.unit for entry in entries).items()):
        if n != sizes[unit]:
            problems.append(f"{MANIFEST}: unit {unit} has {n} lines, expected {sizes[unit]}")
    counts = class_counts(entries, len(card["class_names"]))
    if card["complete"] and counts != card["counts"]:
        problems.append(f"{CARD} counts {card['counts']} images a class, {MANIFEST} has {counts}")

    named, damaged = _named_files(entries), set()
    for file, sha256 in tqdm(named.items(), desc="verifying", unit="file", disable=not progress):
        try:
            if hashlib.sha256((root / file).read_bytes()).hexdigest() != sha256:
                problems.append(f"{file} has changed: its sha256 is not the one in {MANIFEST}")
                damaged.add(file)
        except OSError as error:
            problems.append(f"{file} cannot be read: {error.strerror}")
            damaged.add(file)
    present = [path for path in (root / IMAGES).rglob("*") if path.is_file()] + files_in(root / SOFT_LABELS)
    extra = {path.relative_to(root).as_posix() for path in present} - set(named)
    problems += [f"{file} is not in {MANIFEST}" for file in sorted(extra)]
    if card["complete"]:
        left = files_in(root / CHECKPOINTS)
        problems += [f"{path.relative_to(root).as_posix()} is there, though the dataset is complete" for path in left]
    return Findings(problems, entries, damaged)


def files_in(folder: Path) -> list[Path]:
    """The files right in `folder`, sorted; none where there is no folder."""
    return sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []


def some(items: Sequence, limit: int = 5) -> str:
    """The first items for a message, and how many there are beside them."""
    return ", ".join(map(str, items[:limit])) + (f" and {len(items) - limit} more" if len(items) > limit else "")
