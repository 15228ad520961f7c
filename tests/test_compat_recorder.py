"""A recorder keeps what BatchNorm would, of modules that keep nothing, and measures as DeepInversion's hook does."""

import copy
import io

import pytest
import torch
from tolerances import TOLERANCES, assert_moments_close
from torch import nn

from bnfuse import InputError
from bnfuse.compat import Recorder


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 4, 3))


def batches(*sizes, shape=(3, 7, 6)):
    torch.manual_seed(1)
    return [torch.randn(n, *shape) * (1 + i) + i for i, n in enumerate(sizes)]


def eager(x, mean, var):
    """DeepInversion's distance of x [N, C, L] in float64."""
    x = x.double()
    return (var.double() - x.var((0, 2), correction=0)).norm() + (mean.double() - x.mean((0, 2))).norm()


def test_it_records_the_moments_of_all_batches_together():
    model = network().double()
    recorder = Recorder(model[1])
    for part in batches(5, 3, 8):
        model(part.double())
    inputs = torch.cat([model[0](part.double()) for part in batches(5, 3, 8)]).flatten(2)  # [16, 6, L]
    assert recorder.elements == 16 * inputs.shape[2] and not recorder.running_mean.requires_grad
    torch.testing.assert_close(recorder.running_mean, inputs.mean((0, 2)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(recorder.running_var, inputs.var((0, 2), correction=0), rtol=1e-12, atol=1e-12)


def test_with_momentum_it_is_batchnorm():
    norm, recorder = nn.BatchNorm2d(6).double().train(), Recorder(group := nn.GroupNorm(3, 6).double(), momentum=0.1)
    for x in batches(5, 3, 8, 1, shape=(6, 4, 5)):
        norm(x.double())
        group(x.double())
    torch.testing.assert_close(recorder.running_mean, norm.running_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(recorder.running_var, norm.running_var, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_r_feature_and_its_gradient_are_the_eager_ones(dtype, memory_format):
    module = nn.GroupNorm(2, 6).to(dtype)
    recorder = Recorder(module)
    module(batches(9, shape=(6, 5, 4))[0].to(dtype))
    recorder.match()
    x = (batches(7, shape=(6, 5, 4))[0] * 3 - 1).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    module(x)
    (gradient,) = torch.autograd.grad(recorder.r_feature, x)
    y = x.detach().double().requires_grad_()
    expected = eager(y.flatten(2), recorder.running_mean, recorder.running_var)
    (expected_gradient,) = torch.autograd.grad(expected, y)
    tolerance = TOLERANCES[dtype]
    assert_moments_close(recorder.r_feature, expected.detach(), dtype)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=tolerance.relative, atol=tolerance.absolute)
    recorder.close()
    kept = recorder.r_feature
    module(x * 2)
    assert recorder.r_feature is kept and not module._forward_pre_hooks and "closed" in repr(recorder)


def test_tokens_outputs_and_tuples():
    class Pair(nn.Module):
        def forward(self, x):
            return x, (2 * x,)

    tokens = torch.randn(4, 9, 6).double()
    for module, at, x, seen_of in (
        (nn.LayerNorm(6).double(), None, tokens, lambda x: x.transpose(1, 2)),
        (nn.LayerNorm([9, 6]).double(), "input", tokens, lambda x: x),
        (Pair(), "output:1@last", tokens, lambda x: 2 * x.transpose(1, 2)),
        (nn.Linear(6, 2).double(), None, tokens[:, 0], lambda x: x[:, :, None]),
    ):
        seen = seen_of(x)
        recorder = Recorder(module, at=at)
        module(x)
        torch.testing.assert_close(recorder.running_mean, seen.mean((0, 2)), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(recorder.running_var, seen.var((0, 2), correction=0), rtol=1e-12, atol=1e-12)
        recorder.match()
        module(3 * x + 1)
        expected = eager(seen_of(3 * x + 1), recorder.running_mean, recorder.running_var)
        torch.testing.assert_close(recorder.r_feature, expected, rtol=1e-12, atol=1e-12)


def test_copies_of_a_network_are_without_it_and_copies_of_both_belong_together():
    model = network()
    before = set(model.state_dict())
    recorders = [Recorder(m) for m in model.modules() if isinstance(m, (nn.GroupNorm, nn.ReLU))]
    (x,) = batches(6)
    model(x)
    assert set(model.state_dict()) == before
    for recorder in recorders:
        recorder.match()
    model(x)
    count = int(recorders[0].elements)
    copy.deepcopy(model)(x * 2)
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    torch.load(buffer, weights_only=False)(x * 2)
    first = recorders[0].r_feature
    assert int(recorders[0].elements) == count and first is recorders[0].r_feature
    other, others = copy.deepcopy((model, recorders))
    assert others[0].module is other[1] and not others[0].recording
    with pytest.raises(InputError, match="measured nothing yet"):
        others[0].r_feature  # noqa: B018
    other(x * 2)
    assert others[0].r_feature > 0.1 > 1e-4 > recorders[0].r_feature
    recorders[1].close()
    closed = copy.deepcopy(recorders[1])
    assert closed._handle is None and not closed.module._forward_pre_hooks


def test_what_is_recorded_in_inference_mode_serves_outside_of_it():
    module = nn.GroupNorm(2, 6).double()
    recorder = Recorder(module)
    first, second = (part.double() for part in batches(5, 7, shape=(6, 4, 5)))
    with torch.inference_mode():
        module(first)
    module(second)
    both = torch.cat([first, second]).flatten(2)
    torch.testing.assert_close(recorder.running_var, both.var((0, 2), correction=0), rtol=1e-12, atol=1e-12)
    recorder.match()
    module(x := first.clone().requires_grad_())
    recorder.r_feature.backward()
    assert x.grad.abs().sum() > 0


def test_its_state_is_its_statistics():
    model = network()
    recorder = Recorder(model[1])
    model(batches(6)[0])
    state = recorder.state_dict()
    assert set(state) == {"running_mean", "running_var", "elements"}
    again = Recorder(network()[1])
    again.load_state_dict(state)
    again.match()
    assert again.running_var.equal(recorder.running_var) and again.running_mean.equal(recorder.running_mean)
    again.load_state_dict(Recorder(nn.ReLU()).state_dict())  # one that has recorded nothing
    assert not again.running_mean.numel()


def test_a_recorder_can_begin_anew_and_go_on():
    module = nn.GroupNorm(2, 6).double()
    recorder = Recorder(module)
    first, second = (part.double() for part in batches(5, 7, shape=(6, 4, 5)))
    module(first)
    recorder.match()
    module(second)  # leaves the statistics alone
    recorder.record()
    module(second)
    both = torch.cat([first, second]).flatten(2)
    torch.testing.assert_close(recorder.running_var, both.var((0, 2), correction=0), rtol=1e-12, atol=1e-12)
    recorder.reset()
    with pytest.raises(InputError, match="recorded nothing to match"):
        recorder.match()
    module(second)
    torch.testing.assert_close(recorder.running_mean, second.mean((0, 2, 3)), rtol=1e-12, atol=1e-12)


def test_what_it_refuses():
    with pytest.raises(InputError, match="momentum must be"):
        Recorder(nn.ReLU(), momentum=0.0)
    with pytest.raises(InputError, match="names no sites"):
        Recorder(nn.ReLU(), at="inputs")
    module = nn.Identity()
    recorder = Recorder(module)
    module(torch.randn(4, 3, 2))
    recorder.match()
    with pytest.raises(InputError, match="statistics of 3 channels, and was given 5"):
        module(torch.randn(4, 5, 2))
    with pytest.raises(InputError, match="expected floating-point values"):
        module(torch.ones(4, 3, 2, dtype=torch.int64))
