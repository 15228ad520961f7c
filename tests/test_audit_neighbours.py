"""Exact nearest neighbours, and the two measures that rest on them: a leak that was planted is called one, nothing else is."""

import math

import numpy as np
import pytest
import torch

from bnfuse import InputError, Teacher, load_dataset
from bnfuse.audit import nearest as nearest_module
from bnfuse.audit import neighbours, quality
from bnfuse.audit.context import ARMS, prepare
from bnfuse.audit.findings import Finding
from bnfuse.audit.intervals import bootstrap_ratio, clearly_more, median_interval
from bnfuse.audit.nearest import nearest, nearest_of_class
from bnfuse.datasets import ArrayDataset
from bnfuse.models import build_model, freeze
from bnfuse.preprocessing import Preprocessing

NEIGHBOURS, QUALITY = neighbours.Config(300, 200), quality.Config(150, 200)


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# ---- the search ----


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_nearest_are_those_of_a_plain_search(dtype, monkeypatch):
    monkeypatch.setattr(nearest_module, "_QUERIES", 16)  # chunks of both, none of them full at the end
    monkeypatch.setattr(nearest_module, "_ELEMENTS", 2000)
    queries, references = noise(37, 3, 4, 2), noise(90, 3, 4, 2, seed=1)
    if dtype == torch.float32:
        queries, references = queries.float() / 255, references.float() / 255
    counted = []
    distances, indices = nearest(queries, references, 3, step=counted.append)
    scale = 255 if dtype == torch.uint8 else 1
    plain = torch.stack([((references.double() - q.double()) / scale).square().sum((1, 2, 3)).sqrt() for q in queries])
    expected = plain.sort(1)
    assert indices.equal(expected.indices[:, :3]) and sum(counted) == 37 * 90
    torch.testing.assert_close(distances, expected.values[:, :3], rtol=1e-5, atol=1e-6)


def test_a_copy_is_at_distance_0_where_fast_distances_say_otherwise():
    """As for the pixels of CIFAR: the matrix product's rounding hides which of two images, one level apart, is the copy."""
    references = noise(200, 32, 32, 3) // 8 + 220
    references[1::2] = references[::2]
    references[1::2, 0, 0, 0] ^= 1  # each image twice, one of them a level off in one value
    flat = references.flatten(1).float() / 255
    assert torch.cdist(flat, flat, compute_mode="use_mm_for_euclid_dist").diagonal().max() > 0.01
    distances, indices = nearest(references, references)
    assert (distances[:, 0] == 0).all() and indices[:, 0].equal(torch.arange(200))
    torch.testing.assert_close(distances[:, 1], torch.full((200,), 1 / 255).double(), rtol=1e-5, atol=0)


def test_few_references_are_enough():
    distances, indices = nearest(noise(3, 2, 2, 1), noise(1, 2, 2, 1), 2)
    assert distances.shape == indices.shape == (3, 1)
    distances, _ = nearest(noise(0, 2, 2, 1), noise(4, 2, 2, 1), 2)
    assert distances.shape == (0, 2)


def test_partners_are_of_the_same_class():
    queries, references = noise(20, 2, 2, 1), noise(50, 2, 2, 1, seed=1)
    labels, theirs = torch.arange(20) % 5, torch.arange(50) % 4  # there is no reference of class 4
    distances, indices = nearest_of_class(queries, labels, references, theirs)
    assert (indices[labels == 4] == -1).all() and (distances[labels == 4] == math.inf).all()
    assert theirs[indices[labels < 4]].equal(labels[labels < 4])
    own = (theirs == labels[7]).nonzero()[:, 0]
    assert indices[7] == own[nearest(queries[7:8], references[own], 1)[1][0, 0]]


# ---- intervals ----


def test_the_interval_of_a_median_covers_it_and_takes_infinite_values():
    rng = np.random.default_rng(0)
    covered = [low <= 0 <= high for low, high in (median_interval(rng.standard_normal(41)) for _ in range(500))]
    assert 0.94 <= np.mean(covered) <= 1
    assert median_interval([math.inf] * 20) == (math.inf, math.inf)
    assert median_interval([1.0, 2.0]) == (-math.inf, math.inf) == median_interval([])


def test_the_interval_of_a_ratio_of_medians():
    rng = torch.Generator().manual_seed(0)
    below = torch.rand(400, generator=rng) + 1
    low, high = bootstrap_ratio(2 * (torch.rand(400, generator=rng) + 1), below, rng, 500)
    assert 1.8 < low < 2 < high < 2.2
    assert all(map(math.isnan, bootstrap_ratio(torch.zeros(9), torch.zeros(9), rng, 50)))


def test_clearly_more_is_where_intervals_are_apart():
    assert clearly_more(30, 100, 1, 100) and not clearly_more(3, 100, 1, 100) and not clearly_more(0, 10, 0, 10)


# ---- the measures ----


@pytest.fixture(scope="module")
def digits():
    """Private, held-out and further real digits: 1,000 + 359 + 300."""
    train, test = load_dataset("digits:train"), load_dataset("digits:test")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    return train.subset(order[:1000]), test, train.subset(order[1000:1300])


@pytest.fixture(scope="module")
def teacher():
    """It has learnt nothing, but its features are features."""
    torch.manual_seed(0)
    return Teacher(freeze(build_model("resnet8", 10, 1)), "resnet8", 10, Preprocessing((8, 8), (0.3,), (0.35,)))


@pytest.fixture
def context(digits, teacher, tmp_path):
    """Makes a context in which the synthetic images are those given."""
    private, heldout, _ = digits

    def make(synthetic, **changes):
        settings = {
            "noise": 0.2,
            "teacher": teacher,
            "statistics": None,
            "budget": "quick",
            "device": torch.device("cpu"),
            "seed": 0,
            "out": tmp_path,
            "show_progress": False,
        }
        given = {"private": private, "heldout": heldout} | changes
        return prepare(given.pop("private"), synthetic, given.pop("heldout"), **settings | given)

    return make


def both(context) -> list[Finding]:
    return [neighbours.run(context, NEIGHBOURS), quality.run(context, QUALITY)]


def like(data, images) -> ArrayDataset:
    return ArrayDataset(images, data.labels, data.class_names, name="made")


def shaken(data, deviation, seed=5) -> ArrayDataset:
    images = data.images + deviation * torch.randn(data.images.shape, generator=torch.Generator().manual_seed(seed))
    return like(data, images.round().clamp(0, 255).to(torch.uint8))


@pytest.mark.parametrize("synthetic", ["others", "noise"])
def test_real_images_that_were_not_used_are_no_leak_nor_is_noise(synthetic, digits, context, tmp_path):
    _, _, others = digits
    data = others if synthetic == "others" else like(others, noise(*others.images.shape))
    for finding in both(context(data)):
        assert finding.verdict == "diagnostic", finding.sentence
        assert not finding.failed_controls
        assert [row.arm for row in finding.rows] == [*ARMS, "held-out"]
        assert len({row.figures[0].name for row in finding.rows}) == 1  # the report's headline
        assert {control.kind for control in finding.controls} == {"positive", "negative"}
        assert Finding.from_dict(finding.to_dict()).verdict == finding.verdict
        assert len(finding.pictures) == {"quality": 2, "neighbours": 4}[finding.measure]
        assert all((tmp_path / picture.path).stat().st_size > 500 for picture in finding.pictures)
        plots = ("pictures/quality-metrics.png", "pictures/neighbours-distances.png")  # the rest show private images
        assert all(picture.public == (picture.path if picture.path in plots else None) for picture in finding.pictures)


@pytest.mark.parametrize("deviation", [0, 3])
def test_private_images_called_synthetic_are_a_leak(deviation, digits, context):
    private, _, _ = digits
    copies = private.subset(range(0, 1000, 4))
    for finding in both(context(shaken(copies, deviation) if deviation else copies)):
        assert finding.verdict == "leak", finding.sentence


def test_a_few_copies_among_many_are_a_leak_and_counted(digits, context):
    private, _, others = digits
    images = others.images.clone()
    images[[3, 100, 200]] = private.images[[5, 6, 7]]
    finding = neighbours.run(context(like(others, images)), NEIGHBOURS)
    assert finding.verdict == "leak"
    assert finding.row("synthetic").figures[0].value == 3 and finding.row("held-out").figures[0].value == 0
    assert finding.sentence.startswith("3 of 300 synthetic images are exact copies")


def test_near_copies_that_are_few_show_by_their_ratio(digits, context):
    private, _, others = digits
    images = others.images.clone()
    images[:15] = shaken(private.subset(range(15)), 4).images
    finding = neighbours.run(context(like(others, images)), NEIGHBOURS)
    figures = {figure.name: figure for figure in finding.row("synthetic").figures}
    assert finding.verdict == "leak" and figures["exact copies of private images"].value == 0
    assert figures["pixels: images that single out a private one"].low > 2


def test_an_image_near_to_all_is_no_leak_for_being_near(digits, context):
    """Class means are closer to private images than real images are, and single none of them out."""
    private, _, others = digits
    means = torch.stack([private.images[private.labels == k].float().mean(0) for k in range(10)])
    finding = neighbours.run(context(shaken(like(others, means[others.labels].to(torch.uint8)), 2)), NEIGHBOURS)
    ratio = finding.row("synthetic").figures[1]
    assert ratio.name == "pixels: distance to the closest record, ratio to held-out" and ratio.high < 1.3
    assert finding.verdict == "diagnostic"


def test_planted_copies_are_all_found_or_the_result_is_void(digits, context, monkeypatch):
    _, _, others = digits
    finding = neighbours.run(context(others), NEIGHBOURS)
    positive = [control for control in finding.controls if control.kind == "positive"]
    assert [control.value for control in positive] == [3] * 4 and all(c.needed == "all 3 found" for c in positive)

    def shifted(*args, **options):  # a search that is off by one
        distances, indices = nearest(*args, **options)
        return distances, (indices + 1) % len(args[1])

    monkeypatch.setattr(neighbours, "nearest", shifted)
    assert neighbours.run(context(others), NEIGHBOURS).verdict == "void"


def test_quality_is_void_where_a_copy_with_noise_is_not_recognised(digits, context, monkeypatch):
    _, _, others = digits

    def blind(released, private, *args, **options):
        return {m.name: torch.rand(len(released)).double() for m in quality.METRICS}

    monkeypatch.setattr(quality, "compare", blind)
    assert quality.run(context(others), QUALITY).verdict == "void"


def test_originals_are_paired_with_themselves_and_the_heldout_row_is_the_same_procedure(digits, context):
    private, heldout, others = digits
    made = context(others)
    finding = quality.run(made, QUALITY)
    figures = {row.arm: {figure.name: figure.value for figure in row.figures} for row in finding.rows}
    assert figures["original"]["PSNR, median"] == math.inf and figures["original"]["closer than real images are"] == 100
    assert abs(figures["synthetic"]["PSNR, median"] - figures["held-out"]["PSNR, median"]) < 1
    pairs = quality.pair(made, heldout, len(heldout), "test")
    assert private.labels[pairs.indices].equal(heldout.labels)
    distances = (heldout.images.double() - pairs.private.double()).square().sum((1, 2, 3))
    for i in (0, 50, 358):
        own = private.images[private.labels == heldout.labels[i]].double()
        assert distances[i] == (own - heldout.images[i].double()).square().sum((1, 2, 3)).min()


def test_what_could_not_be_computed_is_said(digits, context):
    _, _, others = digits
    finding = quality.run(context(others, teacher=None), QUALITY)
    said = " ".join(finding.notes)
    for text in ("FID and KID need a teacher", "LPIPS is not there", "SAM: undefined", "VIF: 8×8", "150 of 1,000 original"):
        assert text in said
    assert all("FID" not in figure.name for figure in finding.rows[0].figures)
    assert "by their pixels alone" in " ".join(neighbours.run(context(others, teacher=None), NEIGHBOURS).notes)


def test_findings_do_not_depend_on_what_ran_before(digits, context):
    _, _, others = digits
    made = context(others)
    for run, config in ((neighbours.run, NEIGHBOURS), (quality.run, QUALITY)):
        first = repr(run(made, config))
        torch.rand(5)
        assert repr(run(made, config)) == first


def test_colour_images_have_a_spectral_angle(context):
    sets = [ArrayDataset(noise(60, 9, 9, 3, seed=s), torch.arange(60) % 3, name=f"set {s}") for s in range(3)]
    made = context(sets[1], private=sets[0], heldout=sets[2], teacher=None)
    finding = quality.run(made, QUALITY)
    figures = {figure.name: figure.value for figure in finding.row("synthetic").figures}
    assert 0 < figures["SAM, median"] < math.pi / 2 and finding.verdict == "diagnostic"


def test_one_private_image_and_classes_without_partners_are_refused(context, digits):
    _, heldout, others = digits
    one = others.subset([0])
    with pytest.raises(InputError, match="needs two of them, got 1"):
        neighbours.run(context(others, private=one), NEIGHBOURS)
    elsewhere = others.subset((others.labels != one.labels[0]).nonzero()[:, 0])
    with pytest.raises(InputError, match="none for any synthetic image"):
        quality.run(context(elsewhere, private=one, heldout=heldout), QUALITY)
