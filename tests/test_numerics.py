"""The compiled CPU kernels where numbers are hard: cancellation, long sums, the ends of float32's range, NaN, order of sums.

Everything is held against float64 on the very values given. Ordinary values, shapes and layouts are test_ops.py's.
"""

import math

import pytest
import torch
from test_ops import in_layout
from tolerances import LARGE_MEAN_VARIANCE_RELATIVE, TOLERANCES, assert_moments_close
from torch import Tensor

from bnfuse import ops, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# One shape at least for each way in which the kernels walk memory, each cut into several pieces of work.
WALKS = {
    "planes": ((6, 3, 40, 41), "contiguous"),
    "planes_of_several_tiles": ((3, 3, 71, 73), "contiguous"),
    "nine_planes": ((3, 3, 9, 13), "contiguous"),
    "planes_across_samples": ((43, 3, 5, 7), "contiguous"),  # tiles of several planes; 129 of them leave one
    "planes_cut_between_channels": ((3, 70, 25, 25), "contiguous"),
    "tiny_planes": ((300, 5, 3, 3), "contiguous"),
    "tiny_planes_many_channels": ((40, 70, 3, 3), "contiguous"),
    "small_planes": ((300, 5, 7, 7), "contiguous"),
    "small_planes_many_channels": ((40, 70, 9, 9), "contiguous"),
    "rows": ((4, 70, 17, 19), "channels_last"),
    "rows_of_several_tiles": ((6, 2100, 3, 5), "channels_last"),
    "few_channels_folded": ((4, 3, 40, 41), "channels_last"),
    "no_spatial": ((1000, 37), "contiguous"),
    "no_spatial_folded": ((9000, 2), "contiguous"),
}
every_walk = pytest.mark.parametrize("shape, layout", WALKS.values(), ids=WALKS)
SMALLEST = 2.0**-149  # the smallest float32 above 0


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniform(*shape: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def one_group(x: Tensor) -> Tensor:
    return torch.tensor([0, x.shape[0]])


def moments_in_float64(x: Tensor) -> tuple[Tensor, Tensor]:
    """mean, var [C] of the values as given."""
    mean, var = reference.group_moments(x.double(), one_group(x))
    return mean[0], var[0]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """mean, var [C] as the kernels find them; with an output too, they must be the same bits."""
    mean, var = ops.group_moments(x, backend="cpp")
    one, zero = torch.ones(x.shape[1]), torch.zeros(x.shape[1])
    _, *again = ops.bn_act(x, one, zero, backend="cpp")
    for a, b in zip((mean, var), again):
        assert torch.equal(a.nan_to_num(7.0, 8.0, 9.0), b.nan_to_num(7.0, 8.0, 9.0))
    return mean[0], var[0]


def in_memory_order(x: Tensor) -> Tensor:
    """A view of dense x as a table [rows, columns] that the walk over columns reads from top to bottom."""
    if x.dim() > 2 and not x.is_contiguous():
        return x.movedim(1, -1).flatten(0, -2)  # [N·L, C]
    return x.view(x.shape[0], -1)  # [N, C·L]


# ---- cancellation ----


@every_walk
@pytest.mark.parametrize("sign", [1, -1])
def test_a_mean_ten_thousand_times_the_deviation(shape, layout, sign):
    x = in_layout(sign * 1e4 + randn(*shape), layout)
    mean, var = moments(x)
    expected_mean, expected_var = moments_in_float64(x)
    assert_moments_close(mean, expected_mean, torch.float32)
    torch.testing.assert_close(var.double(), expected_var, rtol=LARGE_MEAN_VARIANCE_RELATIVE, atol=0)


@every_walk
def test_the_gradient_of_the_variance_at_a_large_mean(shape, layout):
    """x − mean is taken of a mean rounded to float32: half a step of 10⁴ is 5·10⁻⁴ deviations."""
    x = in_layout(1e4 + randn(*shape), layout).requires_grad_()
    (gradient,) = torch.autograd.grad(ops.group_moments(x, backend="cpp")[1].sum(), x)
    expected_mean, _ = moments_in_float64(x.detach())
    count = x.numel() / x.shape[1]
    expected = 2 * (x.detach().double() - reference.per_channel(expected_mean, x)) / count
    torch.testing.assert_close(gradient.double() * count, expected * count, rtol=1e-5, atol=LARGE_MEAN_VARIANCE_RELATIVE)


def far_first_rows(shape, layout, first: float, rest: Tensor) -> Tensor:
    """`rest`, but for the first four of every 128 rows of a table's walk (long rows, where few channels are folded)."""
    x = in_layout(rest.clone(), layout)
    rows = in_memory_order(x)
    fold = 1
    while (len(shape) == 2 or layout == "channels_last") and fold * shape[1] < 64:
        fold *= 2
    count = min(4 * fold, len(rows) // 2)
    for start in range(0, len(rows) - count, 128 * fold):
        rows[start : start + count] = first
    return x


@every_walk
@pytest.mark.parametrize("first, around, width", [(0, 1e3, 1), (0, 1e3, 0), (0, 0.7, 0), (1e4, 0, 1), (-3e3, 1, 1), (0, 5, 3)])
def test_first_rows_far_from_all_others(shape, layout, first, around, width):
    """The walk over columns takes moments about the mean of a piece's first rows, which here says nothing of the rest."""
    x = far_first_rows(shape, layout, first, around + uniform(*shape, low=-width, high=width))
    mean, var = moments(x)
    expected_mean, expected_var = moments_in_float64(x)
    assert expected_var.min() > 0
    assert_moments_close(mean, expected_mean, torch.float32)
    assert_moments_close(var, expected_var, torch.float32)


@every_walk
def test_first_samples_far_from_all_others(shape, layout):
    x = in_layout(1e3 + uniform(*shape, low=-1, high=1), layout)
    x[: min(4, len(x) // 2)] = 0
    mean, var = moments(x)
    expected_mean, expected_var = moments_in_float64(x)
    assert_moments_close(mean, expected_mean, torch.float32)
    assert_moments_close(var, expected_var, torch.float32)


@every_walk
@pytest.mark.parametrize("value", [0.1, 1 / 3, -7.7, 1e4 / 3, 123456.7, 1e-30, 1e15])
def test_constant_channels_have_no_variance_at_all(shape, layout, value):
    factors = uniform(shape[1], low=0.5, high=2)
    constants = (value * factors).reshape(1, -1, *[1] * (len(shape) - 2))
    x = in_layout(constants.expand(shape).contiguous(), layout)
    mean, var = moments(x)
    assert var.count_nonzero() == 0, f"{var.count_nonzero()} of {len(var)} variances are not 0, up to {var.max():g}"
    torch.testing.assert_close(mean.double(), constants.flatten().double(), rtol=2e-7, atol=0)


def test_one_element_is_its_own_mean():
    x = randn(5, 3, 1, 1)
    mean, var = ops.group_moments(x, torch.arange(6), backend="cpp")
    assert torch.equal(mean, x[:, :, 0, 0]) and var.count_nonzero() == 0


# ---- 10⁸ elements a channel ----

BLOCK, REPEATS = 10**6, 100


@pytest.mark.parametrize(
    "shape, layout, dtype",
    [
        ((1, 1, 10_000, 10_000), "contiguous", torch.float32),
        ((1_562_500, 1, 8, 8), "contiguous", torch.bfloat16),
        ((16, 2, 2500, 2500), "channels_last", torch.bfloat16),
        ((10**8, 1), "contiguous", torch.float32),
    ],
    ids=["plane", "small_planes", "folded", "no_spatial"],
)
def test_a_hundred_million_elements_a_channel(shape, layout, dtype):
    """REPEATS times a block of integers, shifted by one each time: exact in x's dtype, and so is what is expected."""
    low = -64 if dtype == torch.bfloat16 else 2**12
    block = torch.randint(low, low + 128, (BLOCK,), generator=torch.Generator().manual_seed(0)).to(dtype)
    column = (block + torch.arange(REPEATS, dtype=dtype)[:, None]).view(-1)  # [10⁸]
    channels = shape[1]
    signs = torch.tensor([1, -1][:channels])
    rows = column[:, None] if channels == 1 else torch.stack([column, -column], 1)  # [10⁸, C]
    n, _, *spatial = shape
    x = rows.view(n, *spatial, channels).movedim(-1, 1) if layout == "channels_last" else rows.view(shape)
    mean, var = ops.group_moments(x, backend="cpp")
    expected_mean = (block.double().mean() + (REPEATS - 1) / 2) * signs.double()
    expected_var = (block.double().var(correction=0) + (REPEATS**2 - 1) / 12).expand(channels)
    assert_moments_close(mean[0], expected_mean, dtype)
    assert_moments_close(var[0], expected_var, dtype)


@pytest.mark.parametrize(
    "shape, layout",
    [((16, 64, 56, 56), "channels_last"), ((8, 256, 28, 28), "channels_last"), ((2000, 32, 7, 7), "contiguous")],
    ids=["rows_folded", "rows", "small_planes"],
)
def test_sums_of_many_squares_do_not_lean(shape, layout):
    """Values of few kinds, such as pixels, have squares of few kinds, and a sum much larger than they rounds each kind its own
    way: the error grows with the sum's length, and has one sign in all channels, so that it shows in their mean."""
    x = torch.randint(-32, 33, shape, generator=torch.Generator().manual_seed(0)) / 8
    x = in_layout(x, layout)
    expected = moments_in_float64(x)[1]
    error = (moments(x)[1].double() - expected) / expected  # [C]
    assert error.mean().abs() < TOLERANCES[torch.float32].moments_relative / 2
    assert_moments_close(moments(x)[1], expected, torch.float32)


# ---- the ends of float32's range ----


@every_walk
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_denormal_values_are_not_flushed(shape, layout, residual):
    """Multiples of the smallest float32, some 10⁻⁴¹ in size: exact, and their mean is rounded once."""
    steps = torch.randint(-(2**13), 2**15, shape, generator=torch.Generator().manual_seed(0))
    x = in_layout((steps.double() * SMALLEST).float(), layout)
    assert x.count_nonzero() > 0.9 * x.numel()
    scale, zero = torch.full((shape[1],), 1.5), torch.zeros(shape[1])
    more = x.flip(0) if residual else None
    for act in ("identity", "relu", "leaky_relu"):
        y, mean, var = ops.bn_act(x, scale, zero, residual=more, act=act, backend="cpp")
        expected_mean, _ = moments_in_float64(x)
        expected = reference.bn_act(
            x.double(), None if more is None else more.double(), scale.double(), zero.double(), act, 0.01
        )
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=2 * SMALLEST)
        torch.testing.assert_close(mean[0].double(), expected_mean, rtol=1e-6, atol=2 * SMALLEST)
        assert var.count_nonzero() == 0  # some 10⁻⁸², far below the smallest


@every_walk
def test_denormal_gradients_are_not_flushed(shape, layout):
    x = in_layout(randn(*shape), layout).requires_grad_()
    scale, zero = torch.full((shape[1],), 0.5), torch.zeros(shape[1])
    steps = torch.randint(-(2**15), 2**15, shape, generator=torch.Generator().manual_seed(1))
    dy = in_layout((steps.double() * SMALLEST).float(), layout)
    y, _, _ = ops.bn_act(x, scale, zero, act="relu", backend="cpp")
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx.double(), 0.5 * dy.double() * (x > 0), rtol=0, atol=SMALLEST)


@every_walk
def test_denormal_variances_are_not_flushed(shape, layout):
    x = in_layout(1e-20 * randn(*shape), layout)
    _, var = moments(x)
    _, expected = moments_in_float64(x)
    assert expected.min() > 1e3 * SMALLEST
    torch.testing.assert_close(var.double(), expected, rtol=2e-6, atol=2 * SMALLEST)


@every_walk
@pytest.mark.parametrize("size", [1e15, 1e17, 1e18, 1e19])
def test_large_variances_that_float32_can_hold(shape, layout, size):
    """Var = size²/3, at most 3·10³⁷: the squares' sum may pass float32's 3·10³⁸, the variance does not."""
    x = in_layout(uniform(*shape, low=-size, high=size), layout)
    mean, var = moments(x)
    expected_mean, expected_var = moments_in_float64(x)
    assert expected_var.float().isfinite().all()
    torch.testing.assert_close(mean.double() / size, expected_mean / size, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), expected_var, rtol=2e-6, atol=0)


@every_walk
@pytest.mark.parametrize("size", [1e21, 1e30, 1e35, 1e37, 3.4e38])
def test_a_variance_beyond_float32_is_inf_and_the_mean_is_right(shape, layout, size):
    """As float64 rounded to float32 has it, and the reference in float32, which torch sums in float64."""
    x = in_layout(uniform(*shape, low=0.5 * size, high=size), layout)
    assert x.isfinite().all()
    expected_mean, expected_var = moments_in_float64(x)
    assert (expected_var.float() == math.inf).all()
    plain_mean, plain_var = reference.group_moments(x, one_group(x))
    assert plain_mean.isfinite().all() and (plain_var == math.inf).all()
    mean, var = moments(x)
    assert (var == math.inf).all(), f"variances {var[:4].tolist()}, expected inf"
    torch.testing.assert_close(mean.double() / size, expected_mean / size, rtol=2e-6, atol=0)


@every_walk
def test_the_output_at_the_top_of_float32(shape, layout):
    x = in_layout(uniform(*shape, low=-3.4e38, high=3.4e38), layout)
    one, zero = torch.ones(shape[1]), torch.zeros(shape[1])
    for act in ("identity", "relu", "relu6", "leaky_relu"):
        y, _, _ = ops.bn_act(x, one, zero, act=act, slope=0.5, backend="cpp")
        assert torch.equal(y, reference.activation(x, act, 0.5))


# ---- NaN and inf stay where they are ----


@every_walk
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["first", "last"])
def test_a_value_that_is_not_finite_touches_its_own_group_and_channel_alone(shape, layout, value, where):
    n, channels = shape[:2]
    starts = torch.tensor([0, n // 3, n // 3, n])
    # The bad element is the first of the second group, or its last, in a channel of its own.
    sample, channel, position = (n // 3, 0, 0) if where == "first" else (n - 1, channels - 1, -1)
    clean = in_layout(randn(*shape), layout)
    dy, residual = in_layout(randn(*shape, seed=1), layout), in_layout(randn(*shape, seed=2), layout)
    bad = clean.clone()
    bad[(sample, channel, *[position] * (len(shape) - 2))] = value
    scale, shift = uniform(channels, low=0.5, high=2), randn(channels)
    weights = randn(2, 3, channels, seed=3)

    def run(x):
        x = x.requires_grad_()
        y, mean, var = ops.bn_act(x, scale, shift, group_starts=starts, residual=residual, act="silu", backend="cpp")
        (dx,) = torch.autograd.grad([y, mean, var], x, [dy, weights[0], weights[1]])
        return y.detach(), mean.detach(), var.detach(), dx

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


# ---- the same bits ----


def forward_and_backward(x, dy, residual, act, starts):
    channels = x.shape[1]
    scale, shift = uniform(channels, low=0.5, high=2), randn(channels)
    x = x.detach().requires_grad_()
    residual = None if residual is None else residual.detach().requires_grad_()
    y, mean, var = ops.bn_act(x, scale, shift, group_starts=starts, residual=residual, act=act, backend="cpp")
    inputs = [x] if residual is None else [x, residual]
    cotangents = [dy, randn(*mean.shape), randn(*var.shape, seed=1)]
    return y.detach(), mean.detach(), var.detach(), *torch.autograd.grad([y, mean, var], inputs, cotangents)


@pytest.mark.parametrize(
    "shape, layout",
    [
        ((24, 17, 50, 51), "contiguous"),
        ((700, 33, 10, 11), "contiguous"),
        ((24, 70, 30, 31), "channels_last"),
        ((24, 2100, 5, 5), "channels_last"),
        ((24, 3, 120, 121), "channels_last"),
        ((20_000, 100), "contiguous"),
        ((400_000, 3), "contiguous"),
    ],
    ids=["planes", "small_planes", "rows", "rows_of_several_tiles", "few_channels_folded", "no_spatial", "no_spatial_folded"],
)
@pytest.mark.parametrize("act, has_residual", [("silu", False), ("relu", True)])
def test_same_bits_at_any_number_of_threads(shape, layout, act, has_residual):
    n = shape[0]
    starts = torch.tensor([0, n // 4, n // 4, n // 4 + 1, n])
    tensors = [in_layout(randn(*shape, seed=seed), layout) for seed in range(3)]
    x, dy, residual = tensors if has_residual else (*tensors[:2], None)
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3, 4, 1):
            torch.set_num_threads(count)
            runs.append(forward_and_backward(x, dy, residual, act, starts))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


@every_walk
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_same_bits_at_any_address(shape, layout, dtype):
    """A batch's slice starts anywhere; what its neighbours are must not decide how sums are rounded."""
    x, dy, residual = (in_layout(randn(*shape, seed=seed).to(dtype), layout) for seed in range(3))

    def moved(tensor, elements):
        memory = torch.empty(tensor.numel() + elements, dtype=dtype)
        return memory[elements:].as_strided(tensor.shape, tensor.stride(), elements).copy_(tensor)

    starts = torch.tensor([0, shape[0] // 2, shape[0]])
    for act in ("relu", "silu"):
        expected = forward_and_backward(x, dy, residual, act, starts)
        for elements in (1, 3, 8):
            actual = forward_and_backward(*(moved(t, elements) for t in (x, dy, residual)), act, starts)
            assert all(torch.equal(a, b) for a, b in zip(actual, expected))


@every_walk
def test_a_group_s_moments_do_not_depend_on_its_neighbours(shape, layout):
    n = shape[0]
    x = in_layout(randn(*shape), layout)
    mean, var = ops.group_moments(x, torch.tensor([0, n // 3, n]), backend="cpp")
    alone = ops.group_moments(x[n // 3 :], backend="cpp")
    assert torch.equal(mean[1], alone[0][0]) and torch.equal(var[1], alone[1][0])
    changed = x.clone()
    changed[: n // 3] = 1e30
    again = ops.group_moments(changed, torch.tensor([0, n // 3, n]), backend="cpp")
    assert torch.equal(again[0][1], mean[1]) and torch.equal(again[1][1], var[1])
