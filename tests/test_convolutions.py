"""The convolution that images enter, over cells of pixels: the same values, gradients, layouts and errors as torch's own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fusion import kept_bytes
from torch import nn
from torch.autograd import gradgradcheck

from bnfuse import convolutions, freeze, fuse
from bnfuse.convolutions import FrozenConvolution, ImageConvolution, gains_by_cells

LAYOUTS = [torch.contiguous_format, torch.channels_last]
RESNETS = dict(kernel_size=7, stride=2, padding=3)


def make(channels: int = 3, *, dtype=torch.float64, outputs: int = 5, **options) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(channels, outputs, **(options or RESNETS)).to(dtype).requires_grad_(False)


def images(*shape: int, dtype=torch.float64, layout=torch.contiguous_format) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=layout).requires_grad_()


def run(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the images' gradient."""
    y = module(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    return y.detach(), torch.autograd.grad(y, x, weights)[0]


def in_cells(monkeypatch) -> list:
    """Notes each call that goes over cells."""
    seen, real = [], ImageConvolution._in_cells
    monkeypatch.setattr(ImageConvolution, "_in_cells", lambda *a: (seen.append(a[1].shape), real(*a))[1])
    return seen


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(2, 4),
    st.tuples(st.integers(1, 11), st.integers(1, 11)),
    st.tuples(st.integers(0, 4), st.integers(0, 4)),
    st.tuples(st.integers(1, 25), st.integers(1, 25)),
    st.sampled_from(LAYOUTS),
    st.booleans(),
    st.integers(0, 2),
)
def test_it_gives_torchs_values_and_gradient(channels, stride, kernel, padding, size, layout, bias, more_channels):
    """Also where the last rows enter no output, where cells reach beyond the images, and with channels of zeros."""
    size = [max(n, k - 2 * p) for n, k, p in zip(size, kernel, padding)]
    conv = make(channels, kernel_size=kernel, stride=stride, padding=padding, bias=bias)
    x = images(2, channels, *size, layout=layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolutions, "_more_channels", lambda x, stride: more_channels)
        seen = in_cells(patch)
        found = run(ImageConvolution(conv), x)
    assert seen
    for actual, expected in zip(found, run(conv, x)):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("of_weight", LAYOUTS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_it_is_as_exact_as_torchs_and_lays_out_as_it_does(dtype, limit, layout, of_weight, channels):
    conv, x = make(channels, dtype=dtype), images(2, channels, 33, 40, dtype=dtype, layout=layout)
    conv = conv.to(memory_format=of_weight)
    exact = run(make(channels), x.detach().double().requires_grad_())
    for actual, torchs, wide in zip(run(ImageConvolution(conv), x), run(conv, x), exact):
        assert actual.dtype == dtype and actual.stride() == torchs.stride()
        assert (actual - wide).norm() <= limit * wide.norm()


@pytest.mark.parametrize(
    "options, gains",
    [
        (dict(kernel_size=7, stride=2, padding=3), True),  # ResNets
        (dict(kernel_size=11, stride=4, padding=2), True),  # AlexNet
        (dict(kernel_size=16, stride=16), True),  # patches
        (dict(kernel_size=3, stride=2, padding=1), False),  # MobileNets: nearly half of the taps would be zeros
        (dict(kernel_size=3, padding=1), False),
        (dict(kernel_size=7, stride=(2, 1)), False),
        (dict(kernel_size=7, stride=2, dilation=2), False),
        (dict(kernel_size=7, stride=2, groups=3, outputs=6), False),
        (dict(kernel_size=7, stride=2, channels=5), False),  # no images
    ],
    ids=str,
)
def test_which_convolutions_go_over_cells(options, gains):
    conv = make(**options)
    assert gains_by_cells(conv) == gains
    outputs = conv.out_channels
    model = nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(outputs, 2))
    freeze(model.double())
    x = torch.randn(2, conv.in_channels, 33, 36, dtype=torch.float64)
    for trace in (True, False):
        fused = fuse(model, trace=trace)
        assert [type(m) for m in fused.modules() if isinstance(m, FrozenConvolution)] == [
            ImageConvolution if gains else FrozenConvolution
        ]
        torch.testing.assert_close(fused(x.requires_grad_())[0], model(x))


def test_images_that_ask_for_no_gradient_have_torchs_bits(monkeypatch):
    """As statistics are recorded, and labels computed."""
    seen, conv, x = in_cells(monkeypatch), make(), images(2, 3, 20, 20)
    with torch.no_grad():
        assert ImageConvolution(conv)(x).equal(conv(x))
    assert ImageConvolution(conv)(x.detach()).equal(conv(x)) and not seen


def test_it_keeps_its_weight_alone():
    conv, x = make(dtype=torch.float32), images(4, 3, 64, 64, dtype=torch.float32)
    kept = kept_bytes(lambda: ImageConvolution(conv)(x))
    assert kept == 5 * 12 * 4 * 4 * 4  # float32 [5, 12, 4, 4]


def test_what_does_not_fit_has_torchs_message():
    frozen = ImageConvolution(make())
    for shape in ((2, 4, 20, 20), (2, 3, 0, 20), (3, 20)):
        with pytest.raises(RuntimeError) as torchs:
            make()(images(*shape))
        with pytest.raises(RuntimeError) as ours:
            frozen(images(*shape))
        assert str(ours.value) == str(torchs.value)
    assert frozen(images(3, 20, 20)).shape == (5, 10, 10)  # one image, unbatched


def test_unfrozen_it_trains_and_a_weight_that_is_loaded_later_counts():
    conv, x = make(), images(2, 3, 20, 20)
    frozen = ImageConvolution(conv)
    conv.load_state_dict({name: 2 * value for name, value in conv.state_dict().items()})
    torch.testing.assert_close(frozen(x), conv(x))
    conv.requires_grad_()
    frozen(x).sum().backward()
    assert conv.weight.grad is not None


def test_under_autocast_it_computes_in_16_bits():
    conv, x = make(dtype=torch.float32), images(2, 3, 33, 33, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = ImageConvolution(conv)(x), conv(x)
    (gradient,) = torch.autograd.grad(y.float().sum(), x)
    assert y.dtype == torch.bfloat16 and gradient.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


def test_it_compiles_into_one_graph():
    conv, x = make(), images(2, 3, 20, 20)
    compiled = torch.compile(ImageConvolution(conv), fullgraph=True, backend="aot_eager")
    for actual, expected in zip(run(compiled, x), run(conv, x)):
        torch.testing.assert_close(actual, expected)


def test_without_the_extension_it_is_the_same(monkeypatch):
    monkeypatch.setattr(convolutions.backends, "extension", None)
    seen, conv, x = in_cells(monkeypatch), make(), images(2, 3, 20, 20)
    model = freeze(nn.Sequential(conv, nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(500, 2)).double())
    torch.testing.assert_close(fuse(model, backend="reference")(x)[0], model(x))
    assert seen


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_second_derivatives(layout):
    frozen = ImageConvolution(make(1, kernel_size=5, stride=2, padding=1, outputs=2))
    x = images(1, 1, 6, 5, layout=layout)
    assert gradgradcheck(lambda x: frozen(x).pow(3), (x,))


def test_it_runs_on_the_meta_device():
    x = images(2, 3, 20, 20).detach().to("meta").requires_grad_()
    (gradient,) = torch.autograd.grad(ImageConvolution(make().to("meta"))(x).sum(), x)
    assert gradient.is_meta and gradient.shape == x.shape
