"""Makes damaged and missing files of a synthetic dataset again.

Every image follows from its seed, the config on the card, the teacher and the statistics. So a unit that has lost something is
made once more, and what was lost is put back where it comes out with the hash that the manifest has of it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .card import CARD, read_card, refuse_other_identity
from .distributed import choose_device
from .errors import InputError
from .files import write_atomically
from .manifest import MANIFEST, Entry, image_file, image_id, inspect, shards_in, soft_label_file
from .models import Teacher
from .plans import SynthesisConfig, Unit
from .statistics import ClassStatistics
from .store import ImageRecord, make_entry, open_locked, png_bytes, replace_manifest, soft_label_bytes, writing
from .synthesis import computing_with
from .units import UnitMaker, as_begun

_MOST_ATTEMPTS = 100  # among whose seeds those of a unit are looked for


@dataclass
class RepairResult:
    """What `repair` did; files are relative to the dataset.

    Attributes
    ----------
    found : what `verify` said before
    restored : made again, just as they were (or with no hash left to compare with)
    replaced : made again and different, with new hashes in the manifest (`accept_changes`)
    differing : would have come out different, so that nothing was done to them; `why` says what can have made them so
    problems : what `verify` says afterwards
    """

    found: list[str] = field(default_factory=list)
    restored: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    why: str = "another processor, or other versions, round otherwise"
    problems: list[str] = field(default_factory=list)


def repair(
    teacher: Teacher,
    statistics: ClassStatistics | None,
    out: str | Path,
    *,
    accept_changes: bool = False,
    device: str | torch.device | None = None,
    backend: str = "auto",
    micro_batch: int | None = None,
    progress: bool = True,
    more_teachers: Sequence[tuple[Teacher, ClassStatistics | None]] = (),
) -> RepairResult:
    """Makes again what is damaged: images, soft labels, lines of the manifest.

    Whole images are never touched, and files that the dataset does not know are left to whoever put them there.

    Parameters
    ----------
    teacher, statistics, more_teachers : those that the dataset was made from
    out : the dataset, finished or not
    accept_changes : take a file that comes out different, and note its hash; False leaves the damaged one as it is
    device, backend, micro_batch : as in `synthesize`; default the backend and the micro_batch that the dataset was made with.
        Another micro_batch rounds otherwise, and is for `accept_changes`, as are images that teams of ranks made together

    Raises
    ------
    InputError
        Teacher, statistics or micro_batch are others, the dataset is being written, or its card is damaged.
    """
    root = Path(out).expanduser()
    card = read_card(root)
    config = SynthesisConfig.from_card(card)
    if "backend" not in card:
        raise InputError(f"{root / CARD} names no backend: what `bnfuse synthesize` did not make cannot be repaired")
    device = choose_device(device)
    micro_batch = card.get("micro_batch") if micro_batch is None else micro_batch
    backend = card["backend"] if backend == "auto" else backend
    maker = UnitMaker(teacher, statistics, config, device, backend, micro_batch, more_teachers=more_teachers)
    made_from = maker.card(card.get("threads"), card.get("ranks_per_batch", 1))
    given = {**card, **as_begun(made_from, card)}
    if not more_teachers:
        given.pop("more_teachers", None)
    for free in ("backend", *(["micro_batch"] if accept_changes and "micro_batch" in card else [])):
        given[free] = card[free]
    given.pop("complete")
    refuse_other_identity(root, given, card, "Repair it with those that it was made from.")
    with ExitStack() as held, writing(root, "What was whole still is."), computing_with(card.get("threads")):
        shards = shards_in(root)
        for name in [MANIFEST, *(path.name for path in shards)]:
            held.callback(os.close, open_locked(root, name, create=True))  # one that is lost is made again as one that is empty
        result = _Repair(root, maker, card, accept_changes).run(shards, progress)
    result.problems = inspect(root).problems
    return result


class _Repair:
    def __init__(self, root: Path, maker: UnitMaker, card: dict, accept_changes: bool):
        self.root, self.maker, self.card, self.accept_changes = root, maker, card, accept_changes
        self.names = card["class_names"]
        self.findings = inspect(root)
        self.lines = {entry.id: entry for entry in reversed(self.findings.entries)}  # the first of two alike
        self.result = RepairResult(self.findings.problems)
        self.team = card.get("ranks_per_batch", 1)
        if self.team > 1:
            self.result.why = f"teams of {self.team} ranks made each batch together, and one process rounds otherwise"
        elif "micro_batch" not in card:
            self.result.why += ", and so does another --micro-batch than it was made with, of which its card says nothing"

    def run(self, shards: Sequence[Path], progress: bool) -> RepairResult:
        entries: list[Entry] = []
        for unit in tqdm(self.maker.units, desc="repairing", unit="unit", disable=not progress):
            lines = [self.lines.get(image_id(k, i, len(self.names))) for k, i in zip(unit.classes, unit.indices)]
            lines = [line if line and (line.unit, line.unit_size) == (unit.number, len(lines)) else None for line in lines]
            if not self.card["complete"] and None in lines:
                continue  # not committed: the run that is to be continued makes it
            if None in lines or any(self._is_damaged(line) for line in lines):
                lines = self._mend(unit, lines)
            entries += [line for line in lines if line is not None]
        if not self.result.differing:  # else a line that is damaged may still tell somebody something
            if replaced := replace_manifest(self.root, entries):
                os.close(replaced)
            if not self.card["complete"]:
                for path in shards:
                    path.unlink()
        return self.result

    def _is_damaged(self, line: Entry) -> bool:
        return bool({line.file, line.soft_labels and line.soft_labels["file"]} & self.findings.damaged)

    def _mend(self, unit: Unit, lines: list[Entry | None]) -> list[Entry | None]:
        """Puts the unit's files in order as far as may be; returns its lines as they then are, None for one that is lost."""
        files = [image_file(k, i, self.names) for k, i in zip(unit.classes, unit.indices)]
        whole = [line is not None and line.file not in self.findings.damaged for line in lines]
        if self.team > 1 and not all(whole) and not self.accept_changes:
            self.result.differing += [file for file, is_whole in zip(files, whole) if not is_whole]
            return lines
        images, records = self._images(unit, lines, files, whole)
        digests: list[str | None] = []  # of the image files as they then are; None for one that stays damaged
        changed = False
        for line, file, is_whole, image in zip(lines, files, whole, images):
            data = png_bytes(image)
            digest = line.sha256 if is_whole else hashlib.sha256(data).hexdigest()
            accepted = is_whole or self._accept(file, data, line.sha256 if line else self._digest_on_disk(file))
            digests.append(digest if accepted else None)
            changed |= accepted and line is not None and digest != line.sha256

        labels = None
        if self.maker.config.soft_labels:
            labels = next((line.soft_labels["sha256"] for line in lines if line), None)
            if None in lines or changed or soft_label_file(unit.number) in self.findings.damaged:
                if None in digests:  # the logits of an image that is not there cannot be had
                    return lines
                data = soft_label_bytes(self.maker.soft_labels(images))
                file = soft_label_file(unit.number)
                if not self._accept(file, data, labels or self._digest_on_disk(file)):
                    return lines
                labels = hashlib.sha256(data).hexdigest()
        size = len(files)
        return [
            make_entry(unit.number, size, row, record, digest, labels, self.names) if digest else line
            for row, (line, record, digest) in enumerate(zip(lines, records, digests))
        ]

    def _accept(self, file: str, data: bytes, before: str | None) -> bool:
        """Writes `data` if it is what the file was, whose hash was `before`, or if changes are welcome; says whether."""
        digest = hashlib.sha256(data).hexdigest()
        if before not in (None, digest) and not self.accept_changes:
            self.result.differing.append(file)
            return False
        if self._digest_on_disk(file) != digest:
            write_atomically(self.root / file, data)
            (self.result.restored if before in (None, digest) else self.result.replaced).append(file)
        return True

    def _images(
        self, unit: Unit, lines: list[Entry | None], files: list[str], whole: list[bool]
    ) -> tuple[Tensor, list[ImageRecord]]:
        """The unit's images, from disk where they are whole, and its records: [N, C, H, W]."""
        if all(whole):
            made, records = None, [ImageRecord(e.class_index, e.index, e.seed, e.losses) for e in lines]
        else:
            made, new = self.maker.make(unit, retries=_MOST_ATTEMPTS, attempt=self._attempt(unit, lines))
            records = [
                ImageRecord(e.class_index, e.index, e.seed, e.losses) if is_whole else record
                for e, is_whole, record in zip(lines, whole, new)
            ]
        images = [self._read(file) if is_whole else made[row] for row, (file, is_whole) in enumerate(zip(files, whole))]
        return torch.stack(images), records

    def _attempt(self, unit: Unit, lines: list[Entry | None]) -> int:
        """Which of its sets of seeds the unit was made from, by those in the manifest; the first where it has none left."""
        known = [(row, line.seed) for row, line in enumerate(lines) if line is not None]
        for attempt in range(_MOST_ATTEMPTS):
            seeds = self.maker.seeds(unit, attempt)
            if all(seeds[row] == seed for row, seed in known):
                return attempt
        raise InputError(
            f"{self.root / MANIFEST}: the seeds of unit {unit.number} do not follow from the seed on the card, so that its "
            "images cannot be made again; restore them from a copy"
        )

    def _digest_on_disk(self, file: str) -> str | None:
        path = self.root / file
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None

    def _read(self, file: str) -> Tensor:
        """A PNG as uint8 [C, H, W]."""
        with Image.open(self.root / file) as picture:
            pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            return pixels.reshape(picture.height, picture.width, -1).permute(2, 0, 1)
