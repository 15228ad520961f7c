"""The file of class statistics, read as it is needed: what it holds at once, the numbers of a class when they are asked for.

At ImageNet's scale (1,000 classes, the 26,560 channels of a ResNet-50) the numbers are 425 MB, of which a batch of one class
needs 1/1000.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from .errors import InputError
from .site_moments import SiteMoments

FORMAT, VERSION = "bnfuse.class_statistics", 2
SUBCLASSES_VERSION = 3  # of files whose rows are sub-classes: what reads 2 alone must not take them for classes
READABLE = (1, VERSION, SUBCLASSES_VERSION)  # 1 knew BatchNorm inputs and pooled moments alone
PARTS = ("count", "mean", "m2")  # of a site's tables: [K], [K, C] and [K, C]
_WRITTEN = ("version", "sites", "teacher", "dataset", "class_names", "outputs", "preprocessing")
_ABSENT = {"rules": ["bn"], "variance": "pooled", "row_classes": None, "subclass_teacher": None}  # what is not written is this
WHOLE_PARTS = ("whole_count", "whole_mean", "whole_m2")  # the same of all classes together: [1], [1, C] and [1, C]


def check_replaceable(path: Path) -> None:
    """InputError where `path` is a file of something else than class statistics: a recording must not take its place."""
    if not path.is_file() or not path.stat().st_size:
        return
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            is_statistics = (file.metadata() or {}).get("format") == FORMAT
    except safetensors.SafetensorError:
        is_statistics = False
    if not is_statistics:
        raise InputError(f"{path} is there and holds no class statistics, and nothing is written over it: name another file")


class SitesOnDisk(Mapping):
    """site name → `SiteMoments`, in the order in which the sites ran.

    Read, not mapped: only what was asked for takes memory. The file stays open, so that one that takes its place changes
    nothing here.

    Attributes
    ----------
    description : what `ClassStatistics.save` wrote beside the numbers
    images : int64 [K], of each row
    channels : C of each site
    """

    def __init__(self, path: str | Path):
        """InputError where there is no such file, it is torn, or holds something else."""
        self.path = Path(path)
        try:
            with safetensors.safe_open(path, framework="pt") as file:  # refuses a torn file, and a header that is none
                about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise InputError(f"{path} is a safetensors file but holds no class statistics; make one with `bnfuse record`")
            self.description = json.loads(about["description"])
            for name in _WRITTEN:
                self.description[name]  # or it is damaged
            if self.description["version"] not in READABLE:
                raise InputError(
                    f"{path} has format version {self.description['version']}, this bnfuse reads "
                    f"{', '.join(map(str, READABLE))}; record again"
                )
            self.description = _ABSENT | self.description
            self._file = open(path, "rb", buffering=0)
            # 8 bytes: the header's length; the header: name → dtype, shape, data_offsets; then the data
            length = int.from_bytes(self._file.read(8), "little")
            self._header, self._data = json.loads(self._file.read(length)), 8 + length
            self.images = self._read("images")
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            said = f"{type(error).__name__}: {error}"
            raise InputError(f"{path} is damaged: what it says of itself cannot be read ({said}); record it again") from error
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(f"cannot read class statistics from {path}: {error}; make them with `bnfuse record`") from error
        self._check_row_classes()
        self.channels = {name: self._checked_channels(name, len(self.images)) for name in self.description["sites"]}

    def _check_row_classes(self) -> None:
        of, classes = self.description["row_classes"], range(len(self.description["class_names"]))
        if of is not None and (len(of) != len(self.images) or of != sorted(of) or {*of} != {*classes}):
            raise InputError(f"{self.path} is damaged: its {len(self.images)} rows are not sub-classes; record it again")

    def _checked_channels(self, name: str, rows: int, parts: Sequence[str] = PARTS) -> int:
        headers = [self._header.get(f"{part}/{name}", {}) for part in parts]
        channels = (headers[1].get("shape") or [0])[-1]
        expected = [("I64", [rows]), *[("F64", [rows, channels])] * 2]
        if [(header.get("dtype"), header.get("shape")) for header in headers] != expected:
            raise InputError(f"{self.path} is damaged: site {name!r} is not [{rows}, C] in float64; record it again")
        return channels

    def __iter__(self) -> Iterator[str]:
        return iter(self.channels)

    def __len__(self) -> int:
        return len(self.channels)

    def __getitem__(self, name: str) -> SiteMoments:
        if name not in self.channels:
            raise KeyError(name)
        return SiteMoments(*(self._read(f"{part}/{name}") for part in PARTS))

    def whole(self) -> dict[str, SiteMoments]:
        """The exact moments of all images at once, [1, C] a site; empty of pooled statistics, which do not need them."""
        if self.description["variance"] == "pooled":
            return {}
        for name, channels in self.channels.items():
            if self._checked_channels(name, 1, WHOLE_PARTS) != channels:
                raise InputError(f"{self.path} is damaged: site {name!r} has not as many channels whole; record it again")
        return {name: SiteMoments(*(self._read(f"{part}/{name}") for part in WHOLE_PARTS)) for name in self.channels}

    def of_classes(self, names: Sequence[str], classes: Sequence[int]) -> Iterator[SiteMoments]:
        """Each of the sites with its rows of the classes alone, in their order; no other is read."""
        runs = _runs(classes)
        for name in names:
            tables = (f"{part}/{name}" for part in PARTS)
            yield SiteMoments(*(torch.cat([self._read(table, *run) for run in runs]) for table in tables))

    def _read(self, table: str, start: int = 0, end: int | None = None) -> Tensor:
        """Rows [start, end) of a table, or all."""
        about = self._header[table]
        (first, last), (rows, *row_shape) = about["data_offsets"], about["shape"]
        end, row_bytes = rows if end is None else end, (last - first) // rows if rows else 0
        data, done = bytearray((end - start) * row_bytes), 0
        offset = self._data + first + start * row_bytes
        while done < len(data):  # the system reads at most 2 GiB at a time
            read = os.preadv(self._file.fileno(), [memoryview(data)[done:]], offset + done)
            if not read:
                raise InputError(f"{self.path} has become shorter since it was opened: record the statistics again")
            done += read
        dtype = torch.float64 if about["dtype"] == "F64" else torch.int64
        return torch.frombuffer(data, dtype=dtype).reshape(-1, *row_shape) if data else torch.empty(0, *row_shape, dtype=dtype)


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """[start, end) of each run of consecutive numbers, in the order given."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = runs[-1][0], number + 1
        else:
            runs.append((number, number + 1))
    return runs
