"""How the benchmarks take time: rounds, ratios, the alternation, and the GPU's clock with events that need no GPU."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import timing  # noqa: E402


class Benchmark:
    """What `alternate` uses of pytest-benchmark's fixture."""

    def __init__(self, clock):
        self.clock, self.extra_info = clock, {}

    def pedantic(self, target, args, setup, rounds):
        data = []
        for _ in range(rounds):
            setup()
            start = self.clock()
            target(*args)
            data.append(self.clock() - start)
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=data))


class Event:
    """A CUDA event on a clock that moves only when it is told to."""

    now = 0.0  # milliseconds

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.now

    def synchronize(self):
        self.synchronized = True

    def elapsed_time(self, later):
        assert later.synchronized
        return later.at - self.at


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return SimpleNamespace(clock=timing.CudaInstant, flush=lambda: setattr(Event, "now", Event.now + 1000))


def test_rounds_alternate_and_count_neither_preparation_nor_flush(machine):
    calls = []

    def contender(name: str, milliseconds: float) -> timing.Contender:
        def run(prepared):
            calls.append(prepared)
            Event.now += milliseconds

        return timing.Contender(run, lambda: name)

    contenders = {"bnfuse": contender("bnfuse", 2), "a": contender("a", 6), "b": contender("b", 3)}
    benchmark = Benchmark(machine.clock)
    times = timing.alternate(benchmark, contenders, machine, timing.Limits(2, 2, 0.0))
    assert "".join(name[-1] for name in calls) == "eab" + "abe" + "bae"  # the warm-up, then two rounds; bnfuse ends in e
    assert times == {"bnfuse": pytest.approx([0.002] * 2), "a": pytest.approx([0.006] * 2), "b": pytest.approx([0.003] * 2)}
    assert timing.ratios(times) == pytest.approx({"a": 3, "b": 1.5})
    assert benchmark.extra_info["seconds"] == pytest.approx({"bnfuse": 0.002, "a": 0.006, "b": 0.003})


def test_ratios_are_taken_round_by_round():
    """A slow spell that hits a whole round changes no ratio."""
    assert timing.ratios({"bnfuse": [1.0, 10.0, 1.0], "hook": [3.0, 30.0, 3.0]}) == {"hook": 3.0}


def test_rounds_fill_the_time_within_bounds():
    limits = timing.Limits(5, 15, 3.0)
    assert [limits.rounds(seconds) for seconds in (10.0, 0.3, 0.001, 0.0)] == [5, 10, 15, 15]
