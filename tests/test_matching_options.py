"""Every option of the loss, alone and together, against an eager transcription of its formula on plain hooks, in float64."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Chains, settle

from bnfuse import InputError, Matcher, fuse, record
from bnfuse.averaging import GRADIENTS, STARTS, MovingAverage
from bnfuse.moments import Moments
from bnfuse.reference import DISTANCES

CLASSES = 4
RULES = ("bn", "pixels", "name=stem", "name=stem@cells=4")
MODULES = {"pixels": "", "stem:input": "stem", "stem:input@cells=4": "stem"}


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    model = settle(Chains()).double()
    fused = fuse(model, sites=RULES)
    names, channels = zip(*((name, mean.shape[1]) for name, (mean, _) in fused(images())[1].items()))
    mean = 0.3 * torch.randn(CLASSES, sum(channels))
    var = 0.5 + torch.rand(CLASSES, sum(channels))
    return model, fused, (names, channels, mean, var)


def images(layout=torch.contiguous_format, seed: int = 1):
    x = torch.randn(6, 3, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.to(memory_format=layout)


def inputs_of(model, x, names):
    """site name → [N, C, M], by hooks."""
    seen, handles = {}, []
    for name in names:

        def take(_module, values, name=name):
            value = values[0]
            if name.endswith("cells=4"):
                value = torch.nn.functional.interpolate(value, (8, 8), mode="bilinear")
                value = torch.stack([p.flatten(1) for r in value.split(4, 2) for p in r.split(4, 3)], 1)
            seen[name] = value.flatten(2) if value.dim() > 2 else value[:, :, None]

        handles.append(model.get_submodule(MODULES.get(name, name)).register_forward_pre_hook(take))
    model(x)
    for handle in handles:
        handle.remove()
    return seen


class Formula:
    """The loss as it is written down: one site and one group after the other, nothing shared with the package."""

    def __init__(self, targets, **options):
        self.names, channels, mean, var = targets
        self.tables = [t.double().split(channels, 1) for t in (mean, var)]
        self.options = dict(
            distance="l2", use_std=False, eps=1e-8, slack=0.0, mean_weight=1.0, var_weight=1.0, site_weights={},
            reduction="sum", unbiased=False, relative=False, enhancement=0.0, average=None, left_out=(),
        )  # fmt: skip
        self.options |= options
        self.old = {}

    def distance(self, mean, var, target_mean, target_var):
        o = self.options
        if o["distance"] == "kl":
            v, t = var + o["eps"], target_var + o["eps"]
            return (0.5 * ((t / v).log() + (v + (mean - target_mean) ** 2) / t - 1)).mean()
        if o["use_std"]:
            var, target_var = (var + o["eps"]).sqrt(), (target_var + o["eps"]).sqrt()
        measure = {
            "l2": lambda d: d.norm(),
            "l2_squared": lambda d: (d**2).sum(),
            "mse": lambda d: (d**2).mean(),
            "l1": lambda d: d.abs().mean(),
            "hinge": lambda d: ((d.abs() - o["slack"]).clamp(min=0) ** 2).sum(),
        }[o["distance"]]
        return o["mean_weight"] * measure(mean - target_mean) + o["var_weight"] * measure(var - target_var)

    def averaged(self, key, batch):
        momentum, gradient, start = self.options["average"]
        share = 1.0 if start == "first" and key not in self.old else 1 - momentum
        value = share * batch + (1 - share) * self.old.get(key, torch.zeros_like(batch))
        self.old[key] = value.detach()
        return value if gradient == "scaled" else value.detach() + batch - batch.detach()

    def __call__(self, seen, bounds, classes):
        o, total = self.options, 0.0
        groups = list(zip(bounds, bounds[1:]))
        for g, (a, b) in enumerate(groups):
            for s, name in enumerate(self.names):
                x = seen[name][a:b].transpose(0, 1).flatten(1)  # [C, M]
                mean, var = x.mean(1), x.var(1, correction=1 if o["unbiased"] and x.shape[1] > 1 else 0)
                if o["average"]:
                    mean, var = self.averaged((g, s, 0), mean), self.averaged((g, s, 1), var)
                weights = classes[g] if classes.is_floating_point() else torch.eye(CLASSES).double()[classes[g]]
                target = [sum(w * row for w, row in zip(weights, table[s])) for table in self.tables]
                term = self.distance(mean, var, *target)
                if o["relative"]:
                    term = term / self.distance(0 * target[0], 0 * target[1], *target).abs()
                if o["relative"] or o["reduction"] == "mean":
                    term = term / len(self.names)
                if s == g % len(self.names):
                    term = term * (1 + o["enhancement"])
                if name.split("@")[0] not in o["left_out"]:
                    total = total + o["site_weights"].get(name, 1.0) * term / len(groups)
        return total


def check(parts, bounds, classes, *, steps: int = 1, layout=torch.contiguous_format, **options):
    """Loss and gradient of the matcher and of the formula, step after step."""
    model, fused, targets = parts
    formula = Formula(targets, **options)
    average = options.pop("average", None)
    options.pop("left_out", None)
    matcher = Matcher(*targets, moving_average=MovingAverage(*average) if average else None, **options)
    for step in range(steps):
        results = []
        for loss in (
            lambda x: matcher.measure(fused(x, torch.tensor(bounds))[1], classes)[0],
            lambda x: formula(inputs_of(model, x, targets[0]), bounds, classes),
        ):
            x = images(layout, seed=step).requires_grad_()
            value = loss(x)
            results.append((value.detach(), torch.autograd.grad(value, x)[0]))
        (actual, gradient), (expected, expected_gradient) = results
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
        scale = expected_gradient.abs().max().item()
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-9 * max(1.0, scale))
    return matcher


BATCH, RUNS, SAMPLES = [0, 6], [0, 1, 4, 6], [0, 1, 2, 3, 4, 5, 6]
ONE, OF_RUNS, OF_SAMPLES = torch.tensor([2]), torch.tensor([3, 0, 1]), torch.tensor([1, 1, 0, 2, 2, 3])
MIXTURE = torch.tensor([[0.25, 0.0, 0.5, 0.25]], dtype=torch.float64)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
def test_each_distance_at_all_kinds_of_sites(parts, distance, layout):
    check(parts, RUNS, OF_RUNS, distance=distance, slack=0.1 if distance == "hinge" else 0.0, layout=layout)


@pytest.mark.parametrize(
    "options",
    [
        dict(unbiased=True),
        dict(use_std=True, eps=1e-6),
        dict(mean_weight=0.0),
        dict(mean_weight=-1.0, var_weight=-0.5),
        dict(var_weight=11.0),
        dict(site_weights={"pixels": 10.0, "bn2": -1.0, "bn3": 0.0}),
        dict(reduction="mean"),
        dict(relative=True),
        dict(relative=True, distance="kl"),
        dict(relative=True, mean_weight=-1.0, var_weight=-1.0),
        dict(enhancement=1.0),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "bounds, classes",
    [(BATCH, ONE), (BATCH, MIXTURE), (RUNS, OF_RUNS), (SAMPLES, OF_SAMPLES), (RUNS, torch.rand(3, CLASSES).double())],
    ids=["batch", "mixture", "runs", "samples", "mixtures of runs"],
)
def test_each_option_with_each_grouping(parts, bounds, classes, options):
    check(parts, bounds, classes, **options)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("start", STARTS)
def test_moving_averages(parts, gradient, start):
    matcher = check(parts, RUNS, OF_RUNS, steps=3, average=(0.4, gradient, start))
    check(parts, BATCH, MIXTURE, steps=3, average=(0.8, gradient, start), unbiased=True, distance="mse")
    names = {"moving_average.mean", "moving_average.var", "moving_average.begun"}
    assert names <= set(matcher.state_dict())
    before = matcher.moving_average.state()
    matcher.site_distances(parts[1](images(), torch.tensor(RUNS))[1], OF_RUNS)  # looks, and changes nothing
    assert all(before[name].equal(value) for name, value in matcher.moving_average.state().items())


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(DISTANCES),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["sum", "mean"]),
    st.sampled_from([0.0, 0.7]),
    st.sampled_from([None, (0.4, "straight_through", "zero"), (0.9, "scaled", "first")]),
    st.sampled_from([(BATCH, ONE), (BATCH, MIXTURE), (RUNS, OF_RUNS), (SAMPLES, OF_SAMPLES)]),
    st.floats(-2, 2),
)
def test_options_together(parts, distance, use_std, unbiased, relative, reduction, enhancement, average, groups, var_weight):
    check(
        parts, *groups, steps=2, distance=distance, use_std=use_std, eps=1e-4, unbiased=unbiased, relative=relative,
        reduction=reduction, enhancement=enhancement, average=average, var_weight=var_weight, slack=0.05,
        site_weights={"bn1": 3.0},
    )  # fmt: skip


def test_sites_left_out_at_random(parts):
    """Each draw is the generator's, layouts of one tensor fall together, and the loss is that of the others."""
    model, fused, targets = parts
    moments = fused(images(), torch.tensor(RUNS))[1]
    matcher = Matcher(*targets, site_drop=0.4)
    x = inputs_of(model, images(), targets[0])
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(len(targets[0]))
    for _ in range(200):
        matcher.draw_sites(generator)
        counts += matcher.drawn
        kept = dict(zip(matcher.names, matcher.drawn.tolist()))
        assert kept["stem:input"] == kept["stem:input@cells=4"]
    assert 0.5 < counts.min() / 200 and counts.max() / 200 < 0.7
    left_out = {name for name, value in kept.items() if not value}
    loss, distances = matcher.measure(moments, OF_RUNS)
    torch.testing.assert_close(loss, Formula(targets, left_out=left_out)(x, RUNS, OF_RUNS), rtol=1e-9, atol=0)
    assert distances.ne(0).all()  # of all sites

    first, second = (Matcher(*targets, site_drop=0.4) for _ in range(2))
    for _ in range(5):
        a, b = (m(moments, OF_RUNS, torch.Generator().manual_seed(7)) for m in (first, second))
        assert a == b
    some = Matcher(*targets, site_drop={"stem:input": 0.9, "stem:input@cells=4": 0.9})
    seen = set()
    for _ in range(20):
        some.draw_sites(generator)
        seen |= {name for name, value in zip(some.names, some.drawn.tolist()) if not value}
    assert seen == {"stem:input", "stem:input@cells=4"}
    assert not Matcher(*targets).drops_sites


def test_weights_of_groups_and_sites(parts):
    """DSG's I + 11ᵀ by `enhancement`, and any other."""
    _, fused, targets = parts
    moments = fused(images(), torch.tensor(RUNS))[1]
    matcher = Matcher(*targets)
    loss, distances = matcher.measure(moments, OF_RUNS)
    weights = torch.rand(3, len(targets[0]), dtype=torch.float64)
    weighted, same = matcher.measure(moments, OF_RUNS, weights)
    torch.testing.assert_close(weighted, (distances * weights).sum(1).mean())
    torch.testing.assert_close(same, distances)
    eye = 1 + torch.eye(3, len(targets[0]), dtype=torch.float64)
    torch.testing.assert_close(Matcher(*targets, enhancement=1.0).measure(moments, OF_RUNS)[0], (distances * eye).sum(1).mean())


def test_the_first_site_in_all_its_layouts(parts):
    names, channels, mean, var = parts[2]
    matcher = Matcher(names[1:], channels[1:], mean[:, channels[0] :], var[:, channels[0] :])
    assert matcher.names[:2] == ["stem:input", "stem:input@cells=4"]
    matcher.scale_first_site(10.0)
    assert matcher.site_weights.tolist() == [10.0, 10.0] + [1.0] * 7


def test_relative_losses_carry_over(parts):
    """Twice the channels, at ten times the scale: the same loss for the same shares."""
    mean, var = torch.rand(1, 6) + 1, torch.rand(1, 6) + 1
    wide = Matcher(["a", "b"], [4, 8], torch.cat([mean, mean], 1), torch.cat([var, var], 1), relative=True)
    narrow = Matcher(["a", "b"], [2, 4], mean, var, relative=True)
    scaled = Matcher(["a", "b"], [2, 4], 10 * mean, 10 * var, relative=True)
    losses = []
    for matcher, m, v in ((narrow, mean, var), (scaled, 10 * mean, 10 * var)):
        moments = dict(zip("ab", zip((0.7 * m).split([2, 4], 1), (0.7 * v).split([2, 4], 1))))
        losses.append(matcher(moments))
    torch.testing.assert_close(losses[0], torch.tensor(0.3), rtol=1e-5, atol=0)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    both = [torch.cat([0.7 * v, 0.7 * v], 1).split([4, 8], 1) for v in (mean, var)]
    torch.testing.assert_close(wide(dict(zip("ab", zip(*both)))), losses[0], rtol=1e-5, atol=0)
    dead = Matcher(["a", "b"], [2, 4], mean * torch.tensor([0.0] * 2 + [1.0] * 4), var * torch.tensor([0.0] * 2 + [1.0] * 4))
    dead.relative = True
    assert dead(dict(zip("ab", zip(mean.split([2, 4], 1), var.split([2, 4], 1))))).isfinite()


@pytest.fixture(scope="module")
def statistics(parts):
    labels = torch.arange(40) % CLASSES
    shown = torch.randn(40, 3, 7, 8, dtype=torch.float64) + labels[:, None, None, None]
    return record(parts[0], [(shown, labels)], CLASSES, minimum_images=1)


def test_recorded_targets_with_a_share_of_all_classes(parts, statistics):
    """A quarter the pooled statistics, the rest the mean over the batch's labels of their classes' own."""
    _, fused, _ = parts
    sites = ["bn3", "bn0"]
    matcher = Matcher.from_statistics(statistics, sites=sites, classes=[2, 0, 1], global_share=0.25)
    for table, own, pooled in zip(
        (matcher.target_mean, matcher.target_var),
        statistics.moments(names=sites, classes=[2, 0, 1]),
        statistics.moments(names=sites, per_class=False),
    ):
        torch.testing.assert_close(table, (0.75 * own + 0.25 * pooled).float())
    kept = matcher.target_mean.clone()
    matcher.load_classes(statistics, [2])
    assert matcher.target_mean.equal(kept)
    mixture = torch.tensor([[0.5, 0.25, 0.25]])
    moments = fused(images())[1]
    tables = (mixture.double() @ table.double() for table in (matcher.target_mean, matcher.target_var))
    torch.testing.assert_close(matcher(moments, mixture), norms(moments, sites, *tables), rtol=1e-9, atol=0)


def norms(moments, sites, mean, var):
    """DeepInversion's distance from targets [1, T] of 6 channels a site."""
    targets = zip(sites, mean.split([6, 6], 1), var.split([6, 6], 1))
    return sum((moments[name][0] - m).norm() + (moments[name][1] - v).norm() for name, m, v in targets)


@pytest.mark.parametrize("relative", [False, True])
def test_distances_with_a_share_of_all_classes(parts, statistics, relative):
    """EDC's code: half the distance from the pooled statistics, half that from the mean over the batch's labels."""
    _, fused, _ = parts
    sites, mixture = ["bn3", "bn0"], torch.tensor([[0.5, 0.0, 0.25, 0.25]])
    options = dict(sites=sites, relative=relative)
    half = Matcher.from_statistics(statistics, global_share=0.5, global_blend="distances", **options)
    own, pooled = (Matcher.from_statistics(statistics, per_class=per_class, **options) for per_class in (True, False))
    x = images().requires_grad_()
    moments = fused(x)[1]
    loss, expected = half(moments, mixture), 0.5 * own(moments, mixture) + 0.5 * pooled(moments)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(v, x, retain_graph=True)[0] for v in (loss, expected)))
    distances = 0.5 * own.site_distances(moments, mixture) + 0.5 * pooled.site_distances(moments)
    torch.testing.assert_close(half.site_distances(moments, mixture), distances)
    torch.testing.assert_close(half.measure(moments, mixture)[1], distances)
    if not relative:
        tables = [mixture.double() @ table.float().double() for table in statistics.moments(names=sites)]
        all_classes = [table.float().double() for table in statistics.moments(names=sites, per_class=False)]
        by_hand = 0.5 * norms(moments, sites, *tables) + 0.5 * norms(moments, sites, *all_classes)
        torch.testing.assert_close(loss, by_hand, rtol=1e-9, atol=0)
    assert {"global_mean", "global_var"} <= set(half.state_dict()) and "global_mean" not in own.state_dict()


def test_running_targets_of_pixels(parts):
    """ZeroQ's: each sample's own unbiased standard deviations, and pixels of mean 0 and deviation 1."""
    model, fused, _ = parts
    names = ["pixels", "bn0", "bn4"]
    options = dict(distance="l2_squared", use_std=True, eps=1e-6, unbiased=True)
    matcher = Matcher.from_running(model, sites=names, **options)
    assert matcher.target_mean[0, :3].tolist() == [0.0] * 3 and matcher.target_var[0, :3].tolist() == [1.0] * 3
    loss = matcher(fused(images(), torch.tensor(SAMPLES))[1])
    seen, expected = inputs_of(model, images(), names), 0.0
    for name in names:
        mean, std = 0.0, torch.tensor(1 + 1e-6, dtype=torch.float64).sqrt()
        if name != "pixels":
            layer = model.get_submodule(name)
            mean = layer.running_mean.float().double()
            std = (layer.running_var.float().double() + 1e-6).sqrt()
        x = seen[name]
        expected += ((x.mean(2) - mean) ** 2).sum() / 6 + (((x.var(2) + 1e-6).sqrt() - std) ** 2).sum() / 6
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    with pytest.raises(InputError, match="no BatchNorm layer named stem:output; .* have no running statistics: record theirs"):
        Matcher.from_running(model, sites=["stem:output"])


def test_float32_tables_and_mixtures_in_autocast(parts):
    """Moments in float32, the loss untouched by autocast."""
    model, _, targets = parts
    fused = fuse(copy.deepcopy(model).float(), sites=RULES)
    moments = fused(images().float())[1]
    matcher = Matcher(*targets, unbiased=True, relative=True)
    expected = matcher(moments, MIXTURE)
    with torch.autocast("cpu", torch.bfloat16):
        assert matcher(moments, MIXTURE).equal(expected)
    assert expected.dtype == torch.float32


def test_the_loss_compiles_into_one_graph(parts):
    model, fused, targets = parts
    options = dict(unbiased=True, relative=True, site_drop=0.3, enhancement=1.0)
    ours, theirs = (Matcher(*targets, moving_average=MovingAverage(0.4), **options) for _ in range(2))
    step = lambda matcher: lambda x, starts, classes: matcher.measure(fused(x, starts)[1], classes)[0]
    compiled, arguments = torch.compile(step(ours), fullgraph=True, backend="aot_eager"), (torch.tensor(RUNS), OF_RUNS)
    for seed in range(3):
        for matcher in (ours, theirs):
            matcher.draw_sites(torch.Generator().manual_seed(seed))
        torch.testing.assert_close(compiled(images(seed=seed), *arguments), step(theirs)(images(seed=seed), *arguments))


def test_bad_arguments(parts):
    _, fused, targets = parts
    moments = fused(images())[1]
    for options, message in (
        (dict(site_drop=1.0), "site_drop is a share of the sites, from 0 up to but not 1, got 1.0"),
        (dict(site_drop={"nowhere": 0.5}), "site_drop names sites that are not matched: nowhere"),
    ):
        with pytest.raises(InputError, match=message):
            Matcher(*targets, **options)
    with pytest.raises(InputError, match=r"a mixture of classes must be \[1, 4\].*got \[1, 3\]"):
        Matcher(*targets)(moments, torch.ones(1, 3))
    larger = fused(torch.randn(2, 3, 12, 12, dtype=torch.float64))[1]
    for backend in ("cpp", "reference"):
        with pytest.raises(InputError, match=r"'stem:input@cells=4' has 9 channels or cells in this pass, its targets have 4"):
            Matcher(*targets, backend=backend)(larger, ONE)
    with pytest.raises(InputError, match="got a plain dict"):
        Matcher(*targets, unbiased=True)(dict(moments), ONE)
    single = Moments({"a": (torch.ones(1, 2), torch.zeros(1, 2))}, {"a": 1}, torch.tensor([0, 1]))
    loss = Matcher(["a"], [2], torch.zeros(1, 2), torch.zeros(1, 2), unbiased=True)(single)
    torch.testing.assert_close(loss, torch.tensor(math.sqrt(2)))  # of one element a channel the variance is 0
