"""The matcher compares each group with the statistics of its own class, as the formulas say."""

import pytest
import torch
from networks import Chains, settle

from bnfuse import InputError, Matcher, fuse, group_by_class, record
from bnfuse.models import batchnorm_layers

CLASSES = 4


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    model = settle(Chains()).double()
    labels = torch.arange(40) % CLASSES
    images = torch.randn(40, 3, 6, 6, dtype=torch.float64) + labels[:, None, None, None]
    return model, record(model, [(images, labels)], CLASSES, minimum_images=1), images, labels


def sorted_by_class(images, labels):
    order = labels.argsort(stable=True)
    return images[order], labels[order]


def test_the_recorded_images_themselves_are_at_distance_zero(parts):
    model, statistics, images, labels = parts
    images, labels = sorted_by_class(images, labels)
    starts, classes = group_by_class(labels)
    _, moments = fuse(model)(images, starts)
    distances = Matcher.from_statistics(statistics).site_distances(moments, classes)
    assert distances.shape == (CLASSES, len(statistics.sites))
    assert distances.max() < 1e-5  # the table is float32
    wrong = Matcher.from_statistics(statistics).site_distances(moments, classes.flip(0))
    assert wrong[:, 0].min() > 0.1


def test_mixed_batch_in_one_pass_equals_each_class_alone(parts):
    model, statistics, _, _ = parts
    labels = torch.tensor([2, 2, 2, 0, 3, 3])
    images = torch.randn(6, 3, 6, 6, dtype=torch.float64)
    matcher, fused = Matcher.from_statistics(statistics), fuse(model)
    starts, classes = group_by_class(labels)
    assert starts.tolist() == [0, 3, 4, 6] and classes.tolist() == [2, 0, 3]
    mixed = images.clone().requires_grad_()
    loss = matcher(fused(mixed, starts)[1], classes)
    loss.backward()
    alone = images.clone().requires_grad_()
    losses = [matcher(fused(alone[a:b])[1], k[None]) for a, b, k in zip(starts, starts[1:], classes)]
    (sum(losses) / 3).backward()
    torch.testing.assert_close(loss, sum(losses) / 3, rtol=1e-12, atol=0)
    torch.testing.assert_close(mixed.grad, alone.grad, rtol=1e-9, atol=1e-12)


def test_running_targets_are_deep_inversions_loss(parts):
    model, _, _, _ = parts
    images = torch.randn(5, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    expected, first = 0, 10.0
    inputs = {}
    handles = [
        layer.register_forward_pre_hook(lambda _m, x, name=name: inputs.__setitem__(name, x[0]))
        for name, layer in batchnorm_layers(model).items()
    ]
    model(images)
    for handle in handles:
        handle.remove()
    for i, (name, layer) in enumerate(batchnorm_layers(model).items()):
        x = inputs[name].transpose(0, 1).flatten(1)
        mean, var = layer.running_mean.float().double(), layer.running_var.float().double()
        term = (x.mean(1) - mean).norm() + (x.var(1, correction=0) - var).norm()
        expected = expected + (first if i == 0 else 1) * term
    matcher = Matcher.from_running(model, site_weights={next(iter(batchnorm_layers(model))): first})
    loss = matcher(fuse(model)(images)[1])
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(value, images)[0] for value in (loss, expected)), rtol=1e-8, atol=1e-12)


def test_weights_and_reduction(parts):
    model, statistics, _, _ = parts
    moments = fuse(model)(torch.randn(4, 3, 6, 6, dtype=torch.float64))[1]
    plain = Matcher.from_statistics(statistics, per_class=False)
    distances = plain.site_distances(moments)[0]
    weighted = Matcher.from_statistics(statistics, per_class=False, site_weights={"bn0": 3.0, "bn4": 0.0}, reduction="mean")
    weights = torch.tensor([{"bn0": 3.0, "bn4": 0.0}.get(name, 1.0) for name in statistics.sites], dtype=torch.float64)
    torch.testing.assert_close(weighted(moments), (distances * weights).mean())
    torch.testing.assert_close(plain(moments), distances.sum())


def test_nan_reaches_the_loss(parts):
    model, statistics, _, _ = parts
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    images[1, 0, 3, 3] = float("nan")
    assert Matcher.from_statistics(statistics, per_class=False)(fuse(model)(images)[1]).isnan()


def test_bad_arguments(parts):
    model, statistics, _, _ = parts
    moments = fuse(model)(torch.randn(2, 3, 6, 6, dtype=torch.float64))[1]
    with pytest.raises(InputError, match="need the class of each group"):
        Matcher.from_statistics(statistics)(moments)
    with pytest.raises(InputError, match="unknown distance 'l3'"):
        Matcher.from_statistics(statistics, distance="l3")
    with pytest.raises(InputError, match="'sum' or 'mean'"):
        Matcher.from_statistics(statistics, reduction="max")
    with pytest.raises(InputError, match="not matched: nowhere"):
        Matcher.from_statistics(statistics, site_weights={"nowhere": 1.0})
    with pytest.raises(InputError, match="did not run site 'bn0'"):
        Matcher.from_statistics(statistics, per_class=False)({k: v for k, v in moments.items() if k != "bn0"})
    with pytest.raises(InputError, match="no BatchNorm layer named bn99"):
        Matcher.from_running(model, sites=["bn99"])
    with pytest.raises(InputError, match="not sorted by class"):
        group_by_class(torch.tensor([0, 1, 0]))
