"""The specification itself, against independent formulas, plain loops and autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_elements_close, assert_moments_close

from bnfuse import reference

KINKS = torch.tensor([-math.inf, -7, -3, -1, -0.0, 0.0, 1, 3, 6, 7, math.inf], dtype=torch.float64)


def textbook_activation(z: float, act: str, slope: float) -> float:
    return {
        "identity": lambda: z,
        "relu": lambda: max(z, 0.0),
        "relu6": lambda: min(max(z, 0.0), 6.0),
        "leaky_relu": lambda: z if z > 0 else slope * z,
        "silu": lambda: z / (1 + math.exp(-z)),
        "hardswish": lambda: z * min(max(z + 3, 0.0), 6.0) / 6,
    }[act]()


@pytest.mark.parametrize("act", reference.ACTIVATIONS)
def test_activation_is_the_textbook_formula(act):
    z = torch.linspace(-8, 8, 161, dtype=torch.float64)
    expected = torch.tensor([textbook_activation(v, act, 0.1) for v in z.tolist()], dtype=torch.float64)
    assert_elements_close(reference.activation(z, act, 0.1), expected, torch.float64)


@pytest.mark.parametrize("act", reference.ACTIVATIONS)
def test_activation_derivative_is_autograd_s_at_kinks_too(act):
    z = torch.cat([torch.linspace(-8, 8, 160, dtype=torch.float64), KINKS[1:-1]]).requires_grad_()
    (expected,) = torch.autograd.grad(reference.activation(z, act, 0.1).sum(), z)
    assert_elements_close(reference.activation_derivative(z, act, 0.1).detach(), expected, torch.float64)


@pytest.mark.parametrize("act", reference.ACTIVATIONS)
def test_activation_lets_nan_through(act):
    assert reference.activation(torch.tensor([math.nan]), act, 0.1).isnan().all()


def random_site(n=5, c=3, spatial=(4, 2), seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)
    return draw(n, c, *spatial), draw(n, c, *spatial), draw(c), draw(c)


GROUP_STARTS = torch.tensor([0, 2, 2, 5])  # two samples, none, three


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("act", reference.ACTIVATIONS)
def test_bn_backward_is_the_gradient_of_bn_act_and_the_moments(act, with_residual):
    x, residual, scale, shift = random_site()
    residual = residual.requires_grad_() if with_residual else None
    x.requires_grad_()
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(x.shape, dtype=x.dtype, generator=generator)
    dmean, dvar = torch.randn(2, 3, 3, dtype=x.dtype, generator=generator)

    y = reference.bn_act(x, residual, scale, shift, act, 0.1)
    mean, var = reference.group_moments(x, GROUP_STARTS)
    loss = (y * dy).sum() + (mean * dmean).sum() + (var * dvar).sum()
    expected = torch.autograd.grad(loss, [x, residual] if with_residual else [x])

    detached = residual.detach() if with_residual else None
    with torch.no_grad():
        y2, mean2, var2, mask = reference.bn_forward(x, detached, scale, shift, GROUP_STARTS, act, 0.1)
        dx, dresidual = reference.bn_backward(
            dy, x, detached, mask, scale, shift, mean2, dmean, dvar, GROUP_STARTS, act, 0.1, with_residual
        )
    assert_elements_close(y2, y.detach(), torch.float64)
    assert_moments_close(mean2, mean.detach(), torch.float64)
    assert_moments_close(var2, var.detach(), torch.float64)
    assert_elements_close(dx, expected[0], torch.float64)
    if with_residual:
        assert_elements_close(dresidual, expected[1], torch.float64)
        assert bool(mask.numel()) == (act in reference.TWO_SLOPE_ACTIVATIONS)


@pytest.mark.parametrize("act", reference.ACTIVATIONS)
def test_bn_act_and_moments_pass_gradcheck_twice(act):
    x, residual, scale, shift = random_site(n=3, c=2, spatial=(2,))
    starts = torch.tensor([0, 1, 3])

    def site(x, residual):
        return reference.bn_act(x, residual, scale[:2], shift[:2], act, 0.1), *reference.group_moments(x, starts)

    inputs = x.requires_grad_(), residual.requires_grad_()
    assert torch.autograd.gradcheck(site, inputs)
    assert torch.autograd.gradgradcheck(site, inputs)


def test_group_moments_against_a_plain_loop():
    x, _, _, _ = random_site(n=6)
    starts = [0, 1, 1, 4, 6]
    mean, var = reference.group_moments(x, torch.tensor(starts))
    for g, (begin, end) in enumerate(zip(starts[:-1], starts[1:])):
        for c in range(x.shape[1]):
            values = [v for n in range(begin, end) for v in x[n, c].flatten().tolist()]
            m = sum(values) / len(values) if values else 0.0
            v = sum((value - m) ** 2 for value in values) / len(values) if values else 0.0
            assert mean[g, c].item() == pytest.approx(m, abs=1e-12)
            assert var[g, c].item() == pytest.approx(v, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_group_moments_are_float32_for_narrower_input(dtype):
    mean, var = reference.group_moments(torch.ones(2, 3, 4, dtype=dtype), torch.tensor([0, 2]))
    assert mean.dtype == var.dtype == torch.float32


def test_group_moments_of_nothing_are_zero():
    for shape in [(0, 3, 2), (2, 3, 0), (2, 0, 4)]:
        mean, var = reference.group_moments(torch.empty(shape), torch.tensor([0, shape[0]]))
        assert mean.shape == var.shape == (1, shape[1])
        assert not mean.any() and not var.any()


# ---- the mask ----


@given(
    n=st.integers(0, 3),
    c=st.integers(1, 20),
    spatial=st.lists(st.integers(1, 5), max_size=3),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_mask_unpacks_to_what_was_packed(n, c, spatial, channels_last, seed):
    x = torch.empty(n, c, *spatial)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    bits = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = reference.pack_mask(bits, x)
    assert mask.shape == reference.mask_shape(x)
    assert torch.equal(reference.unpack_mask(mask, x), bits)


def test_mask_bit_j_of_byte_i_is_element_8i_plus_j():
    x = torch.empty(1, 1, 11)
    bits = torch.zeros(1, 1, 11, dtype=torch.bool)
    bits[0, 0, [0, 3, 10]] = True
    assert reference.pack_mask(bits, x).tolist() == [[0b1001, 0b100]]


def test_mask_rows_are_positions_when_channels_last():
    x = torch.empty(1, 3, 2).movedim(1, -1).contiguous().movedim(-1, 1)
    bits = torch.tensor([[[1, 0], [0, 1], [1, 1]]], dtype=torch.bool)  # [N, C, L]
    assert reference.pack_mask(bits, x).tolist() == [[0b101], [0b110]]


# ---- distances ----

SITE_CHANNELS = torch.tensor([2, 3, 1])


def plain_distance(
    mean,
    var,
    target_mean,
    target_var,
    channels,
    *,
    distance,
    use_std=False,
    eps=1e-8,
    slack=0.0,
    mean_weight=1.0,
    var_weight=1.0,
):
    """bn_distance as loops over plain floats: [G][S]."""
    result = []
    for row in range(len(mean)):
        first, sites = 0, []
        for size in channels:
            terms = {"mean": [], "var": []}
            divergence = 0.0
            for c in range(first, first + size):
                m, v, tm, tv = (t[row][c] for t in (mean, var, target_mean, target_var))
                divergence += (
                    math.log(math.sqrt(tv + eps) / math.sqrt(v + eps)) + (v + eps + (m - tm) ** 2) / (2 * (tv + eps)) - 0.5
                )
                if use_std:
                    v, tv = math.sqrt(v + eps), math.sqrt(tv + eps)
                terms["mean"].append(m - tm)
                terms["var"].append(v - tv)
            norm = {
                "l2": lambda d: math.sqrt(sum(x * x for x in d)),
                "l2_squared": lambda d: sum(x * x for x in d),
                "mse": lambda d: sum(x * x for x in d) / len(d),
                "l1": lambda d: sum(abs(x) for x in d) / len(d),
                "hinge": lambda d: sum(max(abs(x) - slack, 0.0) ** 2 for x in d),
                "kl": None,
            }[distance]
            sites.append(
                divergence / size if norm is None else mean_weight * norm(terms["mean"]) + var_weight * norm(terms["var"])
            )
            first += size
        result.append(sites)
    return result


def random_moments(seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean, target_mean = torch.randn(2, 2, 6, dtype=torch.float64, generator=generator)
    var, target_var = torch.rand(2, 2, 6, dtype=torch.float64, generator=generator) + 0.1
    return mean, var, target_mean, target_var


@pytest.mark.parametrize("use_std", [False, True])
@pytest.mark.parametrize("distance", reference.DISTANCES)
def test_bn_distance_against_plain_loops(distance, use_std):
    moments = random_moments()
    options = dict(distance=distance, use_std=use_std, slack=0.2, mean_weight=0.7, var_weight=1.3)
    expected = plain_distance(*(m.tolist() for m in moments), SITE_CHANNELS.tolist(), **options)
    actual = reference.bn_distance(*moments, SITE_CHANNELS, **options)
    assert_elements_close(actual, torch.tensor(expected, dtype=torch.float64), torch.float64)


@pytest.mark.parametrize("distance", ["kl", "kl_reverse"])
def test_bn_distance_kl_is_torch_s_divergence_of_gaussians(distance):
    mean, var, target_mean, target_var = random_moments()
    ours = torch.distributions.Normal(mean, var.sqrt())
    theirs = torch.distributions.Normal(target_mean, target_var.sqrt())
    pair = (ours, theirs) if distance == "kl" else (theirs, ours)
    per_channel = torch.distributions.kl_divergence(*pair)
    expected = torch.stack([p.mean(1) for p in per_channel.split(SITE_CHANNELS.tolist(), dim=1)], dim=1)
    actual = reference.bn_distance(mean, var, target_mean, target_var, SITE_CHANNELS, distance=distance, eps=0.0)
    assert_elements_close(actual, expected, torch.float64)


@pytest.mark.parametrize("distance", (*reference.DISTANCES, *reference.EAGER_DISTANCES))
def test_bn_distance_passes_gradcheck(distance):
    mean, var, target_mean, target_var = random_moments()

    def loss(mean, var):
        return reference.bn_distance(mean, var, target_mean, target_var, SITE_CHANNELS, distance=distance, slack=0.2)

    assert torch.autograd.gradcheck(loss, (mean.requires_grad_(), var.requires_grad_()))


@pytest.mark.parametrize("distance", (*reference.DISTANCES, *reference.EAGER_DISTANCES))
def test_bn_distance_at_its_target_is_zero_with_zero_gradient(distance):
    mean, var, _, _ = random_moments()
    moments = mean.clone().requires_grad_(), var.clone().requires_grad_()
    loss = reference.bn_distance(*moments, mean, var, SITE_CHANNELS, distance=distance)
    gradients = torch.autograd.grad(loss.sum(), moments)
    assert_elements_close(loss.detach(), torch.zeros(2, 3, dtype=torch.float64), torch.float64)
    for gradient in gradients:
        assert_elements_close(gradient, torch.zeros_like(gradient), torch.float64)


def test_bn_act_equals_torch_s_batch_norm_in_eval_mode():
    bn = torch.nn.BatchNorm2d(3).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for values in (bn.weight, bn.bias, bn.running_mean):
            values.copy_(torch.randn(3, generator=generator))
        bn.running_var.copy_(torch.rand(3, generator=generator) + 0.5)
        x, residual, _, _ = random_site()
        scale = bn.weight / (bn.running_var + bn.eps).sqrt()
        shift = bn.bias - bn.running_mean * scale
        expected = F.relu(bn(x) + residual)
        assert_elements_close(reference.bn_act(x, residual, scale, shift, "relu", 0.0), expected, torch.float64)
