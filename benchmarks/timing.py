"""How anything is timed: from a cold cache, the contenders alternating inside one run, on the device's own clock.

pytest-benchmark times bnfuse; the untimed setup of each of its rounds times every rival once, with the same clock, so that a
round holds one time of each and their ratio does not notice that the machine was slow just then.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

OURS = "bnfuse"
COPY_BYTES = 256 * 2**20
HIDE_LAUNCHES_CYCLES = 10_000_000  # about five milliseconds in which a GPU sleeps while Python queues what is timed


@dataclass(frozen=True)
class Contender:
    """`run` is timed; it is given what `prepare`, untimed, returned. What it returns is freed untimed, too."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Limits:
    """A case takes as many rounds as fit into `seconds`, within bounds."""

    min_rounds: int
    max_rounds: int
    seconds: float

    def rounds(self, seconds_a_round: float) -> int:
        return max(self.min_rounds, min(self.max_rounds, int(self.seconds / max(seconds_a_round, 1e-9))))

    @property
    def longest(self) -> float:
        """Seconds of a case, its warm-up included, as long as a round takes no more than `seconds` over `min_rounds`."""
        return self.seconds * (1 + 1 / self.min_rounds)


# By device: of one operator in one direction, and of a step. `make gpu` has nine minutes in all, see tests/test_timing.py.
OPERATOR_LIMITS = {"cpu": Limits(5, 15, 2.0), "cuda": Limits(5, 9, 0.3)}
STEP_LIMITS = {"cpu": Limits(5, 9, 40.0), "cuda": Limits(5, 9, 10.0)}
QUICK_STEP_LIMITS = Limits(3, 5, 10.0)


class CudaInstant:
    """A moment on the GPU's clock; the difference of two is in seconds, and waits for the later one."""

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: CudaInstant) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


class Machine:
    """The device under test: its clock, a cold cache when asked for, and its copy bandwidth.

    The copy goes between two buffers of 256 MiB, allocated and touched beforehand, far beyond any cache.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.clock = CudaInstant if device.type == "cuda" else time.perf_counter
        self._cold = torch.ones(_flush_bytes(device) // 4, device=device)
        self._source = torch.ones(COPY_BYTES // 4, device=device)
        self._target = torch.zeros_like(self._source)
        self._awake = torch.cuda.Event() if device.type == "cuda" else None  # the end of the sleep

    def flush(self, hide_launches: bool = True) -> None:
        """Empties the caches. On CUDA nothing waits: the timed work is queued while the GPU still does this, and sleeps."""
        if self.device.type == "cuda":
            self._cold.zero_()
            if hide_launches:
                torch.cuda._sleep(HIDE_LAUNCHES_CYCLES)
                self._awake.record()
        else:
            self._cold.sum()  # reads alone: what it leaves in the cache need not be written back in the timed part

    def waited_for_host(self) -> bool:
        """Asked when all is queued: whether a GPU that slept is awake already, so that what is timed may contain waiting."""
        return self._awake is not None and self._awake.query()

    def copy(self) -> None:
        self._target.copy_(self._source)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _flush_bytes(device: torch.device) -> int:
    """Twice the last-level cache, and at least 64 MiB."""
    if device.type == "cuda":
        size = torch.cuda.get_device_properties(device).L2_cache_size
    else:
        try:
            size = int(Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip().removesuffix("K")) * 1024
        except (OSError, ValueError):
            size = 0
    return max(64 * 2**20, 2 * size)


def bandwidth(seconds: float) -> float:
    """Bytes a second, read and written, of one `Machine.copy`."""
    return 2 * COPY_BYTES / seconds


def alternate(
    benchmark, contenders: dict[str, Contender], machine: Machine, limits: Limits, hide_launches: bool = True
) -> dict[str, list[float]]:
    """Seconds of every contender in each round; `benchmark` is pytest-benchmark's fixture, which times OURS.

    Every timed call starts from a cold cache; the rivals' order rotates from round to round. A first round is not counted: it
    warms up, and tells how many fit. Whatever had to be compiled has been, since all were verified. With `hide_launches` a
    GPU's time alone is wanted: in how many rounds it may have waited for the host is in `extra_info["waited_for_host"]`.
    """
    waited: dict[str, int] = {}  # rounds
    held: dict[str, Any] = {}  # the input and the result of the call last timed

    def prepare(name: str) -> None:
        held.clear()
        held["input"] = contenders[name].prepare()
        machine.flush(hide_launches)

    def run(name: str) -> None:
        held["result"] = contenders[name].run(held["input"])
        if hide_launches and machine.waited_for_host():
            waited[name] = waited.get(name, 0) + 1

    def time_once(name: str) -> float:
        prepare(name)
        start = machine.clock()
        run(name)
        return machine.clock() - start

    started = time.perf_counter()
    for name in contenders:
        time_once(name)
    rounds = limits.rounds(time.perf_counter() - started)
    waited.clear()

    rivals = [name for name in contenders if name != OURS]
    times: dict[str, list[float]] = {name: [] for name in contenders}

    def setup() -> None:
        first = len(times[rivals[0]]) % len(rivals)
        for name in rivals[first:] + rivals[:first]:
            times[name].append(time_once(name))
        prepare(OURS)

    benchmark.pedantic(run, args=(OURS,), setup=setup, rounds=rounds)
    held.clear()
    times[OURS] = list(benchmark.stats.stats.data)
    benchmark.extra_info["seconds"] = medians(times)
    benchmark.extra_info["waited_for_host"] = waited
    return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """Each rival's time over ours, the median of the rounds' ratios: above 1 we are faster."""
    pairs = {name: zip(seconds, times[OURS]) for name, seconds in times.items() if name != OURS}
    return {name: statistics.median(theirs / ours for theirs, ours in pair) for name, pair in pairs.items()}
