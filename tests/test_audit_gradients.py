"""Gradient matching: each attack recovers what it should, and the measure draws the right conclusion from that."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from bnfuse.audit import gradients
from bnfuse.audit.context import Context, prepare
from bnfuse.audit.recovery import Comparison, bytes_of, conclude, nearest_private, psnr, sheet, sheets
from bnfuse.datasets import ArrayDataset, load_dataset

QUICK = gradients.BUDGETS["quick"]
SHORT = dataclasses.replace(QUICK, trials=((gradients.IDLG, 1, 2), (gradients.INVERTING, 4, 1)), steps=20, adam_steps=10)


def mixtures(data: ArrayDataset, count: int) -> ArrayDataset:
    """Means of two images of a class, in the place of synthetic images."""
    rng = torch.Generator().manual_seed(0)
    images, labels = [], []
    for k in range(data.num_classes):
        own = data.images[data.labels == k].float()
        pairs = torch.rand(count, len(own), generator=rng).argsort(1)[:, :2]  # two different ones
        images.append(own[pairs].mean(1).round().to(torch.uint8))
        labels += [k] * count
    return ArrayDataset(torch.cat(images), torch.tensor(labels), data.class_names, name="mixtures")


def context_of(out, synthetic=None) -> Context:
    private = load_dataset("digits:train").in_memory()
    settings = dict(noise=0.2, teacher=None, statistics=None, budget="quick", device=torch.device("cpu"), seed=0)
    synthetic = mixtures(private, 20) if synthetic is None else synthetic
    return prepare(private, synthetic, load_dataset("digits:test"), out=out, show_progress=False, **settings)


@pytest.fixture
def context(tmp_path) -> Context:
    return context_of(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A context, and a network trained on its originals."""
    context = context_of(tmp_path_factory.mktemp("trained"))
    return context, gradients.trained(context, context.private, QUICK, "original")


@pytest.mark.parametrize(
    ("attack", "size", "decibels"),
    [(gradients.IDLG, 1, 30), (gradients.DLG, 1, 30), (gradients.INVERTING, 1, 30), (gradients.INVERTING, 4, 20)],
)
def test_an_original_is_recovered_from_the_gradient_of_a_trained_network(trained, attack, size, decibels):
    context, network = trained
    got = [gradients._trial(context, QUICK, network, context.private, attack, size, ("test", i)) for i in range(2)]
    reached = torch.cat([psnr(part["recovered"], part["truth"]) for part in got])
    assert len(reached) == 2 * size and reached.median() >= decibels
    assert all(part["recovered"].min() >= 0 and part["recovered"].max() <= 1 for part in got)


def test_noise_in_the_place_of_a_gradient_gives_nothing(context):
    control = gradients._negative(context, dataclasses.replace(QUICK, evaluations=60, restarts=1))
    assert control.kind == "negative" and control.passed and control.value < gradients.UNRELATED


@pytest.mark.parametrize(("count", "share"), [(1, 1.0), (3, 0.95)])
def test_labels_are_read_off_the_gradient(trained, count, share):
    context, network = trained
    right = 0
    for i in range(20):
        images, labels = context.private.batch(gradients._batch(context.private, count, context.rng("labels", i)))
        assert len(labels.unique()) == count
        shared = gradients.gradient(network, images.double(), F.one_hot(labels, 10).double())
        right += len(set(gradients.read_labels(shared, count).tolist()) & set(labels.tolist()))
    assert right >= share * 20 * count


def test_the_network_has_eight_by_eight_features_of_larger_images_and_no_stride_on_small_ones():
    rng = torch.Generator().manual_seed(0)
    strides = {}
    for side in (8, 16, 32, 64):
        network = gradients.Network((3, side, side), 7, rng)
        strides[side] = [layer.stride[0] for layer in network if isinstance(layer, torch.nn.Conv2d)]
        assert network[-1].in_features == 12 * 8 * 8 and network(torch.rand(2, 3, side, side)).shape == (2, 7)
    assert strides == {8: [1, 1, 1], 16: [2, 1, 1], 32: [2, 2, 1], 64: [2, 2, 2]}
    assert gradients.Network((1, 9, 13), 3, rng)(torch.rand(2, 1, 9, 13)).shape == (2, 3)


def test_recovered_images_are_put_into_the_order_that_fits_best():
    truth = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    shuffled = truth[[3, 0, 4, 1, 2]] + 0.01
    assert gradients.in_order(shuffled, truth).sub(truth).abs().max() < 0.011


def test_the_finding_has_every_arm_its_controls_and_pictures_of_them(context):
    finding = gradients.run(context, SHORT)
    assert [row.arm for row in finding.rows] == ["original", "synthetic", "noised", "held-out"]
    assert {row.figures[0].name for row in finding.rows} == {"iDLG, batch of 1: PSNR to the nearest private image"}
    value = {row.arm: row.figures[0].value for row in finding.rows}
    assert value["original"] > 30 > 25 > max(value["synthetic"], value["noised"])
    assert finding.verdict != "void" and all(control.passed for control in finding.controls)
    assert "whoever trains on the synthetic" in finding.bounds and "Membership inference" in finding.does_not_bound
    assert len(finding.pictures) == 3 and all(
        (context.out / picture.path).stat().st_size > 1000 for picture in finding.pictures
    )
    assert [picture.public for picture in finding.pictures] == [None, "pictures/gradients-synthetic-public.png", None]
    assert not finding.failed_controls and finding.to_dict()["verdict"] == finding.outcome


def test_a_network_that_gives_no_image_away_makes_the_result_void(context):
    config = dataclasses.replace(SHORT, trials=((gradients.IDLG, 1, 1),), evaluations=0)
    assert gradients.run(context, config).verdict == "void"


def test_a_stopped_run_goes_on_with_the_batches_that_are_left(context, monkeypatch):
    trial, done = gradients._trial, []

    def stopping(*arguments):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(arguments[-1])
        return trial(*arguments)

    monkeypatch.setattr(gradients, "_trial", stopping)
    with pytest.raises(KeyboardInterrupt):
        gradients.run(context, SHORT)
    first, done[:] = list(done), []
    monkeypatch.setattr(gradients, "_trial", lambda *arguments: done.append(arguments[-1]) or trial(*arguments))
    resumed = gradients.run(context, SHORT)
    assert len(first) == 4 and len(done) == 5 and not set(first) & set(done)
    monkeypatch.setattr(gradients, "_trial", trial)
    straight = gradients.run(dataclasses.replace(context, key="another"), SHORT)
    assert resumed.to_dict() == straight.to_dict()


# ---- what is concluded ----


def comparison(near, published, count=6) -> Comparison:
    """Recovered images at `near` dB of private ones, made of images at `published` dB of them."""
    spread = torch.linspace(-0.5, 0.5, count, dtype=torch.float64)
    zeros = torch.zeros(count, dtype=torch.float64)
    return Comparison(zeros, zeros, near + spread, zeros, published + spread, torch.zeros(count, dtype=torch.int64))


@pytest.mark.parametrize(
    ("near", "published", "outcome"),
    [
        (15, 15, "no leak seen"),
        (40, 15, "leak"),
        (30, 30, "diagnostic"),
        (90, torch.inf, "diagnostic"),
        (17, 10, "no leak seen"),
    ],
    ids=["published", "nearer", "published is near", "published is private", "nearer, yet as real images"],
)
def test_a_leak_is_what_is_nearer_than_real_images_and_than_what_was_published(near, published, outcome):
    heldout = torch.linspace(14, 22, 300, dtype=torch.float64)
    assert conclude([comparison(14, 14), comparison(near, published)], heldout)[0] == outcome


def test_a_private_image_is_its_own_nearest_at_infinite_psnr(context):
    images = context.private.batch(torch.arange(5))[0]
    values, indices = nearest_private(context, images)
    assert values.isinf().all() and context.private.images[indices].equal(context.private.images[:5])
    off = (images + 0.1).clamp(0, 1)
    assert nearest_private(context, off)[0].allclose(psnr(off, images), atol=1e-4)
    assert bytes_of(images).equal(context.private.images[:5])


def test_pictures_show_images_of_any_number_of_channels():
    for channels in (1, 3):
        sheet({"first": torch.rand(3, channels, 8, 8), "fewer": torch.rand(2, channels, 8, 8)}, ["a", "b", "c"])


def test_what_everybody_may_see_has_no_private_row_and_nothing_of_private_arms():
    rows = {name: torch.rand(2, 3, 8, 8) for name in ("private:\ntrained on", "recovered", "dog: nearest\nprivate")}
    whole, public = sheets(rows, ["a", "b"], "synthetic")
    assert len(whole.axes) == 6 and [axes.get_ylabel() for axes in public.axes[::2]] == ["private:\ntrained on", "recovered"]
    assert sheets(rows, ["a", "b"], "original")[1] is None and sheets(rows, ["a", "b"], "noised")[1] is None
