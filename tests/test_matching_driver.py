"""The matching options through the driver: micro-batches, checkpoints, captured steps, configs, flags and cards."""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import virtual_cases as cases
from safetensors.torch import load, save
from torch import nn

from bnfuse import ClassStatistics, InputError, Matcher, SynthesisConfig, capture, fuse, optimisation, synthesize
from bnfuse.cli import main
from bnfuse.configs import add_flags, from_flags
from bnfuse.matching_config import MatchingConfig
from bnfuse.models import Teacher, fingerprint, freeze
from bnfuse.objective import Objective
from bnfuse.preprocessing import Preprocessing
from bnfuse.site_moments import SiteMoments
from bnfuse.sites import call_name, observe, select
from bnfuse.store import verify
from bnfuse.targets import Targets
from bnfuse.units import Source, UnitMaker

CONFIG = dataclasses.replace(cases.CONFIG, targets="class")
OPTIONS = {
    "samples": dict(groups="sample", unbiased=True, use_std=True, site_enhancement=1.0),
    "mixture": dict(groups="batch", global_share=0.5, site_reduction="mean", var_weight=-0.1),
    "mixture and all classes": dict(groups="batch", global_share=0.5, global_blend="distances", moving_average=0.4),
    "average": dict(moving_average=0.4, moving_average_gradient="straight_through", sites=("bn", "conv", "pixels")),
    "average from the first": dict(moving_average=0.9, moving_average_start="first", relative=True),
    "left out": dict(site_drop=0.4, drop_sites=("conv",), sites=("bn", "conv")),
    "left out, any": dict(site_drop=0.4, groups="batch"),
}


def recorded(teacher: Teacher, rules, classes: int = 10) -> ClassStatistics:
    """Class statistics of noise at the sites that the rules name."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(60, teacher.preprocessing.channels, *teacher.preprocessing.image_size, generator=generator)
    labels = torch.arange(60) % classes
    images += 0.2 * labels[:, None, None, None]
    sites = {}

    def take(site, x):
        name = call_name(site.name, sites)
        sites[name] = SiteMoments.empty(classes, x.shape[1])
        sites[name].add_batch(x, labels)

    with observe(teacher.model, select(teacher.model, rules), take), torch.no_grad():
        teacher.model(images)
    names = [str(k) for k in range(classes)]
    return ClassStatistics(sites, torch.full((classes,), 60 // classes), fingerprint(teacher.model), None, "noise", names)


@pytest.fixture(scope="module")
def teacher():
    return cases.teacher(3)


@pytest.fixture(scope="module")
def statistics(teacher):
    return recorded(teacher, ["bn", "conv", "pixels"])


def unit(teacher, statistics, config):
    """What makes a unit of 7 images of the classes 1 and 0, and the objective that it has."""
    targets = Source.of(teacher, statistics, config).targets(config, 2, torch.device("cpu"))
    objective = Objective(fuse(teacher.model, sites=config.sites), targets.matcher)
    groups = targets.groups(cases.LABELS.tolist(), config.grouping)

    def make(**options):
        show = lambda *_: None
        arguments = objective, groups, cases.LABELS, cases.SEEDS, 5, teacher, config, show
        return optimisation.optimise(*arguments, **options)

    return make, objective


@pytest.mark.parametrize("options", OPTIONS)
def test_a_unit_in_micro_batches_from_checkpoints_and_after_another(teacher, statistics, options):
    """The same images to rounding, to the bit from its state, and to the bit when units were made before."""
    make, objective = unit(teacher, statistics, dataclasses.replace(CONFIG, **OPTIONS[options]))
    images, losses = make()
    keep = cases.Keep(1, 6, 13)
    again, _ = make(checkpoint=keep)
    assert again.equal(images) and list(keep.states) == [1, 6, 13]
    for state in keep.states.values():
        make(state=dict(keep.states[1]))  # leaves its own traces
        resumed, theirs = make(state=load(save(state)))
        assert resumed.equal(images) and theirs == losses
    parts, parted = make(micro_batch=3)
    assert (parts - images).abs().mean() < 1e-3
    assert parted == {name: pytest.approx(value, rel=1e-3) for name, value in losses.items()}
    if "moving_average" in OPTIONS[options]:
        broken = {name: value for name, value in keep.states[6].items() if name != "average_mean"}
        with pytest.raises(InputError, match="lacks average_mean"):
            make(state=broken)
        assert keep.states[6]["average_begun"].all() and keep.states[6]["average_mean"].any()


@pytest.mark.parametrize("options", ["average", "average from the first", "left out, any"])
def test_a_captured_unit_is_the_same(teacher, statistics, options, monkeypatch):
    """The calls before a capture leave no trace in an average, at neither of the two sizes."""
    from test_capture import Rerun

    monkeypatch.setattr(capture, "Replayed", Rerun)
    monkeypatch.setattr(optimisation, "check_cuda_graph", lambda *_: None)
    make, _ = unit(teacher, statistics, dataclasses.replace(CONFIG, **OPTIONS[options]))
    images, losses = make()
    replayed, theirs = make(cuda_graph=True)
    assert replayed.equal(images) and theirs == losses


def test_groups_of_a_batch(statistics):
    """Their rows in the table, by class, sample and batch, wherever the targets are held."""
    for budget in (2**30, 0):
        targets = Targets.class_wise(statistics, [4, 2, 7], at_once=2, budget=budget)
        table = lambda rows, targets=targets: targets.matcher.target_mean[rows]
        whole = Matcher.from_statistics(statistics).target_mean
        starts, rows = targets.groups([7, 7, 4], "class")
        assert starts.tolist() == [0, 2, 3] and table(rows).equal(whole[[7, 4]])
        starts, rows = targets.groups([7, 7, 4], "sample")
        assert starts.tolist() == [0, 1, 2, 3] and table(rows).equal(whole[[7, 7, 4]])
        starts, weights = targets.groups([7, 7, 4], "batch")
        assert starts.tolist() == [0, 3] and weights.shape == (1, len(targets.matcher.target_mean))
        torch.testing.assert_close(weights @ targets.matcher.target_mean, (2 * whole[[7]] + whole[[4]]) / 3)
        starts, rows = targets.groups([2, 2], "batch")
        assert starts.tolist() == [0, 2] and table(rows).equal(whole[[2]])
    pooled = Targets.pooled(Matcher.from_statistics(statistics, per_class=False))
    for by, starts, rows in (("class", [0, 2, 3], [0, 0]), ("sample", [0, 1, 2, 3], [0, 0, 0]), ("batch", [0, 3], [0])):
        assert [part.tolist() for part in pooled.groups([7, 7, 4], by)] == [starts, rows]


def test_the_sites_of_a_run(teacher, statistics):
    def names(recording, **changes):
        config = dataclasses.replace(CONFIG, **changes)
        return Source.of(teacher, recording, config).targets(config, 2, torch.device("cpu")).matcher.names

    assert names(statistics) == [name for name in statistics.sites if ":" not in name and name != "pixels"]
    assert names(statistics, sites=("pixels", "name=conv1")) == ["pixels", "conv1:input"]
    assert names(statistics, sites=("pixels", "bn"), targets="running")[:2] == ["pixels", "bn1"]
    assert names(None, sites=("pixels", "bn"), targets="running")[:2] == ["pixels", "bn1"]
    with pytest.raises(InputError, match=r"no site that 'conv:output' names: .* `bnfuse record --sites conv:output`"):
        names(statistics, sites=("bn", "conv:output"))
    with pytest.raises(InputError, match="other than BatchNorm inputs and pixels have no running statistics"):
        names(None, sites=("bn", "conv"), targets="running")


@pytest.mark.parametrize(
    "changes",
    [
        dict(sites=("conv", "conv@cells=4", "bn"), groups="batch", global_share=0.5, moving_average=0.8),
        dict(sites=("bn", "pixels"), groups="sample", targets="running", unbiased=True, use_std=True, ce_weight=0.0),
        dict(targets="global", groups="class", relative=True, bn_weight=-0.1),
    ],
    ids=str,
)
def test_datasets(teacher, changes, tmp_path):
    statistics = recorded(teacher, ["bn", "conv", "conv@cells=4"])
    config = SynthesisConfig(images_per_class=2, classes=(1, 4, 5), batch_size=4, classes_per_batch=2, iterations=4, **changes)
    result = synthesize(teacher, statistics, tmp_path / "a", config, progress=False)
    assert result.made == 6 and verify(tmp_path / "a") == []
    synthesize(teacher, statistics, tmp_path / "b", config, progress=False, checkpoint_every=2)
    files = [sorted((tmp_path / name / "images").rglob("*.png")) for name in "ab"]
    assert [a.read_bytes() for a in files[0]] == [b.read_bytes() for b in files[1]]
    assert SynthesisConfig.from_card(json.loads((tmp_path / "a" / "card.json").read_text())) == config


def test_a_teacher_without_batchnorm(tmp_path):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(True), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = freeze(nn.Sequential(*layers, nn.Linear(8, 10)))
    teacher = Teacher(model, "custom", 10, Preprocessing((8, 8), [0.3] * 3, [0.35] * 3))
    statistics = recorded(teacher, ["type=GroupNorm"])
    config = SynthesisConfig(images_per_class=4, classes=(2,), batch_size=4, iterations=40, sites=("type=GroupNorm",))
    long, short = (
        synthesize(teacher, statistics, tmp_path / str(n), dataclasses.replace(config, iterations=n), progress=False)
        for n in (40, 1)
    )
    assert long.losses["bn"] < 0.5 * short.losses["bn"]
    with pytest.raises(InputError, match=r"has no BatchNorm layer.*GroupNorm \(1\)"):
        UnitMaker(teacher, statistics, dataclasses.replace(config, sites=("bn",)), torch.device("cpu"), "auto")


# ---- configs, flags, cards ----


def test_every_field_is_a_flag_with_its_help():
    parser = argparse.ArgumentParser()
    add_flags(parser, SynthesisConfig)
    text = " ".join(parser.format_help().split())
    for field in dataclasses.fields(MatchingConfig):
        assert "--" + field.name.replace("_", "-") in text
    assert "(default bn)" in text and "share of sites that each step leaves out at random (default 0.0)" in text
    flags = "--sites bn conv@cells=16 --groups batch --use-std --bn-weight -1 --moving-average 0.4"
    flags += " --site-drop 0.1 --drop-sites conv"
    config = from_flags(SynthesisConfig, parser.parse_args(flags.split()))
    assert config.sites == ("bn", "conv@cells=16") and config.use_std and config.bn_weight == -1
    assert config.moving_average == 0.4 and config.grouping == "batch" and config.drop_sites == ("conv",)
    assert from_flags(SynthesisConfig, parser.parse_args([])) == SynthesisConfig()


def test_cards_from_before_the_options(teacher, tmp_path):
    """What they lack is what it is by default, and their datasets go on; another value is another dataset."""
    config = SynthesisConfig(images_per_class=2, classes=(1, 4), batch_size=2, iterations=2, targets="running")
    synthesize(teacher, None, tmp_path / "out", config, progress=False)
    path = tmp_path / "out" / "card.json"
    card = json.loads(path.read_text())
    old = set(card["config"]) - {field.name for field in dataclasses.fields(MatchingConfig)} | {"targets", "distance"}
    card["config"] = {name: value for name, value in card["config"].items() if name in old}
    path.write_text(json.dumps(card, indent=2) + "\n")
    assert SynthesisConfig.from_card(card) == config
    assert synthesize(teacher, None, tmp_path / "out", config, progress=False).made == 0
    with pytest.raises(InputError, match=r"config.groups: given \"sample\", the dataset has \"auto\""):
        synthesize(teacher, None, tmp_path / "out", dataclasses.replace(config, groups="sample"), progress=False)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(groups="cell"), "groups must be one of auto, class, batch, sample"),
        (dict(sites=("batchnorm",)), "'batchnorm' names no sites"),
        (dict(drop_sites=("x",)), "'x' names no sites"),
        (dict(site_drop=1.0), "site_drop must be from 0 up to but not 1"),
        (dict(moving_average=-0.1), "moving_average must be from 0"),
        (dict(moving_average_start="one"), "moving_average_start must be one of zero, first"),
        (dict(global_share=2.0), "global_share must be from 0 to 1"),
        (dict(global_blend="rows"), "global_blend must be one of targets, distances"),
        (dict(global_share=0.5, targets="global"), "global_share is a part of targets='class'"),
        (dict(site_enhancement=1.0), "site_enhancement is for groups='sample'"),
        (dict(mean_weight=float("nan")), "mean_weight must be finite"),
        (dict(bn_weight=float("inf")), "bn_weight must be finite"),
        (dict(slack=-1.0), "slack must be at least 0"),
        (dict(sites=("conv@cells=4",), low_resolution_iterations=5), "smaller images have fewer spatial cells"),
    ],
    ids=str,
)
def test_values_out_of_range(changes, message):
    with pytest.raises(InputError, match=message):
        SynthesisConfig(**changes)


def test_the_command_line(tmp_path, capsys):
    """Pixels and BatchNorm layers sample by sample, without a recording: ZeroQ's."""
    flags = (
        "--teacher resnet8 --num-classes 10 --image-size 8 --mean 0.3 0.3 0.3 --std 0.3 0.3 0.3 --targets running "
        "--sites pixels bn --groups sample --unbiased --use-std --distance l2_squared --distance-eps 1e-6 --ce-weight 0 "
        "--iterations 2 --images-per-class 1 --classes 1 2 --batch-size 2"
    )
    assert main(["synthesize", "--out", str(tmp_path / "out"), *flags.split()]) == 0
    assert "2 images, 2 made now" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "card.json").read_text())["config"]["sites"] == ["pixels", "bn"]


# ---- the page ----

PAGE = Path(__file__).parents[1] / "docs" / "matching.md"


def test_the_page_has_every_option_and_its_example_runs(teacher):
    text = PAGE.read_text()
    table = text[text.index("## Options") :]
    assert all(f"`{field.name}`" in table for field in dataclasses.fields(MatchingConfig))
    names = {
        "torch": torch,
        "F": nn.functional,
        "model": teacher.model,
        "statistics": recorded(teacher, ["bn", "conv@cells=4"]),
        "images": torch.randn(4, 3, 8, 8, requires_grad=True),
        "labels": torch.tensor([3, 3, 0, 7]),
    }
    exec(text.split("```python")[1].split("```")[0], names)
    assert torch.autograd.grad(names["loss"], names["images"])[0].isfinite().all()
