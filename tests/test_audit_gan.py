"""The GAN-based attack: an adversary learns a class he has no image of, noise does not pass for one, and the rest follows."""

import dataclasses

import pytest
import torch
from test_audit_gradients import context_of

from bnfuse import InputError
from bnfuse.audit import federation, gan
from bnfuse.audit.context import Context, prepare
from bnfuse.audit.federation import Federation, attack, deal
from bnfuse.datasets import ArrayDataset
from bnfuse.training import train

QUICK = gan.BUDGETS["quick"]
TINY = dataclasses.replace(
    QUICK,
    federation=Federation(rounds=1, steps=1, images=40, fakes=8, channels=4, generator_channels=4),
    judge=dataclasses.replace(QUICK.judge, epochs=1),
    judge_images=60,
    generated=12,
)


@pytest.fixture(scope="module")
def context(tmp_path_factory) -> Context:
    return context_of(tmp_path_factory.mktemp("gan"))


@pytest.fixture(scope="module")
def finding(context):
    return gan.run(context, QUICK)


@pytest.fixture(scope="module")
def judge(context, finding):
    return gan.trained_judge(context, QUICK)  # the finding's own


def colours(count, seed) -> ArrayDataset:
    """Colour images of three classes, one bright in each channel."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 120, (count, 12, 9, 3), generator=rng)
    images[torch.arange(count), :, :, labels] += 130
    return ArrayDataset(images.to(torch.uint8), labels, ["red", "green", "blue"], name=f"colours {seed}")


def quicken(monkeypatch):
    """Fewer exchanges and smaller pictures, where neither matters."""
    monkeypatch.setattr(gan, "PERMUTATIONS", 19)
    monkeypatch.setattr(gan, "_COLUMNS", 1)


# ---- controls ----


def test_a_class_of_originals_is_learnt_and_noise_is_not_taken_for_it(finding):
    positive, *negative = finding.controls
    assert positive.kind == "positive" and positive.value >= 0.9 and positive.passed and positive.needed == "at least 0.9"
    assert [control.kind for control in negative] == ["negative", "negative"]
    assert all(control.value <= 0.2 and control.passed for control in negative)
    assert finding.verdict in ("no leak seen", "diagnostic") and not finding.failed_controls


def test_the_judge_knows_real_images_and_takes_noise_for_no_class(context, judge):
    images, labels = context.heldout.batch(torch.arange(len(context.heldout)))
    said = gan.probabilities(judge, images, context.device)
    assert said.shape == (359, 11) and (said.argmax(1) == labels).double().mean() > 0.95
    certain, right = gan.competence(judge, context)
    assert right == pytest.approx((said.argmax(1) == labels).double().mean().item())
    assert certain == pytest.approx(said.gather(1, labels[:, None]).mean().item()) and gan.needed(certain) == 0.9
    noise = torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    assert gan.probabilities(judge, noise, context.device)[:, :10].mean(0).max() <= 0.2


def test_an_adversary_who_has_hardly_begun_makes_the_result_void(context, judge, tmp_path, monkeypatch):
    monkeypatch.setattr(gan, "trained_judge", lambda *arguments: judge)
    found = gan.run(dataclasses.replace(context, out=tmp_path), TINY)
    assert found.verdict == "void" and found.controls[0].value < 0.2
    assert found.row("original").reading.startswith("the class is not learnt")


# ---- the federation ----


def test_three_participants_are_attacked_as_two_are(context, judge):
    config = dataclasses.replace(QUICK.federation, participants=3)
    images = attack(context, config, context.private, 0, 100, "three")
    assert images.shape == (100, 1, 8, 8) and images.min() >= 0 and images.max() <= 1
    assert gan.probabilities(judge, images, context.device)[:, 0].mean() >= 0.9


@pytest.mark.parametrize("sharing", ["in turn", "averaging"])
def test_parameters_are_shared_in_turn_or_as_their_mean(context, monkeypatch, sharing):
    taken, take_part = [], federation.Participant.take_part

    def recorded(self, parameters):
        before = {name: part.clone() for name, part in parameters.items()}
        after = take_part(self, parameters)
        taken.append((before, {name: part.clone() for name, part in after.items()}))
        return after

    monkeypatch.setattr(federation.Participant, "take_part", recorded)
    config = dataclasses.replace(TINY.federation, rounds=2, participants=3, sharing=sharing)
    attack(context, config, context.private, 3, 4, sharing)
    assert len(taken) == 6
    for i, (before, _) in enumerate(taken[1:], 1):
        if sharing == "in turn":
            expected = taken[i - 1][1]
        elif i < 3:
            expected = taken[0][0]
        else:
            expected = {name: torch.stack([taken[k][1][name] for k in range(3)]).mean(0) for name in before}
        assert all(before[name].equal(expected[name]) for name in before), i


@pytest.mark.parametrize("participants", [2, 5])
def test_only_victims_have_the_class_and_nobody_has_anothers_image(context, participants):
    data = context.private
    adversary, *victims = deal(data, 3, participants, torch.Generator().manual_seed(0))
    assert len(victims) == participants - 1 and all(bool((data.labels[part] == 3).any()) for part in victims)
    assert len(data.labels[adversary].unique()) == 5 and 3 not in data.labels[adversary]
    assert not set(data.labels[adversary].tolist()) & set(data.labels[torch.cat(victims)].tolist())
    assert torch.cat([adversary, *victims]).sort().values.equal(torch.arange(len(data)))


def test_what_cannot_be_dealt_out_is_refused():
    one = ArrayDataset(torch.zeros(5, 8, 8, dtype=torch.uint8), [0] * 5, ["only"])
    with pytest.raises(InputError, match="no image of the class 'only': expected 2 classes or more"):
        deal(one, 0, 2, torch.Generator())
    with pytest.raises(InputError, match="participants must be 2 or more, an adversary and a victim, got 1"):
        Federation(rounds=1, steps=1, participants=1)
    with pytest.raises(InputError, match="waits must be fewer than the 3 rounds, or no attack begins, got 3"):
        Federation(rounds=3, steps=1, waits=3)


def test_the_adversary_waits_then_calls_what_he_generates_by_a_class_of_his_own(context, monkeypatch):
    seen, batch = [], federation.Adversary.batch
    monkeypatch.setattr(federation.Adversary, "batch", lambda self: seen.append(batch(self)) or seen[-1])
    config = dataclasses.replace(TINY.federation, rounds=2, waits=1)
    attack(context, config, context.private, 3, 4, "labels")
    (_, waiting), (images, labels) = seen
    assert len(waiting) == 40 and waiting.max() < 10
    assert len(images) == 40 and (labels == 10).sum() == 8 and (labels[-8:] == 10).all() and 3 not in labels


def test_networks_take_images_of_any_size_and_number_of_channels():
    for shape in ((1, 8, 8), (3, 32, 32), (3, 12, 9), (1, 28, 28), (1, 3, 5)):
        images = federation.Generator(shape, 4)(torch.randn(2, 32))
        assert images.shape == (2, *shape)
        assert federation.Network(shape, 7, 4)(images).shape == (2, 7)


# ---- the measure ----


def test_the_finding_has_every_arm_beside_held_out_images(context, finding):
    assert [row.arm for row in finding.rows] == ["original", "synthetic", "noised", "held-out"]
    assert {row.figures[0].name for row in finding.rows} == {gan.JUDGED}
    original, heldout = finding.row("original"), finding.row("held-out")
    assert original.reading == "the class is learnt; no nearer to private images than to held-out ones"
    assert [figure.name for figure in original.figures[:4]] == [figure.name for figure in heldout.figures]
    assert 5 < original.figures[2].value < heldout.figures[2].value < 30  # dB: the class was learnt, no image of it
    assert "whoever trains on the synthetic images" in finding.bounds and "membership" in finding.does_not_bound
    assert len(finding.pictures) == 3 and all(
        (context.out / picture.path).stat().st_size > 1000 for picture in finding.pictures
    )
    assert [picture.public for picture in finding.pictures] == [None, "pictures/gan-synthetic-public.png", None]


def test_one_seed_gives_one_attack_and_another_arm_another(context):
    first, again, other = (attack(context, TINY.federation, context.private, 3, 5, word) for word in ("a", "a", "b"))
    assert first.equal(again) and not first.equal(other)


def test_a_stopped_run_goes_on_with_the_federations_that_are_left(context, tmp_path, monkeypatch):
    quicken(monkeypatch)
    context, done = dataclasses.replace(context, out=tmp_path), []
    config = dataclasses.replace(TINY, targets=2)

    def stopping(*arguments, **more):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(arguments[-2:])
        return attack(*arguments, **more)

    monkeypatch.setattr(gan, "attack", stopping)
    with pytest.raises(KeyboardInterrupt):
        gan.run(context, config)
    first, done[:] = list(done), []
    monkeypatch.setattr(gan, "train", None)  # the judge is there already
    resumed = gan.run(context, config)
    assert len(first) == 4 and len(done) == 2 and not set(first) & set(done)
    monkeypatch.setattr(gan, "train", train)
    monkeypatch.setattr(gan, "attack", attack)
    straight = gan.run(dataclasses.replace(context, key="another"), config)
    assert resumed.to_dict() == straight.to_dict()


def test_colour_images_of_no_square_size_are_attacked_class_by_class(tmp_path, monkeypatch):
    quicken(monkeypatch)
    settings = dict(noise=0.2, teacher=None, statistics=None, budget="quick", device=torch.device("cpu"), seed=0)
    context = prepare(colours(90, 0), colours(60, 1), colours(60, 2), out=tmp_path, show_progress=False, **settings)
    found = gan.run(context, dataclasses.replace(TINY, targets=10))
    names = [figure.name for figure in found.row("synthetic").figures]
    assert [f"{name}: {gan.JUDGED}" in names for name in ("red", "green", "blue")] == [True] * 3
    assert "red, green, blue" in found.notes[0] and len(found.pictures) == 3


def test_a_class_that_a_dataset_lacks_is_not_attacked(context):
    held = context.heldout
    only = dataclasses.replace(context, heldout=held.subset((held.labels == 6).nonzero().flatten()))
    assert gan._targets(only, dataclasses.replace(TINY, targets=10)) == [6]
    none = dataclasses.replace(only, synthetic=held.subset((held.labels == 5).nonzero().flatten()))
    with pytest.raises(InputError, match="private, synthetic and held-out images"):
        gan._targets(none, TINY)


# ---- what is concluded ----


def test_nearer_to_private_images_is_what_resembles_them_not_what_is_blurred_or_all_alike(context):
    labels = torch.full((30,), 3)
    own = context.private.batch((context.private.labels == 3).nonzero().flatten())[0]
    learnt = (own[:30] + 0.02 * torch.randn(30, 1, 8, 8, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    gain, p = gan.nearer(context, learnt, labels, "learnt")
    assert gain > 0.5 and p < 0.01
    for word, image in {"blurred": own.mean(0), "another": context.heldout.batch([5])[0][0]}.items():
        gain, p = gan.nearer(context, image.expand(30, -1, -1, -1), labels, word)
        assert abs(gain) < 3 and p > 0.01, word


@pytest.mark.parametrize(
    ("near", "published", "p", "outcome"),
    [(15.0, 15.0, 0.5, "no leak seen"), (20.0, 15.0, 0.001, "leak"), (15.0, 15.0, 0.001, "diagnostic")]
    + [(20.0, 15.0, 0.5, "no leak seen"), (40.0, torch.inf, 0.001, "diagnostic")],
)
def test_a_leak_is_what_is_nearer_to_private_images_than_chance_and_than_what_was_published(near, published, p, outcome):
    def at(decibels):
        zeros = torch.zeros(6, dtype=torch.float64)
        return gan.Examined(zeros, zeros, zeros, zeros + decibels, zeros, zeros)

    assert gan.conclude(at(near), at(published), p)[0] == outcome


@pytest.mark.parametrize(("certain", "asked"), [(0.97, 0.9), (0.7, 0.7), (0.3, 0.5)])
def test_no_more_is_asked_of_generated_images_than_of_real_ones_but_one_half_at_least(certain, asked):
    assert gan.needed(certain) == asked
