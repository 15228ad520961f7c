"""Who says what the images show: the teacher, or another network, at its own size and with its own outputs."""

import pytest
import torch
from torch import nn

from bnfuse import InputError, Preprocessing, SynthesisConfig
from bnfuse.checkpoints import save_checkpoint
from bnfuse.cli import main
from bnfuse.models import Teacher, freeze
from bnfuse.networks import CifarResNet
from bnfuse.store import ImageRecord, Store
from bnfuse.units import recognised

LEVELS = (0.1, 0.5, 0.9)  # brightness of classes a, b, c
RUNNING = SynthesisConfig(targets="running")


class Brightness(nn.Module):
    """Output k for images of brightness levels[k]; takes images of one size alone."""

    def __init__(self, levels, size):
        super().__init__()
        self.bn, self.levels, self.size = nn.BatchNorm2d(1), torch.tensor(levels), size

    def forward(self, x):
        assert x.shape[1:] == (1, self.size, self.size)
        return -(x.mean((1, 2, 3))[:, None] - self.levels).abs()


def network(levels, size, names=None) -> Teacher:
    preprocessing = Preprocessing((size, size), (0.0,), (1.0,))
    return Teacher(freeze(Brightness(levels, size)), f"brightness{len(levels)}", len(levels), preprocessing, names)


@pytest.fixture
def store(tmp_path):
    """An image of each class, of which that of c is as bright as b's."""
    brightness = torch.tensor([LEVELS[0], LEVELS[1], LEVELS[1]])
    images = (brightness * 255).round().to(torch.uint8)[:, None, None, None].expand(3, 1, 8, 8).contiguous()
    with Store.open(tmp_path / "store", card={}, class_names=["a", "b", "c"]) as store:
        store.commit(0, images, [ImageRecord(k, 0, 0, {}) for k in range(3)])
        store.finish()
    return tmp_path / "store"


def test_a_judge_is_asked_for_its_own_outputs_at_its_own_size(store):
    teacher = network((0.5, 0.1, 0.9), 8, ["a", "b", "c"])  # takes a for b, and b and c for a
    judged = lambda judge: recognised(teacher, None, store, RUNNING, judge=judge)
    assert recognised(teacher, None, store, RUNNING) == 0
    assert judged(network(LEVELS, 12)) == pytest.approx(2 / 3)  # as many outputs: the teacher's
    assert judged(network(LEVELS[::-1], 12, ["c", "b", "a"])) == pytest.approx(2 / 3)  # by name
    assert judged(network(LEVELS, 12, ["x", "y", "z"])) == pytest.approx(2 / 3)
    more = (0.9, 0.3, 0.1, 0.5)
    assert judged(network(more, 4, ["c", "x", "a", "b"])) == pytest.approx(2 / 3)
    assert judged(network(more, 4, ["c", "x", "b", "a"])) == 0
    with pytest.raises(
        InputError,
        match="the judge, brightness4, tells 4 classes apart and names none: one is needed that names all of the dataset's 3",
    ):
        judged(network(more, 4))


def test_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = lambda line: main(line.split())
    for name in ("teacher", "judge"):
        assert run(f"train --data digits:train --out {name} --model resnet8 --epochs 1 --image-size 8") == 0
    flow = "synthesize --teacher teacher/model.safetensors --targets running --images-per-class 1 --iterations 2 --out out"
    assert run(f"{flow} --judge judge/model.safetensors") == 0
    assert "the judge (resnet8) takes " in capsys.readouterr().out
    assert run(f"{flow} --judge judge") == 2 and "no model is called 'judge'" in capsys.readouterr().err
    save_checkpoint(
        tmp_path / "few.safetensors",
        CifarResNet(8, 3, 1),
        architecture="resnet8",
        num_classes=3,
        preprocessing=Preprocessing((8, 8), (0.5,), (0.5,)),
    )
    other = flow.replace("--out out", "--out other")
    assert run(f"{other} --judge few.safetensors") == 2 and "tells 3 classes apart" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()  # before anything is made
