"""A site with targets of its own, `ops.bn_act_loss`: what `bn_act` and `bn_loss` give one after the other, in one operator."""

import pytest
import torch
from test_ops import in_layout
from tolerances import TOLERANCES, assert_elements_close, assert_moments_close

from bnfuse import InputError, ops, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory", "extension")
BACKENDS = ("reference", "cpp")
STARTS, CLASSES = torch.tensor([0, 2, 2, 5]), torch.tensor([1, 0, 2])


def make_site(dtype=torch.float32, layout="contiguous", residual=True, table_rows=3, seed=0):
    """x and residual [5, 6, 3, 4], scale and shift [6], targets [K, 6] of a site in the given dtype and layout."""
    generator = torch.Generator().manual_seed(seed)

    def eighths(*size):  # exact in every dtype
        return torch.randint(-32, 33, size, generator=generator) / 8

    moments = reference.moment_dtype(dtype)
    x, other = (in_layout(eighths(5, 6, 3, 4).to(dtype), layout) for _ in range(2))
    scale, shift = (eighths(6) + 2**-8).to(moments), (eighths(6) + 2**-8).to(moments)
    targets = eighths(table_rows, 6).to(moments), eighths(table_rows, 6).abs().to(moments)
    return x, other if residual else None, scale, shift, targets


EVERY_OUTPUT = ("y", "loss", "mean", "var")


def run(site, backend, *, act="relu", classes=CLASSES, loss_factor=3.0, through=EVERY_OUTPUT, **options):
    """y, loss, mean, var, and the gradients of a sum that uses those named in `through`."""
    x, residual, scale, shift, targets = site
    inputs = [t.detach().requires_grad_() for t in (x, residual) if t is not None]
    y, loss, mean, var = ops.bn_act_loss(
        inputs[0],
        scale,
        shift,
        *targets,
        group_starts=STARTS,
        classes=classes,
        residual=inputs[1] if residual is not None else None,
        act=act,
        backend=backend,
        **options,
    )
    outputs = {"y": y, "loss": loss, "mean": mean, "var": var}
    weights = {name: torch.arange(t.numel()).remainder(17).sub(8).div(8).view(t.shape).to(t) for name, t in outputs.items()}
    weights["loss"].fill_(loss_factor)
    used = [outputs[name] for name in through]
    gradients = torch.autograd.grad(used, inputs, [weights[name] for name in through], allow_unused=True)
    return y.detach(), loss.detach(), mean.detach(), var.detach(), gradients


def double(site):
    x, residual, scale, shift, targets = site
    wide = lambda t: None if t is None else t.double()
    return wide(x), wide(residual), scale.double(), shift.double(), tuple(map(wide, targets))


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "offset"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_float64(backend, residual, layout, dtype):
    site = make_site(dtype, layout, residual)
    actual, expected = run(site, backend), run(double(site), "reference")
    assert_elements_close(actual[0], expected[0], dtype)
    for index in (1, 2, 3):
        assert_moments_close(actual[index], expected[index], dtype)
    for ours, theirs in zip(actual[4], expected[4], strict=True):
        assert_elements_close(ours, theirs, dtype)


@pytest.mark.parametrize("distance", reference.DISTANCES)
@pytest.mark.parametrize("use_std", [False, True])
def test_every_distance_and_option(distance, use_std):
    options = dict(distance=distance, use_std=use_std, weight=0.75, mean_weight=0.5, var_weight=2.0, slack=0.25)
    for act in reference.ACTIVATIONS:
        site = make_site(seed=1)
        actual, expected = run(site, "cpp", act=act, **options), run(double(site), "reference", act=act, **options)
        assert_moments_close(actual[1], expected[1], torch.float32)
        for ours, theirs in zip(actual[4], expected[4], strict=True):
            assert_elements_close(ours, theirs, torch.float32)


@pytest.mark.parametrize("through", [("loss",), ("y",), ("mean",), ("loss", "var"), ("y", "loss")], ids="+".join)
@pytest.mark.parametrize("loss_factor", [1.0, -2.0])
def test_a_gradient_through_some_of_the_outputs(through, loss_factor):
    site = make_site(torch.float64)
    actual = run(site, "cpp", through=through, loss_factor=loss_factor)[4]
    expected = run(site, "reference", through=through, loss_factor=loss_factor)[4]
    for ours, theirs in zip(actual, expected, strict=True):
        # A residual that reaches only the moments' loss has no gradient at all.
        torch.testing.assert_close(ours, theirs) if ours is not None else None
        assert (ours is None) == (theirs is None)


def test_the_loss_is_that_of_one_site_among_all():
    x, residual, scale, shift, targets = make_site()
    options = dict(distance="mse", use_std=True)
    y, loss, mean, var = ops.bn_act_loss(
        x, scale, shift, *targets, group_starts=STARTS, classes=CLASSES, weight=0.5, residual=residual, act="silu", **options
    )
    same_y, same_mean, same_var = ops.bn_act(x, scale, shift, group_starts=STARTS, residual=residual, act="silu")
    for ours, theirs in ((y, same_y), (mean, same_mean), (var, same_var)):
        assert torch.equal(ours, theirs)
    expected, _ = ops.bn_loss([mean], [var], *targets, torch.tensor([0.5]), classes=CLASSES, **options)
    assert torch.equal(loss, expected)


def test_one_row_of_targets_needs_no_classes():
    site = make_site(table_rows=1)
    for backend in BACKENDS:
        actual, expected = run(site, backend, classes=None), run(double(site), "reference", classes=None)
        assert_moments_close(actual[1], expected[1], torch.float32)


def test_opcheck():
    x, residual, scale, shift, targets = make_site()
    x.requires_grad_()
    options = 0.5, "relu", 0.01, "l2", False, 1e-8, 0.0, 1.0, 1.0
    torch.library.opcheck(
        torch.ops.bnfuse_cpp.bn_forward_with_targets.default,
        (x, residual, scale, shift, STARTS, *targets, CLASSES, *options),
    )


def test_compiles_in_one_graph():
    x, residual, scale, shift, targets = make_site()
    x.requires_grad_()

    def step(x, residual):
        y, loss, _, _ = ops.bn_act_loss(
            x, scale, shift, *targets, group_starts=STARTS, classes=CLASSES, residual=residual, act="relu", backend="cpp"
        )
        return y.sum() + loss

    (expected,) = torch.autograd.grad(step(x, residual), x)
    (actual,) = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(x, residual), x)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(distance="l3"), "unknown distance 'l3'"),
        (dict(classes=None), "need the class of each group"),
        (dict(classes=torch.tensor([0, 1, 3])), r"classes must be from 0 to 2, got \[0, 1, 3\]"),
        (dict(classes=torch.tensor([0, 1])), r"classes must be int64 \[3\]"),
        (dict(target_var=torch.zeros(3, 5)), r"target_var must be torch.float32 \[K, 6\]"),
        (dict(target_mean=torch.zeros(3, 6, dtype=torch.float64)), r"target_mean must be torch.float32 \[K, 6\]"),
        (dict(scale=torch.zeros(6, requires_grad=True)), "scale asks for a gradient"),
        (dict(target_mean=torch.zeros(6)), r"target_mean must be torch.float32 \[K, 6\] .* got torch.float32 \[6\]"),
        (dict(target_mean=torch.tensor(0.0)), r"target_mean must be torch.float32 \[K, 6\] .* got torch.float32 \[\]"),
        (dict(target_mean=torch.zeros(3, 6, requires_grad=True)), "target_mean asks for a gradient, .* detach it"),
        (dict(target_var=torch.zeros(3, 6, requires_grad=True)), "target_var asks for a gradient"),
        (dict(weight=torch.tensor(2.0, requires_grad=True)), "weight asks for a gradient"),
        (dict(act="gelu"), "unknown activation 'gelu'"),
        (dict(group_starts=torch.tensor([0, 2, 4])), "must run from 0 to the batch size 5"),
        (dict(residual=torch.zeros(5, 6, 1, 1)), "residual must be like x"),
    ],
)
def test_what_does_not_fit_is_said(backend, change, message):
    x, residual, scale, shift, (target_mean, target_var) = make_site()
    arguments = dict(x=x, scale=scale, shift=shift, target_mean=target_mean, target_var=target_var)
    arguments |= dict(residual=residual, group_starts=STARTS, classes=CLASSES, backend=backend)
    with pytest.raises(InputError, match=message):
        ops.bn_act_loss(**{**arguments, **change})
