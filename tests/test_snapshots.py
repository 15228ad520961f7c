"""Units stopped in the middle: they go on bit for bit, from nothing but a whole checkpoint of their own; units that diverge
begin anew."""

from __future__ import annotations

import errno
import os
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import torch

from bnfuse import BnfuseError, InputError, SynthesisConfig, synthesize, units
from bnfuse.cli import main
from bnfuse.distributed import Team
from bnfuse.errors import Interrupted, UnitWarning
from bnfuse.manifest import read_store, verify
from bnfuse.models import Teacher, freeze
from bnfuse.networks import CifarResNet
from bnfuse.optimisation import NonFiniteLoss, derive_seed
from bnfuse.preprocessing import Preprocessing
from bnfuse.signals import Stop
from bnfuse.snapshots import UnitCheckpoint
from bnfuse.store import Store

CONFIG = SynthesisConfig(
    images_per_class=2,
    classes=(0, 1),
    batch_size=2,
    iterations=5,
    low_resolution_iterations=3,
    targets="running",
    jitter=1,
    flip=True,
    crop_scale=0.5,
    warmup=2,
)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    torch.manual_seed(0)
    return Teacher(freeze(CifarResNet(8, 10, 1, width=4)), "custom", 10, Preprocessing((8, 8), (0.3,), (0.3,)))


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("whole") / "made"
    make(teacher, root)
    return tree(root)


def make(teacher: Teacher, root: Path, config: SynthesisConfig = CONFIG, **options):
    return synthesize(teacher, None, root, config, device="cpu", progress=False, **options)


def tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def stop_at(monkeypatch):
    """Sends this process a signal after a step of a unit: when its checkpoint is asked, or (the last step) the unit is made."""

    def stop_at(unit: int, step: int, number: int = signal.SIGTERM) -> None:
        genuine = UnitCheckpoint.due

        def due(self, now):
            if (self.unit, now) == (unit, step):
                os.kill(os.getpid(), number)
            return genuine(self, now)

        def optimise(objective, labels, outputs, seeds, number_of_unit, *rest, **options):
            made = make_unit(objective, labels, outputs, seeds, number_of_unit, *rest, **options)
            if (number_of_unit, CONFIG.total_iterations) == (unit, step):
                os.kill(os.getpid(), number)
            return made

        make_unit = units.optimise
        monkeypatch.setattr(units, "optimise", optimise)
        monkeypatch.setattr(UnitCheckpoint, "due", due)

    return stop_at


@pytest.mark.parametrize("step", range(1, 9))
def test_stopped_at_every_step(teacher, whole, tmp_path, stop_at, step, capfd):
    stop_at(1, step)
    with pytest.raises(Interrupted) as stopped:
        make(teacher, tmp_path / "made")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert stopped.value.signal == signal.SIGTERM and "stopped by SIGTERM" in str(stopped.value)
    files = tree(tmp_path / "made")
    if step < 8:  # the last step is followed by the commit
        assert f"unit 1 goes on after step {step} of 8" in str(stopped.value)
        assert "2 of 4 images are safe" in str(stopped.value) and "checkpoints/000001.safetensors" in files
    else:
        assert "4 of 4 images are safe" in str(stopped.value) and "checkpoints/000001.safetensors" not in files
    assert verify(tmp_path / "made") == ["the dataset is not finished"]
    done = []
    make_step = units.optimise
    units.optimise = lambda *arguments, **options: done.append(options["state"]) or make_step(*arguments, **options)
    try:
        make(teacher, tmp_path / "made")
    finally:
        units.optimise = make_step
    assert [state is not None for state in done] == ([True] if step < 8 else [])
    assert tree(tmp_path / "made") == whole and not (tmp_path / "made" / "checkpoints").exists()
    assert "SIGTERM: stopping as soon as the work in hand is safe" in capfd.readouterr().err


def test_a_second_interrupt_acts_at_once():
    with Stop(quiet=True) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted):
            stop.check()


def test_exit_status(teacher, tmp_path, monkeypatch, stop_at, capsys):
    stop_at(0, 4, signal.SIGINT)
    monkeypatch.setattr("bnfuse.cli_flags.load_teacher", lambda args: teacher)
    flags = "--teacher x --targets running --images-per-class 1 --classes 3 --iterations 8 --device cpu".split()
    assert main(["synthesize", *flags, "--out", str(tmp_path / "made")]) == 130
    error = capsys.readouterr().err
    assert "bnfuse: stopped by SIGINT; unit 0 goes on after step 4 of 8; 0 of 1 images are safe" in error


def test_checkpoints_of_a_run_that_is_killed(teacher, whole, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def dying(self, step, state):
        genuine(self, step, state)
        if step == 6:
            raise Killed

    genuine = UnitCheckpoint.save
    with monkeypatch.context() as patch:
        patch.setattr(UnitCheckpoint, "save", dying)
        with pytest.raises(Killed):
            make(teacher, tmp_path / "made", checkpoint_every=3)
    with safetensors.safe_open(tmp_path / "made" / "checkpoints" / "000000.safetensors", "pt") as file:
        assert file.metadata()["step"] == "6" and file.metadata()["unit"] == "0"
    make(teacher, tmp_path / "made", checkpoint_every=3)
    assert tree(tmp_path / "made") == whole


class TestUnusable:
    """A checkpoint that is not whole, or not of this unit of this dataset, is never gone on from."""

    @pytest.fixture
    def stopped(self, teacher, tmp_path, stop_at, monkeypatch) -> Path:
        stop_at(1, 4)
        with pytest.raises(Interrupted):
            make(teacher, tmp_path / "made")
        monkeypatch.undo()
        return tmp_path / "made"

    @pytest.mark.parametrize("offset", [0, 20, 60, 150, 2000, -1])
    def test_flipped_bit(self, teacher, whole, stopped, offset):
        path = stopped / "checkpoints" / "000001.safetensors"
        data = bytearray(path.read_bytes())
        data[offset] ^= 1
        path.write_bytes(data)
        with pytest.warns(UnitWarning, match="000001.safetensors is not used, and unit 1 begins anew"):
            make(teacher, stopped)
        assert tree(stopped) == whole

    @pytest.mark.parametrize("size", [0, 5, 300, -1])
    def test_torn(self, teacher, whole, stopped, size):
        path = stopped / "checkpoints" / "000001.safetensors"
        path.write_bytes(path.read_bytes()[:size])
        with pytest.warns(UnitWarning, match="unit 1 begins anew: it is damaged"):
            make(teacher, stopped)
        assert tree(stopped) == whole

    def test_of_another_unit(self, teacher, whole, stopped):
        path = stopped / "checkpoints" / "000001.safetensors"
        (stopped / "manifest.jsonl").write_bytes(b"")
        path.rename(path.with_name("000000.safetensors"))
        with pytest.warns(UnitWarning, match="unit 0 begins anew: it belongs to another dataset or another unit"):
            make(teacher, stopped)
        assert tree(stopped) == whole

    def test_of_another_dataset(self, teacher, stopped, tmp_path):
        other, config = tmp_path / "other", replace(CONFIG, seed=1)
        make(teacher, tmp_path / "expected", config)
        card = units.Source.of(teacher, None, config).card(config, "cpp", 1)
        Store.open(other, card=card, class_names=["0", "1"], counts=[2, 2]).close()
        (other / "checkpoints").mkdir()
        (stopped / "checkpoints" / "000001.safetensors").rename(other / "checkpoints" / "000001.safetensors")
        with pytest.warns(UnitWarning, match="another dataset"):
            make(teacher, other, config)
        assert tree(other) == tree(tmp_path / "expected")

    def test_of_a_unit_that_is_committed(self, teacher, whole, stopped):
        for unit in (0, 7):
            (stopped / "checkpoints" / f"{unit:06d}.safetensors").write_bytes(b"")
        (stopped / "checkpoints" / "notes.txt").write_bytes(b"")
        make(teacher, stopped)
        left = {"checkpoints/000007.safetensors", "checkpoints/notes.txt"}
        assert set(tree(stopped)) - set(whole) == left
        assert len(verify(stopped)) == 2


class TestDisk:
    @pytest.fixture
    def full(self, monkeypatch):
        """No room for checkpoints."""
        genuine = os.replace

        def refuse(source, target):
            if "checkpoints" in str(target):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            genuine(source, target)

        monkeypatch.setattr(os, "replace", refuse)

    def test_a_checkpoint_in_between(self, teacher, whole, tmp_path, full, monkeypatch):
        with pytest.raises(InputError, match="checkpoints/000000.safetensors: No space left.*committed so far are safe.*free"):
            make(teacher, tmp_path / "made", checkpoint_every=2)
        monkeypatch.undo()
        make(teacher, tmp_path / "made", checkpoint_every=2)
        assert tree(tmp_path / "made") == whole

    def test_the_checkpoint_of_a_run_that_stops(self, teacher, whole, tmp_path, full, stop_at):
        stop_at(1, 4)
        with pytest.raises(Interrupted, match="unit 1 begins anew: cannot write .*No space left.*; 2 of 4 images are safe"):
            make(teacher, tmp_path / "made")
        assert "checkpoints" not in " ".join(tree(tmp_path / "made"))


def test_ranks_of_a_team_ask_alike_and_the_first_writes(teacher, tmp_path, monkeypatch):
    Store.open(tmp_path, card={}, class_names=["x"]).close()
    asked = []
    monkeypatch.setattr("bnfuse.snapshots.any_of", lambda team, flag: asked.append(flag) or True)  # another rank was told to
    checkpoint = UnitCheckpoint(tmp_path, 0, 10, every=0, stop=Stop(), team=Team(rank=1, size=2))
    assert checkpoint.due(3) and asked == [False] and not checkpoint.due(10)
    with pytest.raises(Interrupted, match="SIGTERM; unit 0 goes on after step 3 of 10"):
        checkpoint.save(3, {"x": torch.zeros(2)})
    assert not checkpoint.path.exists()


# ---- losses that are not finite ----


@pytest.fixture
def diverging(monkeypatch):
    """Makes the given (unit, attempt) diverge, told apart by the seeds."""

    def diverging(*which):
        genuine = units.optimise

        def optimise(objective, labels, outputs, seeds, unit, *rest, **options):
            for number, attempt in which:
                extra = ("attempt", attempt) if attempt else ()
                if unit == number and seeds[0] == derive_seed(CONFIG.seed, int(outputs[0]), 0, *extra):
                    raise NonFiniteLoss(f"unit {unit}, step 3: the loss is not finite at site conv1", unit, 3, "conv1")
            return genuine(objective, labels, outputs, seeds, unit, *rest, **options)

        monkeypatch.setattr(units, "optimise", optimise)

    return diverging


def test_a_unit_that_diverges_begins_anew(teacher, whole, tmp_path, diverging):
    diverging((1, 0), (1, 1))
    with pytest.warns(UnitWarning, match="unit 1, step 3: .* at site conv1. Unit 1 begins anew from other seeds") as notes:
        make(teacher, tmp_path / "made")
    assert len(notes) == 2
    seeds = [entry.seed for entry in read_store(tmp_path / "made").entries]
    assert seeds == [derive_seed(0, 0, 0), derive_seed(0, 0, 1)] + [derive_seed(0, 1, i, "attempt", 2) for i in range(2)]
    files = tree(tmp_path / "made")
    assert [name for name in whole if name.startswith("images/00") and files[name] != whole[name]] == []
    assert all(files[name] != whole[name] for name in whole if name.startswith("images/01"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make(teacher, tmp_path / "again")
    assert tree(tmp_path / "again") == files


def test_a_unit_that_always_diverges_ends_the_run(teacher, tmp_path, diverging, monkeypatch):
    diverging((1, 0), (1, 1))
    with pytest.warns(UnitWarning), pytest.raises(BnfuseError, match="conv1. 2 different sets of seeds .* safe. .*--retries"):
        make(teacher, tmp_path / "made", retries=1)
    assert [entry.unit for entry in read_store(tmp_path / "made").entries] == [0, 0]
    with pytest.warns(UnitWarning):
        assert make(teacher, tmp_path / "made", retries=2).made == 2


def test_a_further_attempt_goes_on_as_such(teacher, tmp_path, diverging, stop_at):
    diverging((1, 0))
    with pytest.warns(UnitWarning):
        make(teacher, tmp_path / "whole")
    stop_at(1, 5)
    with pytest.warns(UnitWarning), pytest.raises(Interrupted):
        make(teacher, tmp_path / "made")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the first attempt is not tried once more
        make(teacher, tmp_path / "made")
    assert tree(tmp_path / "made") == tree(tmp_path / "whole")


def test_threads_are_those_of_the_dataset(teacher, whole, tmp_path, stop_at, monkeypatch):
    stop_at(0, 2)
    with pytest.raises(Interrupted):
        make(teacher, tmp_path / "made")
    monkeypatch.undo()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    make(teacher, tmp_path / "made")
    assert seen == [1, 3] and tree(tmp_path / "made") == whole
    with pytest.raises(InputError, match="threads: given 2, the dataset has 1"):
        make(teacher, tmp_path / "made", threads=2)
    with pytest.raises(InputError, match="threads must be at least 1"):
        make(teacher, tmp_path / "made", threads=0)
