"""The recipes that ship: both configs are what the table says; the command line takes them, and flags that stand on it win."""

import json
from dataclasses import replace

import pytest

from bnfuse import InputError, SynthesisConfig, TrainConfig, demo, recipe
from bnfuse.card import read_card
from bnfuse.cli import main
from bnfuse.recipes import RECIPES, listing, settings

FLOW = ["--teacher", "teacher/model.safetensors", "--statistics", "statistics.safetensors"]


def run(line: str) -> int:
    return main(line.split())


def test_recipes_are_two_configs_and_changes_win():
    assert list(RECIPES) == ["digits", "cifar10", "imagenet"]
    for name, each in RECIPES.items():
        synthesis, training = each.synthesis_config(), each.train_config()
        assert each.name == name and synthesis.recipe == name == training.recipe
        assert synthesis.soft_labels == each.soft_labels
        assert all(getattr(synthesis, field) == value for field, value in each.synthesis.items())
        assert all(getattr(training, field) == value for field, value in each.training.items())
        assert each.synthesis_config(lr=0.125).lr == 0.125 == each.train_config(lr=0.125).lr
        assert each.synthesis_config(soft_labels=not each.soft_labels).soft_labels != each.soft_labels
        if each.views:
            views = each.relabel_config(views=7)
            shared = ("batch_size", "crop_scale", "flip", "mixup", "cutmix")  # or the student would see other views
            assert views.views == 7 and all(getattr(views, field) == getattr(training, field) for field in shared)
    assert [recipe(name).labels for name in RECIPES] == ["relabel", "relabel", "relabel"]
    with pytest.raises(InputError, match="recipe plain learn hard labels: it has nothing to relabel"):
        replace(recipe("digits"), name="plain", views=0).relabel_config()
    with pytest.raises(InputError, match="no recipe is called 'mnist'; choose one of digits, cifar10, imagenet"):
        recipe("mnist")


def test_the_demo_runs_a_recipe():
    assert demo.SYNTHESIS == recipe("digits").synthesis_config() and demo.STUDENT == recipe("digits").train_config()
    assert demo.VIEWS == recipe("digits").relabel_config()


@pytest.mark.parametrize("command", ("synthesize", "relabel", "train"))
def test_settings_are_what_the_command_line_takes(command, capsys):
    with pytest.raises(SystemExit) as ended:
        run(f"{command} --list-recipes")
    assert ended.value.code == 0 and capsys.readouterr().out == listing() + "\n"
    said = settings("cifar10")
    assert list(said) == ["synthesize", "relabel", "train"]
    assert "--low-resolution-iterations 200" in said["synthesize"]
    assert said["synthesize"].endswith("--teacher-plan in_turn --soft-labels")
    assert said["relabel"] == "--views 100 --batch-size 32 --crop-scale 0.2 --flip"
    assert "--crop-scale 0.2" in said["train"] and said["train"].endswith("--labels relabel")


def test_the_flow_by_a_recipe(tmp_path, monkeypatch, capsys):
    """The digits' own, and CIFAR-10's for its labels of views; both a little shorter."""
    monkeypatch.chdir(tmp_path)
    assert run("train --data digits:train --out teacher --model resnet8 --epochs 1") == 0
    assert run("record --teacher teacher/model.safetensors --data digits:train --out statistics.safetensors") == 0
    short = "--images-per-class 2 --iterations 2 --low-resolution-iterations 0"
    flow = f"synthesize {' '.join(FLOW)} {short}"
    for name in ("digits", "cifar10"):
        assert run(f"{flow} --recipe {name} --out made/{name} --chroma-scale 1") == 0
        config = SynthesisConfig.from_card(read_card(tmp_path / "made" / name))
        changes = dict(images_per_class=2, iterations=2, low_resolution_iterations=0, chroma_scale=1.0)
        assert config == recipe(name).synthesis_config(**changes)
        said = capsys.readouterr().out
        assert f"`bnfuse relabel made/{name} --recipe {name}" in said and f"train --data made/{name} --recipe {name}`" in said
    assert run(f"{flow} --recipe cifar10 --out made/grey") == 2 and "make it 1" in capsys.readouterr().err

    trained = lambda out: json.loads((tmp_path / out / "metrics.json").read_text())["config"]
    student = "train --recipe cifar10 --data made/cifar10 --out student --epochs 2 --model resnet8"
    assert run(student) == 2 and "bnfuse relabel" in capsys.readouterr().err  # which the recipe's students learn from
    assert run("relabel made/cifar10 --recipe cifar10 --views 2 --teacher teacher/model.safetensors") == 0
    said = capsys.readouterr().out
    assert "labels of 40 views" in said and "--labels relabel --recipe cifar10`" in said and run(student) == 0
    assert TrainConfig(**trained("student")) == recipe("cifar10").train_config(epochs=2, model="resnet8")
    assert all(run(f"{student} --labels {labels} --out {labels}") == 0 for labels in ("soft", "hard"))
    assert run("train --recipe imagenet --labels soft --data digits --out digits --epochs 1 --model resnet8") == 2
    assert "has no soft labels" in capsys.readouterr().err
    assert run("train --recipe digits --labels hard --data digits --out digits --epochs 1 --model resnet8") == 0
    assert trained("digits")["label_smoothing"] == 0.1

    assert run(f"{flow} --recipe digits --preset cda --out other") == 2
    assert "begin from one of a preset and a recipe, got both: preset='cda', recipe='digits'" in capsys.readouterr().err
    assert run(f"{flow} --recipe mnist --out other") == 2 and run("train --recipe mnist --data digits --out other") == 2
    assert capsys.readouterr().err.count("no recipe is called 'mnist'") == 2
