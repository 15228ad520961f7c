"""Several teachers a step: the weighted sum of what each alone says, who looks when, and the driver with more than one."""

import copy
import dataclasses
import json
import math

import pytest
import torch
import virtual_cases as cases

from bnfuse import InputError, SynthesisConfig, load_dataset, record, synthesize
from bnfuse.checkpoints import save_checkpoint
from bnfuse.cli import main
from bnfuse.ensemble import TEACHER_PLANS, Committee, Ensemble
from bnfuse.models import Teacher, freeze
from bnfuse.networks import CifarResNet
from bnfuse.optimisation import NonFiniteLoss
from bnfuse.preprocessing import Preprocessing
from bnfuse.repair import repair
from bnfuse.store import verify

SMALL = SynthesisConfig(images_per_class=2, batch_size=2, iterations=4, soft_labels=True)


@pytest.fixture(scope="module")
def teacher():
    return cases.teacher(3)


# ---- the loss ----


def doubles(teacher):
    """Two objectives in float64, with every term."""
    both = copy.deepcopy((teacher, cases.other_teacher(3)))
    members = [cases.objective(each, ce_weight=0.7, bn_weight=0.3, tv_weight=0.2, l2_weight=0.1) for each in both]
    for member in members:
        member.teacher.double()
    return members


def step(objective, view):
    leaf = view.clone().requires_grad_()
    losses = objective(leaf, leaf * 1.0, cases.LABELS, *cases.groups())
    return losses, torch.autograd.grad(losses.total, leaf)[0]


def test_the_loss_is_the_weighted_sum_of_each_teachers(teacher):
    members = doubles(teacher)
    view = torch.randn(7, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    losses, gradient = step(Ensemble(members, Committee(weights=(0.25, 1.5))), view)
    alone = [step(dataclasses.replace(member, tv_weight=0.0, l2_weight=0.0), view) for member in members]
    priors, by_priors = step(dataclasses.replace(members[0], ce_weight=0.0, bn_weight=0.0), view)
    expected = 0.25 * alone[0][0].total + 1.5 * alone[1][0].total + priors.total
    torch.testing.assert_close(losses.total, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, 0.25 * alone[0][1] + 1.5 * alone[1][1] + by_priors, rtol=1e-9, atol=1e-14)
    assert set(losses.terms) == {"bn", "ce", "tv", "l2", "total"}
    sites = Ensemble(members, Committee()).site_names
    assert sites[0] == "1/bn1" and sites[-1].startswith("2/") and losses.distances.shape == (2, len(sites))


def test_committees():
    turns = [Committee("in_turn").at(0, i, 3) for i in range(7)]
    assert turns == [(0,), (1,), (2,), (0,), (1,), (2,), (0,)]
    drawn = [Committee("drawn", drawn=2).at(unit, 5, 4) for unit in range(40)]
    assert drawn == [Committee("drawn", drawn=2).at(unit, 99, 4) for unit in range(40)]
    assert len(set(drawn)) == 6 and all(a < b for a, b in drawn)
    assert drawn != [Committee("drawn", drawn=2, seed=1).at(unit, 5, 4) for unit in range(40)]
    assert Committee().at(3, 4, 2) == (0, 1) and Committee().weights_of((0, 1)) == [0.5, 0.5]
    assert Committee("in_turn").weights_of((1,)) == [1.0]
    assert Committee(weights=(3.0, 4.0, 5.0)).weights_of((0, 2)) == [3.0, 5.0]
    a, b = Committee(priors=(60.0, 10.0, 52.0), temperature=5.0).weights_of((0, 2))
    assert a + b == pytest.approx(1) and a / b == pytest.approx(math.exp(8 / 5))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"weights": (1.0,)}, r"teacher_weights must be one a teacher \(2\), got \[1.0\]"),
        ({"priors": (1.0, 2.0, 3.0)}, r"teacher_priors must be one a teacher \(2\)"),
        ({"weights": (1.0, 1.0), "priors": (1.0, 2.0)}, "give one of them"),
        ({"plan": "drawn", "drawn": 3}, r"from 1 to the number of teachers \(2\), got 3"),
    ],
)
def test_committees_that_do_not_fit(teacher, options, message):
    with pytest.raises(InputError, match=message):
        Ensemble(doubles(teacher), Committee(**options))


# ---- a unit ----


@pytest.mark.parametrize("plan", TEACHER_PLANS)
def test_micro_batches_and_going_on_change_nothing(teacher, plan):
    objective, keep = cases.ensemble(teacher, plan), cases.Keep(9)
    images, losses = cases.make_unit(objective, teacher, checkpoint=keep)
    resumed, again = cases.make_unit(objective, teacher, state=keep.states[9])
    assert resumed.equal(images) and again == losses
    parts, theirs = cases.make_unit(objective, teacher, micro_batch=3)
    assert (parts - images).abs().mean() < 1e-4
    assert {name: pytest.approx(value, rel=1e-4) for name, value in theirs.items()} == losses


def test_every_plan_gives_images_of_its_own(teacher):
    made = [cases.make_unit(cases.ensemble(teacher, plan), teacher)[0] for plan in TEACHER_PLANS]
    made.append(cases.make_unit(cases.objective(teacher), teacher)[0])
    assert all((a - b).abs().mean() > 1e-2 for i, a in enumerate(made) for b in made[:i] if not a.equal(b))
    assert not made[0].equal(made[1]) and not made[0].equal(made[3])


def test_each_looks_in_its_turn(teacher):
    objective, seen = cases.ensemble(teacher, "in_turn"), []
    for number, member in enumerate(objective.members, start=1):
        member.teacher.register_forward_hook(lambda *_, number=number: seen.append(number))
    cases.make_unit(objective, teacher)
    assert seen == [1, 2] * (cases.CONFIG.total_iterations // 2)


@pytest.mark.parametrize("plan, at", [("together", 1), ("in_turn", 2)])
def test_a_loss_that_is_not_finite_names_the_teacher(teacher, plan, at):
    objective = cases.ensemble(teacher, plan)
    objective.members[1].matcher.target_mean[0, 0] = float("nan")
    with pytest.raises(NonFiniteLoss) as caught:
        cases.make_unit(objective, teacher)
    assert (caught.value.step, caught.value.where) == (at, "2/bn1")


# ---- the driver ----

PREPROCESSING = Preprocessing((8, 8), (0.5,), (0.25,))


def teacher_of(seed: int, classes: int = 3, preprocessing=PREPROCESSING, **options) -> Teacher:
    torch.manual_seed(seed)
    model = CifarResNet(8, classes, 1, width=4 + 2 * seed)
    with torch.no_grad():
        for _ in range(30):
            model(torch.randn(32, 1, 8, 8))
    return Teacher(freeze(model), "resnet8", classes, preprocessing, ["a", "b", "c"][:classes])


def statistics_of(teacher: Teacher):
    images = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    return record(teacher, [(images, torch.arange(60) % 3)], 3, class_names=["a", "b", "c"])


@pytest.fixture(scope="module")
def pair():
    """Two teachers of different width, each with its statistics."""
    return [(each, statistics_of(each)) for each in (teacher_of(0), teacher_of(1))]


def files(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def make(pair, out, **changes):
    config = dataclasses.replace(SMALL, **changes)
    return synthesize(*pair[0], out, config, device="cpu", progress=False, more_teachers=pair[1:])


@pytest.mark.parametrize("plan", TEACHER_PLANS)
def test_a_dataset_of_two_teachers_is_made_and_mended_byte_for_byte(pair, tmp_path, plan):
    changes = {"teacher_plan": plan, "teachers_drawn": 1}
    make(pair, tmp_path / "a", **changes)
    make(pair, tmp_path / "b", **changes)
    before = files(tmp_path / "a")
    assert before == files(tmp_path / "b") and verify(tmp_path / "a") == []
    card = json.loads(before["card.json"])
    assert [more["teacher"]["fingerprint"] for more in card["more_teachers"]] == [pair[1][0].fingerprint]
    assert card["more_teachers"][0]["statistics"]["sha256"] == pair[1][1].digest()
    for name in ("images/00-a/00-000001.png", "soft_labels/000000.safetensors"):
        (tmp_path / "a" / name).unlink(missing_ok=False)
    with pytest.raises(InputError, match="more_teachers: not given"):
        repair(*pair[0], tmp_path / "a", device="cpu", progress=False)
    result = repair(*pair[0], tmp_path / "a", device="cpu", progress=False, more_teachers=pair[1:])
    assert result.problems == [] and files(tmp_path / "a") == before
    with pytest.raises(InputError, match="fingerprint"):
        make(pair[::-1], tmp_path / "a", **changes)


def test_every_kind_of_targets(pair, tmp_path):
    for targets in ("global", "running"):
        make(pair, tmp_path / targets, targets=targets, class_plan="balanced")
        assert verify(tmp_path / targets) == []


def test_targets_that_do_not_all_fit_the_device(pair, tmp_path, monkeypatch):
    """Then both teachers' come class by class, though one's would fit, and the images are the same."""
    make(pair, tmp_path / "a", batch_size=4, classes_per_batch=2)
    rows = [2 * 4 * 3 * sum(statistics.site_channels.values()) for _, statistics in pair]
    monkeypatch.setattr("bnfuse.targets.TARGET_BYTES", max(rows) + 1)
    make(pair, tmp_path / "b", batch_size=4, classes_per_batch=2)
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"classes": 2}, "number of classes are 2, expected 3|outputs up to 2"),
        ({"preprocessing": Preprocessing((8, 8), (0.4,), (0.25,))}, "teacher 2 does not go with the first: its preprocessing"),
    ],
)
def test_teachers_that_do_not_go_together(pair, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        config = dataclasses.replace(SMALL, targets="running")
        more = [(teacher_of(1, **options), None)]
        synthesize(pair[0][0], None, tmp_path / "out", config, device="cpu", progress=False, more_teachers=more)
    assert not (tmp_path / "out").exists()


def test_which_teacher_lacks_statistics_is_said(pair, tmp_path):
    for statistics, message in ((None, "needs class statistics"), (pair[0][1], "teacher is")):
        with pytest.raises(InputError, match=rf"teacher 2 \(--more-teachers, --more-statistics\): .*{message}"):
            make([pair[0], (pair[1][0], statistics)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"teacher_weights": (2.0,)}, "are for several teachers: give --more-teachers"),
        ({"teacher_priors": (60.0,)}, "are for several teachers: give --more-teachers"),
        ({"teacher_plan": "drawn"}, r"from 1 to the number of teachers \(1\), got 2"),
    ],
)
def test_what_one_teacher_cannot_be(pair, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        make(pair[:1], tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path, capsys):
    for number in range(2):
        save_checkpoint(
            tmp_path / f"{number}.safetensors",
            CifarResNet(8, 3, 1),
            architecture="resnet8",
            num_classes=3,
            preprocessing=PREPROCESSING,
        )
    first, second = (str(tmp_path / f"{number}.safetensors") for number in range(2))
    command = ["synthesize", "--teacher", first, "--more-teachers", second, "--out", str(tmp_path / "out"), "--device", "cpu"]
    command += ["--targets", "running", "--images-per-class", "1", "--iterations", "2", "--teacher-plan", "in_turn"]
    assert main(command) == 0
    assert len(load_dataset(str(tmp_path / "out"))) == 3
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert len(card["more_teachers"]) == 1 and card["config"]["teacher_plan"] == "in_turn"
    next((tmp_path / "out/images").rglob("*.png")).unlink()
    mend = ["verify", str(tmp_path / "out"), "--repair", "--teacher", first, "--device", "cpu"]
    assert main([*mend, "--more-teachers", second]) == 0
    assert main([*command, "--more-statistics", first, first]) == 2
    assert "--more-statistics goes with --more-teachers, one each: got 2 for 1" in capsys.readouterr().err
