"""`bn_forward_with_targets`, one site with its loss in one operator: against bn_forward and the loss of the reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loss import EVERY_DISTANCE
from test_ops import SLOPE, Case, cases, make_case
from tolerances import TOLERANCES, assert_elements_close
from torch import Tensor

from bnfuse import backends, ops, reference

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(backends.extension is None, reason="the C++ extension is not built"),
]
WEIGHT = 2.5


def targets_of(case: Case, classes: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """target_mean, target_var [K, C] and the class of each group."""
    generator = torch.Generator().manual_seed(0)
    shape, dtype = (classes, case.x.shape[1]), reference.moment_dtype(case.x.dtype)
    mean = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    var = (0.1 + 2 * torch.rand(shape, generator=generator, dtype=torch.float64)).to(dtype)
    groups = len(case.group_starts) - 1
    return mean, var, torch.randint(classes, (groups,), generator=generator) if classes > 1 else None


def site(case: Case, x: Tensor, residual: Tensor | None, targets, *options) -> tuple[Tensor, ...]:
    """y, mean, var, mask, loss, dmean, dvar"""
    arguments = x, residual, case.scale, case.shift, case.group_starts, *targets, WEIGHT, case.act, SLOPE
    return torch.ops.bnfuse_cpp.bn_forward_with_targets(*arguments, *options)


def expected_site(case: Case, x: Tensor, residual: Tensor | None, targets, *options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, mean, var, loss: differentiable, of plain PyTorch."""
    y = reference.bn_act(x, residual, case.scale, case.shift, case.act, SLOPE)
    mean, var = reference.group_moments(x, case.group_starts)
    weights = torch.full((1,), WEIGHT, dtype=mean.dtype)
    return y, mean, var, reference.bn_loss([mean], [var], *targets, weights, *options)[0]


@given(case=cases(), classes=st.sampled_from([1, 3]), kind=st.sampled_from(EVERY_DISTANCE))
@settings(max_examples=40)
def test_agrees_with_the_reference(case, classes, kind):
    dtype = case.x.dtype
    x = case.x if ops._is_dense(case.x) else case.x.contiguous()
    residual = None if case.residual is None else ops._match_layout(case.residual, x)
    targets, double = targets_of(case, classes), case.double()
    options = *kind, 1e-3, 0.25, 0.5, 2.0
    y, mean, var, mask, loss, dmean, dvar = site(case, x, residual, targets, *options)
    double_targets = [t if t is None or t.dtype == torch.int64 else t.double() for t in targets]
    moments = [m.double().requires_grad_() for m in (mean, var)]
    weights = torch.full((1,), WEIGHT, dtype=torch.float64)
    expected, _ = reference.bn_loss(*([m] for m in moments), *double_targets, weights, *options)
    assert_elements_close(y, expected_site(double, x.double(), double.residual, double_targets, *options)[0], dtype)
    relative = TOLERANCES[dtype].moments_relative
    for actual, wanted in zip((loss, dmean, dvar), (expected, *torch.autograd.grad(expected, moments))):
        torch.testing.assert_close(actual.double(), wanted.detach(), rtol=relative, atol=1e-12)
    for actual, wanted in zip(
        (y, mean, var, mask),
        ops.operators("cpp", "cpu").bn_forward(x, residual, case.scale, case.shift, case.group_starts, case.act, SLOPE),
    ):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("act, has_residual", [("silu", False), ("silu", True), ("relu", True), ("identity", True)])
@pytest.mark.parametrize("outputs", ["y", "loss", "y loss", "mean loss", "y mean var loss"])
def test_gradients_through_any_outputs(act, has_residual, outputs):
    case = make_case((4, 3, 5, 5), dtype=torch.float64, groups=[1, 3], act=act, residual=has_residual)
    targets, options = targets_of(case, 3), ("l2", True, 1e-3, 0.0, 0.5, 2.0)
    inputs = [t.detach().requires_grad_() for t in (case.x, case.residual) if t is not None]
    x, residual = inputs[0], inputs[1] if has_residual else None
    y, mean, var, _, loss, _, _ = site(case, x, residual, targets, *options)

    def gradients(y, mean, var, loss):
        given = {"y": (y * case.dy).sum(), "mean": (mean * case.dmean).sum(), "var": (var * case.dvar).sum(), "loss": 3 * loss}
        return torch.autograd.grad(sum(given[name] for name in outputs.split()), inputs, allow_unused=True)

    expected = gradients(*expected_site(case, x, residual, targets, *options))
    for actual, wanted in zip(gradients(y, mean, var, loss), expected):
        assert (actual is None) == (wanted is None)
        if actual is not None:
            assert_elements_close(actual, wanted, torch.float64)


def test_the_coefficients_carry_no_gradient():
    case = make_case((4, 3, 5, 5))
    y, mean, var, mask, loss, dmean, dvar = site(
        case, case.x.requires_grad_(), None, targets_of(case, 1), "l2", False, 1e-8, 0.0, 1.0, 1.0
    )
    assert all(t.requires_grad for t in (y, mean, var, loss))
    assert not any(t.requires_grad for t in (mask, dmean, dvar))


def test_nan_reaches_the_loss():
    case = make_case((4, 3, 5, 5), groups=[2, 2])
    case.x[3, 1, 2, 2] = math.nan
    *_, loss, dmean, dvar = site(case, case.x, None, targets_of(case, 1), "l2", False, 1e-8, 0.0, 1.0, 1.0)
    assert loss.isnan() and not dmean[0].isnan().any() and dmean[1].isnan().all()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(target_mean=torch.zeros(2, 4)), r"target_mean must be float32 \[2, 3\], got float32 \[2, 4\]"),
        (dict(target_var=torch.zeros(3, 3)), r"target_var must be float32 \[2, 3\], got float32 \[3, 3\]"),
        (dict(classes=None), r"a table of 2 targets needs the class of each group, got none"),
        (dict(classes=torch.tensor([2])), r"classes must be from 0 to 1, got 2"),
        (dict(distance="cosine"), r"distance must be one of l2, .* got 'cosine'"),
        (dict(x=torch.zeros(4)), r"x must be \[N, C, \*spatial\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_says_what_it_expected_and_got(change, message):
    arguments = dict(x=torch.zeros(4, 3, 2, 2), residual=None, scale=torch.ones(3), shift=torch.zeros(3))
    arguments |= dict(group_starts=torch.tensor([0, 4]), target_mean=torch.zeros(2, 3), target_var=torch.zeros(2, 3))
    arguments |= dict(classes=torch.tensor([0]), weight=1.0, act="relu", slope=0.0, distance="l2", use_std=False, eps=0.0)
    arguments |= dict(slack=0.0, mean_weight=1.0, var_weight=1.0)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bnfuse_cpp.bn_forward_with_targets(*(arguments | change).values())
