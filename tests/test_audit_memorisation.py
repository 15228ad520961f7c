"""Model memorisation: what is hidden in a network comes out again, and nothing comes out of an honest one."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_audit_gradients import context_of

from bnfuse import InputError
from bnfuse.audit import memorisation as m
from bnfuse.audit.context import Context
from bnfuse.datasets import ArrayDataset, load_dataset

QUICK = m.BUDGETS["quick"]
SHORT = dataclasses.replace(QUICK, hidden=(4, 4, 4, 1), images=300, epochs=6)


@pytest.fixture(scope="module")
def context(tmp_path_factory) -> Context:
    return context_of(tmp_path_factory.mktemp("memorisation"))


@pytest.fixture(scope="module")
def finding(context):
    return m.run(context, SHORT)


def bits_of(length, seed=0):
    return torch.randint(2, (length,), generator=torch.Generator().manual_seed(seed)).bool()


# ---- hiding and reading ----


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 23), st.integers(1, 300), st.integers(0, 5))
def test_low_bits_come_out_as_they_went_in_and_change_weights_by_no_more(low_bits, length, seed):
    weights = torch.randn(400, generator=torch.Generator().manual_seed(seed))
    changed = m.hide_in_low_bits(weights, bits_of(length, seed), low_bits)
    assert m.read_low_bits(changed, length, low_bits).equal(bits_of(length, seed))
    assert ((changed - weights).abs() <= weights.abs() * 2.0 ** (low_bits - 22)).all()
    untouched = -(-length // low_bits)
    assert changed[untouched:].equal(weights[untouched:]) and changed.sign().equal(weights.sign())


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 100))
def test_labels_spell_bits(bits_a_label, length):
    labels = m.labels_of(bits_of(length), bits_a_label)
    assert labels.max() < 2**bits_a_label and len(labels) == -(-length // bits_a_label)
    assert m.read_labels(labels, length, bits_a_label).equal(bits_of(length))


def test_images_become_bits_under_a_stream_that_another_key_does_not_lift():
    images = torch.zeros(5, 8, 8, 1, dtype=torch.uint8)
    images[0] = torch.arange(64).view(8, 8, 1)
    bits = m.to_bits(images, key=1)
    assert len(bits) == 5 * 64 * 8 and abs(bits.double().mean() - 0.5) < 0.04
    assert m.from_bits(bits, 1, images.shape).equal(images) and not m.from_bits(bits, 2, images.shape).equal(images)


def test_weights_are_read_and_set_in_one_order_the_largest_matrix_first(context):
    network = m.Network(context.image_shape, 10)
    vector = torch.randn(m.weights(network).numel())
    m.set_weights(network, vector)
    assert m.weights(network).equal(vector) and network[5].weight.flatten().equal(vector[: network[5].weight.numel()])


def test_the_penalties_are_those_of_the_paper():
    weights = torch.tensor([0.5, -0.25, 2.0, -3.0])
    assert m.sign_penalty(weights, torch.tensor([True, True, False, False])) == pytest.approx((0.25 + 2.0) / 4)
    pixels = torch.tensor([0.0, 10.0, 250.0, 30.0])
    expected = torch.corrcoef(torch.stack([weights, pixels]))[0, 1]
    assert m.correlation(weights, pixels).item() == pytest.approx(expected.item(), abs=1e-6)
    assert m.read_values(torch.linspace(-3, 1, 256), 256)[[0, 255]].tolist() == [0, 255]


def test_chance_is_wider_where_neighbours_are_alike():
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1001, generator=rng, dtype=torch.float64) for _ in range(2))
    rolled = torch.stack([m.correlation(a, b.roll(shift)) for shift in range(len(b))])
    assert m.shifted_deviation(a, b) == pytest.approx(rolled.std().item(), rel=1e-9)
    assert m.shifted_deviation(a, b) == pytest.approx(len(a) ** -0.5, rel=0.1)
    smooth = [v.unfold(0, 20, 1).mean(1) for v in (a, b)]
    assert m.shifted_deviation(*smooth) > 2 * len(a) ** -0.5


# ---- the measure ----


def test_low_bits_and_capacity_abuse_give_every_bit_of_the_originals(finding):
    positive = [control for control in finding.controls if control.kind == "positive"]
    assert [control.name.split(",")[0] for control in positive] == [m.LSB, m.CAPACITY]
    assert all(control.value == 1.0 and control.passed for control in positive)


def test_an_honest_network_gives_chance(finding):
    negative = [control for control in finding.controls if control.kind == "negative"]
    assert len(negative) == len(m.ATTACKS) and all(control.passed for control in negative)
    assert all(abs(control.value - 0.5) < 0.1 for control in negative if "bit accuracy" in control.name)


def test_every_arm_has_its_images_decoded_and_only_the_originals_are_private(finding, context):
    figures = {row.arm: {figure.name: figure for figure in row.figures} for row in finding.rows}
    assert list(figures) == ["original", "synthetic", "noised", "held-out"]
    for arm in ("original", "synthetic", "noised"):
        named = figures[arm]
        assert named["low bits: bit accuracy"].value == named["capacity abuse: bit accuracy"].value == 1.0
        assert named["low bits: bit accuracy"].low > 0.99 and named["low bits: PSNR to the image trained on"].value == torch.inf
        assert named["signs: bit accuracy"].value > 0.95
        assert named["correlated values: correlation with the hidden pixels"].value > 0.8
        honest = named["nothing hidden: accuracy of the network"].value
        assert abs(named["low bits: accuracy of the network"].value - honest) < 1
    nearest = {arm: named["low bits: PSNR to the nearest private image"].value for arm, named in figures.items()}
    assert nearest["original"] == torch.inf and max(nearest["synthetic"], nearest["noised"]) < 25
    assert "whoever trains on the synthetic" in finding.bounds and "Membership inference" in finding.does_not_bound
    assert finding.verdict == finding.outcome and len(finding.pictures) == 3
    assert all((context.out / picture.path).stat().st_size > 1000 for picture in finding.pictures)
    assert [picture.public for picture in finding.pictures] == [None, "pictures/memorisation-synthetic-public.png", None]


def test_private_images_among_the_synthetic_ones_are_decoded_as_such(tmp_path):
    private = load_dataset("digits:train").in_memory()
    context = context_of(tmp_path, ArrayDataset(private.images, private.labels, private.class_names, name="copies"))
    finding = m.run(context, dataclasses.replace(SHORT, hidden=(8, 1, 1, 1), memorising=60))
    assert finding.row("synthetic").figures[0].value == torch.inf and finding.outcome == "diagnostic"
    assert "nearer to private images than held-out" in finding.row("synthetic").reading


def test_a_network_that_has_not_memorised_makes_the_result_void(context):
    config = dataclasses.replace(SHORT, epochs=1, memorising=0)
    finding = m.run(dataclasses.replace(context, key="unfinished"), config)
    assert finding.verdict == "void" and finding.controls[1].value < 1


def test_a_stopped_run_goes_on_with_the_networks_that_are_left(context, finding, monkeypatch):
    def unexpected(*arguments):
        raise AssertionError("trained again")

    kept = context.scratch(m.NAME) / "noised-signs.safetensors"
    kept.unlink()
    attacked, done = m._attacked, []
    monkeypatch.setattr(m, "_attacked", lambda *arguments: done.append(arguments[2:]) or attacked(*arguments))
    assert m.run(context, SHORT).to_dict() == finding.to_dict() and done == [("noised", m.SIGN)]
    monkeypatch.setattr(m, "_attacked", unexpected)
    assert m.run(context, SHORT).to_dict() == finding.to_dict()


def test_larger_images_fit_and_those_that_do_not_are_refused(context):
    network = m.Network((3, 32, 32), 10)
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10) and network[-3].in_features == 64 * 8 * 8
    with pytest.raises(InputError, match="image of 64 pixels is too large to be hidden in the signs of 100 weights"):
        m._hidden(context.private, torch.arange(10), SHORT, m.SIGN, 100)
    images = m._hidden(context.private, torch.arange(30), SHORT, m.SIGN, 2 * 64 * 8)
    assert len(images) == 2  # as many as there is room for


def test_one_class_has_no_labels_to_hide_bits_in(context):
    one = context.private.with_classes(["3"])
    single = dataclasses.replace(context, private=one, synthetic=one, noised=one)
    with pytest.raises(InputError, match="at least 2 classes"):
        m.run(single, SHORT)
