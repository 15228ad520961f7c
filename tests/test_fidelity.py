"""The fidelity harness: what a case comes to, what is not made twice, what its lists and its page say."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import fidelity  # noqa: E402
import fidelity_cases  # noqa: E402
import fidelity_measures  # noqa: E402
import fidelity_page  # noqa: E402
import fidelity_runs  # noqa: E402
import results_file  # noqa: E402
from fidelity_ablations import ABLATIONS, BASES  # noqa: E402
from fidelity_cases import PROBLEMS, Case, ImageSet  # noqa: E402

from bnfuse import InputError, SynthesisConfig, TrainConfig  # noqa: E402
from bnfuse.datasets import ArrayDataset  # noqa: E402
from bnfuse.recipes import RECIPES  # noqa: E402

CPU = torch.device("cpu")
TINY = replace(
    PROBLEMS["digits"],
    teacher="resnet8",
    teacher_training={"epochs": 2, "batch_size": 256, "lr": 0.01},
    steps={2: 2, 4: 3, None: 2},
)
SET = ImageSet("recipe", {"iterations": 2, "batch_size": 4}, images=4)
TRAINING = {"batch_size": 32, "shift": 0}


def case(source="synthetic", labels="hard", ipc=4, seed=0, made=SET) -> Case:
    return Case(TINY, source, labels, ipc, "resnet8", TRAINING, seed, made if source == "synthetic" else None)


@pytest.fixture(autouse=True)
def students(monkeypatch):
    monkeypatch.setitem(fidelity_cases.STUDENTS, "resnet8", "resnet8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def workshop(folder):
    """With what earlier tests have made in its folder."""
    return fidelity_runs.Workshop(TINY, folder, CPU)


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """Results go to, and are looked for in, a folder of the test's own."""
    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    monkeypatch.setattr(fidelity_cases, "KEPT", tmp_path / "fidelity")
    return tmp_path / "fidelity"


# ---- what is measured ----


def test_every_rung_leaves_its_figures(workshop, kept):
    cases = [case(source, labels) for source, labels in (("real", "hard"), ("noise", "soft"), ("synthetic", "views"))]
    cases += [case("all_real", ipc=None), case("synthetic", "soft", ipc=2)]
    fidelity.work(workshop, cases, "heldout", "a command")
    assert len(list(kept.iterdir())) == len(cases)
    for each in cases:
        found = each.kept("heldout")
        low, high = found["interval"]
        assert found["tested"] == 250 and found["correct"] == round(250 * found["accuracy"])
        assert 0 <= low < found["accuracy"] < high <= 1 and 0 <= found["agreement"] <= 1
        assert found["case"]["images"] == (len(workshop.real) if each.ipc is None else 10 * each.ipc)
        assert found["train_seconds"] > 0 and (found["synthesis_seconds"] > 0) == (each.source == "synthetic")
        assert found["diversity"] == pytest.approx(1) if "real" in each.source else found["diversity"] > 0
        assert found["command"] == "a command" and found["threads"] == torch.get_num_threads()


def test_what_is_kept_is_not_run_again_and_the_same_student_is_judged_on_test(workshop, kept, monkeypatch):
    fidelity.work(workshop, [case("real")], "heldout", "")
    before = case("real").kept_at("heldout").stat().st_mtime_ns
    monkeypatch.setattr(fidelity_runs, "train", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(fidelity_runs, "synthesize", lambda *_, **__: pytest.fail("made again"))
    fidelity.work(workshop, [case("real")], "heldout", "")
    assert case("real").kept_at("heldout").stat().st_mtime_ns == before
    fidelity.work(workshop, [case("real")], "test", "")
    assert case("real").kept("test")["tested"] == len(workshop.judged("test")) != 250


def test_students_of_one_set_see_its_first_images(workshop):
    four, _ = workshop.images(case(ipc=4))
    two, _ = workshop.images(case(ipc=2))
    assert len(two) == 20 and two.images.equal(four.first_per_class(2).images)
    assert not workshop.images(case("real", seed=1))[0].images.equal(workshop.images(case("real", seed=2))[0].images)


def test_with_nothing_held_out_all_is_learnt_from(tmp_path, kept):
    whole = fidelity_runs._load(TINY.train)
    problem = replace(TINY, heldout=0, steps={4: 3}, batches={"batch_size": 20, "classes_per_batch": 10})
    workshop = fidelity_runs.Workshop(problem, tmp_path, CPU)
    assert workshop.real.images.equal(whole.images) and workshop.real.labels.equal(whole.labels)
    curves = fidelity_cases.curves(problem)
    assert {each.source for each in curves} == {"real", "synthetic", "noise"} and {each.ipc for each in curves} == {4}


def test_what_is_held_out_is_in_nothing_else(workshop):
    whole = fidelity_runs._load(TINY.train)
    heldout, real = workshop.judged("heldout"), workshop.real
    assert torch.bincount(heldout.labels).tolist() == [25] * 10 and len(heldout) + len(real) == len(whole)
    rows = lambda data: sorted(map(bytes, data.images.numpy().reshape(len(data), -1)))
    assert sorted(rows(heldout) + rows(real)) == rows(whole)
    statistics = workshop.statistics(workshop.teacher, {})
    assert statistics.images.tolist() == torch.bincount(real.labels).tolist()
    assert workshop.as_many_real(case("all_real", ipc=None)) is real


def test_soft_labels_are_the_teacher_s(workshop, monkeypatch):
    teacher, seen = workshop.teacher, []
    monkeypatch.setattr(workshop, "_trained", lambda out, learnt, *_: seen.append(learnt()))
    images, _ = workshop.images(case())
    workshop.student(case(labels="soft"), images)
    ((learnt, options),) = seen
    logits = teacher.model(teacher.preprocessing.normalize(images.batch(range(40))[0]))
    torch.testing.assert_close(learnt.soft_labels, logits)
    assert options == {"soft_labels": True}


def test_images_are_drawn_by_seed():
    labels = torch.tensor([0, 1] * 20)
    rows = fidelity_runs.drawn(labels, 5, seed=0)
    assert torch.bincount(labels[rows]).tolist() == [5, 5] and rows.tolist() == sorted(set(rows.tolist()))
    assert rows.equal(fidelity_runs.drawn(labels, 5, seed=0)) and not rows.equal(fidelity_runs.drawn(labels, 5, seed=1))
    with pytest.raises(InputError, match="21 images of each class are asked for, and one has 20"):
        fidelity_runs.drawn(labels, 21, seed=0)


def test_figures_of_a_student():
    """Of four images three are right, at a confidence of .9 each; the teacher is right in all."""
    labels = torch.tensor([0, 1, 0, 1])
    sure = torch.tensor([9.0]).log().item()  # softmax of (sure, 0) is (.9, .1)
    logits = torch.tensor([[sure, 0], [0, sure], [sure, 0], [sure, 0]])
    found = fidelity_measures.figures(logits, torch.eye(2)[labels], labels)
    assert (found["correct"], found["tested"], found["accuracy"], found["agreement"]) == (3, 4, 0.75, 0.75)
    assert found["calibration_error"] == pytest.approx(0.15, abs=1e-6) and found["teacher_accuracy"] == 1
    assert found["interval"] == pytest.approx([0.1941, 0.9937], abs=1e-4)


def test_within_class_spread():
    features, labels = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    expected = np.mean([np.trace(np.cov(features[labels == k].double().numpy().T)) for k in range(3)])
    assert fidelity_measures.within_class_spread(features, labels) == pytest.approx(expected, rel=1e-10)


# ---- who makes what ----


def test_a_claim_holds_against_others_and_ends(tmp_path):
    made = []
    path = tmp_path / "a" / "thing"
    with fidelity_runs.claimed(path), pytest.raises(fidelity_runs.Busy):
        fidelity_runs.once(path, lambda: made.append(1))
    fidelity_runs.once(path, lambda: (made.append(2), path.write_text("")))
    fidelity_runs.once(path, lambda: made.append(3))
    assert made == [2]


def test_what_another_process_is_at_comes_last(workshop, kept, monkeypatch):
    first, second = case("real", seed=3), case("real", seed=4)
    order, busy = [], [first.key]
    monkeypatch.setattr(fidelity, "WAIT_SECONDS", 0.0)

    def measure(each, split, command):
        if each.key in busy:
            busy.remove(each.key)
            raise fidelity_runs.Busy
        order.append(each.seed)
        results_file.write_result(f"fidelity/{each.stem}-{split}", command, accuracy=0.5)

    monkeypatch.setattr(workshop, "measure", measure)
    fidelity.work(workshop, [first, second], "heldout", "")
    assert order == [4, 3]


def test_the_seconds_of_a_stopped_synthesis_count(workshop, monkeypatch):
    wanted = replace(SET, seed=5)

    def stopped(*_, **__):
        raise KeyboardInterrupt

    ticks = iter((0.0, 100.0, 200.0, 207.0))
    monkeypatch.setattr(fidelity_runs.time, "monotonic", lambda: next(ticks))
    monkeypatch.setattr(fidelity_runs, "synthesize", stopped)
    with pytest.raises(KeyboardInterrupt):
        workshop.synthetic(wanted)
    monkeypatch.setattr(fidelity_runs, "synthesize", lambda *_, **__: None)
    monkeypatch.setattr(fidelity_runs, "load_dataset", lambda _: ArrayDataset(np.zeros((1, 2, 2), np.uint8), [0]))
    assert workshop.synthetic(wanted)[1] == 107.0


# ---- the lists ----


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_every_case_is_one_that_can_be_run(problem):
    cases = fidelity_cases.curves(problem) + fidelity_cases.students(problem) + fidelity_cases.ablations(problem)
    assert len({each.stem for each in cases}) == len(cases)
    for each in cases:
        TrainConfig(**each.training)
        if each.made:
            SynthesisConfig(**each.made.synthesis)
            assert each.made.images >= each.ipc


def test_each_ablation_changes_something_and_the_curves_follow_the_recipe(monkeypatch):
    sets = {each.arm: each.made.key for each in fidelity_cases.ablations(PROBLEMS["cifar10"])}
    for_cifar10 = [variant for variant in ABLATIONS if variant.towards in (None, "cifar10")]
    of_students = {variant.name for variant in for_cifar10 if variant.training}
    assert len(set(sets.values())) == len(sets) - len(of_students) and len(sets) == len(for_cifar10)
    assert {sets[name] for name in of_students} == {sets["base"]}  # they learn the same images
    cases = [each.key for each in fidelity_cases.ablations(PROBLEMS["cifar10"])]
    assert len(set(cases)) == len(cases)
    keys = lambda cases: [each.key for each in cases]
    curves, ablations = keys(fidelity_cases.curves(TINY)), keys(fidelity_cases.ablations(TINY))
    recipe = RECIPES["digits"]
    monkeypatch.setitem(RECIPES, "digits", replace(recipe, synthesis=recipe.synthesis | {"iterations": 9}))
    changed = [old != new for old, new in zip(curves, keys(fidelity_cases.curves(TINY)))]
    assert changed == [each.source == "synthetic" for each in fidelity_cases.curves(TINY)]
    assert ablations == keys(fidelity_cases.ablations(TINY))
    monkeypatch.setitem(RECIPES, "digits", replace(recipe, more_teachers=("convnet3",)))
    assert [each.made.teachers for each in fidelity_cases.curves(TINY) if each.made][0] == ("convnet3",)
    assert set(BASES) >= {problem.recipe for problem in PROBLEMS.values()}


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_no_two_ablations_do_the_same_work(problem):
    cases = fidelity_cases.ablations(problem)
    assert len({each.work for each in cases}) == len(cases)
    assert cases[0].arm == "base" and {each.seed for each in cases} == {0, 1, 2}
    assert all(each.made.seed == each.seed for each in cases)  # ± holds what the draw of the images does too


def test_everything_kept_is_of_a_case():
    cases = [
        each
        for problem in PROBLEMS.values()
        for each in fidelity_cases.curves(problem) + fidelity_cases.students(problem) + fidelity_cases.ablations(problem)
    ]
    known = {each.kept_at(split) for each in cases for split in fidelity_cases.SPLITS}
    assert set(fidelity_cases.KEPT.iterdir()) <= known, "of an earlier recipe, base or budget: to be removed"


def test_what_students_of_labelled_views_ignore_makes_no_other_work():
    problem = PROBLEMS["digits"]
    base = next(each for each in fidelity_cases.ablations(problem) if each.labels == "views")
    for ignored in fidelity_cases.NOT_OF_VIEWS:
        assert replace(base, training=base.training | {ignored: 1 if ignored == "shift" else 0.5}).work == base.work
    hard = replace(base, labels="hard")
    assert replace(hard, training=hard.training | {"shift": 3}).work != hard.work
    others = {each.arm for each in fidelity_cases.ablations(problem)}
    assert "no total variation" not in others and "total variation × 10" not in others  # their base has none


def test_a_scaled_line_is_of_the_base_it_changes():
    def iterations(problem, name):
        made = next(each.made for each in fidelity_cases.ablations(PROBLEMS[problem]) if each.arm == name)
        return made.synthesis["iterations"], made.synthesis["low_resolution_iterations"]

    assert iterations("cifar10", "iterations ÷ 2") == (100, 100)
    assert iterations("digits", "iterations × 3") == (900, 0)


def test_kept_figures_were_measured_with_these_defaults():
    """Keys hold what recipes and bases set; whoever changes another default measures again."""
    synthesis, training = SynthesisConfig(), TrainConfig()
    assert (synthesis.lr, synthesis.betas, synthesis.schedule, synthesis.warmup) == (0.1, (0.5, 0.9), "cosine", 0)
    assert (synthesis.bn_weight, synthesis.ce_weight, synthesis.tv_weight, synthesis.l2_weight) == (1, 1, 0, 0)
    assert (synthesis.distance, synthesis.targets, synthesis.groups, synthesis.site_reduction) == ("l2", "class", "auto", "sum")
    assert (synthesis.clip, synthesis.noise_scale, synthesis.use_std, synthesis.unbiased) == (True, 1, False, False)
    assert (training.optimizer, training.weight_decay, training.momentum, training.warmup) == ("adamw", 0.01, 0.9, 0.1)
    assert (training.temperature, training.sampling, training.label_smoothing) == (4, "instance", 0)


def test_the_last_ablation_is_the_recipe():
    for_cifar10, recipe = ABLATIONS[-1], RECIPES["cifar10"]
    set_of = fidelity_cases.ablations(PROBLEMS["cifar10"])[-1].made
    shipped = {name: value for name, value in recipe.synthesis.items() if name != "images_per_class"}
    assert for_cifar10.towards == "cifar10" and set_of.name == for_cifar10.name
    assert set_of.synthesis == shipped and set_of.teachers == recipe.more_teachers
    for problem in PROBLEMS.values():
        last, recipe = fidelity_cases.ablations(problem)[-1], RECIPES[problem.recipe]
        as_shipped = recipe.train_config()
        assert replace(as_shipped, recipe=None) == TrainConfig(model="resnet20", epochs=as_shipped.epochs, **last.training)
    for_one = {variant.name: variant.towards for variant in ABLATIONS if variant.towards}  # digits have no colours
    assert set(for_one.values()) == {"cifar10", "digits"}
    of_digits = {each.arm for each in fidelity_cases.ablations(PROBLEMS["digits"])}
    assert {for_one[name] for name in of_digits & set(for_one)} == {"digits"}


def test_a_key_is_the_same_in_every_process():
    code = "import fidelity_cases as f; print(f.curves(f.PROBLEMS['cifar10'])[4].key)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == fidelity_cases.curves(PROBLEMS["cifar10"])[4].key, done.stderr


def test_the_command_line_chooses_cases(kept, monkeypatch, capsys):
    line = "fidelity.py curves digits --list --ipc 10 0 --seeds 1 --labels hard --only real all_real noise"
    monkeypatch.setattr(sys, "argv", line.split())
    assert fidelity.main() == 0
    assert capsys.readouterr().out.splitlines() == [
        "     -  digits: resnet20 on all_real, hard labels, all, seed 0",
        "     -  digits: resnet20 on real, hard labels, 10 a class, seed 0",
        "     -  digits: resnet20 on noise, hard labels, 10 a class, seed 0",
    ]
    monkeypatch.setattr(sys, "argv", ["fidelity.py", "ablations", "--list", "--only", "base", "nonsense"])
    with pytest.raises(SystemExit, match="--only nonsense: choose of base, global targets"):
        fidelity.main()


def test_nothing_is_chosen_where_nothing_is_held_out(kept, monkeypatch, capsys):
    for line in ("curves cifar10_jpeg", "ablations cifar10_jpeg --split test"):
        monkeypatch.setattr(sys, "argv", ["fidelity.py", *line.split()])
        with pytest.raises(SystemExit) as stopped:
            fidelity.main()
        assert stopped.value.code == 2 and "nothing of cifar10_jpeg is held out to choose by" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", "fidelity.py curves cifar10_jpeg --split test --list --seeds 1 --only real".split())
    assert fidelity.main() == 0 and "resnet18 on real, hard labels, 5000 a class, seed 0" in capsys.readouterr().out


def test_the_curves_of_a_problem_have_its_batches():
    made = [each.made for each in fidelity_cases.curves(PROBLEMS["cifar10_jpeg"]) if each.made]
    batches = {(each.images, each.synthesis["batch_size"], each.synthesis["classes_per_batch"]) for each in made}
    assert batches == {(5000, 500, 10)}
    recipes = {each.made.synthesis["batch_size"] for each in fidelity_cases.curves(PROBLEMS["cifar10"]) if each.made}
    assert recipes == {RECIPES["cifar10"].synthesis["batch_size"]}


# ---- the page ----


@pytest.fixture
def page(monkeypatch, tmp_path):
    path = tmp_path / "fidelity.md"
    path.write_text(fidelity_page.PAGE.read_text())
    monkeypatch.setattr(fidelity_page, "PAGE", path)
    monkeypatch.setattr(fidelity_page, "PICTURE", tmp_path / "fidelity.png")
    readme = tmp_path / "README.md"
    readme.write_text(fidelity_page.README.read_text())
    monkeypatch.setattr(fidelity_page, "README", readme)
    return path


def test_the_pages_show_the_results_that_are_kept(page):
    pages = page, fidelity_page.README
    before = [each.read_text() for each in pages]
    fidelity_page.write_report()
    assert [each.read_text() for each in pages] == before, f"run `{fidelity_page.COMMAND}`"


def test_results_become_tables_and_a_picture(page, kept):
    digits = PROBLEMS["digits"]
    keep(fidelity_cases.curves(digits), "test", lambda each: 0.5 + 0.01 * each.seed)
    keep(fidelity_cases.students(digits), "test", lambda each: 0.25)
    keep(fidelity_cases.ablations(digits)[:5], "heldout", lambda each: 0.5 if each.arm == "base" else 0.625)
    fidelity_page.write_report()
    written = page.read_text()
    for text in (
        "Per cent of 200 test images; teacher resnet20 (95.0%)",
        "Mean over as many as 3 seeds of the student",
        "| the student learns from | labels | 10 a class | 100 a class | all |",
        "| all real images | hard |  |  | 51.0 ± 1.0 (44–58) |",
        "| synthetic, targets of all classes pooled | soft | 51.0 ± 1.0 (44–58) | 51.0 ± 1.0 (44–58) |  |",
        "| synthetic | soft | 10 a class | 90.0% | 0.100 | 0.80 | 60 | 30 |",
        "| scikit-learn's digits, 100 images a class | labels | resnet20 | convnet3 | wide_resnet20 |",
        "| noise | hard | 51.0 ± 1.0 (44–58) | 25.0 (19–32) | 25.0 (19–32) |",
        "On 200 held-out training images, one seed of images and student.",
        "| global targets | targets | `--targets global` |  | 62.5 (+12.5) | 62.5 (+12.5) | 0.80 | 60 |",
    ):
        assert text in written, text
    assert fidelity_page.PICTURE.read_bytes().startswith(b"\x89PNG")
    keep(fidelity_cases.curves(PROBLEMS["cifar10"])[:1], "test", lambda each: 0.75)
    fidelity_page.write_report()
    assert "| all real images | hard | 75.0 (68–81) |" in fidelity_page.README.read_text()


def test_a_page_without_results(page, kept):
    fidelity_page.write_report()
    assert page.read_text().count("Nothing is kept yet.") == 3 and not fidelity_page.PICTURE.exists()


def keep(cases: list[Case], split: str, accuracy) -> None:
    """Results such as `measure` leaves."""
    for each in cases:
        path = each.kept_at(split)
        path.parent.mkdir(exist_ok=True)
        found = {"accuracy": accuracy(each), "tested": 200, "agreement": 0.9, "calibration_error": 0.1, "diversity": 0.8}
        found |= {"teacher_accuracy": 0.95, "train_seconds": 30.0, "synthesis_seconds": 60.0 if each.made else 0.0}
        found |= {"processor": "a processor", "threads": 1, "torch": "2", "date": "today", "command": "a command"}
        path.write_text(json.dumps(found))
