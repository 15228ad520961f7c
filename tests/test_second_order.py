"""Gradients of gradients: every operator on every backend, a fused network, and that the first order is left as it was.

The oracle is `reference.py` under plain autograd in float64, which knows nothing of the operators' own formulas, and finite
differences (`gradgradcheck`).
"""

import functools
import re
import sys
from pathlib import Path
from statistics import geometric_mean

import pytest
import torch
import torch.nn.functional as F
from networks import Chains, settle
from test_fusion import hooked_moments
from test_loss import Loss, every_distance
from test_ops import SLOPE, in_layout, make_case, operator_arguments
from tolerances import assert_elements_close, assert_moments_close
from torch.autograd import grad, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import bnfuse
from bnfuse import Matcher, backends, fuse, ops, reference
from bnfuse.convolutions import FrozenConvolution
from bnfuse.models import build_model
from bnfuse.objective import Objective

pytestmark = pytest.mark.usefixtures("poisoned_memory", "extension")

CHECKED = ["reference", "cpp"] + (["cuda"] if backends._cuda().available else [])
# Interpreted, Triton's kernels are too slow for finite differences.
BACKENDS = CHECKED + (["triton"] if backends.triton_is_installed() else [])
LAYOUTS = ["contiguous", "channels_last"]
STARTS = torch.tensor([0, 1, 1, 3])  # the second of three groups is empty


def device_of(backend):
    return "cuda" if backend == "cuda" or backend == "triton" and torch.cuda.is_available() else "cpu"


def site_inputs(backend, layout="contiguous", shape=(3, 2, 2, 1)):
    """x, residual, scale, shift and groups in float64, on the backend's device."""
    generator = torch.Generator().manual_seed(0)
    device = device_of(backend)
    x, residual = torch.randn(2, *shape, dtype=torch.float64, generator=generator).to(device)
    x, residual = (in_layout(t, layout).requires_grad_() for t in (x, residual))
    scale, shift = (torch.rand(2, shape[1], dtype=torch.float64, generator=generator) + 0.5).to(device)
    return x, residual, scale, shift, STARTS.to(device)


# ---- the operators ----


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("act", reference.ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bn_act(backend, act, layout):
    x, residual, scale, shift, starts = site_inputs(backend, layout)

    def site(x, residual=None):
        return ops.bn_act(x, scale, shift, group_starts=starts, residual=residual, act=act, slope=SLOPE, backend=backend)

    assert gradgradcheck(site, (x, residual))
    assert gradgradcheck(site, (x,))
    assert gradgradcheck(lambda residual: site(x.detach(), residual)[0], (residual,))
    for output in range(3):
        assert gradgradcheck(lambda x, output=output: site(x)[output], (x,))


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_group_moments(backend, layout):
    x, *_, starts = site_inputs(backend, layout, (3, 2, 2, 2))
    assert gradgradcheck(lambda x: ops.group_moments(x, starts, backend=backend), (x,))


@pytest.mark.parametrize("backend", CHECKED)
@every_distance
def test_bn_loss(backend, distance, use_std):
    loss = Loss(2, (3, 1), 4, slack=0.25, distance=distance, use_std=use_std, mean_weight=0.5, var_weight=2.0)
    for name, value in vars(loss).items():
        if isinstance(value, torch.Tensor):
            setattr(loss, name, value.to(device_of(backend)))
    moments = [site.to(device_of(backend)).requires_grad_() for site in (*loss.mean, *loss.var)]
    assert gradgradcheck(lambda *moments: loss(backend, list(moments[:2]), list(moments[2:]))[0], moments)
    # Only one of the moments asks for a gradient.
    asked, rest = moments[-1], [site.detach() for site in moments[:-1]]
    assert gradgradcheck(lambda asked: loss(backend, rest[:2], [rest[2], asked])[0], (asked,))


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("layout, distance", [("contiguous", "l2"), ("channels_last", "kl"), ("contiguous", "l1")])
def test_bn_act_loss(backend, layout, distance):
    x, residual, scale, shift, starts = site_inputs(backend, layout)
    targets = [(torch.rand(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) + 0.1) for k in range(2)]
    targets = [t.to(scale.device) for t in targets]
    options = dict(classes=torch.tensor([3, 0, 1], device=x.device), weight=0.75, distance=distance, use_std=distance == "l1")

    def site(x, residual, act="silu"):
        return ops.bn_act_loss(
            x, scale, shift, *targets, group_starts=starts, residual=residual, act=act, backend=backend, **options
        )

    assert gradgradcheck(site, (x, residual))
    assert gradgradcheck(lambda x: site(x, None, "relu")[1], (x,))


# y, loss, mean and var of `ops.bn_act_loss`, in three ways.


def plain_site(x, residual, scale, shift, starts, act, tables, classes, distance):
    mean, var = reference.group_moments(x, starts)
    loss = [mean], [var], *tables, classes, mean.new_full((1,), 0.75), distance, False, 1e-8, 0.25, 1.0, 2.0
    return reference.bn_act(x, residual, scale, shift, act, SLOPE), reference.bn_loss(*loss)[0], mean, var


def one_operator(x, residual, scale, shift, starts, act, tables, classes, distance, backend):
    site = dict(group_starts=starts, residual=residual, act=act, slope=SLOPE, backend=backend)
    loss = dict(classes=classes, weight=0.75, distance=distance, slack=0.25, var_weight=2.0)
    return ops.bn_act_loss(x, scale, shift, *tables, **site, **loss)


def three_operators(x, residual, scale, shift, starts, act, tables, classes, distance, backend):
    y, _, var = ops.bn_act(x, scale, shift, group_starts=starts, residual=residual, act=act, slope=SLOPE, backend=backend)
    mean, _ = ops.group_moments(x, starts, backend=backend)
    loss = dict(classes=classes, distance=distance, slack=0.25, var_weight=2.0, backend=backend)
    return y, ops.bn_loss([mean], [var], *tables, mean.new_full((1,), 0.75), **loss)[0], mean, var


def second_order(site, case, distance, device="cpu"):
    """Of v·dx + w·dresidual, v and w fixed: the gradients by x, residual, dy and the gradients of mean, var and loss."""
    generator = torch.Generator().manual_seed(1)
    v, w = (torch.randint(-4, 5, case.x.shape, generator=generator).to(case.x) / 8 for _ in range(2))
    tables = [torch.randint(1, 9, (4, case.x.shape[1]), generator=generator).to(case.x) / 8 for _ in range(2)]
    v, w, *tables = (t.to(device) for t in (v, w, *tables))
    given = case.x, case.residual, case.dy, case.dmean, case.dvar, torch.ones_like(case.dvar[0, 0])
    x, residual, dy, dmean, dvar, dloss = inputs = [t.detach().to(device).requires_grad_() for t in given]
    frozen = [t.to(device) for t in (case.scale, case.shift, case.group_starts)]
    outputs = site(x, residual, *frozen, case.act, tables, torch.tensor([3, 0, 1], device=device), distance)
    first = grad(outputs, (x, residual), (dy, dloss, dmean, dvar), create_graph=True)
    return [g.cpu() for g in grad(first, inputs, (v, w), allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("site", [one_operator, three_operators])
@pytest.mark.parametrize("layout, dtype", [("contiguous", torch.float64), ("channels_last", torch.float32)], ids=str)
@pytest.mark.parametrize("act, distance", list(zip(reference.ACTIVATIONS, reference.DISTANCES)))
def test_agrees_with_plain_autograd_in_float64(backend, site, layout, dtype, act, distance):
    case = make_case((4, 5, 3, 6), dtype=dtype, layout=layout, groups=[1, 0, 3], act=act, residual=True)
    actual = second_order(functools.partial(site, backend=backend), case, distance, device_of(backend))
    expected = second_order(plain_site, case.double(), distance)
    for ours, theirs in zip(actual[:3], expected[:3], strict=True):
        assert_elements_close(ours, theirs, dtype)
    for ours, theirs in zip(actual[3:], expected[3:], strict=True):
        assert_moments_close(ours, theirs, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_s_factor_of_one_is_a_variable_like_any_other(backend):
    x, _, scale, shift, starts = site_inputs(backend)
    table = scale[None]
    one = torch.ones((), dtype=torch.float64, device=x.device, requires_grad=True)
    for loss in (
        ops.bn_act_loss(x, scale, shift, table, table, group_starts=starts, backend=backend)[1],
        ops.bn_loss(*([m] for m in ops.group_moments(x, starts, backend=backend)), table, table, scale[:1], backend=backend)[0],
    ):
        (dx,) = grad(loss, x, one, create_graph=True)
        (by_one,) = grad(dx.sum(), one, retain_graph=True)
        torch.testing.assert_close(by_one, dx.detach().sum())


@pytest.mark.parametrize("backend", BACKENDS)
def test_at_the_target_the_norm_has_no_slope_and_no_curvature(backend):
    mean, var = (torch.ones(1, 3, dtype=torch.float64, device=device_of(backend)) for _ in range(2))
    moments = [mean.clone().requires_grad_()], [var.clone().requires_grad_()]
    loss, _ = ops.bn_loss(*moments, mean, var, mean[0, :1], distance="l2", backend=backend)
    (slope,) = grad(loss, moments[0], create_graph=True)
    (curvature,) = grad(slope.sum(), moments[0])
    assert not slope.any() and not curvature.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_derivative_that_is_zero_everywhere_is_zero(backend):
    x, _, scale, shift, starts = site_inputs(backend)
    y, *_ = ops.bn_act(x, scale, shift, group_starts=starts, act="relu", backend=backend)
    dy = torch.ones_like(y).requires_grad_()
    (dx,) = grad(y, x, dy, create_graph=True)
    by_x, by_dy = grad(dx.sum(), (x, dy))
    assert not by_x.any() and by_dy.any()


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_targets_changed_in_place_are_noticed(backend):
    x, _, scale, shift, starts = site_inputs(backend)
    table = scale[None].clone()
    for loss in (
        ops.bn_act_loss(x, scale, shift, table, table, group_starts=starts, backend=backend)[1],
        ops.bn_loss(*([m] for m in ops.group_moments(x, starts, backend=backend)), table, table, scale[:1], backend=backend)[0],
    ):
        table += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_third_order(backend):
    x, residual, scale, shift, starts = site_inputs(backend)
    table = scale[None] / 2

    def third(site):
        y, loss = site()
        (first,) = grad((y * y.detach().sin()).sum() + loss, x, create_graph=True)
        (second,) = grad(first.pow(3).sum(), x, create_graph=True)
        return grad(second.pow(2).sum(), (x, residual))

    def ours():
        return ops.bn_act_loss(
            x, scale, shift, table, table, group_starts=starts, residual=residual, act="silu", backend=backend
        )[:2]

    def plain():
        moments = [[m] for m in reference.group_moments(x, starts)]
        loss, _ = reference.bn_loss(*moments, table, table, None, scale.new_ones(1), "l2", False, 1e-8, 0.0, 1.0, 1.0)
        return reference.bn_act(x, residual, scale, shift, "silu", 0.0), loss

    for actual, expected in zip(third(ours), third(plain), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("operator", ["bn_backward", "group_moments_backward"])
def test_opcheck_of_the_gradients(operator, backend):
    arguments = [
        a.detach().to(device_of(backend)).requires_grad_(a.is_floating_point()) if isinstance(a, torch.Tensor) else a
        for a in operator_arguments("reference", "channels_last", "silu", residual=True)[operator]
    ]
    torch.library.opcheck(getattr(ops.operators(backend, device_of(backend)), operator), arguments)


# ---- the first order is as it was ----


class Log(TorchDispatchMode):
    """The operators that run, in their order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.append(str(function))
        return function(*arguments, **(options or {}))


def sites_and_loss():
    """x, and outputs of two sites one after the other, the loss of them, and a site with targets of its own."""
    x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scale, table = torch.linspace(0.5, 1, 4), torch.ones(1, 4)
    site = dict(group_starts=torch.tensor([0, 3]), act="silu", backend="cpp")
    y, *first = ops.bn_act(x, scale, scale, **site)
    y, own_loss, *_ = ops.bn_act_loss(y, scale, scale, table, table, **site)
    (mean, var), tables = ops.group_moments(x, backend="cpp"), [table.repeat(1, 2)] * 2
    loss, _ = ops.bn_loss([first[0], mean], [first[1], var], *tables, torch.ones(2), backend="cpp")
    return x, y * 1, own_loss, loss


def run_backward(create_graph):
    """The operators of a backward pass (the log keeps gradients from being overwritten in place), and what it finds."""
    x, *outputs = sites_and_loss()
    weights = [torch.ones_like(out) for out in outputs]
    log = Log()
    with log:
        (dx,) = grad(outputs, x, weights, create_graph=create_graph)
    compiled = [name for name in log.names if name.startswith("bnfuse")]
    return compiled, {name.split(".")[1] for name in log.names} - {name.split(".")[1] for name in compiled}, dx


def test_the_first_order_runs_its_kernels_and_nothing_else():
    compiled, others, dx = run_backward(create_graph=False)
    assert not dx.requires_grad
    backward = "bnfuse_cpp.bn_backward.default"
    assert sorted(compiled) == [backward, backward, "bnfuse_cpp.group_moments_backward.default"]
    # Coefficients are scaled and cut, gradients added.
    assert others <= {"mul", "add", "slice", "view", "detach"}


def test_a_graph_is_made_by_the_same_kernels():
    compiled, _, dx = run_backward(create_graph=True)
    expected, _, first_order = run_backward(create_graph=False)
    assert dx.requires_grad and sorted(compiled) == sorted(expected)
    torch.testing.assert_close(dx.detach(), first_order)


def test_no_python_runs_in_a_compiled_backward_pass():
    _, *outputs = sites_and_loss()
    total = sum(out.sum() for out in outputs)
    called = []
    sys.setprofile(lambda frame, event, _: called.append(frame.f_code) if event == "call" else None)
    try:
        total.backward()
    finally:
        sys.setprofile(None)
    assert called[0].co_name == "backward"  # which is Python itself
    operators = (
        str(Path(ops.__file__).parent),
        str(Path(torch.__file__).parent / "_library"),
        torch.library.__file__,
        torch._ops.__file__,
    )
    assert not [code for code in called if code.co_filename.startswith(operators)]


# ---- convolutions, networks, objectives ----


@pytest.mark.parametrize(
    "conv, size",
    [
        (torch.nn.Conv2d(2, 4, 3, padding=1), (2, 2, 4, 3)),
        (torch.nn.Conv2d(4, 4, 3, stride=2, groups=2, bias=False), (2, 4, 5, 5)),
        (torch.nn.Conv2d(2, 3, 1), (2, 2, 3, 3)),
        (torch.nn.Conv1d(2, 3, 2, dilation=2), (2, 2, 5)),
        (torch.nn.Conv3d(2, 2, 2), (1, 2, 3, 3, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_frozen_convolution(conv, size, layout):
    frozen = FrozenConvolution(conv.double().requires_grad_(False))
    x = in_layout(torch.randn(size, dtype=torch.float64), layout).requires_grad_()
    assert gradgradcheck(frozen, (x,))
    assert gradgradcheck(lambda x: frozen(x).pow(3), (x,))


def test_the_gradient_by_a_weight_before_a_site():
    weight = torch.randn(2, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x, _, scale, shift, starts = site_inputs("cpp", shape=(3, 2, 3, 2))

    def layer(x, weight):
        return ops.bn_act(F.conv2d(x, weight), scale, shift, group_starts=starts, act="silu", backend="cpp")

    assert gradgradcheck(layer, (x, weight))


BOUNDS = [0, 3, 4, 7]
LABELS, CLASSES = torch.tensor([0, 0, 0, 1, 3, 3, 3]), torch.tensor([0, 1, 3])


def matching_objective(images, logits, losses):
    """What gradient inversion asks for: how far ∂loss/∂images is from a given gradient, by the images."""
    loss = F.cross_entropy(logits, LABELS) + losses
    (first,) = grad(loss, images, create_graph=True)
    wanted = torch.linspace(-1, 1, first.numel(), dtype=first.dtype).view(first.shape)
    objective = 1 - F.cosine_similarity(first.flatten(), wanted.flatten(), dim=0) + first.square().sum() + loss
    return first.detach(), grad(objective, images)[0]


def plain_loss(moments, matcher, distance):
    """The BN-statistic loss as an eager hook has it, per class, over `hooked_moments`."""
    start, total = 0, 0
    for mean, var in moments.values():
        stop = start + mean.shape[1]
        deltas = [m - t[CLASSES, start:stop] for m, t in ((mean, matcher.target_mean), (var, matcher.target_var))]
        total = total + sum(d.norm(dim=1) if distance == "l2" else d.square().mean(dim=1) for d in deltas).mean()
        start = stop
    return total


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("trace", [True, False])
@pytest.mark.parametrize("distance", ["l2", "mse"])
def test_a_whole_network_against_plain_batchnorm_and_hooks(backend, trace, distance):
    model = settle(Chains()).double()
    images = torch.randn(7, 3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    fused = fuse(model, trace=trace, backend=backend)
    logits, moments = fused(images, torch.tensor(BOUNDS))
    channels = [mean.shape[1] for mean, _ in moments.values()]
    targets = [torch.rand(4, sum(channels), generator=torch.Generator().manual_seed(k)) + 0.1 for k in range(2)]
    matcher = Matcher(list(moments), channels, *targets, distance=distance, backend=backend).double()
    actual = matching_objective(images, logits, matcher(moments, CLASSES))

    logits, hooked = hooked_moments(model, images, BOUNDS)
    expected = matching_objective(images, logits, plain_loss({name: hooked[name] for name in moments}, matcher, distance))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10 * theirs.abs().max().item())


def test_a_network_of_sites_with_targets_of_their_own():
    model = settle(build_model("resnet8", 5)).double()
    layers = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)][:2]
    images = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)][:2]

    def ours(x, layer):
        scale = layer.weight / (layer.running_var + layer.eps).sqrt()
        shift, targets = layer.bias - layer.running_mean * scale, (layer.running_mean[None], layer.running_var[None])
        return ops.bn_act_loss(x, scale, shift, *targets, act="silu", backend="cpp")[:2]

    def plain(x, layer):
        var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        return F.silu(layer(x)), (mean - layer.running_mean).norm() + (var - layer.running_var).norm()

    def second_order(site):
        x, total = images, 0
        for conv, layer in zip(convs, layers, strict=True):
            x, loss = site(conv(x), layer)
            total = total + loss
        (first,) = grad(total + x.square().mean(), images, create_graph=True)
        return grad(first.square().sum(), images)[0]

    torch.testing.assert_close(second_order(ours), second_order(plain), rtol=1e-10, atol=1e-10)


def errors_of_an_objective(precision, seed):
    """How far ours and the plain network's second order, in a precision, are from float64's, relative, as a whole."""
    torch.manual_seed(seed)
    model, images = settle(Chains(), seed), torch.randn(7, 3, 6, 5)
    fused = fuse(model, backend="cpp")
    moments = fused(images)[1]
    channels = [mean.shape[1] for mean, _ in moments.values()]
    targets = torch.rand(2, 4, sum(channels)) + 0.1
    matcher = Matcher(list(moments), channels, *targets, backend="cpp")
    objective = Objective(fused, matcher, precision=precision)

    def second_order(total, leaf):
        (first,) = grad(total, leaf, create_graph=True)
        return grad(first.square().sum() + total, leaf)[0]

    def of_the_plain_network(model, matcher, leaf):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16" and leaf.dtype == torch.float32):
            logits, hooked = hooked_moments(model, leaf, BOUNDS)
        hooked = {name: [moment.to(leaf.dtype) for moment in hooked[name]] for name in moments}
        loss = F.cross_entropy(logits.to(leaf.dtype), LABELS) + plain_loss(hooked, matcher, "l2")
        return second_order(loss, leaf)

    leaf = images.clone().requires_grad_()
    ours = second_order(objective(leaf, leaf, LABELS, torch.tensor(BOUNDS), CLASSES).total, leaf)
    plain = of_the_plain_network(model, matcher, images.clone().requires_grad_())
    exact = of_the_plain_network(model.double(), matcher.double(), images.double().requires_grad_())
    return [((gradient.double() - exact).norm() / exact.norm()).item() for gradient in (ours, plain)]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_objective_is_as_near_to_float64_as_the_plain_network_is(precision):
    """What rounding may do, autocast's above all, is what it does to torch's own operators: on average, for a kink may flip."""
    errors = [errors_of_an_objective(precision, seed) for seed in range(6)]
    ours, plain = (geometric_mean(values) for values in zip(*errors))
    assert ours < 1.5 * plain, errors


def test_the_examples_of_the_page_run():
    page = (Path(__file__).parents[1] / "docs" / "second_order.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) == 2
    model = settle(build_model("resnet8", 5))
    names = dict(torch=torch, bnfuse=bnfuse, cross_entropy=F.cross_entropy, model=model, labels=torch.tensor([0, 1, 2]))
    names["wanted"] = torch.zeros(3, 3, 8, 8)
    for example in examples:
        images = names["images"] = torch.randn(3, 3, 8, 8).requires_grad_()
        names["shared"] = [torch.zeros_like(p) for p in model.parameters()]
        exec(example, names)
        assert images.grad.isfinite().all() and images.grad.any()
        model.requires_grad_(True)
