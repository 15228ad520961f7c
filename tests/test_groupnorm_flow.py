"""A teacher without BatchNorm from end to end, by the very commands of docs/recording.md."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from test_cli import run

from bnfuse import ClassStatistics, Matcher, fuse, group_by_class, load_dataset, load_teacher

PAGE = Path(__file__).parents[1] / "docs/recording.md"
SITES = ("type=GroupNorm",)


def commands() -> dict[str, list[str]]:
    """The page's commands that begin with `bnfuse train …` and the T that they share, by subcommand; of two, the first."""
    lines = re.search(r"\n((?:    .*\n)*    T=.*\n(?:    .*\n)*)", PAGE.read_text())[1].replace("\\\n", " ").splitlines()
    teacher = next(re.fullmatch(r'\s*T="(.*)"', line)[1] for line in lines if "T=" in line)
    found = [shlex.split(line.replace("$T", teacher))[1:] for line in lines if line.strip().startswith("bnfuse")]
    return {arguments[0]: arguments for arguments in reversed(found)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the page's network, and what its first two commands leave."""
    folder = tmp_path_factory.mktemp("groupnorm")
    (folder / "groupnorm.py").write_text(re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(*commands()["train"], "--epochs", 4, "--device", "cpu") == 0
        assert run(*commands()["record"], "--device", "cpu") == 0
    return folder


def test_the_commands_of_the_page(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    synthesize = commands()["synthesize"]
    small = ["--images-per-class", 4, "--batch-size", 4, "--classes", 0, 3, "--device", "cpu"]
    assert run(*synthesize, *small, "--iterations", 60) == 0
    assert "8 images, 8 made now" in capsys.readouterr().out
    teacher = load_teacher("groupnorm.py:small", weights="runs/groupnorm/teacher/model.safetensors")
    statistics = ClassStatistics.load(
        "runs/groupnorm/statistics.safetensors", teacher=teacher.model, num_classes=10, sites=SITES
    )
    fused, matcher = fuse(teacher.model, sites=SITES), Matcher.from_statistics(statistics)

    def distance(pixels, labels):
        group_starts, classes = group_by_class(labels)
        _, moments = fused(teacher.preprocessing.normalize(pixels), group_starts)
        return float(matcher(moments, classes))

    made, real = load_dataset("runs/groupnorm/synthetic"), load_dataset("digits:train")
    pixels, labels = torch.stack([made[i][0] for i in range(8)]), torch.tensor([0] * 4 + [3] * 4)
    noise = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    std, mean = (torch.tensor(value) for value in (teacher.preprocessing.std, teacher.preprocessing.mean))
    start = distance((noise * std + mean).clamp(0, 1), labels)
    of_real = distance(torch.stack([real[int(i)][0] for k in (0, 3) for i in (real.labels == k).nonzero()[:4]]), labels)
    assert distance(pixels, labels) < 0.2 * start and distance(pixels, labels) < of_real

    # in virtual batches: the same images but for rounding, over the few steps in which it has not grown
    for name, more in (("whole", []), ("virtual", ["--micro-batch", 3])):
        assert run(*synthesize, *small, "--iterations", 4, *more, "--out", name) == 0
    whole, virtual = (torch.stack([load_dataset(name)[i][0] for i in range(8)]) for name in ("whole", "virtual"))
    assert (whole - virtual).abs().max() <= 1.01 / 255 and not torch.equal(whole, pixels)


def test_other_estimators_and_part_of_the_sites(trained, monkeypatch):
    monkeypatch.chdir(trained)
    record, synthesize = commands()["record"], commands()["synthesize"]
    assert (
        run(*record, "--sites", "type=GroupNorm", "pixels", "--class-variance", "images", "--out", "images", "--device", "cpu")
        == 0
    )
    small = ["--images-per-class", 2, "--classes", 5, "--iterations", 2, "--device", "cpu", "--statistics", "images"]
    for name, more in (("half", ["--global-share", 0.5]), ("pooled", ["--targets", "global"])):
        assert run(*synthesize, *small, *more, "--out", name) == 0
        card = json.loads(Path(name, "card.json").read_text())
        assert card["statistics"]["variance"] == "images" and card["config"]["sites"] == ["type=GroupNorm"]
    assert run("verify", "half") == 0


def test_what_does_not_fit_is_said(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    synthesize = commands()["synthesize"]
    at = synthesize.index("--sites")
    without = [*synthesize[:at], *synthesize[at + 2 :], "--device", "cpu", "--out", "no"]
    assert run(*without) == 2
    assert "no BatchNorm layer: it has GroupNorm (3)" in capsys.readouterr().err
    assert run(*without, "--sites", "conv:output") == 2
    assert "no site that 'conv:output' names: they were recorded at 1:input, 4:input, 8:input" in capsys.readouterr().err
    assert run(*without, "--sites", "type=GroupNorm", "--targets", "running") == 2
    assert "have no running statistics: record theirs" in capsys.readouterr().err
    assert not (trained / "no").exists()
