"""Membership inference and tracing on the digits: controls, known leaks, canaries through the pipeline, and resuming."""

import dataclasses

import pytest
import torch
from torch.utils.data import DataLoader

import bnfuse
from bnfuse import InputError, Teacher
from bnfuse.audit import ARMS, membership, pipeline, tracing
from bnfuse.audit.canaries import Guesses, epsilon_lower_bound
from bnfuse.audit.context import prepare
from bnfuse.audit.findings import Figure
from bnfuse.audit.pipeline import confidence, learn, synthesised
from bnfuse.audit.scores import Scores
from bnfuse.datasets import ArrayDataset, load_dataset
from bnfuse.models import freeze
from bnfuse.training import TrainConfig, train

QUICK = membership.BUDGETS["quick"]
PIPELINE = dataclasses.replace(
    QUICK.pipeline,
    teacher=dataclasses.replace(QUICK.pipeline.teacher, epochs=2),
    student=dataclasses.replace(QUICK.pipeline.student, epochs=2),
    synthesis=dataclasses.replace(QUICK.pipeline.synthesis, images_per_class=2, batch_size=20, iterations=3),
)
TINY = dataclasses.replace(  # as quick as can be: for what does not depend on how well anything is learnt
    QUICK,
    student=dataclasses.replace(QUICK.student, epochs=1),
    images=60,
    overfitted=dataclasses.replace(QUICK.overfitted, epochs=1),
    overfitted_images=20,
    canaries=16,
    canary_images=80,
    shadows=4,
    shadow_images=120,
    pipeline=PIPELINE,
)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits:train"), load_dataset("digits:test")


@pytest.fixture(scope="module")
def teacher(digits):
    trained = train(digits[0], TrainConfig(model="resnet8", epochs=4, batch_size=64), progress=False, device="cpu")
    return Teacher(freeze(trained.model), "resnet8", 10, trained.preprocessing)


@pytest.fixture(scope="module")
def statistics(digits, teacher):
    return bnfuse.record(teacher, DataLoader(digits[0], batch_size=256), 10)


@pytest.fixture
def make_context(digits, tmp_path):
    def make(private=None, synthetic=None, heldout=None, **more):
        settings = dict(noise=0.2, teacher=None, statistics=None, budget="quick", device=torch.device("cpu"), seed=0)
        return prepare(
            private or digits[0],
            synthetic or digits[1],
            heldout or digits[1],
            out=tmp_path,
            show_progress=False,
            **settings | more,
        )

    return make


def control(finding, words):
    (found,) = [c for c in finding.controls if words in c.name]
    return found


def figures(finding, arm):
    return {figure.name: figure for figure in finding.row(arm).figures}


# ---- membership: controls and known leaks ----


def test_an_overfitted_network_gives_its_members_away_and_published_originals_are_a_leak(make_context, digits):
    """Published are the very images that are told from held-out ones."""
    config = dataclasses.replace(QUICK, student=dataclasses.replace(QUICK.student, epochs=25), images=250, canaries=0)
    members = membership._chosen(digits[0], 250, make_context().rng("membership", "members"))
    finding = membership.run(make_context(synthetic=digits[0].subset(members)), config)
    positive = control(finding, "overfitted")
    assert positive.passed and positive.kind == "positive" and positive.value > 5
    assert all(c.passed for c in finding.controls if c.kind == "negative")
    assert finding.verdict == "leak" and "can be told from the synthetic images better than by chance" in finding.sentence
    auc = figures(finding, "original")["AUC"]
    assert auc.low > 0.5 and auc.low < auc.value < auc.high
    assert [row.figures[0].name for row in finding.rows] == ["TPR at 1 % FPR"] * 3
    assert {row.arm for row in finding.rows} == set(ARMS)
    assert any("0.1 % FPR (needs 1,000)" in note for note in finding.notes)  # there are 359 held-out images


def test_the_sentence_is_about_the_best_of_the_attacks_that_succeeded():
    aucs = {"AUC": 0.5, "AUC, loss alone": 0.9, "AUC, LiRA, shadows": 0.53, "AUC, RMIA, shadows": 0.52}
    rates = {name.replace("AUC", "TPR at 1 % FPR"): 100 * value for name, value in aucs.items()}
    given = [Figure(name, value) for name, value in (aucs | rates).items()]
    found = membership._sentence(["LiRA, shadows", "RMIA, shadows", "canaries"], given)
    assert (
        "better than by chance (LiRA with shadow pipelines, RMIA with shadow pipelines, canaries): by LiRA with shadow" in found
    )
    assert "53 times in 100" in found and "of 100 members 53.0 are found" in found
    assert "by a student's loss a member looks more like one than a stranger does 50" in membership._sentence([], given)
    assert "a student's loss" in membership._sentence(["calibrated loss", "canaries"], given)


def test_images_that_know_nothing_of_the_private_ones_are_no_leak(make_context, digits):
    """Published are other real images, so that the verdict has to be that nothing leaks; the control still has to work."""
    real = digits[1]
    config = dataclasses.replace(QUICK, canaries=0, images=150)
    context = make_context(synthetic=real.subset(range(0, 359, 2)), heldout=real.subset(range(1, 359, 2)))
    finding = membership.run(context, config)
    assert finding.verdict == "no leak seen" and "could not be told" in finding.sentence
    assert figures(finding, "synthetic")["AUC"].low < 0.5


def test_a_control_that_fails_makes_the_finding_void(make_context):
    finding = membership.run(make_context(), dataclasses.replace(TINY, canaries=0, shadows=0))
    assert not control(finding, "overfitted").passed and finding.verdict == "void"  # one epoch overfits nothing


def test_held_out_images_of_another_kind_prove_nothing(make_context, digits):
    """Dark held-out images: any network tells them from the private ones, whether it has seen these or not."""
    dark = ArrayDataset(digits[1].images // 3, digits[1].labels, digits[1].class_names, name="dark")
    config = dataclasses.replace(QUICK, canaries=0, images=200, overfitted_images=20)
    finding = membership.run(make_context(synthetic=dark.subset(range(150)), heldout=dark.subset(range(150, 359))), config)
    assert not control(finding, "seen neither").passed
    assert finding.outcome == "no leak seen" and any("differ in kind" in note for note in finding.notes)


def test_luck_in_one_of_many_looks_is_no_leak(make_context):
    """22 right guesses of 32 rule out ε = 0 with 95 % confidence by themselves, but not as one of five looks."""
    chance = Scores(torch.arange(300.0), torch.arange(300.0))
    result = membership._Result({"synthetic": chance}, {"synthetic": chance})
    for right, signs in ((22, []), (27, ["canaries"])):
        result.guesses["synthetic"] = Guesses(right, 32, epsilon_lower_bound(right, 32), 0, 0.0)
        assert result.guesses["synthetic"].epsilon > 0
        assert membership._signs(make_context(), result, "synthetic") == signs


# ---- membership: through the pipeline ----


def test_canaries_among_originals_are_guessed_and_bound_epsilon(make_context):
    """Tier 2 of the quick budget: what publishes the originals is found out; the bound is at most what the guesses allow."""
    config = dataclasses.replace(QUICK, overfitted_images=20, student=TINY.student, images=60)
    short = dataclasses.replace(config.pipeline, synthesis=PIPELINE.synthesis)
    finding = membership.run(make_context(), dataclasses.replace(config, pipeline=short))
    learnt = control(finding, "mislabelled originals")
    assert learnt.passed and 1 < learnt.value <= 2.33  # 32 guesses, all right: 2.32
    original = figures(finding, "original")
    assert original["ε lower bound, canaries"].value == learnt.value
    assert original["canaries guessed right"].value > 85
    assert original["worst canary, in standard deviations of those left out"].value > 3
    assert any("at most 2.32" in note for note in finding.notes)


def test_all_tiers_run_and_are_told_arm_by_arm(make_context):
    finding = membership.run(make_context(), TINY)
    assert [row.figures[0].name for row in finding.rows] == ["TPR at 1 % FPR, LiRA, shadows"] * 3  # the strongest attack
    for arm in ARMS:
        names = figures(finding, arm)
        for attack in ("", ", loss alone", ", LiRA, shadows", ", RMIA, shadows"):
            assert {f"TPR at 1 % FPR{attack}", f"TPR at 0.1 % FPR{attack}", f"AUC{attack}"} <= set(names)
        assert "ε lower bound, canaries" in names
    assert [picture.public for picture in finding.pictures] == [
        "pictures/membership-roc.png",
        "pictures/membership-canaries.png",
    ]
    assert control(finding, "AUC of LiRA").kind == "positive"


def test_a_stopped_run_goes_on_with_the_networks_that_it_has(make_context, monkeypatch):
    config = dataclasses.replace(TINY, shadows=0)
    context, trained = make_context(), []
    whole = membership.run(dataclasses.replace(context, key="whole"), config)

    def counted(context, data, config, *words):
        if len(trained) == stops_at:
            raise KeyboardInterrupt
        trained.append(words)
        return learn(context, data, config, *words)

    monkeypatch.setattr(membership, "learn", counted)
    monkeypatch.setattr(pipeline, "learn", counted)
    stops_at = 6
    with pytest.raises(KeyboardInterrupt):
        membership.run(context, config)
    stops_at = None
    resumed = membership.run(context, config)
    assert len(trained) == len(set(trained)) == 8 + 3 + 1  # each once; the canaries' synthetic arm has a teacher, too
    assert resumed.to_dict() == whole.to_dict()
    assert not list(context.scratch("membership").glob(".synthesis-*"))


def test_the_pipeline_makes_images_of_every_class_and_depends_on_its_words(make_context, digits, tmp_path):
    context = make_context()
    data = digits[0].subset(range(150))
    one, same, other = (synthesised(context, data, PIPELINE, tmp_path, word) for word in ("one", "one", "other"))
    assert torch.bincount(one.labels).tolist() == [2] * 10 and one.image_shape == (1, 8, 8)
    assert one.images.equal(same.images) and not one.images.equal(other.images)


def test_confidence_is_the_logit_of_the_labels_probability(make_context, digits):
    trained = learn(make_context(), digits[0].subset(range(50)), TINY.student, "any")
    data = digits[1].subset(range(30))
    pixels = torch.stack([data[i][0] for i in range(30)])
    with torch.no_grad():
        p = trained.model(trained.preprocessing.normalize(pixels)).double().softmax(1)[torch.arange(30), data.labels]
    assert torch.allclose(confidence(trained, data, torch.device("cpu")), (p / (1 - p)).log(), atol=1e-5)


# ---- tracing ----


def test_ten_images_a_class_are_traced_and_strangers_are_not(make_context, teacher, statistics):
    context = make_context(teacher=teacher, statistics=statistics)
    finding = tracing.run(context, tracing.BUDGETS["quick"])
    positive, negative = finding.controls
    assert positive.kind == "positive" and positive.value >= 0.8 and positive.passed
    assert negative.kind == "negative" and negative.passed
    assert [row.figures[0].name for row in finding.rows] == ["AUC"] * 3
    assert figures(finding, "synthetic")["AUC"].high < 0.5  # published are the held-out images: they are in it, not the private
    assert len(finding.pictures) == 2


def test_statistics_of_few_images_are_found_to_leak(make_context, digits, teacher):
    few = digits[0].subset([i for k in range(10) for i in (digits[0].labels == k).nonzero().flatten()[:25].tolist()])
    statistics = bnfuse.record(teacher, DataLoader(few, batch_size=256), 10)
    finding = tracing.run(make_context(few, teacher=teacher, statistics=statistics), tracing.BUDGETS["quick"])
    assert finding.verdict == "leak" and finding.row("original").reading == "members are traced"
    assert figures(finding, "original")["AUC"].low > 0.6
    assert "statistics tell whose image was in them" in finding.sentence


def test_the_moments_of_a_class_are_the_means_of_its_images(digits, teacher, statistics):
    moments = tracing.image_moments(teacher, digits[0], torch.device("cpu"))
    rows, classes = moments.about(moments.mean.mean(0)), tracing._class_moments(statistics).about(moments.mean.mean(0))
    means = torch.stack([rows[moments.labels == k].mean(0) for k in range(10)])
    assert torch.allclose(means, classes, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rules", [("bn", "pixels"), ("name=layer1.*.bn1",)])
def test_statistics_of_other_sites_are_traced_at_these(make_context, digits, teacher, rules):
    """And of a teacher whose outputs are others than the classes."""
    private = DataLoader(digits[0], batch_size=256)
    statistics = bnfuse.record(teacher.model, private, 10, sites=rules, preprocessing=teacher.preprocessing)
    moments = tracing.image_moments(teacher, digits[0], torch.device("cpu"), rules)
    rows, classes = moments.about(moments.mean.mean(0)), tracing._class_moments(statistics).about(moments.mean.mean(0))
    means = torch.stack([rows[moments.labels == k].mean(0) for k in range(10)])
    assert torch.allclose(means, classes, rtol=1e-5, atol=1e-7)
    few = dataclasses.replace(tracing.BUDGETS["quick"], images=300)
    wider = dataclasses.replace(teacher, num_classes=11)
    assert len(tracing.run(make_context(teacher=wider, statistics=statistics), few).rows) == 3


def test_classes_of_the_same_name_at_other_places_are_refused(make_context, digits):
    """Unless all are the same: then they are brought to the private dataset's order."""
    named = lambda names: ArrayDataset(digits[1].images, digits[1].labels, names)
    turned = make_context(heldout=named(list("1203456789"))).heldout
    assert turned.class_names == digits[0].class_names and not turned.labels.equal(digits[1].labels)
    make_context(heldout=named(list("abcdefghij")))
    with pytest.raises(InputError, match="class 0 of the held-out dataset .* is '1', which is class 1 of the private dataset"):
        make_context(heldout=named(["1", "zebra", *"23456789"]))


def test_one_class_has_no_membership_to_be_told(make_context, digits):
    ones = [data.subset((data.labels == 1).nonzero().flatten()) for data in digits]
    ones = [ArrayDataset(data.images, torch.zeros(len(data), dtype=torch.int64), ["1"]) for data in ones]
    with pytest.raises(InputError, match="and there is one class: expected two or more"):
        membership.run(make_context(ones[0], synthetic=ones[0], heldout=ones[1]), membership.BUDGETS["quick"])


def test_whitening_is_by_the_shrunk_covariance():
    rng = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randn(n, 6, generator=rng).double() @ torch.randn(6, 6, generator=rng).double()
    mean = draw(40)
    moments = tracing.ImageMoments(mean, mean.square() + draw(40).abs(), torch.arange(40) % 2)
    reference = tracing.Reference(moments, 2)
    rows = moments.about(reference.centre)
    deviations = (rows - reference.means[moments.labels]) * reference.scale
    covariance = (1 - reference.shrinkage) * deviations.T @ deviations / 38 + reference.shrinkage * torch.eye(12).double()
    classes = tracing.ImageMoments(draw(2), draw(2).square(), torch.arange(2))
    ours = (rows - reference.means[moments.labels]) * reference.scale
    theirs = (classes.about(reference.centre) - reference.means) * reference.scale
    expected = (ours @ torch.linalg.inv(covariance) * theirs[moments.labels]).sum(1)
    assert torch.allclose(reference.scores(moments, classes), expected, rtol=1e-8)


def test_an_image_is_never_its_own_reference(make_context, digits, teacher, statistics):
    """Statistics of strangers to both: an image that were part of its own reference would score lower than a member."""
    private, heldout = digits
    config = tracing.BUDGETS["quick"]
    aside = heldout.subset(range(0, 359, 3))
    context = make_context(heldout=heldout.subset([i for i in range(359) if i % 3]), teacher=teacher, statistics=statistics)
    moments = [tracing.image_moments(teacher, data, context.device) for data in (private, context.heldout)]
    strangers = bnfuse.record(teacher, DataLoader(aside, batch_size=256), 10, allow_few_images=True)
    scores = tracing._trace(context, config, strangers, *moments)
    low, high = scores.auc_interval(torch.Generator().manual_seed(0), 0.99)
    assert isinstance(scores, Scores) and low < 0.5 < high


def test_classes_without_reference_or_control_are_refused(make_context, digits, teacher, statistics):
    def run(private, heldout):
        context = make_context(private, heldout=heldout, teacher=teacher, statistics=statistics)
        return tracing.run(context, tracing.BUDGETS["quick"])

    no_nines = digits[1].subset((digits[1].labels != 9).nonzero().flatten())
    with pytest.raises(InputError, match="at least 2; digits:test has fewer of 9"):
        run(digits[0], no_nines)
    few = digits[0].subset([i for k in range(10) for i in (digits[0].labels == k).nonzero().flatten()[:9].tolist()])
    with pytest.raises(InputError, match="more than 10 private images of some class, and the classes have 9"):
        run(few, digits[1])
