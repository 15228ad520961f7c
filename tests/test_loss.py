"""`ops.bn_loss`, the compiled loss of all sites at once: its values and gradients against the reference in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCES
from torch import Tensor

from bnfuse import InputError, Matcher, ops, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EVERY_DISTANCE = [(d, use_std) for d in reference.DISTANCES for use_std in (False, True)]
every_distance = pytest.mark.parametrize("distance, use_std", EVERY_DISTANCE)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


class Loss:
    """Arguments of one call of `bn_loss`, drawn at random; any of them may be replaced before it runs."""

    def __init__(self, groups=3, channels=(5, 1, 17), classes=4, dtype=torch.float64, seed=0, **options):
        generator = torch.Generator().manual_seed(seed)

        def normal(*size):
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        def positive(*size):
            return 0.1 + 2 * torch.rand(*size, generator=generator, dtype=torch.float64)

        width = sum(channels)
        self.dtype = dtype
        self.mean = [normal(groups, c).to(dtype) for c in channels]
        self.var = [positive(groups, c).to(dtype) for c in channels]
        self.target_mean, self.target_var = normal(classes, width).to(dtype), positive(classes, width).to(dtype)
        self.site_weights = positive(len(channels)).to(dtype)
        self.classes = torch.randint(classes, (groups,), generator=generator) if classes > 1 else None
        self.options = options

    def double(self) -> "Loss":
        """The same values in float64."""
        loss = Loss.__new__(Loss)
        for name, value in vars(self).items():
            if isinstance(value, list):
                value = [t.double() for t in value]
            elif isinstance(value, Tensor) and value.is_floating_point():
                value = value.double()
            setattr(loss, name, value)
        loss.dtype = torch.float64
        return loss

    def __call__(self, backend: str, mean=None, var=None) -> tuple[Tensor, Tensor]:
        return ops.bn_loss(
            mean or self.mean,
            var or self.var,
            self.target_mean,
            self.target_var,
            self.site_weights,
            classes=self.classes,
            backend=backend,
            **self.options,
        )

    def run(self, backend: str, factor: float = 1.0) -> tuple[Tensor, Tensor, list[Tensor]]:
        """loss, distances, and the gradient of factor·loss by every site's mean and var."""
        mean, var = ([t.detach().requires_grad_() for t in moments] for moments in (self.mean, self.var))
        loss, distances = self(backend, mean, var)
        assert loss.dtype == distances.dtype == self.dtype
        assert loss.shape == () and distances.shape == (len(mean[0]), len(mean))
        assert loss.requires_grad and not distances.requires_grad
        gradients = list(torch.autograd.grad(factor * loss, [*mean, *var]))
        assert [g.shape for g in gradients] == [t.shape for t in (*mean, *var)]
        return loss.detach(), distances, gradients


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """As moments are compared; what is absolute is for the cancellation of near equal moments alone."""
    tolerance = TOLERANCES[dtype]
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance.moments_relative, atol=1e-12)


def assert_agrees_with_the_reference(loss: Loss, factor: float = 1.0) -> None:
    actual, distances, gradients = loss.run("cpp", factor)
    expected, expected_distances, expected_gradients = loss.double().run("reference", factor)
    assert_close(actual, expected, loss.dtype)
    assert_close(distances, expected_distances, loss.dtype)
    for gradient, wanted in zip(gradients, expected_gradients):
        assert_close(gradient, wanted, loss.dtype)


# ---- values and gradients ----


@every_distance
@every_dtype
@pytest.mark.parametrize("groups, classes", [(1, 1), (1, 5), (4, 1), (5, 3), (3, 10)])
def test_agrees_with_the_reference(distance, use_std, dtype, groups, classes):
    loss = Loss(groups, (7, 1, 64, 33), classes, dtype, distance=distance, use_std=use_std, slack=0.3)
    assert_agrees_with_the_reference(loss, factor=-2.5)


@every_dtype
@given(
    groups=st.integers(1, 6),
    classes=st.integers(1, 5),
    channels=st.lists(st.one_of(st.integers(1, 9), st.sampled_from([64, 257])), min_size=1, max_size=6),
    kind=st.sampled_from(EVERY_DISTANCE),
    weights=st.tuples(st.sampled_from([0.0, 0.5, 3.0]), st.sampled_from([0.0, 1.0, 0.25])),
    eps=st.sampled_from([1e-8, 1e-5, 0.5]),
    slack=st.sampled_from([0.0, 0.25, 100.0]),
    seed=st.integers(0, 2**16),
)
def test_agrees_on_drawn_sizes(dtype, groups, classes, channels, kind, weights, eps, slack, seed):
    options = {"distance": kind[0], "use_std": kind[1], "mean_weight": weights[0], "var_weight": weights[1]}
    assert_agrees_with_the_reference(Loss(groups, channels, classes, dtype, seed, eps=eps, slack=slack, **options))


@every_distance
def test_gradcheck(distance, use_std):
    loss = Loss(2, (3, 1, 4), 3, distance=distance, use_std=use_std, slack=0.2, mean_weight=0.5, var_weight=2.0)
    moments = [t.requires_grad_() for t in (*loss.mean, *loss.var)]
    assert torch.autograd.gradcheck(lambda *m: loss("cpp", list(m[:3]), list(m[3:]))[0], moments)


@pytest.mark.parametrize("distance", reference.DISTANCES)
def test_the_weights_of_sites_and_terms_are_factors(distance):
    loss = Loss(2, (3, 4), 3, distance=distance)
    plain, distances, gradients = loss.run("cpp")
    torch.testing.assert_close(plain, (distances * loss.site_weights).sum(1).mean(), rtol=1e-12, atol=0)
    loss.site_weights = torch.tensor([0.0, 7.0], dtype=torch.float64)
    weighted, same_distances, _ = loss.run("cpp")
    assert torch.equal(same_distances, distances)
    torch.testing.assert_close(weighted, 7 * distances[:, 1].mean(), rtol=1e-12, atol=0)
    if distance == "kl":  # has no terms to weigh
        return
    loss.options |= {"mean_weight": 3.0, "var_weight": 0.0}
    _, mean_alone, gradients = loss.run("cpp")
    assert not any(g.any() for g in gradients[2:]) and gradients[1].any()
    loss.options |= {"mean_weight": 0.0, "var_weight": 3.0}
    _, var_alone, _ = loss.run("cpp")
    torch.testing.assert_close((mean_alone + var_alone) / 3, distances, rtol=1e-12, atol=0)


def test_slack_forgives_small_differences_and_no_large_ones():
    loss = Loss(1, (4,), 1, distance="hinge", slack=0.5)
    loss.target_mean, loss.target_var = loss.mean[0].clone(), loss.var[0].clone()
    loss.mean = [loss.target_mean + torch.tensor([0.25, -0.5, 0.75, -2.5], dtype=torch.float64)]
    value, distances, (dmean, dvar) = loss.run("cpp")
    torch.testing.assert_close(distances, torch.tensor([[0.25**2 + 2.0**2]], dtype=torch.float64), rtol=1e-12, atol=0)
    expected = loss.site_weights * torch.tensor([[0, 0, 0.5, -4]], dtype=torch.float64)
    torch.testing.assert_close(dmean, expected, rtol=1e-12, atol=1e-15)
    assert not dvar.any()


@every_distance
@every_dtype
def test_at_the_target_the_loss_and_its_gradient_are_zero(distance, use_std, dtype):
    loss = Loss(3, (5, 2), 1, dtype, distance=distance, use_std=use_std)
    loss.target_mean, loss.target_var = (torch.cat([t[:1] for t in moments], 1) for moments in (loss.mean, loss.var))
    loss.mean, loss.var = ([t[:1].expand(3, -1) for t in moments] for moments in (loss.mean, loss.var))
    value, distances, gradients = loss.run("cpp")
    assert value == 0 and not distances.any()
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("distance", ["l2", "l1", "hinge"])
def test_one_term_at_its_target_does_not_stop_the_other(distance):
    loss = Loss(1, (6,), 1, distance=distance)
    loss.target_var = loss.var[0].clone()
    loss.target_mean[0, 2] = loss.mean[0][0, 2]
    assert_agrees_with_the_reference(loss)
    _, _, (dmean, dvar) = loss.run("cpp")
    assert dmean.count_nonzero() == 5 and not dvar.any()


@every_distance
@pytest.mark.parametrize("given", ["mean", "var"])
@pytest.mark.parametrize("slack", [0.0, 0.5])
def test_nan_reaches_the_loss_and_no_other_group(distance, use_std, given, slack):
    loss = Loss(3, (5, 2), 3, distance=distance, use_std=use_std, slack=slack)
    getattr(loss, given)[1][2, 0] = math.nan
    value, distances, gradients = loss.run("cpp")
    assert value.isnan()
    assert distances.isnan().tolist() == [[False, False], [False, False], [False, True]]
    _, _, expected = loss.run("reference")
    for gradient, wanted in zip(gradients, expected):
        assert torch.equal(gradient[:2].isnan(), wanted[:2].isnan()) and not gradient[:2].isnan().any()
    spoilt = gradients[1 if given == "mean" else 3]
    assert spoilt[2, 0].isnan()


@every_distance
def test_inf_reaches_the_loss(distance, use_std):
    """A variance that overflowed, say. The gradients are those of plain autograd, inf and NaN included."""
    loss = Loss(2, (3, 2), 1, distance=distance, use_std=use_std)
    loss.mean[0][1, 2] = math.inf
    value, distances, gradients = loss.run("cpp")
    expected, expected_distances, expected_gradients = loss.run("reference")
    assert torch.equal(value, expected) and not value.isfinite()
    torch.testing.assert_close(distances, expected_distances, rtol=1e-12, atol=0)
    for gradient, wanted in zip(gradients, expected_gradients):
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize("distance", ["l2", "kl", "hinge"])
def test_values_that_float32_cannot_square(distance):
    """10²⁰ squared is no float32; the norm of it is, and so is everything on the way in float64."""
    loss = Loss(2, (3, 2), 1, torch.float32, distance=distance)
    for moments in (loss.mean, loss.var, [loss.target_var]):
        for tensor in moments:
            tensor.mul_(1e20)
    actual, _, gradients = loss.run("cpp")
    expected, _, expected_gradients = loss.double().run("reference")
    torch.testing.assert_close(actual, expected.float(), rtol=2e-6, atol=0)
    for gradient, wanted in zip(gradients, expected_gradients):
        torch.testing.assert_close(gradient, wanted.float(), rtol=2e-6, atol=0)


def test_channels_of_one_site_do_not_leak_into_the_next():
    """Sites side by side give what each gives alone."""
    loss = Loss(3, (5, 1, 17), 4)
    _, together, gradients = loss.run("cpp")
    at = 0
    for s, c in enumerate((5, 1, 17)):
        alone = Loss(1, (1,))
        alone.mean, alone.var, alone.classes = [loss.mean[s]], [loss.var[s]], loss.classes
        alone.target_mean, alone.target_var = loss.target_mean[:, at : at + c], loss.target_var[:, at : at + c]
        alone.site_weights = loss.site_weights[s : s + 1]
        _, distances, (dmean, dvar) = alone.run("cpp")
        assert torch.equal(distances[:, 0], together[:, s])
        assert torch.equal(dmean, gradients[s]) and torch.equal(dvar, gradients[3 + s])
        at += c


# ---- memory and arguments ----


def test_moments_and_targets_of_any_strides():
    loss = Loss(3, (5, 4), 4)
    expected = loss.run("cpp")

    def strided(tensor):
        wide = tensor.repeat_interleave(2, -1)
        return wide[..., ::2] if tensor.dim() == 1 else wide.t().contiguous().t()[..., ::2]

    for change in ("mean", "var", "target_mean", "target_var", "site_weights", "classes"):
        value = getattr(loss, change)
        setattr(loss, change, [strided(t) for t in value] if isinstance(value, list) else strided(value))
    assert not loss.mean[0].is_contiguous() and not loss.target_mean.is_contiguous() and not loss.classes.is_contiguous()
    actual = loss.run("cpp")
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    assert all(torch.equal(a, b) for a, b in zip(actual[2], expected[2]))


def test_expanded_moments_get_the_sum_of_all_groups_gradients():
    loss = Loss(4, (3,), 4)

    def run(backend):
        mean, var = loss.mean[0][:1].clone().requires_grad_(), loss.var[0][:1].clone().requires_grad_()
        value, _ = loss(backend, [mean.expand(4, 3)], [var.expand(4, 3)])
        return torch.autograd.grad(value, [mean, var])

    for actual, expected in zip(run("cpp"), run("reference")):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_nothing_given_is_changed_and_gradients_are_one_s_own():
    loss = Loss(2, (3, 4), 3)
    tensors = [*loss.mean, *loss.var, loss.target_mean, loss.target_var, loss.site_weights, loss.classes]
    before = [t.clone() for t in tensors]
    mean, var = ([t.requires_grad_() for t in moments] for moments in (loss.mean, loss.var))
    value, _ = loss("cpp", mean, var)
    first = torch.autograd.grad(value, [*mean, *var], retain_graph=True)
    kept = [g.clone() for g in first]
    for gradient in first:
        gradient.fill_(math.nan)
    second = torch.autograd.grad(value, [*mean, *var])
    assert all(torch.equal(a, b) for a, b in zip(second, kept))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before))


def test_only_some_moments_ask_for_a_gradient():
    loss = Loss(2, (3, 4, 2), 3)
    _, _, expected = loss.run("cpp")
    asked = loss.var[1].requires_grad_()
    (gradient,) = torch.autograd.grad(loss("cpp")[0], asked)
    assert torch.equal(gradient, expected[4])
    asked.requires_grad_(False)
    assert not loss("cpp")[0].requires_grad


def test_one_row_of_targets_holds_for_every_group():
    loss = Loss(4, (3, 2), 1)
    assert loss.classes is None
    expected, _, gradients = loss.run("cpp")
    loss.target_mean, loss.target_var = loss.target_mean.repeat(5, 1), loss.target_var.repeat(5, 1)
    loss.classes = torch.tensor([3, 0, 4, 4])
    actual, _, actual_gradients = loss.run("cpp")
    assert torch.equal(actual, expected) and all(torch.equal(a, b) for a, b in zip(actual_gradients, gradients))


def test_distances_carry_no_gradient():
    loss = Loss(2, (3,), 1)
    value, distances = loss("cpp", [loss.mean[0].requires_grad_()], [loss.var[0].requires_grad_()])
    assert value.requires_grad and not distances.requires_grad


def changed(**changes):
    def change(loss: Loss) -> None:
        for name, value in changes.items():
            if name == "options":
                loss.options |= value
            else:
                setattr(loss, name, value(getattr(loss, name)))

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (changed(options={"distance": "cosine"}), r"unknown distance 'cosine'; choose one of l2, l2_squared, mse"),
        (changed(mean=lambda _: []), r"at least one site, got none"),
        (changed(mean=lambda m: (t for t in m)), r"mean must be a list or tuple of \[G, C\] tensors.* got a generator"),
        (changed(var=lambda v: torch.stack([v[0], v[0]])), r"var must be a list or tuple of .* got a Tensor"),
        (changed(classes=lambda _: None), r"class-wise targets need the class of each group: pass classes"),
        (changed(classes=lambda c: c.fill_(4)), r"classes must be from 0 to 3, got \[4, 4, 4\]"),
        (changed(classes=lambda c: c.fill_(-1)), r"classes must be from 0 to 3, got \[-1, -1, -1\]"),
        (changed(classes=lambda c: c[:2]), r"classes must be int64 \[3\] on cpu, one a group, got torch.int64 \[2\]"),
        (changed(classes=lambda c: c.int()), r"classes must be int64 \[3\] on cpu, one a group, got torch.int32 \[3\]"),
        (changed(mean=lambda m: [t.half() for t in m]), r"mean must be float32 or float64, got torch.float16 \[3, 5\]"),
        (changed(var=lambda v: v[:1]), r"var must have one tensor a site, 2 as mean has, got 1"),
        (changed(var=lambda v: [v[0], v[1].float()]), r"var .* at site 1 torch.float64 \[3, 2\] .* got torch.float32 \[3, 2\]"),
        (changed(var=lambda v: [v[1], v[0]]), r"var .* at site 0 torch.float64 \[3, 5\] .* got torch.float64 \[3, 2\]"),
        (changed(var=lambda v: [t[:1] for t in v]), r"var .* at site 0 torch.float64 \[3, 5\] .* got torch.float64 \[1, 5\]"),
        (changed(mean=lambda m: [m[0], m[1][:2]]), r"mean must be \[G, C\] .* site 0 has .* \[3, 5\] .* site 1 .* \[2, 2\]"),
        (changed(mean=lambda m: [t[0] for t in m]), r"mean must be \[G, C\] .* site 0 has torch.float64 \[5\]"),
        (changed(mean=lambda m: [t[0, 0] for t in m]), r"mean must be \[G, C\] .* site 0 has torch.float64 \[\]"),
        (changed(target_mean=lambda t: t[:, :-1]), r"target_mean must be torch.float64 \[K, 7\] .* got torch.float64 \[4, 6\]"),
        (changed(target_mean=lambda t: t[:, :1]), r"target_mean must be torch.float64 \[K, 7\] .* got torch.float64 \[4, 1\]"),
        (changed(target_mean=lambda t: t[:0]), r"target_mean must be torch.float64 \[K, 7\] .* got torch.float64 \[0, 7\]"),
        (changed(target_mean=lambda t: t[0]), r"target_mean must be torch.float64 \[K, 7\] .* got torch.float64 \[7\]"),
        (changed(target_mean=lambda t: t[0, 0]), r"target_mean must be torch.float64 \[K, 7\] .* got torch.float64 \[\]"),
        (changed(target_var=lambda t: t[:3]), r"target_var must be torch.float64 \[K, 7\] .* got torch.float64 \[3, 7\]"),
        (changed(target_var=lambda t: t.float()), r"target_var must be torch.float64 \[K, 7\] .* got torch.float32"),
        (changed(site_weights=lambda w: w[:1]), r"site_weights must be torch.float64 \[2\] .* got torch.float64 \[1\]"),
        (changed(site_weights=lambda w: w.float()), r"site_weights must be torch.float64 \[2\] .* got torch.float32 \[2\]"),
        (changed(target_mean=lambda t: t.requires_grad_()), r"target_mean asks for a gradient, .* mean and var alone; detach"),
        (changed(target_var=lambda t: t.requires_grad_()), r"target_var asks for a gradient"),
        (changed(site_weights=lambda w: w.requires_grad_()), r"site_weights asks for a gradient"),
    ],
)
@pytest.mark.parametrize("gradients", [False, True], ids=["no_gradient", "gradient"])
@pytest.mark.parametrize("backend, distance", [("cpp", "l2"), ("reference", "l2"), ("cpp", "kl_reverse")])
def test_says_what_it_expected_and_got(backend, distance, change, message, gradients):
    loss = Loss(3, (5, 2), 4, distance=distance)
    change(loss)
    if gradients and isinstance(loss.mean, list):
        loss.mean = [t.detach().requires_grad_() for t in loss.mean]
    with pytest.raises(InputError, match=message):
        loss(backend)


def test_the_operator_refuses_what_python_would_have():
    loss = Loss(3, (5, 2), 4)
    arguments = [loss.mean, loss.var, loss.target_mean, loss.target_var, loss.classes, loss.site_weights]
    options = ["l2", False, 1e-8, 0.0, 1.0, 1.0]
    with pytest.raises(RuntimeError, match=r"distance must be one of l2, l2_squared, .* got 'cosine'"):
        torch.ops.bnfuse_cpp.bn_loss(*arguments, "cosine", *options[1:])
    with pytest.raises(RuntimeError, match=r"at least one site, got none"):
        torch.ops.bnfuse_cpp.bn_loss([], [], *arguments[2:], *options)
    with pytest.raises(RuntimeError, match=r"a table of 4 targets needs the class of each group, got none"):
        torch.ops.bnfuse_cpp.bn_loss(*arguments[:4], None, arguments[5], *options)


@pytest.mark.parametrize("name", ["target_mean", "target_var", "site_weights"])
@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_the_operator_drops_no_gradient_that_was_asked_for(backend, name):
    if backend == "triton":
        pytest.importorskip("triton")
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    loss = Loss(1, (5,), 1)
    tensors = {n: getattr(loss, n).to(device) for n in ("target_mean", "target_var", "site_weights")}
    tensors[name].requires_grad_()
    target_mean, target_var, weights = tensors.values()
    moments = [loss.mean[0].to(device)], [loss.var[0].to(device)]
    with pytest.raises((RuntimeError, InputError), match="gives (no gradient|one to mean and var alone)"):
        getattr(torch.ops, f"bnfuse_{backend}").bn_loss(
            *moments, target_mean, target_var, None, weights, "l2", False, 1e-8, 0.0, 1.0, 1.0
        )


# ---- as PyTorch sees it ----


@pytest.mark.parametrize("distance, use_std, classes", [("l2", False, 1), ("kl", False, 3), ("hinge", True, 3)])
def test_opcheck(distance, use_std, classes):
    loss = Loss(2, (3, 2), classes, torch.float32)
    moments = [[t.requires_grad_() for t in moments] for moments in (loss.mean, loss.var)]
    arguments = *moments, loss.target_mean, loss.target_var, loss.classes, loss.site_weights
    torch.library.opcheck(torch.ops.bnfuse_cpp.bn_loss.default, (*arguments, distance, use_std, 1e-8, 0.0, 1.0, 1.0))


def matcher_of(loss: Loss, **options) -> Matcher:
    names = [f"site{s}" for s in range(len(loss.mean))]
    channels = [t.shape[1] for t in loss.mean]
    weights = dict(zip(names, loss.site_weights.tolist()))
    return Matcher(names, channels, loss.target_mean, loss.target_var, site_weights=weights, **options)


def run_matcher(loss: Loss, matcher: Matcher, function) -> tuple[Tensor, ...]:
    """The value of function(moments, classes), and its gradients by all moments."""
    mean, var = ([t.detach().clone().requires_grad_() for t in moments] for moments in (loss.mean, loss.var))
    value = function(dict(zip(matcher.names, zip(mean, var))), loss.classes)
    return value.detach(), *torch.autograd.grad(value, [*mean, *var])


@every_distance
@every_dtype
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("classes", [1, 3])
def test_the_matcher_s_loss_is_the_weighted_sum_of_its_site_distances(distance, use_std, dtype, reduction, classes):
    loss = Loss(4, (6, 3), classes, dtype)
    matcher = matcher_of(loss, distance=distance, use_std=use_std, slack=0.1, reduction=reduction, backend="cpp")

    def by_hand(moments, classes):
        return (matcher.site_distances(moments, classes) * matcher.site_weights.to(dtype)).sum(1).mean()

    for actual, expected in zip(run_matcher(loss, matcher, matcher), run_matcher(loss, matcher, by_hand)):
        assert actual.dtype == dtype
        # The reference in float32 rounds each of its own steps.
        torch.testing.assert_close(actual, expected, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("backend, distance, classes", [("cpp", "l2", 3), ("cpp", "kl", 1), ("reference", "l2", 3)])
def test_the_matcher_compiles_to_one_graph(backend, distance, classes):
    loss = Loss(4, (6, 3), classes, torch.float64)
    matcher = matcher_of(loss, distance=distance, backend=backend)
    torch.compiler.reset()
    compiled = torch.compile(matcher, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(run_matcher(loss, matcher, compiled), run_matcher(loss, matcher, matcher)):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_the_compiled_matcher_takes_batches_of_any_number_of_groups():
    """The second size makes the compiler trace the number of groups as a symbol."""
    torch.compiler.reset()
    matcher = matcher_of(Loss(2, (6, 3), 3), backend="cpp")
    compiled = torch.compile(matcher, fullgraph=True, backend="aot_eager")
    for groups in (2, 3, 5):
        loss = Loss(groups, (6, 3), 3)
        for actual, expected in zip(run_matcher(loss, matcher, compiled), run_matcher(loss, matcher, matcher)):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=20)
@given(groups=st.integers(1, 4), channels=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(0, 2**16))
def test_the_same_bits_each_time(groups, channels, seed):
    loss = Loss(groups, channels, 3, torch.float32, seed)
    first, second = loss.run("cpp"), loss.run("cpp")
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert all(torch.equal(a, b) for a, b in zip(first[2], second[2]))
