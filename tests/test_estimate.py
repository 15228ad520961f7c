"""What is said beforehand of time and disk is what comes, and TensorBoard's scalars are those of the run."""

import dataclasses
import re
import sys
import types
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnfuse import InputError, Preprocessing, SynthesisConfig, forecast, optimisation, synthesize
from bnfuse.cli import main
from bnfuse.estimate import (
    Disk,
    check_space,
    free_bytes,
    png_bytes_bound,
    readable_bytes,
    readable_seconds,
    seconds_left,
    soft_label_bytes,
)
from bnfuse.forecast import Forecast
from bnfuse.models import Teacher, freeze
from bnfuse.networks import CifarResNet
from bnfuse.optimisation import learning_rate
from bnfuse.scalars import Scalars
from bnfuse.store import png_bytes


@settings(max_examples=60)
@given(st.sampled_from([1, 3]), st.integers(1, 70), st.integers(1, 70), st.integers(0, 2**31))
def test_no_png_takes_more_than_its_bound(channels, height, width, seed):
    noise = torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    assert len(png_bytes(noise)) <= png_bytes_bound(channels, height, width)


def test_the_bound_is_close_for_noise():
    noise = torch.randint(0, 256, (3, 224, 224), dtype=torch.uint8)
    assert 0.98 * png_bytes_bound(3, 224, 224) < len(png_bytes(noise)) <= png_bytes_bound(3, 224, 224)


@pytest.mark.parametrize("images, classes", [(1, 2), (100, 1000), (4096, 50)])
def test_soft_labels_take_what_is_said(images, classes):
    data = safetensors.torch.save({"logits": torch.zeros(images, classes, dtype=torch.float16)})
    assert 0 <= soft_label_bytes(images, classes, 1) - len(data) < 96


def test_time_grows_with_pixels_and_falls_with_ranks():
    stages = [(200, 100 * 16), (300, 100 * 64)]  # half the size first
    assert seconds_left(stages, 0.5, 100 * 64) == pytest.approx(0.5 * (200 / 4 + 300))
    assert seconds_left(stages, 0.5, 100 * 64, teams=8) == pytest.approx(0.5 * (200 / 4 + 300) / 8)
    assert seconds_left([], 0.5, 1) == 0


def test_sizes_and_times_are_readable():
    sizes = {0: "0 bytes", 999: "999 bytes", 1500: "1.5 kB", 425e6: "425.0 MB", 3.02e10: "30.2 GB", 5e12: "5.0 TB"}
    assert {n: readable_bytes(n) for n in sizes} == sizes
    times = {3.4: "3 s", 150: "2 min", 9012: "2 h 30 min", 26 * 3600: "26 h 0 min", 3.5 * 86400: "3 days 12 h"}
    assert {t: readable_seconds(t) for t in times} == times


def test_free_space(tmp_path):
    assert free_bytes(tmp_path / "not" / "there") == pytest.approx(free_bytes(tmp_path), rel=0.01) and free_bytes("/") > 0
    check_space(tmp_path, 1, "it")
    with pytest.raises(InputError, match=r"labels take 1000000.0 TB, but only .* are free where .*x lies"):
        check_space(tmp_path / "x", 10**18, "labels")
    assert Disk(3, 5000.0, False, 100, 10**6).needed == 3 * 8192 + 100  # whole blocks
    assert (
        "at most 15.0 kB of images and 100 bytes of soft labels, 24.7 kB in whole blocks; 1.0 MB are free"
        in Disk(3, 5000, True, 100, 10**6).describe()
    )


def unit(number: int, images: int = 10):
    return types.SimpleNamespace(number=number, classes=(0,) * images)


@pytest.fixture
def clock(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(forecast.time, "monotonic", lambda: clock.now)
    return clock


def test_time_is_told_once_after_two_calls_in_one_stage(clock, tmp_path):
    said = []
    stages = [((4, 4), 40), ((8, 8), 100)]
    told = Forecast(tmp_path, [unit(k) for k in range(5)], {4}, stages, (3, 8, 8), teams=2, say=said.append)
    images = torch.zeros(10, 3, 8, 8)
    for step, now in ((40, 100.0), (50, 200.0), (60, 201.0), (70, 300.0)):  # 40 is of the first stage
        clock.now = now
        told.show(unit(0), step, images)
    # 0.1 s a step at full size; four units of 40 steps at a quarter and 100 at full, by two teams
    assert said == ["40 images in 4 units: about 22 s on 2 ranks, at 0.1 s a step"]
    assert 4 * 0.1 * (40 / 4 + 100) / 2 == 22


def test_a_disk_that_is_too_small_is_told_before_it_is_full(tmp_path, monkeypatch):
    free = types.SimpleNamespace(bytes=0)
    monkeypatch.setattr(forecast, "free_bytes", lambda path: free.bytes)
    units, said, pixels = [unit(k) for k in range(4)], [], torch.randint(0, 256, (10, 3, 40, 40), dtype=torch.uint8)
    new = lambda **o: Forecast(tmp_path, units, set(), [((40, 40), 10)], (3, 40, 40), say=said.append, **o)  # noqa: E731
    with pytest.raises(InputError, match="soft labels, .* in whole blocks; 0 bytes are free"):
        new(logits=10).begin()
    free.bytes = 100_000
    with pytest.warns(
        UserWarning, match="may be too small: at most 19[0-9].* of images, .* in whole blocks; 100.0 kB are free"
    ):
        new().begin()
    with pytest.raises(InputError, match=r"about 14[67].. kB .*100.0 kB are free.*committed is safe; free .* more and run"):
        new().committed(units[0], pixels)
    free.bytes = 10**9
    told = new()
    told.begin()
    told.committed(units[0], pixels)
    told.committed(units[1], pixels)  # told once
    assert said[-2].startswith("to write: at most") and said[-2].endswith("; 1.0 GB are free")
    assert said[-1].startswith("still to write: about") and sum(line.startswith("still") for line in said) == 2


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return Teacher(freeze(CifarResNet(8, 3, 1, width=4)), "small", 3, Preprocessing((8, 8), (0.5,), (0.25,)))


RUN = SynthesisConfig(
    images_per_class=2, batch_size=2, iterations=40, low_resolution_iterations=20, warmup=5, targets="running"
)


def test_a_run_tells_what_it_will_take(teacher, tmp_path, capsys):
    synthesize(teacher, None, tmp_path / "out", RUN)
    text = capsys.readouterr().out
    assert len(re.findall(r"6 images in 3 units: about \d+ s, at .* s a step", text)) == 1
    (line,) = re.findall("still to write: about (.*) bytes of images, .* are free", text)
    real = [path.stat().st_size for path in (tmp_path / "out" / "images").rglob("*.png")]
    assert float(line) == pytest.approx(sum(real) * 4 / 6, rel=0.1)
    synthesize(teacher, None, tmp_path / "out", RUN)
    assert not capsys.readouterr().out  # it was done


def test_a_run_that_cannot_fit_ends_after_its_first_unit(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(forecast, "free_bytes", lambda path: 100)
    with pytest.warns(UserWarning, match="may be too small"), pytest.raises(InputError, match="What is committed is safe"):
        synthesize(teacher, None, tmp_path / "out", RUN, progress=False)
    monkeypatch.undo()
    assert synthesize(teacher, None, tmp_path / "out", RUN, progress=False).made == 4


def test_tensorboard_reads_it(teacher, tmp_path):
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed: bnfuse[tensorboard]"
    )
    result = synthesize(teacher, None, tmp_path / "out", RUN, progress=False, tensorboard=tmp_path / "log")
    events = reader.EventAccumulator(str(tmp_path / "log"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {f"loss/{n}" for n in ("bn", "ce", "total")} | {
        "lr",
        "pace/steps_per_second",
        "pace/images_per_second",
    }
    losses, rates = events.Scalars("loss/total"), events.Scalars("lr")
    assert [e.step for e in losses] == list(range(10, 181, 10))
    assert losses[-1].value == pytest.approx(result.losses["total"], rel=1e-6)
    assert [e.value for e in rates[:6]] == pytest.approx([learning_rate(RUN, step) for step in range(10, 61, 10)])
    pace = {name: {e.step: e.value for e in events.Scalars(f"pace/{name}_per_second")} for name in ("steps", "images")}
    assert set(pace["steps"]) == {e.step for e in losses} - {10, 70, 130}  # a unit's first has none before it
    assert all(pace["images"][step] == pytest.approx(2 * pace["steps"][step], rel=1e-5) for step in pace["steps"])


def test_the_learning_rate_that_is_told_is_the_one_that_is_used(teacher, tmp_path, monkeypatch):
    used, adam = [], optimisation.adam
    monkeypatch.setattr(optimisation, "adam", lambda *args, lr, **more: used.append(lr) or adam(*args, lr=lr, **more))
    config = dataclasses.replace(RUN, classes=(0,))
    synthesize(teacher, None, tmp_path / "out", config, progress=False)
    assert used == [learning_rate(config, step) for step in range(1, 61)]


def test_without_tensorboard_the_extra_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"pip install 'bnfuse\[tensorboard\]'"):
        Scalars(tmp_path, 10, lambda step: 0.1)
    with pytest.raises(SystemExit):
        main(["synthesize", "--help"])
    assert "--tensorboard" in capsys.readouterr().out and not list(Path(tmp_path).iterdir())
