"""The audit's frame, with measures made up for the purpose: what runs, what is kept, what is void, what is refused."""

import dataclasses
import json
import math
import multiprocessing
import os
import shutil
import signal

import audit_measures as made_up
import pytest
import torch

import bnfuse
from bnfuse import InputError, Teacher
from bnfuse.audit import ARMS, MEASURES, Control, Figure, Finding, Row, measure
from bnfuse.audit.context import Context, prepare
from bnfuse.audit.findings import not_run
from bnfuse.audit.intervals import bootstrap, clopper_pearson
from bnfuse.audit.measure import inputs_key
from bnfuse.audit.running import command_line
from bnfuse.audit.summary import summarise, verdict_lines
from bnfuse.cli import main
from bnfuse.datasets import ArrayDataset
from bnfuse.models import build_model, freeze
from bnfuse.preprocessing import Preprocessing

SETTINGS = dict(
    noise=0.2, teacher=None, statistics=None, budget="quick", device=torch.device("cpu"), seed=0, show_progress=False
)


def dataset(seed, name="data", **shape):
    return ArrayDataset(*made_up.blobs(seed, **shape), name=name)


def datasets():
    return dataset(0, "private"), dataset(1, "synthetic"), dataset(2, "held-out")


def teacher(classes=4, size=12):
    model = freeze(build_model("resnet8", classes))
    return Teacher(model, "resnet8", classes, Preprocessing((size, size), (0.5,) * 3, (0.25,) * 3))


@pytest.fixture
def context(tmp_path) -> Context:
    return prepare(*datasets(), out=tmp_path, **SETTINGS)


@pytest.fixture
def measures(monkeypatch):
    """Two measures, and the list of what ran."""
    ran = []

    def run(name):
        def run(context, config):
            ran.append(name)
            return made_up.finding(context, name)

        return run

    made_up.replace_measures(monkeypatch, {name: made_up.module(name, run(name)) for name in ("first", "second")})
    return ran


# ---- what a measure is handed ----


def test_a_measure_sees_three_arms_of_the_same_images_and_labels(context):
    original, synthetic, noised = (context.images(arm) for arm in ARMS)
    assert noised.labels.equal(original.labels) and synthetic.images.equal(dataset(1).images)
    assert noised.images.dtype == torch.uint8 and context.image_shape == (3, 12, 12)
    difference = noised.images.double() - original.images.double()
    inside = (original.images > 100) & (original.images < 155)  # where hardly anything is clipped
    assert 45 < difference[inside].std() < 57 and abs(difference[inside].mean()) < 3  # 0.2 of 255 is 51


def test_random_numbers_depend_on_the_seed_and_on_what_they_are_for(context):
    drawn = [torch.rand(4, generator=context.rng(*words)) for words in (("a", 1), ("a", 1), ("a", 2), ("b", 1))]
    assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2]) and not drawn[0].equal(drawn[3])
    other = dataclasses.replace(context, seed=1)
    assert not torch.rand(4, generator=other.rng("a", 1)).equal(drawn[0])


def test_classes_in_another_order_are_numbered_as_the_private_ones(tmp_path):
    private, synthetic, heldout = datasets()
    synthetic = ArrayDataset(synthetic.images, synthetic.labels, ["3", "1", "2", "0"])
    context = prepare(private, synthetic, heldout, out=tmp_path, **SETTINGS)
    assert context.synthetic.class_names == private.class_names
    assert context.synthetic.labels[0] == 3 and context.synthetic.labels[1] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"synthetic": dataset(1, "small", size=8)}, "synthetic dataset small has images of 8x8 pixels.*private.*12x12"),
        ({"heldout": dataset(1, "grey", channels=1)}, "held-out dataset grey has images of 12x12 pixels and 1 channel,"),
        ({"synthetic": dataset(1, "few", classes=3)}, "few has 3 classes.*private dataset private 4"),
        ({"synthetic": dataset(1, "empty").subset([])}, "synthetic dataset empty has no image"),
        ({"private": dataset(1, "empty").subset([])}, "private dataset empty has no image"),
        ({"heldout": dataset(0, "same")}, "40 of the 40 images of the held-out dataset same are among the private ones"),
        ({"budget": "long"}, "budget is 'long', expected one of quick, standard, full"),
        ({"noise": 0.0}, "noise is the standard deviation.*got 0.0"),
        ({"teacher": teacher(size=16)}, "resnet8 takes images of 16x16 pixels and 3 channels.*12x12"),
        ({"statistics": object()}, "give it too"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused_and_named(change, message, tmp_path):
    given = dict(zip(("private", "synthetic", "heldout"), datasets())) | SETTINGS | change
    with pytest.raises(InputError, match=message):
        prepare(**given, out=tmp_path)


def test_statistics_of_another_teacher_are_refused(tmp_path):
    private, synthetic, heldout = datasets()
    one, other = teacher(), teacher()
    loader = torch.utils.data.DataLoader(private, batch_size=40)
    statistics = bnfuse.record(one, loader, 4, allow_few_images=True)
    prepare(private, synthetic, heldout, out=tmp_path, **SETTINGS | {"teacher": one, "statistics": statistics})
    with pytest.raises(InputError, match="do not fit: teacher is"):
        prepare(private, synthetic, heldout, out=tmp_path, **SETTINGS | {"teacher": other, "statistics": statistics})


def test_a_part_that_is_kept_is_made_once(context):
    made, drawn = [], torch.rand(3, 2, dtype=torch.float64)

    def make():
        made.append(list(context.scratch("first").iterdir()))
        return {"drawn": drawn, "count": torch.tensor(3)}

    for _ in range(2):
        part = context.kept("first", "noised-low bits", make)
        assert part["drawn"].equal(drawn) and part["count"] == 3 and set(part) == {"drawn", "count"}
    assert made == [[]]  # called once, when there was no file yet
    assert [path.name for path in context.scratch("first").iterdir()] == ["noised-low-bits.safetensors"]
    context.kept("first", "another", make)
    context.kept("second", "another", make)
    assert len(made) == 3


def test_a_part_is_kept_whole_or_not_at_all(context, monkeypatch):
    def stopped(*_):
        raise RuntimeError("the power is off")

    part = {"drawn": torch.rand(3)}
    with pytest.raises(RuntimeError, match="power"):
        context.kept("first", "part", stopped)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power"):
        patch.setattr("bnfuse.files.os.replace", stopped)  # all is written, but not in its place
        context.kept("first", "part", lambda: part)
    assert list(context.scratch("first").iterdir()) == []
    assert context.kept("first", "part", lambda: part)["drawn"].equal(part["drawn"])


# ---- findings ----


def example(**more) -> Finding:
    figure = Figure("PSNR", math.inf, low=math.nan, high=-math.inf, unit="dB", better="lower")
    control = Control("planted", math.nan, "all", True)
    fields = dict(
        outcome="leak", rows=[Row("synthetic", [figure])], controls=[control], bounds="b", does_not_bound="d", sentence="s"
    )
    return Finding("name", "Title", **fields | more)


def test_a_finding_survives_json_even_what_is_not_finite():
    text = json.dumps(example().to_dict(), allow_nan=False)
    back = Finding.from_dict(json.loads(text))
    assert repr(back) == repr(example())  # nan is not equal to itself
    assert json.loads(text)["verdict"] == "leak" and back.rows[0].figures[0].value == math.inf


@pytest.mark.parametrize(
    ("controls", "verdict"),
    [
        ([("positive", True)], "leak"),
        ([("positive", True), ("positive", False)], "void"),
        ([("positive", True), ("negative", False)], "leak"),
        ([("negative", True)], "void"),
        ([], "void"),
    ],
)
def test_a_finding_is_void_unless_every_positive_control_passed(controls, verdict):
    made = example(controls=[Control("c", 0.0, "more", passed, kind) for kind, passed in controls])
    assert made.verdict == verdict and made.outcome == "leak"
    assert not_run("name", "Title", "why").verdict == "not run"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: example(outcome="private"), "outcome is 'private', expected one of leak, no leak seen"),
        (lambda: Figure("x", 1.0, low=0.5), "0.5 to None: give both or none"),
        (lambda: Figure("x", 1.0, better="up"), "better is 'up'"),
        (lambda: Control("x", 1.0, "more", True, kind="neutral"), "kind 'neutral'"),
    ],
)
def test_a_finding_that_is_not_one_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_summary_never_calls_private_what_is_void_or_was_not_run(context):
    leak, void = example(), example(controls=[])
    clear = dataclasses.replace(example(), outcome="no leak seen", title="Clear")
    found = summarise([leak, void, clear, not_run("n", "Missing", "why")], context)["found"]
    assert found.startswith("One measure found a leak (Title). s. One measure saw no leak (Clear).")
    assert "void, and says nothing either way" in found and "One measure was not run (Missing)." in found
    assert summarise([void], context)["found"].endswith("So it is not known whether anything leaks.")
    assert "no leak" not in summarise([dataclasses.replace(void, outcome="no leak seen")], context)["found"]
    assert "s" not in verdict_lines([void]).split()  # the sentence of a void finding is not said


# ---- intervals ----


def test_intervals_are_those_of_the_books():
    assert clopper_pearson(0, 100) == pytest.approx((0, 1 - 0.025 ** (1 / 100)))
    assert clopper_pearson(5, 5) == pytest.approx((0.025 ** (1 / 5), 1)) and clopper_pearson(0, 0) == (0, 1)
    values = torch.arange(400, dtype=torch.float64)
    low, high = bootstrap(values, torch.Generator().manual_seed(0))
    half = 1.96 * float(values.std()) / 20
    assert (low, high) == pytest.approx((199.5 - half, 199.5 + half), abs=1.0)
    low, high = bootstrap(values, torch.Generator().manual_seed(0), torch.median)
    assert 170 < low < 190 < 210 < high < 230


# ---- a whole audit ----


def test_it_writes_findings_json_and_page(measures, tmp_path):
    result = bnfuse.audit(*datasets(), tmp_path / "out", command="bnfuse audit --private p")
    record = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert measures == ["first", "second"] and result.verdicts == {"first": "no leak seen", "second": "no leak seen"}
    assert [Finding.from_dict(finding) for finding in record["findings"]] == result.findings
    assert record["datasets"]["private"]["images"] == 40 and record["summary"] == result.summary
    first = result.findings[0]
    assert first.command == "bnfuse audit --private p --only first" and first.budget == "quick" and first.seconds > 0
    assert all((result.out / picture.path).is_file() for picture in first.pictures)
    assert result.report.is_file() and list((result.out / "scratch").iterdir()) == []


def test_a_second_run_makes_nothing_again_unless_its_inputs_changed(measures, tmp_path):
    private, synthetic, heldout = datasets()
    bnfuse.audit(private, synthetic, heldout, tmp_path)
    again = bnfuse.audit(private, synthetic, heldout, tmp_path)
    assert measures == ["first", "second"] and again.verdicts["first"] == "no leak seen"

    (tmp_path / "pictures" / "second-pairs-public.png").unlink()
    (tmp_path / "findings" / "first.json").write_text('{"key": ')
    bnfuse.audit(private, synthetic, heldout, tmp_path)
    assert measures == ["first", "second"] * 2

    bnfuse.audit(private, synthetic, heldout, tmp_path, measures=["first"], seed=1)
    assert measures == ["first", "second"] * 2 + ["first"]


def test_findings_are_made_again_if_any_source_of_the_audit_has_changed(measures, monkeypatch, tmp_path):
    sources = shutil.copytree(measure.PACKAGE, tmp_path / "sources")
    monkeypatch.setattr(measure, "PACKAGE", sources)
    for _ in range(2):
        bnfuse.audit(*datasets(), tmp_path / "out")
    assert measures == ["first", "second"]
    helper = sources / "nearest.py"
    helper.write_text(helper.read_text() + "# changed")
    bnfuse.audit(*datasets(), tmp_path / "out")
    assert measures == ["first", "second"] * 2


def test_every_input_is_part_of_the_key(context):
    pixel = context.synthetic.images.clone()
    pixel[0, 0, 0, 0] ^= 1
    relabelled = context.heldout.labels.roll(1)
    loader = torch.utils.data.DataLoader(context.private, batch_size=40)
    one = teacher()
    other = dataclasses.replace(one, model=freeze(build_model("resnet8", 4)))
    recorded = bnfuse.record(one, loader, 4, allow_few_images=True)
    changes = [
        {},
        {"synthetic": ArrayDataset(pixel, context.synthetic.labels)},
        {"heldout": ArrayDataset(context.heldout.images, relabelled)},
        {"heldout": None},
        {"private": dataset(3)},
        {"noise": 0.1},
        {"budget": "full"},
        {"seed": 1},
        {"teacher": one},
        {"teacher": other},
        {"teacher": one, "statistics": recorded},
        {"teacher": one, "statistics": dataclasses.replace(recorded, outputs=[1, 0, 2, 3])},
    ]
    keys = [inputs_key(dataclasses.replace(context, **change)) for change in changes]
    assert len(set(keys)) == len(changes) and inputs_key(context) == keys[0]


def test_what_was_not_asked_for_stays_in_the_report_if_it_is_there(measures, tmp_path):
    first = bnfuse.audit(*datasets(), tmp_path, measures=["first"])
    assert first.verdicts == {"first": "no leak seen", "second": "not run"}
    assert first.findings[1].sentence == "It was not asked for."
    second = bnfuse.audit(*datasets(), tmp_path, measures=["second"])
    assert measures == ["first", "second"] and set(second.verdicts.values()) == {"no leak seen"}


def test_a_measure_that_lacks_something_is_not_run_and_says_why(monkeypatch, tmp_path):
    def unfit(context, config):
        raise InputError("expected 100 images of each class, got 10")

    modules = {
        "needy": made_up.module("needy", None, "Needy", {"teacher", "heldout", "statistics"}),
        "unfit": made_up.module("unfit", unfit, "Unfit"),
        "absent": "made_up_nowhere",
        "broken": made_up.module("fine", made_up.finding),
    }
    made_up.replace_measures(monkeypatch, modules)
    (tmp_path / "made_up_broken.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(MEASURES, "broken", "made_up_broken")
    private, synthetic, _ = datasets()
    result = bnfuse.audit(private, synthetic, None, tmp_path / "out")
    assert set(result.verdicts.values()) == {"not run"} and list((tmp_path / "out").glob("findings/*")) == []
    needy, unfit, absent, broken = (finding.sentence for finding in result.findings)
    assert "--heldout" in needy and "--teacher" in needy and "--statistics" in needy
    assert unfit == "It does not fit these images: expected 100 images of each class, got 10"
    assert absent == "It is not part of this version of bnfuse."
    assert broken == "It needs no_such_library, which is not installed: pip install 'bnfuse[audit]'."


@pytest.mark.parametrize("asked", [["needy"], ["fine", "needy"]], ids=str)
def test_a_measure_that_lacks_something_and_is_asked_for_by_name_is_refused_before_any_is_made(monkeypatch, tmp_path, asked):
    made = []
    modules = {
        "fine": made_up.module("fine", lambda *_: made.append("fine"), "Fine"),
        "needy": made_up.module("needy", None, "Needy", {"teacher"}),
    }
    made_up.replace_measures(monkeypatch, modules)
    with pytest.raises(InputError, match=r"measure needy was asked for and cannot be made. It needs the network .*--teacher"):
        bnfuse.audit(*datasets(), tmp_path / "out", measures=asked)
    assert not made and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("names", "message"), [(["third"], "measures are first, second; got third"), ([], "got none")])
def test_an_unknown_measure_is_refused_before_anything_runs(names, message, measures, tmp_path):
    with pytest.raises(InputError, match=message):
        bnfuse.audit(*datasets(), tmp_path, measures=names)
    assert not measures


def test_a_killed_audit_goes_on_where_it_stopped(monkeypatch, tmp_path):
    """It is killed in its second measure, of which a part is kept; the first is not made again, the part is found."""
    ran = []

    def first(context, config):
        ran.append("first")
        return made_up.finding(context, "first")

    def second(context, config):
        part = context.scratch("second") / "part"
        if not part.exists():
            part.write_text(" ".join(ran))
            os.kill(os.getpid(), signal.SIGKILL)
        ran.append("second, after " + part.read_text())
        return made_up.finding(context, "second")

    made_up.replace_measures(monkeypatch, {run.__name__: made_up.module(run.__name__, run) for run in (first, second)})
    killed = multiprocessing.get_context("fork").Process(target=bnfuse.audit, args=(*datasets(), tmp_path))
    killed.start()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL and not (tmp_path / "audit.json").exists()
    result = bnfuse.audit(*datasets(), tmp_path)
    assert ran == ["second, after first"] and set(result.verdicts.values()) == {"no leak seen"}
    assert list((tmp_path / "scratch").iterdir()) == []


# ---- the command line ----


def test_the_command_line_runs_it_and_says_where_the_report_is(measures, tmp_path, capsys):
    out = tmp_path / "an audit"
    arguments = ["audit", "--private", "digits:train", "--synthetic", "digits:train", "--heldout", "digits:test"]
    assert main([*arguments, "--only", "first", "--out", str(out), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2] == f"the report without private images: {out / 'audit_public.html'}"
    assert printed[-1] == f"the report, which shows private images: {out / 'audit.html'}"
    assert any("no leak seen" in line for line in printed) and measures == ["first"]
    command = json.loads((out / "audit.json").read_text())["command"]
    assert command == f"bnfuse {' '.join(arguments)} --budget quick --noise 0.2 --seed 0 --out '{out}'"


def test_the_command_line_loads_images_as_the_teacher_takes_them(measures, tmp_path, capsys):
    from bnfuse import TrainConfig, train

    data = ArrayDataset(*made_up.blobs(0, classes=10))
    train(data, TrainConfig(model="resnet8", epochs=1), out=tmp_path / "teacher", device="cpu")
    where = [
        "--private",
        "digits:train",
        "--synthetic",
        "digits:test",
        "--teacher",
        str(tmp_path / "teacher/model.safetensors"),
    ]
    assert main(["audit", *where, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    images = json.loads((tmp_path / "out" / "audit.json").read_text())["images"]
    assert (images["height"], images["width"], images["channels"]) == (12, 12, 3)


def test_what_does_not_fit_is_an_error_without_a_traceback(measures, tmp_path, capsys):
    arguments = ["audit", "--private", "digits:train", "--synthetic", "digits:test", "--heldout", "digits:train"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert "among the private ones" in capsys.readouterr().err and not measures


def test_a_command_line_leaves_out_what_was_not_given():
    flags = dict(private="a b", teacher=None, image_size=[8, 8], download=False)
    assert command_line(**flags) == "bnfuse audit --private 'a b' --image-size 8 8"
