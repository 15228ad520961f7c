"""How the work is cut: the size of tiles, how many of them a program walks, with how many warps.

What is chosen decides in which order sums run, and so their last bits. By default it follows from x's shape, dtype and layout
alone, so that results are the same in every process. Who wants the last few percent instead

- sets BNFUSE_TRITON_AUTOTUNE=1: what fits a kernel, dtype, layout and class of shapes best is measured when it is first met,
  and kept in a JSON file for this GPU and this version of Triton: BNFUSE_TRITON_CACHE, by default bnfuse/triton.json in the
  user's cache folder. Nothing is measured while a CUDA graph is captured or kernels are interpreted: what was not measured
  before is chosen by the heuristic;
- or pins it: BNFUSE_TRITON_CONFIG, JSON or the path of a file with it, ``{"forward_rows": {"rows": 4, "columns": 256,
  "tiles": 16}}``; or in Python ``with kernels.pinned(forward_rows=Config(4, 256, 16)):``.

The innermost `pinned` comes first, then the environment's, then what was measured, then the heuristic.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton

from bnfuse.errors import InputError
from bnfuse.files import turns_at, write_atomically

from .boundary import INTERPRETED, Walk, current

AUTOTUNE_VARIABLE = "BNFUSE_TRITON_AUTOTUNE"
CACHE_VARIABLE = "BNFUSE_TRITON_CACHE"
CONFIG_VARIABLE = "BNFUSE_TRITON_CONFIG"
KERNELS = ("forward_rows", "forward_planes", "backward_rows", "backward_planes")


@dataclass(frozen=True)
class Config:
    """One way to cut a kernel's work."""

    rows: int  # of a tile, a power of two: rows of x, or channels where x is planes
    columns: int  # of a tile, a power of two, at least 8: channels, or positions where x is planes
    tiles: int  # that a program walks one after the other
    warps: int = 4  # a program
    stages: int = 3  # 1 reads a tile when it is due; more, that many less one tiles ahead, by way of shared memory

    def __post_init__(self) -> None:
        def is_power(value):
            return isinstance(value, int) and value > 0 and value & (value - 1) == 0

        if not (is_power(self.rows) and is_power(self.columns) and self.columns >= 8 and is_power(self.warps)):
            raise InputError(f"rows, columns (at least 8) and warps of a configuration must be powers of two, got {self}")
        if not (isinstance(self.tiles, int) and self.tiles >= 1 and isinstance(self.stages, int) and self.stages >= 1):
            raise InputError(f"tiles and stages of a configuration must be at least 1, got {self}")


@dataclass(frozen=True)
class Cut:
    """What a `Config` makes of one `Walk`."""

    chunk_units: int  # units (see tiles.py) a chunk
    chunks: int  # at most, over all groups
    segments: int  # of a plane
    segment_tiles: int  # a segment's length
    channel_tiles: int
    share: float  # a power of two, at most one over the elements that one place of the tile sees

    @property
    def parts(self) -> int:
        """Partial moments a channel, at most."""
        return self.chunks * self.segments

    @property
    def programs(self) -> int:
        return self.parts * self.channel_tiles


@functools.lru_cache(maxsize=4096)
def cut(walk: Walk, config: Config) -> Cut:
    if walk.planes:
        plane_tiles = max(1, triton.cdiv(walk.plane, config.columns))
        samples = max(1, config.tiles // plane_tiles)
        segment_tiles = min(config.tiles, plane_tiles)
        channel_tiles, chunk_units = triton.cdiv(walk.channels, config.rows), samples
        segments, tiles = triton.cdiv(plane_tiles, segment_tiles), samples * segment_tiles
    else:
        channel_tiles, chunk_units = triton.cdiv(walk.channels, config.columns), config.rows * config.tiles
        segments, segment_tiles, tiles = 1, 1, config.tiles
    # Σ⌈units of a group / chunk_units⌉ over G groups is less than units / chunk_units + G.
    chunks = triton.cdiv(walk.samples * walk.sample_units, chunk_units) + walk.groups - 1
    return Cut(chunk_units, chunks, segments, segment_tiles, channel_tiles, 1 / triton.next_power_of_2(tiles))


def walk_arguments(walk: Walk, work: Cut) -> tuple[int, ...]:
    """What the walks of both directions take after `groups`, in their order."""
    if walk.planes:
        return walk.samples, walk.channels, walk.plane // walk.unit, work.chunk_units, work.segment_tiles, work.segments
    return walk.samples, walk.sample_units, walk.channels // walk.unit, work.chunk_units


# ---- the heuristic ----

WARPS = 4
THREAD_ELEMENTS = 8  # of a tile: one access of 16 bytes where an element has 2
WIDEST, NARROWEST = 256, 32  # columns
# Enough programs for each of the 132 multiprocessors of a Hopper GPU to hold as many as its registers allow, once: all of them
# end together then. Fewer, longer programs also leave fewer partial moments to pool.
PROGRAMS = {"forward": 132 * 5, "backward": 132 * 7}
MOST_TILES = 1024


def _columns(length: int, widest: int) -> int:
    """The widest power of two that wastes at most an eighth of the tiles over `length`, else the one that wastes least."""
    if length <= NARROWEST:
        return max(8, triton.next_power_of_2(length))
    widths = [w for w in (1024, 512, 256, 128, 64, NARROWEST) if w <= widest and w < 2 * length]
    waste = {w: triton.cdiv(length, w) * w - length for w in widths}
    return next((w for w in widths if 8 * waste[w] <= length), min(widths, key=waste.get))


@functools.lru_cache(maxsize=4096)
def heuristic(kernel: str, walk: Walk) -> Config:
    """A tile as wide as its rows allow, one access of each thread; as many tiles a program as leave `PROGRAMS` programs."""
    elements = 32 * WARPS * THREAD_ELEMENTS
    if walk.planes:
        columns = _columns(walk.plane, elements)
        rows = min(elements // columns, triton.next_power_of_2(max(1, walk.channels)))
        tiles = walk.samples * triton.cdiv(walk.channels, rows) * triton.cdiv(walk.plane, columns)
    else:
        columns = _columns(walk.channels, WIDEST)
        rows = elements // columns
        tiles = triton.cdiv(walk.samples * walk.plane, rows) * triton.cdiv(walk.channels, columns)
    programs = PROGRAMS[kernel.split("_")[0]]
    return Config(rows, columns, min(max(1, triton.cdiv(tiles, programs)), MOST_TILES), WARPS)


@dataclass(frozen=True)
class Pooling:
    """The tile in which `finish` pools partial moments: [parts of one group, channels]."""

    rows: int
    columns: int
    block: int  # channels at a time, where the distance's gradient is written


def pooling(walk: Walk, work: Cut) -> Pooling:
    """Wide where groups have few parts; narrow where they have many, so that several programs share them."""
    rows = min(256, max(4, triton.next_power_of_2(triton.cdiv(work.parts, walk.groups))))
    channels = triton.next_power_of_2(max(1, walk.channels))
    return Pooling(rows, min(channels, max(8, 2048 // rows)), min(channels, 1024))


# ---- pinned ----

_pinned: list[dict[str, Config]] = []


@contextmanager
def pinned(**configs: Config) -> Iterator[None]:
    """While the block runs, kernels named take these configurations, whatever the shape, in every thread.

    In every thread: autograd runs backward passes in threads of its own. Where several threads pin at a time, the block that
    was entered last decides for all of them; results then depend on who came when.

    Parameters
    ----------
    forward_rows, forward_planes, backward_rows, backward_planes : Config
        The kernels that walk channels_last (rows) and contiguous (planes) memory.
    """
    _check_names(configs)
    _pinned.append(configs)
    try:
        yield
    finally:
        # The block's own entry, not one that is equal: blocks of other threads may end in any order.
        del _pinned[next(i for i, entry in enumerate(_pinned) if entry is configs)]


def _check_names(configs: dict) -> None:
    for name in configs:
        if name not in KERNELS:
            raise InputError(f"no kernel is named {name!r}; configurations can be pinned for {', '.join(KERNELS)}")


@functools.lru_cache(maxsize=16)
def _pinned_by(text: str) -> dict[str, Config]:
    """The configurations in BNFUSE_TRITON_CONFIG, JSON or the path of a file with it."""
    try:
        content = json.loads(text if text.lstrip().startswith("{") else Path(text).expanduser().read_text())
        configs = {name: Config(**fields) for name, fields in content.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{CONFIG_VARIABLE} must be JSON, or the path of a file with JSON, like "
            f'{{"forward_rows": {{"rows": 4, "columns": 256, "tiles": 16}}}}; {text!r}: {error}'
        ) from error
    _check_names(configs)
    return configs


# ---- measured ----


def choose(kernel: str, walk: Walk, run: Callable[[Config], object]) -> Config:
    """The configuration for one launch. `run` launches the kernel with any configuration, and may do so any number of times."""
    for configs in reversed(_pinned):
        if kernel in configs:
            return configs[kernel]
    if os.environ.get(CONFIG_VARIABLE) and kernel in (configs := _pinned_by(os.environ[CONFIG_VARIABLE])):
        return configs[kernel]
    if os.environ.get(AUTOTUNE_VARIABLE) == "1" and not INTERPRETED:
        with current(walk.device):  # whose name, clock and graphs are asked for
            return _measured(kernel, walk, run)
    return heuristic(kernel, walk)


def shape_class(kernel: str, walk: Walk) -> str:
    """Shapes that share a measurement: batches and numbers of groups are equal if they round up to the same power of two."""
    batch, groups = (triton.next_power_of_2(max(1, value)) for value in (walk.samples, walk.groups))
    dtype = str(walk.dtype).removeprefix("torch.")
    return f"{kernel} {dtype} N≤{batch} C={walk.channels} L={walk.plane} G≤{groups}"


def candidates(kernel: str, walk: Walk) -> list[Config]:
    """The heuristic's choice, and others around it."""
    first = heuristic(kernel, walk)
    taller = replace(first, rows=2 * first.rows, tiles=max(1, first.tiles // 2))
    shorter = replace(first, tiles=max(1, first.tiles // 2))
    variants = [first, taller, shorter, replace(first, tiles=min(2 * first.tiles, MOST_TILES))]
    variants += [replace(c, warps=2 * WARPS) for c in (first, taller)]
    variants += [replace(c, stages=stages) for c in (first, taller) for stages in (2, 4)]
    return list(dict.fromkeys(variants))


def cache_path() -> Path:
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bnfuse" / "triton.json"


def _device_name() -> str:
    return torch.cuda.get_device_name()


def _machine() -> str:
    return f"{_device_name()}, triton {triton.__version__}"


_winners: dict[tuple[Path, str, str], Config] = {}  # of this process, by file, machine and class


def _measured(kernel: str, walk: Walk, run: Callable[[Config], object]) -> Config:
    key = cache_path(), _machine(), shape_class(kernel, walk)
    if key not in _winners:
        stored = _read(key[0]).get(key[1], {}).get(key[2])
        if stored is None and torch.cuda.is_current_stream_capturing():
            return heuristic(kernel, walk)
        if stored is None:
            times = {config: measure(run, config) for config in candidates(kernel, walk)}
            stored = _keep(*key, asdict(min(times, key=times.get)))
        _winners[key] = Config(**stored)
    return _winners[key]


def _keep(path: Path, machine: str, shapes: str, winner: dict) -> dict:
    """Adds a winner to the file; what another process found first is what all of them take."""
    with turns_at(path):
        content = _read(path)
        winner = content.setdefault(machine, {}).setdefault(shapes, winner)
        write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False).encode())
    return winner


def _read(path: Path) -> dict:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} does not hold the JSON of measured configurations: {error}; delete it") from error


def measure(run: Callable[[Config], object], config: Config) -> float:
    """The median of ten runs in milliseconds; infinite where the device cannot hold such a program."""
    try:
        run(config)
    except triton.runtime.errors.OutOfResources:
        return float("inf")
    times = []
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(config)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)
