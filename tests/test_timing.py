"""How the benchmarks take time: rounds, ratios, the alternation, the GPU's clock with events that need no GPU, `make gpu`'s."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bnfuse.fusion import FusedBatchNorm

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import timing  # noqa: E402

CPU = torch.device("cpu")


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
    machine = SimpleNamespace(clock=timing.CudaInstant, waited_for_host=lambda: False)
    machine.flush = lambda hide_launches: setattr(Event, "now", Event.now + 1000)
    return machine


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


def test_rounds_in_which_the_gpu_was_awake_before_all_was_queued_are_noted(machine):
    queued = []
    machine.waited_for_host = lambda: queued[-1] == "slow" or len(queued) == 1  # bnfuse in the warm-up alone
    contenders = {name: timing.Contender(lambda _, name=name: queued.append(name)) for name in ("bnfuse", "fast", "slow")}
    for benchmark, hide_launches, noted in (
        (Benchmark(machine.clock), True, {"slow": 2}),
        (Benchmark(machine.clock), False, {}),
    ):
        timing.alternate(benchmark, contenders, machine, timing.Limits(2, 2, 0.0), hide_launches)
        assert benchmark.extra_info["waited_for_host"] == noted


def test_the_gpu_sleeps_while_what_is_timed_is_queued(monkeypatch):
    """Five milliseconds at 2 GHz: a backward pass through a compiled function took 0.3 to queue, one through Triton 1.3."""
    slept = []
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    machine = timing.Machine(CPU)
    assert not machine.waited_for_host()
    machine.device = SimpleNamespace(type="cuda")
    machine._awake = SimpleNamespace(record=lambda: slept.append("awake"), query=lambda: True)
    machine.flush()
    assert slept == [timing.HIDE_LAUNCHES_CYCLES, "awake"] and slept[0] >= 5e-3 * 2e9 and machine.waited_for_host()
    machine.flush(hide_launches=False)
    assert len(slept) == 2


def test_ratios_are_taken_round_by_round():
    """A slow spell that hits a whole round changes no ratio."""
    assert timing.ratios({"bnfuse": [1.0, 10.0, 1.0], "hook": [3.0, 30.0, 3.0]}) == {"hook": 3.0}


def test_rounds_fill_the_time_within_bounds():
    limits = timing.Limits(5, 15, 3.0)
    assert [limits.rounds(seconds) for seconds in (10.0, 0.3, 0.001, 0.0)] == [5, 10, 15, 15]


# ---- the time of `make gpu` ----

# Of its nine minutes, what the benchmarks may take: the rest is for building the kernels and for the GPU tests.
BENCHMARKS_SECONDS = 356
# What is not timed, in seconds, on 16 cores. Assumed; benchmarks/results/make_gpu_nvidia-h200.log has a run's seconds, with the
# steps of two networks missing: 127 for the first run, 55 for the second.
START = 15  # of a run: imports, CUDA, Triton compiling its kernels
VERIFY_SITE, VERIFY_NETWORK = 0.4, 6  # values, and every contender once; of a network for its step and for its memory
CONVOLUTIONS = 25  # of one network, in two processes: a millisecond or two each, behind a sleep of five
PROFILE = 8  # of six steps
COMPILE_SITE, COMPILE_NETWORK = 4, 60  # sites compile side by side; from the cache a site still takes a second or two


def test_what_make_gpu_measures_fits_into_its_time():
    from sites import all_sites

    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    runs = re.findall(r"\$\(GPU_BENCH\) .*--networks ([\w ]+?) --compile-for([\w ]*)", makefile)
    assert len(runs) == 2
    timed, untimed = 0.0, float(CONVOLUTIONS + PROFILE)
    for networks, compiled in ((networks.split(), compiled.split()) for networks, compiled in runs):
        sites = all_sites(networks, 256)
        timed += 2 * len(sites) * timing.OPERATOR_LIMITS["cuda"].longest + len(networks) * timing.STEP_LIMITS["cuda"].longest
        untimed += START + VERIFY_SITE * len(sites) + VERIFY_NETWORK * len(networks)
        untimed += COMPILE_SITE * sum(not found.keys().isdisjoint(compiled) for found in sites.values())
        untimed += COMPILE_NETWORK * len(compiled)
    assert timed + untimed <= BENCHMARKS_SECONDS, f"{timed:.0f} s of timing, {untimed:.0f} s of everything else"


def test_convolutions_are_timed_in_both_forms_after_they_have_agreed(tmp_path, monkeypatch):
    command = [sys.executable, "benchmarks/convolutions.py", "--networks", "resnet18", "--batch", "1", "--threads", "1"]
    environment = {**os.environ, "BNFUSE_RESULTS": str(tmp_path)}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
    assert ran.returncode == 0, ran.stderr
    layers = json.loads((tmp_path / "convolutions_batch1.json").read_text())["convolutions"]["resnet18"]["layers"]
    assert sum(layer["calls"] for layer in layers) == 20 and layers[0]["input"] == [1, 3, 224, 224]
    assert sum(layer["calls"] * layer["gigaflop"] for layer in layers) == pytest.approx(7.25, rel=1e-2)  # of 1.81 G products
    assert [set(layer["seconds"]) for layer in layers] == [{"as it is", "over cells"}] + [{"as it is"}] * (len(layers) - 1)
    assert all(seconds > 0 for layer in layers for seconds in layer["seconds"].values())
    assert "| 1×3×224×224 | 3 → 64, 7×7, stride 2 | 1 | 0.5 |" in ran.stdout


def test_a_step_s_profile_has_the_convolutions_and_every_site():
    import step_profile

    spent = step_profile.profiled_step("resnet20", 2, torch.device("cpu"), torch.float32)
    found = {one.name: one for one in spent}
    assert [one.seconds for one in spent] == sorted((one.seconds for one in spent), reverse=True)
    assert found["bnfuse_cpp::bn_forward"].calls == found["aten::convolution_backward"].calls == 19
    *rows, others, total = step_profile.table(spent, 4).splitlines()[2:]
    assert len(rows) == 4 and spent[0].name in rows[0] and "100.0%" in total and f"{len(spent) - 4} others" in others


def test_with_both_settings_of_cudnn_each_has_a_process_of_its_own():
    import convolutions

    found = convolutions.time_with_both_settings({"resnet20": 1}, "cpu", torch.float32)
    assert list(found) == ["resnet20"] and len(found["resnet20"]) == 6
    assert all(layer.keys() == {"as it is", "as it is, cudnn.benchmark"} for layer in found["resnet20"])
    assert not torch.backends.cudnn.benchmark


def test_a_wrong_gradient_of_a_convolution_is_not_timed(monkeypatch):
    import convolutions

    monkeypatch.setattr(convolutions.ImageConvolution, "forward", lambda self, x: 1.01 * self.convolution(x))
    layer = torch.nn.Conv2d(3, 8, 7, stride=2, padding=3)
    with pytest.raises(AssertionError, match="over cells: output is 1.00e-02 off"):
        convolutions.time_layer(layer, (2, 3, 16, 16), timing.Machine(torch.device("cpu")), torch.float32)


def test_the_longest_case_is_the_limit_and_its_warm_up():
    """A round at the edge of what the limit is for: one to warm up, and as many as the least allowed."""
    limits = timing.Limits(5, 15, 2.0)
    seconds_a_round = limits.seconds / limits.min_rounds
    assert limits.longest == pytest.approx((1 + limits.rounds(seconds_a_round)) * seconds_a_round)
    assert all((1 + limits.rounds(seconds)) * seconds <= limits.longest for seconds in (0.3, 0.1, 0.01))


def test_the_demo_s_rate_on_the_reference_is_the_reference_s_alone(monkeypatch, tmp_path):
    import results_file
    import synthesis_rate

    ran = []

    def optimise(objective, *_):
        sites = (module for module in objective.teacher.modules() if isinstance(module, FusedBatchNorm))
        ran.append({objective.matcher.backend, *(site.backend for site in sites)})
        return None, {"total": 1.0}

    monkeypatch.setattr(synthesis_rate, "optimise", optimise)
    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["synthesis_rate.py", "--pairs", "1"])
    threads = torch.get_num_threads()
    synthesis_rate.main()
    torch.set_num_threads(threads)
    assert ran == [{"cpp"}, {"reference"}] * 2


def test_small_planes_are_timed_beside_a_copy(tmp_path):
    command = [sys.executable, "benchmarks/small_planes.py", "--quick", "--threads", "1"]
    environment = {**os.environ, "BNFUSE_RESULTS": str(tmp_path)}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
    assert ran.returncode == 0, ran.stderr
    result = json.loads((tmp_path / "quick_small_planes.json").read_text())
    shares = result["share_of_copy_bandwidth"]
    assert {(s["layout"], s["residual"], s["plane"]) for s in shares} == {
        (layout, residual, plane)
        for layout in ("contiguous", "channels_last")
        for residual in (False, True)
        for plane in (1, 7, 56)
    }
    assert all(s[direction] > 0 for s in shares for direction in ("forward", "backward"))
    assert result["threads"] == 1 and "| forward, contiguous | 64 |" in ran.stdout
