"""The Triton kernels against the reference in float64: on the GPU where there is one, otherwise interpreted on the CPU.

Tiles are small in most tests, so that small shapes are cut into many tiles, chunks and segments; test_triton_compiles.py sees
to the sizes that real shapes get. What the interpreter cannot show, an order of sums that changes with the layout of a tile or
a graph that is captured, shows where there is a GPU.
"""

import contextlib
import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loss import EVERY_DISTANCE, Loss, every_distance
from test_loss import assert_close as assert_loss_close
from test_ops import SLOPE, Case, in_layout, make_case
from tolerances import LARGE_MEAN_VARIANCE_RELATIVE, assert_elements_close, assert_moments_close
from torch import Tensor

from bnfuse import ops, reference
from bnfuse.errors import InputError

triton = pytest.importorskip("triton", reason="the Triton backend needs triton, which is not installed")

from bnfuse.kernels import Config, boundary, tuning  # noqa: E402

from bnfuse import kernels  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU here: streams and graphs are not interpreted")
SMALLEST = 2.0**-149  # the smallest float32 above 0

# By heuristic, and two ways in which every direction of a small shape takes several tiles and several programs.
CUTS = {
    "heuristic": {},
    "few_tiles": dict.fromkeys(tuning.KERNELS, Config(rows=4, columns=16, tiles=2)),
    "many_tiles": dict.fromkeys(tuning.KERNELS, Config(rows=2, columns=8, tiles=9, stages=1)),
}


def pinned(cut: str) -> contextlib.AbstractContextManager:
    return kernels.pinned(**CUTS[cut])


# ---- inputs ----


def to_device(value):
    """Tensors with their strides, and no better aligned than they were."""
    if isinstance(value, list):
        return [to_device(v) for v in value]
    if not isinstance(value, Tensor):
        return value
    if 0 in value.stride():
        return value.to(DEVICE)
    span = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride()) if size) + 1
    memory = torch.empty(span + 1, dtype=value.dtype, device=DEVICE)
    offset = 1 if value.numel() and value.data_ptr() % boundary.ALIGNMENT else 0
    return memory.as_strided(value.shape, value.stride(), offset).copy_(value)


def on_device(case: Case) -> Case:
    return Case(**{name: to_device(value) for name, value in vars(case).items()})


@st.composite
def cases(draw) -> Case:
    groups = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    channels = draw(st.one_of(st.integers(1, 9), st.sampled_from([16, 24, 31, 64])))
    spatial = draw(st.one_of(st.lists(st.integers(1, 7), max_size=3), st.sampled_from([[1, 1], [7, 7]])))
    return make_case(
        (sum(groups), channels, *spatial),
        dtype=draw(st.sampled_from(ops.DTYPES)),
        layout=draw(st.sampled_from(["contiguous", "channels_last", "offset"])),
        groups=groups,
        act=draw(st.sampled_from(reference.ACTIVATIONS)),
        residual=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


# ---- values ----


def forward(case: Case, functions=kernels) -> tuple[Tensor, ...]:
    return functions.bn_forward(case.x, case.residual, case.scale, case.shift, case.group_starts, case.act, SLOPE)


def backward_arguments(case: Case, mean: Tensor, mask: Tensor, **absent) -> tuple:
    """Those of bn_backward, as autograd gives them: with a mask, no residual. `absent` gradients are None."""
    residual = None if mask.numel() or case.act == "identity" else case.residual
    dy, dmean, dvar = (absent.get(name, getattr(case, name)) for name in ("dy", "dmean", "dvar"))
    moments = mean, dmean, dvar, case.group_starts
    return dy, case.x, residual, mask, case.scale, case.shift, *moments, case.act, SLOPE, case.residual is not None


def assert_agrees_with_the_reference(case: Case, **absent) -> None:
    dtype, actual_case, expected_case = case.x.dtype, on_device(case), case.double()
    actual, expected = forward(actual_case), forward(expected_case, reference)
    y, mean, var, mask = (t.cpu() for t in actual)
    assert y.shape == case.x.shape and y.stride() == torch.empty_like(case.x).stride()
    assert_elements_close(y, expected[0], dtype)
    assert_moments_close(mean, expected[1], dtype)
    assert_moments_close(var, expected[2], dtype)
    assert torch.equal(mask, expected[3])

    arguments = backward_arguments(actual_case, actual[1], actual[3], **absent)
    gradients = kernels.bn_backward(*arguments)
    expected_gradients = reference.bn_backward(*backward_arguments(expected_case, expected[1], expected[3], **absent))
    for gradient, wanted in zip(gradients, expected_gradients):
        assert gradient.shape == wanted.shape
        assert_elements_close(gradient.cpu(), wanted, dtype)
    if arguments[0] is not None:
        dx = arguments[0].clone()
        dresidual = kernels.bn_backward_(dx, *arguments[1:])
        assert torch.equal(dx, gradients[0]) and torch.equal(dresidual, gradients[1])


@settings(max_examples=50)
@given(case=cases(), cut=st.sampled_from([*CUTS]), absent=st.sampled_from(["", "dy", "dmean", "dvar", "dmean dvar"]))
def test_agrees_on_drawn_shapes(case, cut, absent):
    with pinned(cut):
        assert_agrees_with_the_reference(case, **dict.fromkeys(absent.split()))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("act", reference.ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_agrees_for_every_kernel(act, residual, layout):
    dtype = torch.float32 if layout == "contiguous" else torch.bfloat16
    case = make_case((4, 11, 3, 6), dtype=dtype, layout=layout, groups=[1, 0, 3], act=act, residual=residual)
    with pinned("few_tiles"):
        assert_agrees_with_the_reference(case)


@pytest.mark.parametrize(
    "shape, layout",
    [
        ((3, 2, 41, 43), "contiguous"),  # planes in segments
        ((3, 2, 32, 33), "channels_last"),  # few channels, many rows
        ((2, 300, 2, 3), "channels_last"),  # channels in several tiles
        ((65, 37), "contiguous"),  # no spatial dimensions
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agrees_beyond_one_tile_of_the_heuristic(shape, layout, dtype):
    n = shape[0]
    assert_agrees_with_the_reference(
        make_case(shape, dtype=dtype, layout=layout, groups=[n // 3, n - n // 3], act="relu", residual=True)
    )


@settings(max_examples=20)
@given(case=cases(), cut=st.sampled_from([*CUTS]))
def test_group_moments_agree(case, cut):
    actual_case, double = on_device(case), case.double()
    expected_mean, expected_var = reference.group_moments(double.x, case.group_starts)
    with pinned(cut):
        mean, var = kernels.group_moments(actual_case.x, actual_case.group_starts)
        gradient = kernels.group_moments_backward(
            actual_case.x, mean, actual_case.dmean, actual_case.dvar, actual_case.group_starts
        )
        _, same_mean, same_var, _ = forward(actual_case)
    assert_moments_close(mean.cpu(), expected_mean, case.x.dtype)
    assert_moments_close(var.cpu(), expected_var, case.x.dtype)
    assert torch.equal(mean, same_mean) and torch.equal(var, same_var)
    expected = reference.group_moments_backward(double.x, expected_mean, double.dmean, double.dvar, case.group_starts)
    assert_elements_close(gradient.cpu(), expected, case.x.dtype)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 4, 4), (0, 3)], ids=str)
def test_nothing_in_nothing_out(shape):
    case = on_device(make_case(shape, groups=[0, shape[0]], residual=True))
    y, mean, var, mask = forward(case)
    dx, dresidual = kernels.bn_backward(*backward_arguments(case, mean, mask))
    assert y.shape == dx.shape == dresidual.shape == shape
    assert mean.shape == var.shape == (2, shape[1])
    assert not mean.any() and not var.any()
    assert kernels.group_moments_backward(case.x, mean, case.dmean, case.dvar, case.group_starts).shape == shape


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_groups_than_chunks_hold(layout):
    """Many groups, most of them empty or of one sample: every program must find its own."""
    groups = [0, 1, 0, 0, 2, 1, 0, 1, 1, 0, 3, 0, 1]
    case = make_case((sum(groups), 3, 2, 5), layout=layout, groups=groups, act="relu", residual=True)
    for cut in CUTS:
        with pinned(cut):
            assert_agrees_with_the_reference(case)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_without_a_gradient_of_the_variance_x_is_not_touched(layout):
    """0·inf would be NaN."""
    case = make_case((2, 3, 4, 4), layout=layout, act="identity")
    case.x[1, 2, 3, 3] = math.inf
    case.x[0, 0, 0, 0] = math.nan
    case = on_device(case)
    mean = torch.zeros(1, 3, device=DEVICE)
    dx, _ = kernels.bn_backward(*backward_arguments(case, mean, torch.empty(0, dtype=torch.uint8, device=DEVICE), dvar=None))
    assert dx.isfinite().all()
    assert kernels.group_moments_backward(case.x, mean, case.dmean, None, case.group_starts).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_narrow_value_is_read_and_rounded_as_torch_does(dtype):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    every = to_device(bits.view(dtype).view(1, 1, -1))
    one, zero, starts = torch.ones(1, device=DEVICE), torch.zeros(1, device=DEVICE), torch.tensor([0, 1], device=DEVICE)
    for factor in (1.0, 1 / 3):
        y = kernels.bn_forward(every, None, one * factor, zero, starts, "identity", 0.0)[0]
        expected = (every.float() * factor).to(dtype)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.nan_to_num(0), expected.nan_to_num(0))


# ---- where numbers are hard ----

# Every way in which memory is walked, cut so that a place of the tile sees many values, and several chunks are pooled.
WALKS = {
    "planes": ((6, 3, 20, 21), "contiguous", Config(4, 64, 21)),
    "planes_in_segments": ((3, 3, 31, 33), "contiguous", Config(4, 64, 12)),
    "small_planes": ((40, 5, 7, 7), "contiguous", Config(8, 64, 15)),
    "rows": ((4, 40, 9, 9), "channels_last", Config(4, 64, 25)),
    "no_spatial": ((300, 19), "contiguous", Config(8, 32, 15)),
}
every_walk = pytest.mark.parametrize("shape, layout, config", WALKS.values(), ids=WALKS)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def moments(x: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """mean, var [C] as the kernels find them."""
    with kernels.pinned(**dict.fromkeys(tuning.KERNELS, config)):
        mean, var = kernels.group_moments(to_device(x), torch.tensor([0, len(x)], device=DEVICE))
    return mean[0].cpu(), var[0].cpu()


def moments_in_float64(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, var = reference.group_moments(x.double(), torch.tensor([0, len(x)]))
    return mean[0], var[0]


@every_walk
@pytest.mark.parametrize("sign", [1, -1])
def test_a_mean_ten_thousand_times_the_deviation(shape, layout, config, sign):
    x = in_layout(sign * 1e4 + randn(*shape), layout)
    mean, var = moments(x, config)
    expected_mean, expected_var = moments_in_float64(x)
    assert_moments_close(mean, expected_mean, torch.float32)
    torch.testing.assert_close(var.double(), expected_var, rtol=LARGE_MEAN_VARIANCE_RELATIVE, atol=0)


@every_walk
@pytest.mark.parametrize("first, around, width", [(0, 1e3, 1), (0, 0.7, 0), (1e4, 0, 1), (-3e3, 1, 1)])
def test_first_samples_far_from_all_others(shape, layout, config, first, around, width):
    """Where sums are taken about some first value, that value says nothing of the rest."""
    x = in_layout(around + uniform(*shape, low=-width, high=width), layout)
    x[: max(1, len(x) // 20)] = first
    mean, var = moments(x, config)
    expected_mean, expected_var = moments_in_float64(x)
    assert_moments_close(mean, expected_mean, torch.float32)
    assert_moments_close(var, expected_var, torch.float32)


@every_walk
@pytest.mark.parametrize("value", [0.1, -7.7, 123456.7, 1e-30, 1e15])
def test_constant_channels_have_no_variance_at_all(shape, layout, config, value):
    constants = (value * uniform(shape[1], low=0.5, high=2)).reshape(1, -1, *[1] * (len(shape) - 2))
    mean, var = moments(in_layout(constants.expand(shape).contiguous(), layout), config)
    assert var.count_nonzero() == 0, f"{var.count_nonzero()} of {len(var)} variances are not 0, up to {var.max():g}"
    torch.testing.assert_close(mean.double(), constants.flatten().double(), rtol=2e-7, atol=0)


@every_walk
@pytest.mark.parametrize("size", [1e18, 1e19])
def test_large_variances_that_float32_can_hold(shape, layout, config, size):
    """Var = size²/3, at most 3·10³⁷: the squares' sum passes float32's 3·10³⁸, the variance does not."""
    x = in_layout(uniform(*shape, low=-size, high=size), layout)
    mean, var = moments(x, config)
    expected_mean, expected_var = moments_in_float64(x)
    torch.testing.assert_close(mean.double() / size, expected_mean / size, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), expected_var, rtol=2e-6, atol=0)


@every_walk
@pytest.mark.parametrize("size", [1e21, 3.4e38])
def test_a_variance_beyond_float32_is_inf_and_the_mean_is_right(shape, layout, config, size):
    x = in_layout(uniform(*shape, low=0.5 * size, high=size), layout)
    mean, var = moments(x, config)
    assert (var == math.inf).all(), f"variances {var[:4].tolist()}, expected inf"
    torch.testing.assert_close(mean.double() / size, moments_in_float64(x)[0] / size, rtol=2e-6, atol=0)


@every_walk
def test_denormal_numbers_are_not_flushed(shape, layout, config):
    steps = torch.randint(-(2**13), 2**15, shape, generator=torch.Generator().manual_seed(0))
    x = in_layout((steps.double() * SMALLEST).float(), layout)
    mean, var = moments(x, config)
    torch.testing.assert_close(mean.double(), moments_in_float64(x)[0], rtol=1e-6, atol=2 * SMALLEST)
    assert var.count_nonzero() == 0  # some 10⁻⁸², far below the smallest

    scale, shift = torch.full((shape[1],), 1.5, device=DEVICE), torch.zeros(shape[1], device=DEVICE)
    starts = torch.tensor([0, len(x)], device=DEVICE)
    y, mean, _, mask = kernels.bn_forward(to_device(x), None, scale, shift, starts, "leaky_relu", 0.5)
    expected = reference.bn_act(x.double(), None, scale.cpu().double(), shift.cpu().double(), "leaky_relu", 0.5)
    torch.testing.assert_close(y.cpu().double(), expected, rtol=0, atol=2 * SMALLEST)
    dy = to_device(x)
    dx, _ = kernels.bn_backward(dy, dy, None, mask, scale, shift, mean[None, 0], None, None, starts, "relu", 0.0, False)
    torch.testing.assert_close(dx.cpu().double(), 1.5 * x.double() * (x > 0), rtol=0, atol=2 * SMALLEST)

    small = in_layout(1e-20 * randn(*shape), layout)
    _, var = moments(small, config)
    torch.testing.assert_close(var.double(), moments_in_float64(small)[1], rtol=2e-6, atol=2 * SMALLEST)


@every_walk
@pytest.mark.parametrize("value, where", [(math.nan, "first"), (math.inf, "last")])
def test_a_value_that_is_not_finite_touches_its_own_group_and_channel_alone(shape, layout, config, value, where):
    n, channels = shape[:2]
    n = min(n, 20)
    shape = n, *shape[1:]
    starts = torch.tensor([0, n // 3, n // 3, n])
    # The bad element is the first of the last group, or its last, in a channel of its own.
    sample, channel, position = (n // 3, 0, 0) if where == "first" else (n - 1, channels - 1, -1)
    clean = in_layout(randn(*shape), layout)
    bad = clean.clone()
    bad[(sample, channel, *[position] * (len(shape) - 2))] = value
    case = Case(
        clean,
        in_layout(randn(*shape, seed=2), layout),
        uniform(channels, low=0.5, high=2),
        randn(channels),
        starts,
        "silu",
        in_layout(randn(*shape, seed=1), layout),
        *randn(2, 3, channels, seed=3),
    )

    def run(x):
        given = on_device(replace(case, x=x))
        with kernels.pinned(**dict.fromkeys(tuning.KERNELS, config)):
            y, mean, var, mask = forward(given)
            dx, _ = kernels.bn_backward(*backward_arguments(given, mean, mask))
        return tuple(t.cpu() for t in (y, mean, var, dx))

    y, mean, var, dx = run(bad)
    clean_y, clean_mean, clean_var, clean_dx = run(clean)
    spoilt_moment = torch.zeros(3, channels, dtype=torch.bool)
    spoilt_moment[2, channel] = True
    for moment, clean_moment in ((mean, clean_mean), (var, clean_var)):
        assert torch.equal(moment.isfinite(), ~spoilt_moment)
        assert torch.equal(moment[~spoilt_moment], clean_moment[~spoilt_moment])
    assert torch.equal((y != clean_y).nonzero(), (bad != clean).nonzero())
    spoilt_dx = reference.per_sample(spoilt_moment, starts, dx).expand_as(dx)
    assert torch.equal(dx[~spoilt_dx], clean_dx[~spoilt_dx])
    assert not dx[spoilt_dx].isfinite().any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_and_inf_reach_the_outputs(value, layout):
    for act in reference.ACTIVATIONS:
        case = make_case((2, 3, 3, 3), layout=layout, groups=[1, 1], act=act, residual=True)
        case.x[1, 1, 2, 2] = value
        expected_y, expected_mean, _, expected_mask = forward(case.double(), reference)
        given = on_device(case)
        y, mean, var, mask = forward(given)
        dx, dresidual = kernels.bn_backward(*backward_arguments(given, mean, mask))
        wanted = reference.bn_backward(*backward_arguments(case.double(), expected_mean, expected_mask))
        assert torch.equal(y.cpu().isnan(), expected_y.isnan()) and torch.equal(y.cpu().isinf(), expected_y.isinf())
        assert torch.equal(mask.cpu(), expected_mask)
        for actual, expected in zip((dx, dresidual), wanted):
            assert torch.equal(actual.cpu().isfinite(), expected.isfinite())


# ---- the same bits ----


def every_output(case: Case) -> list[Tensor]:
    y, mean, var, mask = forward(case)
    return [y, mean, var, mask, *kernels.bn_backward(*backward_arguments(case, mean, mask))]


@every_walk
def test_the_same_bits_each_time_and_at_any_address(shape, layout, config):
    shape = min(shape[0], 6), *shape[1:]
    tensors = [in_layout(randn(*shape, seed=seed), layout) for seed in range(3)]
    starts, channels = torch.tensor([0, shape[0] // 3, shape[0]]), shape[1]
    case = Case(*tensors[:2], randn(channels), randn(channels), starts, "relu", tensors[2], *randn(2, 2, channels))
    first = every_output(on_device(case))

    def moved(tensor):
        if tensor.dim() < 3 and tensor.shape != shape:
            return tensor
        memory = torch.empty(tensor.numel() + 3, dtype=tensor.dtype, device=DEVICE)
        return memory.as_strided(tensor.shape, tensor.stride(), 3).copy_(tensor)

    elsewhere = on_device(case)
    for name in ("x", "residual", "dy"):
        setattr(elsewhere, name, moved(getattr(elsewhere, name)))
    for again in (every_output(on_device(case)), every_output(elsewhere)):
        assert all(torch.equal(a, b) for a, b in zip(first, again))


# ---- the loss of all sites ----


def run_loss(loss: Loss) -> tuple[Tensor, Tensor, list[Tensor]]:
    """loss, distances, and its gradients by every site's mean and var."""
    names = ("mean", "var", "target_mean", "target_var", "classes", "site_weights")
    defaults = {"distance": "l2", "use_std": False, "eps": 1e-8, "slack": 0.0, "mean_weight": 1.0, "var_weight": 1.0}
    options = {**defaults, **loss.options}
    value, distances, *flat = kernels.bn_loss(*(to_device(getattr(loss, n)) for n in names), *options.values())
    gradients = []
    for gradient in flat:
        shapes = [site.shape for site in loss.mean]
        gradients += [g.view(s) for g, s in zip(gradient.split([s.numel() for s in shapes]), shapes)]
    return value.cpu(), distances.cpu(), [g.cpu() for g in gradients]


def assert_loss_agrees(loss: Loss) -> None:
    actual, distances, gradients = run_loss(loss)
    expected, expected_distances, expected_gradients = loss.double().run("reference")
    assert actual.shape == () and distances.shape == expected_distances.shape
    assert_loss_close(actual, expected, loss.dtype)
    assert_loss_close(distances, expected_distances, loss.dtype)
    assert [g.shape for g in gradients] == [g.shape for g in expected_gradients]
    for gradient, wanted in zip(gradients, expected_gradients):
        assert_loss_close(gradient, wanted, loss.dtype)


@every_distance
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_loss_agrees_with_the_reference(distance, use_std, dtype):
    options = {"distance": distance, "use_std": use_std, "slack": 0.3, "mean_weight": 0.7, "var_weight": 1.3}
    assert_loss_agrees(Loss(3, (7, 1, 64, 33), 4, dtype, **options))
    assert_loss_agrees(Loss(2, (5,), 1, dtype, eps=0.5, **options))


def test_loss_of_a_site_wider_than_a_block():
    assert_loss_agrees(Loss(2, (1100, 3), 3, torch.float32, distance="l2"))


@settings(max_examples=25)
@given(
    groups=st.integers(1, 5),
    classes=st.integers(1, 5),
    channels=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    kind=st.sampled_from(EVERY_DISTANCE),
    weights=st.tuples(st.sampled_from([0.0, 0.5, 3.0]), st.sampled_from([0.0, 1.0, 0.25])),
    slack=st.sampled_from([0.0, 0.25, 100.0]),
    seed=st.integers(0, 2**16),
)
def test_loss_agrees_on_drawn_sizes(groups, classes, channels, kind, weights, slack, seed):
    options = {"distance": kind[0], "use_std": kind[1], "mean_weight": weights[0], "var_weight": weights[1], "slack": slack}
    assert_loss_agrees(Loss(groups, channels, classes, torch.float32, seed, **options))


@every_distance
def test_loss_at_the_target_is_zero_and_so_is_its_gradient(distance, use_std):
    loss = Loss(3, (5, 2), 1, distance=distance, use_std=use_std)
    loss.target_mean, loss.target_var = (torch.cat([t[:1] for t in moments], 1) for moments in (loss.mean, loss.var))
    loss.mean, loss.var = ([t[:1].expand(3, -1) for t in moments] for moments in (loss.mean, loss.var))
    value, distances, gradients = run_loss(loss)
    assert value == 0 and not distances.any() and not any(g.any() for g in gradients)


@every_distance
@pytest.mark.parametrize("given", ["mean", "var"])
def test_nan_reaches_the_loss_and_no_other_group(distance, use_std, given):
    loss = Loss(3, (5, 2), 3, distance=distance, use_std=use_std, slack=0.5)
    getattr(loss, given)[1][2, 0] = math.nan
    value, distances, gradients = run_loss(loss)
    assert value.isnan()
    assert distances.isnan().tolist() == [[False, False], [False, False], [False, True]]
    assert not any(g[:2].isnan().any() for g in gradients)
    assert gradients[1 if given == "mean" else 3][2, 0].isnan()


@pytest.mark.parametrize("row", [-1, 4, 2**40])
def test_a_class_without_targets_makes_the_loss_nan(row):
    """Nothing on the host knows the classes, and no memory but the targets' is read."""
    loss = Loss(3, (5, 2), 4)
    loss.classes[1] = row
    value, distances, gradients = run_loss(loss)
    assert value.isnan() and distances.isnan().tolist() == [[False, False], [True, True], [False, False]]
    x, one = torch.zeros(3, 5, device=DEVICE), torch.ones(5, device=DEVICE)
    tables = [to_device(t[:, :5].float().contiguous()) for t in (loss.target_mean, loss.target_var)]
    options = "relu", 0.0, "l2", False, 1e-8, 0.0, 1.0, 1.0
    starts = torch.arange(4, device=DEVICE)
    fused = kernels.bn_forward_with_targets(x, None, one, one, starts, *tables, to_device(loss.classes), 1.0, *options)
    assert fused[4].isnan() and fused[5].isnan().all(1).tolist() == [False, True, False]


def test_loss_takes_strided_moments_and_targets():
    loss = Loss(3, (5, 4), 4, torch.float32)
    expected = run_loss(loss)
    loss.mean, loss.var = ([t.t().contiguous().t() for t in moments] for moments in (loss.mean, loss.var))
    wide = torch.randn(4, 30)
    wide[:, 7:16] = loss.target_mean
    loss.target_mean = wide[:, 7:16]
    loss.target_var = loss.target_var.repeat_interleave(2, 1)[:, ::2]
    actual = run_loss(loss)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    assert all(torch.equal(a, b) for a, b in zip(actual[2], expected[2]))


# ---- forward with targets ----


def with_targets_by_definition(mean, var, target_mean, target_var, classes, weight, *options):
    """loss, dmean, dvar of one site, weight · mean over groups of the distance, from its moments."""
    mean, var = (t.double().requires_grad_() for t in (mean, var))
    site_weights = torch.tensor([weight], dtype=torch.float64)
    loss, _ = reference.bn_loss([mean], [var], target_mean.double(), target_var.double(), classes, site_weights, *options)
    return loss.detach(), *torch.autograd.grad(loss, [mean, var])


def assert_with_targets_agrees(case: Case, classes: int, weight: float, *options) -> None:
    generator = torch.Generator().manual_seed(0)
    groups, channels = case.dmean.shape
    dtype = case.dmean.dtype
    # A slice of a table of all sites, whose rows lie further apart than they are long.
    wide = [(0.1 + 2 * torch.rand(classes, channels + 5, generator=generator)).to(dtype) for _ in range(2)]
    tables = [table[:, 3 : 3 + channels] for table in wide]
    rows = torch.randint(classes, (groups,), generator=generator) if classes > 1 else None
    given = on_device(case)
    y, mean, var, mask, loss, dmean, dvar = kernels.bn_forward_with_targets(
        given.x,
        given.residual,
        given.scale,
        given.shift,
        given.group_starts,
        *(table.to(DEVICE)[:, 3 : 3 + channels] for table in wide),
        to_device(rows),
        weight,
        case.act,
        SLOPE,
        *options,
    )
    for actual, expected in zip((y, mean, var, mask), forward(given)):
        assert torch.equal(actual, expected)
    expected = with_targets_by_definition(mean.cpu(), var.cpu(), *tables, rows, weight, *options)
    assert loss.shape == () and dmean.shape == dvar.shape == (groups, channels)
    for actual, wanted in zip((loss, dmean, dvar), expected):
        assert_loss_close(actual.cpu(), wanted, dtype)


@settings(max_examples=10)
@given(case=cases(), cut=st.sampled_from([*CUTS]), classes=st.integers(1, 4), kind=st.sampled_from(EVERY_DISTANCE))
def test_forward_with_targets_agrees_with_its_definition(case, cut, classes, kind):
    with pinned(cut):
        assert_with_targets_agrees(case, classes, 1.7, *kind, 1e-8, 0.1, 0.7, 1.3)


@pytest.mark.parametrize("distance", reference.DISTANCES)
def test_forward_with_targets_pools_channels_in_several_tiles(distance, monkeypatch):
    """The last of a group's programs reads what all the others wrote."""
    monkeypatch.setattr(tuning, "pooling", lambda *_: tuning.Pooling(rows=4, columns=8, block=16))
    case = make_case((5, 43, 3, 3), layout="channels_last", groups=[2, 0, 3])
    with pinned("few_tiles"):
        assert_with_targets_agrees(case, 3, 0.3, distance, False, 1e-8, 0.1, 1.0, 1.0)


def test_forward_takes_two_launches(monkeypatch):
    launches = []
    monkeypatch.setattr(boundary, "launch", lambda kernel, programs, *_, **__: launches.append(kernel.__name__))
    case = on_device(make_case((2, 3, 4, 4), residual=True))
    forward(case)
    assert launches == ["forward_planes", "finish"]
    launches.clear()
    target = torch.zeros(1, 3, device=DEVICE)
    options = None, 1.0, "relu", 0.0, "l2", False, 1e-8, 0.0, 1.0, 1.0
    kernels.bn_forward_with_targets(case.x, None, case.scale, case.shift, case.group_starts, target, target, *options)
    assert launches == ["forward_planes", "finish"]
    launches.clear()
    mask = torch.empty(0, dtype=torch.uint8, device=DEVICE)
    kernels.bn_backward(*backward_arguments(replace(case, act="silu"), torch.zeros(1, 3, device=DEVICE), mask))
    assert launches == ["backward_planes"]


# ---- on the GPU alone ----


@needs_gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_graph_captures_a_whole_step_and_replays_it_on_new_values(layout):
    case = on_device(make_case((6, 16, 5, 5), layout=layout, groups=[2, 4], residual=True))
    table = torch.rand(2, 16, device=DEVICE)
    classes, weights = torch.tensor([1, 0], device=DEVICE), torch.ones(1, device=DEVICE)
    options = "l2", False, 1e-8, 0.0, 1.0, 1.0

    def step():
        outputs = kernels.bn_forward_with_targets(
            case.x,
            case.residual,
            case.scale,
            case.shift,
            case.group_starts,
            table,
            table,
            classes,
            2.0,
            case.act,
            SLOPE,
            *options,
        )
        mean, var, mask = outputs[1:4]
        loss = kernels.bn_loss([mean], [var], table, table, classes, weights, *options)
        return [*outputs, *loss, *kernels.bn_backward(*backward_arguments(case, mean, mask))]

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(2):
        torch.manual_seed(seed)
        for tensor in (case.x, case.dy, case.residual):
            tensor.copy_(torch.randn(tensor.shape))
        case.group_starts.copy_(torch.tensor([0, 1 + seed, 6]))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, step()))


# ---- configurations ----


def walk(**changes) -> boundary.Walk:
    given = {"planes": False, "samples": 256, "channels": 64, "plane": 112 * 112, "groups": 1, "dtype": torch.bfloat16}
    return boundary.Walk(**{**given, "device": torch.device("cpu"), **changes})


@given(
    planes=st.booleans(),
    samples=st.integers(0, 5000),
    channels=st.integers(1, 3000),
    plane=st.integers(1, 300**2),
    groups=st.integers(1, 1000),
    kernel=st.sampled_from(["forward", "backward"]),
)
def test_the_heuristic_covers_every_shape(planes, samples, channels, plane, groups, kernel):
    given = walk(planes=planes, samples=samples, channels=channels, plane=plane, groups=groups)
    config = tuning.heuristic(f"{kernel}_{given.layout}", given)
    work = tuning.cut(given, config)
    assert config.rows * config.columns <= 4096
    assert work.chunk_units * work.chunks >= samples * given.sample_units
    if planes:
        assert work.segments * work.segment_tiles * config.columns >= plane
        assert (work.segments - 1) * work.segment_tiles * config.columns < plane  # no segment is empty
        assert work.chunk_units * work.segment_tiles * work.share <= 1
    else:
        assert config.tiles * work.share <= 1
    assert math.frexp(work.share)[0] == 0.5  # a power of two


def test_every_group_finds_its_chunks_within_the_bound():
    for starts in ([0, 10], [0, 1, 2, 3, 10], [0, 0, 0, 10, 10], [0, 5, 10]):
        for units in (1, 2, 3, 7, 20):
            needed = sum(-(-(b - a) // units) for a, b in zip(starts, starts[1:]))
            given = walk(samples=10, plane=1, groups=len(starts) - 1)
            assert needed <= tuning.cut(given, Config(rows=1, columns=8, tiles=units)).chunks


def test_pinned_configurations_hold_in_every_thread_and_end_with_the_block():
    """Autograd runs backward passes in threads of its own."""
    first, second = Config(4, 16, 1), Config(8, 16, 3)
    seen = []

    def ask():
        seen.append(tuning.choose("forward_rows", walk(), None))

    with kernels.pinned(forward_rows=first):
        with kernels.pinned(forward_rows=second):
            thread = threading.Thread(target=ask)
            thread.start()
            thread.join()
        with kernels.pinned(backward_rows=second):
            ask()
    ask()
    assert seen == [second, first, tuning.heuristic("forward_rows", walk())]


def test_a_pinned_block_takes_its_own_entry_away():
    first, second = Config(4, 256, 16), Config(2, 64, 3)
    with kernels.pinned(forward_rows=first), kernels.pinned(forward_rows=second):
        with kernels.pinned(forward_rows=first):
            assert tuning.choose("forward_rows", walk(), None) == first
        assert tuning.choose("forward_rows", walk(), None) == second
    assert tuning.choose("forward_rows", walk(), None) == tuning.heuristic("forward_rows", walk())


def test_the_environment_pins_configurations(monkeypatch, tmp_path):
    text = '{"forward_rows": {"rows": 4, "columns": 256, "tiles": 16, "warps": 8}}'
    monkeypatch.setenv(tuning.CONFIG_VARIABLE, text)
    assert tuning.choose("forward_rows", walk(), None) == Config(4, 256, 16, 8)
    assert tuning.choose("backward_rows", walk(), None) == tuning.heuristic("backward_rows", walk())
    (tmp_path / "configs.json").write_text(text)
    monkeypatch.setenv(tuning.CONFIG_VARIABLE, str(tmp_path / "configs.json"))
    assert tuning.choose("forward_rows", walk(), None) == Config(4, 256, 16, 8)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "must be JSON, or the path of a file with JSON, like"),
        ("/nowhere.json", "No such file"),
        ('{"forward_rows": {"row": 1}}', "unexpected keyword argument 'row'"),
        ('{"forward": {"rows": 4, "columns": 256, "tiles": 16}}', "no kernel is named 'forward'"),
        ('{"forward_rows": {"rows": 3, "columns": 256, "tiles": 16}}', "must be powers of two"),
        ('{"forward_rows": {"rows": 4, "columns": 4, "tiles": 16}}', "at least 8"),
        ('{"forward_rows": {"rows": 4, "columns": 8, "tiles": 0}}', "must be at least 1"),
    ],
)
def test_a_pinned_configuration_that_cannot_be_says_why(monkeypatch, text, message):
    monkeypatch.setenv(tuning.CONFIG_VARIABLE, text)
    with pytest.raises(InputError, match=message):
        tuning.choose("forward_rows", walk(), None)


@pytest.fixture
def autotuned(monkeypatch, tmp_path):
    """Autotuning with a clock of its own, which prefers eight warps; what it timed is noted."""
    timed = []

    def measure(run, config):
        timed.append(config)
        return 1.0 if config.warps == 8 else 2.0

    monkeypatch.setenv(tuning.AUTOTUNE_VARIABLE, "1")
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(tmp_path / "folder" / "triton.json"))
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    monkeypatch.setattr(tuning, "_device_name", lambda: "GPU")
    monkeypatch.setattr(tuning, "_winners", {})
    monkeypatch.setattr(tuning, "measure", measure)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return timed


def test_what_was_measured_is_kept_for_its_class_of_shapes(autotuned, monkeypatch):
    chosen = tuning.choose("forward_rows", walk(), None)
    assert chosen.warps == 8 and autotuned == tuning.candidates("forward_rows", walk())
    autotuned.clear()
    monkeypatch.setattr(tuning, "_winners", {})  # as in a new process
    assert tuning.choose("forward_rows", walk(samples=200), None) == chosen and not autotuned
    content = json.loads(tuning.cache_path().read_text())
    assert [*content] == [f"GPU, triton {triton.__version__}"]
    assert [*content.popitem()[1]] == ["forward_rows bfloat16 N≤256 C=64 L=12544 G≤1"]
    tuning.choose("forward_rows", walk(samples=300), None)
    assert autotuned
    monkeypatch.setattr(tuning, "_device_name", lambda: "another GPU")
    autotuned.clear()
    assert tuning.choose("forward_rows", walk(), None) == chosen and autotuned


def test_what_another_process_found_first_is_taken(autotuned, monkeypatch):
    found = Config(16, 64, 5)

    def measure(run, config):  # meanwhile the other process writes
        machine, shapes = f"GPU, triton {triton.__version__}", tuning.shape_class("forward_rows", walk())
        tuning.cache_path().parent.mkdir(exist_ok=True)
        tuning.cache_path().write_text(json.dumps({machine: {shapes: asdict(found)}}))
        return 1.0

    monkeypatch.setattr(tuning, "measure", measure)
    assert tuning.choose("forward_rows", walk(), None) == found
    assert json.loads(tuning.cache_path().read_text()).popitem()[1].popitem()[1] == asdict(found)


def test_of_those_that_write_at_one_moment_the_first_decides_and_nothing_is_lost(tmp_path, monkeypatch):
    path, read = tmp_path / "folder" / "triton.json", tuning._read

    def slowly(path):
        content = read(path)
        time.sleep(0.02)  # long enough for all others to have read the same
        return content

    monkeypatch.setattr(tuning, "_read", slowly)
    with ThreadPoolExecutor(8) as pool:  # each opens the lock for itself, as processes do
        taken = list(pool.map(lambda i: tuning._keep(path, "GPU", f"class {i % 4}", {"rows": i}), range(8)))
    content = read(path)["GPU"]
    assert len(content) == 4 and taken == [content[f"class {i % 4}"] for i in range(8)]


def test_what_is_measured_runs_on_the_device_of_x(autotuned, monkeypatch):
    current = [torch.device("cuda", 0)]

    @contextlib.contextmanager
    def device(chosen):
        current.append(chosen)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(tuning, "_device_name", lambda: f"GPU {current[-1].index}")
    monkeypatch.setattr(tuning, "measure", lambda run, config: autotuned.append(current[-1].index) or 1.0)
    tuning.choose("forward_rows", walk(device=torch.device("cuda", 1)), None)
    assert set(autotuned) == {1} and len(current) == 1
    assert [*json.loads(tuning.cache_path().read_text())] == [f"GPU 1, triton {triton.__version__}"]


def test_nothing_is_measured_while_a_graph_is_captured(autotuned, monkeypatch):
    measured = tuning.choose("forward_rows", walk(), None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    autotuned.clear()
    assert tuning.choose("backward_rows", walk(), None) == tuning.heuristic("backward_rows", walk())
    assert tuning.choose("forward_rows", walk(), None) == measured and not autotuned


def test_what_is_tried_leaves_dy_as_it_was(autotuned, monkeypatch):
    monkeypatch.setattr(tuning, "measure", lambda run, config: [run(config), 1.0][1])
    monkeypatch.setattr(tuning, "candidates", lambda *_: [Config(rows=4, columns=16, tiles=t) for t in (1, 2)])
    case = on_device(make_case((2, 3, 4, 4), act="silu"))
    _, mean, _, mask = forward(case)
    arguments = backward_arguments(case, mean, mask)
    dx, _ = kernels.bn_backward(*arguments)
    monkeypatch.setattr(tuning, "_winners", {})
    tuning.cache_path().unlink()
    kernels.bn_backward_(*arguments)
    assert torch.equal(case.dy, dx)


def test_a_spoilt_cache_is_an_error_that_says_what_to_do(autotuned):
    tuning.cache_path().parent.mkdir()
    tuning.cache_path().write_text("{")
    with pytest.raises(InputError, match=r"triton\.json does not hold the JSON of measured configurations: .*; delete it"):
        tuning.choose("forward_rows", walk(), None)


# ---- groups that do not fit x, which the host cannot see ----


@pytest.fixture
def watched(monkeypatch):
    """What a kernel touches outside of its tensors is an error. A tensor's own elements alone count, not all of its memory."""
    interpreter, launch = pytest.importorskip("triton.runtime.interpreter"), boundary.launch
    allowed = []

    def launch_watched(kernel, programs, *arguments, **options):
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        allowed[:] = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]
        launch(kernel, programs, *arguments, **options)

    def check(pointers, mask):
        touched = pointers.data[mask.data]
        inside = np.zeros(touched.shape, bool)
        for begin, end in allowed:
            inside |= (touched >= begin) & (touched < end)
        assert inside.all(), "an access outside of every tensor"

    def watch(name, place):
        access = getattr(interpreter.InterpreterBuilder, name)

        def checked(self, pointers, *arguments):
            check(pointers, arguments[place])
            return access(self, pointers, *arguments)

        monkeypatch.setattr(interpreter.InterpreterBuilder, name, checked)

    watch("create_masked_load", 0)
    watch("create_masked_store", 1)
    monkeypatch.setattr(boundary, "launch", launch_watched)


@pytest.mark.skipif(not boundary.INTERPRETED, reason="only the interpreter sees each access")
@pytest.mark.parametrize(
    "starts", [[0, -5, 9], [0, 3, 99], [4, 2, 0], [0, 0, 0], [2**62, -(2**62), 7], [5, 99], [0, 8], [6, 0, 6, 0, 6]], ids=str
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("cut", CUTS)
def test_wrong_group_starts_lead_nowhere_outside_of_x(watched, starts, layout, cut):
    """What comes out is undefined."""
    case = make_case((6, 8, 3, 3), layout=layout, residual=True, act="silu")
    case.group_starts, like = torch.tensor(starts), torch.ones(len(starts) - 1, 8)
    case.dmean = case.dvar = like
    with pinned(cut):
        forward(case)
        kernels.bn_backward(*backward_arguments(case, like, torch.empty(0, dtype=torch.uint8)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_groups_beyond_the_batch_end_with_it(layout):
    memory = torch.full((9, 2, 3, 3), math.nan, device=DEVICE)
    memory = memory.to(memory_format=torch.channels_last) if layout == "channels_last" else memory
    x = memory[:6].fill_(1.0)
    for starts in ([0, 8], [-2, 8], [0, 3, 8]):
        mean, var = kernels.group_moments(x, torch.tensor(starts, device=DEVICE))
        assert (mean == 1).all() and not var.any(), starts


# ---- what is refused ----

X = torch.zeros(4, 3, 2, 2, device=DEVICE)
ONE, ZERO, STARTS = torch.ones(3, device=DEVICE), torch.zeros(3, device=DEVICE), torch.tensor([0, 4], device=DEVICE)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=X[:, :, ::2]), r"x must be contiguous or channels_last, got float32 \[4, 3, 1, 2\] with strides"),
        (dict(x=X.int()), r"x must be float32, bfloat16, float16 or float64, got int32"),
        (dict(x=X[0, 0, 0]), r"x must be \[N, C, \*spatial\] with 0 to 3 spatial dimensions, got float32 \[2\]"),
        (dict(residual=X.to(memory_format=torch.channels_last)), r"residual must have x's dtype, shape and strides"),
        (dict(scale=torch.ones(2, device=DEVICE)), r"scale must be float32 \[3\] on \w+(:0)?, got float32 \[2\]"),
        (dict(shift=ZERO.double()), r"shift must be float32 \[3\] .* got float64 \[3\]"),
        (dict(group_starts=STARTS.int()), r"group_starts must be int64 \[G \+ 1\] .* got int32 \[2\]"),
        (dict(group_starts=STARTS[:1]), r"at least one group, got int64 \[1\]"),
        (dict(act="gelu"), r"act must be one of identity, relu, .* got 'gelu'"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_forward_says_what_it_expected_and_got(change, message):
    given = {"x": X, "residual": None, "scale": ONE, "shift": ZERO, "group_starts": STARTS, "act": "relu", "slope": 0.0}
    with pytest.raises(InputError, match=message):
        kernels.bn_forward(*{**given, **change}.values())


def test_planes_that_32_bits_do_not_count_are_refused(monkeypatch):
    monkeypatch.setattr(boundary, "check_device", lambda tensor: None)
    starts = torch.empty(2, dtype=torch.int64, device="meta")
    for plane in (2**30 + 1, 2**31):
        x = torch.empty(1, 2, plane, device="meta")
        with pytest.raises(InputError, match=f"x has planes of {plane} elements, more than {2**30}"):
            kernels.bn_forward(x, None, *torch.empty(2, 2, device="meta"), starts, "relu", 0.0)
        with pytest.raises(InputError, match=f"x has planes of {plane} elements"):
            kernels.group_moments_backward(x, torch.empty(1, 2, device="meta"), None, None, starts)
    assert boundary.check_x(torch.empty(1, 2, 2**30, device="meta"), starts).planes
    rows = torch.empty(1, 2**31, 2, device="meta").movedim(-1, 1)
    assert not boundary.check_x(rows, starts).planes


def test_backward_says_what_it_expected_and_got():
    no_mask = torch.empty(0, dtype=torch.uint8, device=DEVICE)
    moments = torch.zeros(1, 3, device=DEVICE)

    def backward(dy=X, mask=no_mask, dmean=None):
        return kernels.bn_backward(dy, X, None, mask, ONE, ZERO, moments, dmean, None, STARTS, "relu", 0.0, False)

    with pytest.raises(InputError, match=r"dy must have x's dtype, shape and strides"):
        backward(dy=X.transpose(2, 3))
    with pytest.raises(InputError, match=r"mask must be uint8 \[12, 1\] on .*, got uint8 \[5\]"):
        backward(mask=torch.zeros(5, dtype=torch.uint8, device=DEVICE))
    with pytest.raises(InputError, match=r"dmean must be float32 \[1, 3\] .*, got float32 \[2, 3\]"):
        backward(dmean=torch.zeros(2, 3, device=DEVICE))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(mean=lambda _: []), r"at least one site, got none"),
        (dict(classes=lambda _: None), r"a table of 4 targets needs .* got none; pass classes, int64 \[3\]"),
        (dict(classes=lambda c: c[:2]), r"classes must be int64 \[3\] on .*, got int64 \[2\]"),
        (dict(mean=lambda m: [t.half() for t in m]), r"moments must be float32 or float64, got float16"),
        (dict(var=lambda v: v[:1]), r"var must have one tensor a site, 2, got 1"),
        (dict(var=lambda v: [v[1], v[0]]), r"var must be float64 \[3, 5\] on .*, got float64 \[3, 2\]"),
        (dict(mean=lambda m: [t[0] for t in m]), r"mean must be \[G, C\] at every site, got float64 \[5\]"),
        (dict(target_mean=lambda t: t[:, :-1]), r"target_mean must be float64 \[4, 7\] on .*, got float64 \[4, 6\]"),
        (dict(target_mean=lambda t: t[:, 0]), r"target_mean must be \[K, 7\], got float64 \[4\]"),
        (dict(site_weights=lambda w: w.float()), r"site_weights must be float64 \[2\] on .*, got float32 \[2\]"),
        (dict(options=lambda o: {"distance": "cosine"}), r"distance must be one of l2, l2_squared, .* got 'cosine'"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_loss_says_what_it_expected_and_got(change, message):
    loss = Loss(3, (5, 2), 4)
    for name, value in change.items():
        setattr(loss, name, value(getattr(loss, name)))
    with pytest.raises(InputError, match=message):
        run_loss(loss)


def test_a_tensor_on_the_cpu_is_refused_where_kernels_are_compiled(monkeypatch):
    monkeypatch.setattr(boundary, "INTERPRETED", False)
    with pytest.raises(InputError, match="run on a CUDA device, got a tensor on cpu; move it there, .* TRITON_INTERPRET=1"):
        kernels.group_moments(X.cpu(), STARTS.cpu())


def test_memory_is_poisoned():
    assert torch.empty(3, device=DEVICE).isnan().all() and torch.empty_like(X).isnan().all()
