"""Sub-classes: clusters that are never too small, statistics of each that are exact, and images dealt to them in proportion."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Chains, settle
from torch.utils.data import DataLoader

from bnfuse import ClassStatistics, InputError, Matcher, Preprocessing, SynthesisConfig, load_dataset, record, synthesize
from bnfuse.audit.tracing import ImageMoments, Reference
from bnfuse.card import read_card
from bnfuse.cli import main
from bnfuse.features import Features
from bnfuse.models import Teacher
from bnfuse.plans import deal
from bnfuse.store import verify
from bnfuse.subclasses import SubClasses, clusters
from bnfuse.units import UnitMaker

CLASSES, SIZE = 3, 8
PREPROCESSING = Preprocessing((SIZE, SIZE), (0.5,) * 3, (0.25,) * 3)
KINDS = (40, 24, 30, 31, 26)  # images that look alike; two kinds of class 0, two of class 1, one of class 2
CLASS_OF_KIND = (0, 0, 1, 1, 2)


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return Teacher(settle(Chains(classes=CLASSES)).double(), "chains", CLASSES, PREPROCESSING)


@pytest.fixture(scope="module")
def data():
    """Images of each kind around one of its own, in random order: float64 [N, 3, SIZE, SIZE], labels and kinds int64 [N]."""
    generator = torch.Generator().manual_seed(1)
    kinds = torch.repeat_interleave(torch.arange(len(KINDS)), torch.tensor(KINDS))
    kinds = kinds[torch.randperm(len(kinds), generator=generator)]
    centres = torch.randn(len(KINDS), 3, SIZE, SIZE, generator=generator, dtype=torch.float64) * 3
    noise = torch.randn(len(kinds), 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return centres[kinds] + 0.1 * noise, torch.tensor(CLASS_OF_KIND)[kinds], kinds


def batches(images, labels, size=16):
    return list(zip(images.split(size), labels.split(size)))


def take(teacher, data, **options):
    return record(teacher.model, batches(*data[:2]), CLASSES, **options)


# ---- the clusters ----


@settings(max_examples=50, deadline=None)
@given(
    images=st.integers(1, 60),
    most=st.integers(1, 8),
    minimum=st.integers(0, 20),
    spread=st.sampled_from([0.0, 0.1, 10.0]),  # 0: many images are the same
    seed=st.integers(0, 10**6),
)
def test_no_cluster_is_too_small(images, most, minimum, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, 5, (images,), generator=generator)
    features = torch.randn(5, 3, generator=generator)[kinds] + spread * torch.randn(images, 3, generator=generator)
    found = clusters(features, most, minimum)
    sizes = torch.bincount(found)
    assert len(found) == images and 1 <= len(sizes) <= most and sizes.min() >= 1
    assert len(sizes) == 1 or sizes.min() >= minimum
    assert clusters(features, most, minimum).equal(found)


def test_a_small_cluster_joins_the_one_next_to_it():
    points = torch.cat([torch.zeros(30, 2), torch.full((30, 2), 10.0), torch.full((5, 2), 12.0)])
    points += 0.01 * torch.randn(65, 2, generator=torch.Generator().manual_seed(0))
    found = clusters(points, 3, 5)
    assert sorted(torch.bincount(found).tolist()) == [5, 30, 30]
    found = clusters(points, 3, 20)
    assert sorted(torch.bincount(found).tolist()) == [30, 35] and len(found[30:].unique()) == 1


# ---- what is recorded ----


def test_each_sub_class_has_the_statistics_of_its_images(teacher, data):
    with pytest.warns(UserWarning, match=r"fewer than 2 sub-classes in 1 class\(es\), since each needs 20 images: 2 \(1\)$"):
        statistics = take(teacher, data, subclasses=2)
    assert statistics.row_classes == [0, 0, 1, 1, 2] and statistics.num_classes == CLASSES
    assert statistics.class_images().tolist() == [64, 61, 26] and statistics.rows(1) == [2, 3]
    by_kind = record(teacher.model, batches(data[0], data[2]), len(KINDS))  # kinds as if they were classes
    kind_of = [by_kind.images.tolist().index(count) for count in statistics.images.tolist()]
    assert sorted(kind_of) == [0, 1, 2, 3, 4]
    for name, site in statistics.sites.items():
        expected = by_kind.sites[name].of_classes(kind_of)
        assert site.count.equal(expected.count) and site.mean.equal(expected.mean) and site.m2.equal(expected.m2)

    plain = take(teacher, data)
    for ours, theirs in zip(statistics.moments(per_class=False), plain.moments(per_class=False)):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for k in range(CLASSES):
        for name, site in statistics.sites.items():
            whole = site.of_classes(statistics.rows(k)).pooled()
            torch.testing.assert_close(whole.mean[0], plain.sites[name].mean[k], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(whole.m2[0], plain.sites[name].m2[k], rtol=1e-11, atol=1e-10)
    matcher = Matcher.from_statistics(statistics)  # a row a sub-class
    torch.testing.assert_close(matcher.target_mean.double(), statistics.moments()[0], rtol=1e-6, atol=1e-6)
    assert len(matcher.target_mean) == 5


@pytest.mark.filterwarnings("ignore:fewer than 2 sub-classes")
def test_the_file(teacher, data, tmp_path):
    statistics, plain = take(teacher, data, subclasses=2), take(teacher, data)
    statistics.save(tmp_path / "s")
    plain.save(tmp_path / "plain")
    loaded = ClassStatistics.load(tmp_path / "s", teacher=teacher.model, num_classes=CLASSES)
    assert loaded.row_classes == statistics.row_classes and loaded.digest() == statistics.digest()
    assert loaded.moments(classes=[3, 0])[0].equal(statistics.moments()[0][[3, 0]])
    assert ClassStatistics.load(tmp_path / "plain").row_classes is None

    def described(path):
        with safetensors.safe_open(path, "pt") as file:
            return file.metadata()

    versions = [json.loads(described(tmp_path / name)["description"])["version"] for name in ("plain", "s")]
    assert versions == [2, 3]  # what knows nothing of sub-classes refuses the second
    for broken in ([0, 0, 1, 2], [0, 0, 1, 2, 1], [0, 0, 1, 1, 1]):
        about = described(tmp_path / "s")
        about["description"] = json.dumps(json.loads(about["description"]) | {"row_classes": broken})
        safetensors.torch.save_file(safetensors.torch.load_file(tmp_path / "s"), tmp_path / "broken", about)
        with pytest.raises(InputError, match="is damaged: its 5 rows are not sub-classes"):
            ClassStatistics.load(tmp_path / "broken")
    with pytest.raises(InputError, match="statistics of sub-classes cannot be merged"):
        plain.merge(statistics)


def test_what_cannot_have_sub_classes(teacher, data):
    images, labels, _ = data
    with pytest.raises(InputError, match="subclasses must be at least 1.*got 0 of a list"):
        take(teacher, data, subclasses=0)
    with pytest.raises(InputError, match="gone through twice.*got 2 of a zip"):
        record(teacher.model, zip(images.split(16), labels.split(16)), CLASSES, subclasses=2)
    few = labels.clone()
    few[(labels == 2).nonzero()[3:]] = 0
    with pytest.raises(InputError, match=r"fewer than 20 images in 1 class\(es\): 2 \(3\)"), pytest.warns(UserWarning):
        record(teacher.model, batches(images, few), CLASSES, subclasses=2)  # a class that is too small is no less refused
    with pytest.raises(InputError, match="no image of class 2"), pytest.warns(UserWarning):
        record(teacher.model, batches(images, labels.clamp(max=1)), CLASSES, subclasses=2)
    shuffled = DataLoader(list(zip(images, labels)), 16, shuffle=True, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="the same images in the same order"), pytest.warns(UserWarning):
        record(teacher.model, shuffled, CLASSES, subclasses=2)
    with pytest.raises(InputError, match="Conv2d.*has none: record it without sub-classes"):
        Features(torch.nn.Conv2d(3, 3, 1), "record it without sub-classes")


# ---- the driver ----


@given(shares=st.lists(st.integers(1, 1000), min_size=1, max_size=6), count=st.integers(0, 60))
def test_the_first_images_are_dealt_in_proportion_too(shares, count):
    parts = deal(shares, count)
    assert len(parts) == count and parts == deal(shares, count + 7)[:count]
    for i in range(1, count + 1):
        dealt = Counter(parts[:i])
        assert all(abs(dealt[j] - i * share / sum(shares)) < 2 for j, share in enumerate(shares))


@pytest.fixture(scope="module")
def recorded(data):
    torch.manual_seed(0)
    teacher = Teacher(settle(Chains(classes=CLASSES)), "chains", CLASSES, PREPROCESSING)
    loader = batches(data[0].float(), data[1])
    with pytest.warns(UserWarning):
        statistics = record(teacher.model, loader, CLASSES, subclasses=2, class_names=["a", "b", "c"])
    return teacher, statistics


def maker(recorded, **fields):
    config = SynthesisConfig(**{"iterations": 2, "images_per_class": 8, "batch_size": 8} | fields)
    return UnitMaker(*recorded, config, torch.device("cpu"), "auto")


@pytest.mark.parametrize("plan", ({}, {"class_plan": "balanced"}, {"classes_per_batch": 2}, {"classes": (2, 0)}))
def test_images_are_dealt_to_sub_classes_and_matched_to_them(recorded, plan):
    statistics = recorded[1]
    made = maker(recorded, **plan)
    rows_of = {}
    for unit in made.units:
        rows = made.rows(unit)
        starts, targets = made.targets[0].groups(rows, "class")
        assert all(len(set(rows[a:b])) == 1 for a, b in zip(starts.tolist(), starts.tolist()[1:]))
        mean, _ = statistics.moments(classes=[rows[start] for start in starts[:-1].tolist()])
        torch.testing.assert_close(made.targets[0].matcher.target_mean[targets].double(), mean, rtol=1e-6, atol=1e-6)
        rows_of |= {(k, i): row for k, i, row in zip(unit.classes, unit.indices, rows)}
    for k, number in enumerate(plan.get("classes", range(CLASSES))):
        rows = [rows_of[k, i] for i in range(8)]
        assert {statistics.row_classes[row] for row in rows} == {number}
        first = statistics.rows(number)[0]
        for count in (4, 8):
            expected = count * int(statistics.images[first]) / int(statistics.class_images()[number])
            assert abs(rows[:count].count(first) - expected) <= 1


def test_a_dataset_of_sub_classes_has_the_classes_labels(recorded, tmp_path, monkeypatch):
    teacher, statistics = recorded
    config = SynthesisConfig(images_per_class=6, batch_size=6, iterations=3)
    synthesize(teacher, statistics, tmp_path / "out", config, progress=False)
    made = load_dataset(str(tmp_path / "out"))
    assert made.class_names == ["a", "b", "c"] and torch.bincount(made.labels).tolist() == [6, 6, 6]
    assert verify(tmp_path / "out") == []
    assert read_card(tmp_path / "out")["statistics"]["row_classes"] == statistics.row_classes
    monkeypatch.setattr("bnfuse.units.budget_of_each", lambda wanted: 0)  # targets are brought unit by unit: the same images
    synthesize(teacher, statistics, tmp_path / "few", config, progress=False)
    few, everything = load_dataset(str(tmp_path / "few")), torch.arange(18)
    assert few.batch(everything)[0].equal(made.batch(everything)[0])
    for targets in ("global", "running"):  # a batch as a whole knows of no parts
        assert [maker(recorded, targets=targets).rows(unit) for unit in maker(recorded).units] == [[k] * 8 for k in range(3)]


@pytest.fixture(scope="module")
def two_teachers():
    """Two that find different sub-classes, with (images, labels) in batches."""
    generator = torch.Generator().manual_seed(3)
    images, labels = torch.rand(150, 3, SIZE, SIZE, generator=generator), torch.arange(150) % CLASSES
    teachers = []
    for seed in range(2):
        torch.manual_seed(seed)
        teachers.append(Teacher(settle(Chains(classes=CLASSES), seed), "chains", CLASSES, PREPROCESSING))
    return *teachers, batches(images, labels)


def test_a_further_teacher_takes_the_sub_classes_of_the_first(two_teachers, tmp_path):
    first, second, loader = two_teachers
    options = dict(subclasses=2, minimum_images=10, class_names=["a", "b", "c"])
    statistics, own = (record(teacher, loader, CLASSES, **options) for teacher in (first, second))
    shared = record(second, loader, CLASSES, subclass_teacher=first, **options)
    assert own.images.tolist() != shared.images.tolist() == statistics.images.tolist()
    assert shared.grouping == statistics.grouping != own.grouping

    inputs = [(PREPROCESSING.normalize(images), labels) for images, labels in loader]
    found = SubClasses(first.model, inputs, options["class_names"], 2, 10)
    rows = [found.of(16 * i, images) for i, (images, _) in enumerate(inputs)]
    batches_of = [(images, of) for (images, _), of in zip(inputs, rows)]
    as_classes = record(second.model, batches_of, len(found.row_classes), minimum_images=10)
    for name, site in shared.sites.items():
        expected = as_classes.sites[name]
        assert site.count.equal(expected.count) and site.mean.equal(expected.mean) and site.m2.equal(expected.m2)

    shared.save(tmp_path / "shared")
    loaded = ClassStatistics.load(tmp_path / "shared", teacher=second.model)
    assert loaded.grouping == statistics.grouping and loaded.subclass_teacher == first.fingerprint
    config = SynthesisConfig(images_per_class=8, batch_size=8, iterations=3)
    made = UnitMaker(first, statistics, config, torch.device("cpu"), "auto", more_teachers=[(second, loaded)])
    for unit in made.units:
        rows = made.rows(unit)
        for targets, of in zip(made.targets, (statistics, shared)):
            starts, chosen = targets.groups(rows, "class")
            mean, _ = of.moments(classes=[rows[start] for start in starts[:-1].tolist()])
            torch.testing.assert_close(targets.matcher.target_mean[chosen].double(), mean, rtol=1e-6, atol=1e-6)
    synthesize(first, statistics, tmp_path / "out", config, more_teachers=[(second, loaded)], progress=False)
    assert read_card(tmp_path / "out")["more_teachers"][0]["statistics"]["subclass_teacher"] == first.fingerprint

    plain = record(second, loader, CLASSES, class_names=["a", "b", "c"])
    for other in (own, plain):
        with pytest.raises(InputError, match="teacher 2 does not go with the first: an image is of one sub-class"):
            synthesize(first, statistics, tmp_path / "two", config, more_teachers=[(second, other)])
    with pytest.raises(InputError, match="teacher 2 does not go with the first: an image is of one sub-class"):
        synthesize(second, plain, tmp_path / "two", config, more_teachers=[(first, statistics)])
    pooled = replace(config, targets="global")  # knows of no sub-classes
    UnitMaker(first, statistics, pooled, torch.device("cpu"), "auto", more_teachers=[(second, plain)])


def test_whose_sub_classes_cannot_be_taken(two_teachers):
    first, second, loader = two_teachers
    with pytest.raises(InputError, match=r"needs subclasses \(--subclasses\) of 2 or more, got 1"):
        record(second, loader, CLASSES, subclass_teacher=first)
    other = replace(first, preprocessing=Preprocessing((SIZE, SIZE), (0.4,) * 3, (0.25,) * 3))
    with pytest.raises(InputError, match="both teachers must be shown the same"):
        record(second, loader, CLASSES, subclasses=2, subclass_teacher=other)
    with pytest.raises(InputError, match="train"):  # not frozen
        record(second, loader, CLASSES, subclasses=2, subclass_teacher=Chains(classes=CLASSES).train())


def test_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = lambda line: main(line.split())
    assert run("train --data digits:train --out teacher --model resnet8 --epochs 2") == 0
    assert run("record --teacher teacher/model.safetensors --data digits:train --subclasses 3 --out s") == 0
    assert "10 classes, 30 sub-classes, at 7 BatchNorm layers" in capsys.readouterr().out
    assert ClassStatistics.load("s").images.min() >= 20
    flow = "synthesize --teacher teacher/model.safetensors --statistics s --images-per-class 3 --iterations 2 --out synthetic"
    assert run(flow) == 0 and run(flow) == 0 and "30 images, 0 made now" in capsys.readouterr().out

    assert run("train --data digits:train --out second --model resnet8 --epochs 1 --seed 1") == 0
    more = "record --teacher second/model.safetensors --data digits:train --subclasses 3 --out more"
    first = " --subclass-teacher teacher/model.safetensors"
    two = f"{flow} --more-teachers second/model.safetensors --more-statistics more".replace("synthetic", "of_two")
    assert run(more) == 0 and run(two) == 2 and "and the first as --subclass-teacher" in capsys.readouterr().err
    assert run(more + first) == 0 and run(two) == 0 and "30 images, 30 made now" in capsys.readouterr().out
    assert run(more + " --subclass-weights x") == 2 and "--subclass-teacher, which is missing" in capsys.readouterr().err


# ---- the audit ----


def test_tracing_takes_the_sub_class_that_suits_best():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    reference = Reference(ImageMoments(draw(30, 4), draw(30, 4).square(), torch.arange(30) % 2), 2)
    images = ImageMoments(draw(9, 4), draw(9, 4).square(), torch.arange(9) % 2)
    rows = ImageMoments(draw(3, 4), draw(3, 4).square(), torch.tensor([0, 0, 1]))
    pair = [
        ImageMoments(part.mean, part.square, torch.tensor([0, 1])) for part in (rows.part(torch.tensor([r, 2])) for r in (0, 1))
    ]
    plain = [reference.scores(images, of) for of in pair]
    torch.testing.assert_close(reference.scores(images, rows), torch.maximum(*plain))
