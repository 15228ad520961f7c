"""The noise that images start from, and the coordinates of their steps: spectrum, scale, and that each image's is its own."""

import pytest
import torch
from scipy.fft import dctn, idctn

from bnfuse import InputError, SynthesisConfig
from bnfuse.optimisation import Images
from bnfuse.spectrum import StepSpace, starting_noise


def test_white_noise_is_the_generators():
    drawn = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(5))
    noise = starting_noise([4, 5], 3, (8, 8), scale=0.5)
    assert noise[1].equal(drawn * 0.5) and noise.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [(32, 32), (15, 24)])
def test_the_amplitude_falls_with_the_frequency(exponent, size):
    noise = starting_noise(range(400), 3, size, exponent=exponent).double()
    assert noise.square().mean().sqrt() == pytest.approx(1, abs=0.05)
    power = torch.fft.rfft2(noise).abs().square().mean((0, 1))
    frequency = torch.hypot(torch.fft.fftfreq(size[0])[:, None], torch.fft.rfftfreq(size[1])[None]).double()
    bands = [(frequency - f).abs().argmin() for f in (0.12, 0.2, 0.3, 0.45)]
    points = torch.stack([torch.stack((frequency.flatten()[b].log(), power.flatten()[b].log() / 2)) for b in bands])
    slopes = (points[1:, 1] - points[:-1, 1]) / (points[1:, 0] - points[:-1, 0])
    assert slopes.mean() == pytest.approx(-exponent, abs=0.15)


def test_images_differ_in_brightness_as_white_noise_does_not():
    brightness = [starting_noise(range(200), 3, (32, 32), exponent=e).mean((2, 3)).std() for e in (0.0, 1.0, 2.0)]
    assert brightness[0] < 0.04 and brightness[1] > 0.2 and brightness[2] > 0.35


def test_each_image_is_its_own_whatever_the_others_are():
    together = starting_noise([7, 8, 9], 1, (16, 16), exponent=1.0)
    assert together[1:2].equal(starting_noise([8], 1, (16, 16), exponent=1.0))


@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_colours_differ_less_than_brightness(exponent):
    noise = starting_noise(range(400), 3, (16, 16), exponent=exponent, chroma_scale=0.3).double()
    mean = noise.mean(1, keepdim=True)
    assert noise.square().mean().sqrt() == pytest.approx(1, abs=0.05)
    # of three channels the mean has one degree of freedom, the differences two
    assert ((noise - mean).square().sum() / 2 / (3 * mean.square().sum())).sqrt() == pytest.approx(0.3, abs=0.02)
    white = starting_noise(range(400), 3, (16, 16), exponent=exponent).double()
    assert torch.corrcoef(white.transpose(0, 1).flatten(1)).triu(1).abs().max() < 0.1


# ---- the coordinates of steps ----

SIZES = [(32, 32), (15, 24), (1, 1)]


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_scaled_cosines(channels, size):
    space = StepSpace(channels, size, 0.0, 1.0, "cpu")
    x = torch.randn(2, channels, *size)
    found = space.gradient(x)
    assert found[:, 0].double().numpy() == pytest.approx(
        dctn(x.double().sum(1).numpy() / channels**0.5, axes=(1, 2), norm="ortho"), abs=1e-5
    )
    torch.testing.assert_close(space.pixels(found), x, rtol=0, atol=1e-5)  # orthonormal


@pytest.mark.parametrize("size", SIZES)
def test_the_gradient_is_that_of_the_loss_to_the_coefficients(size):
    space = StepSpace(3, size, 1.0, 0.3, "cpu")
    start, weights = torch.randn(2, 3, *size), torch.randn(2, 3, *size)
    coefficients = torch.zeros(2, 3, *size, requires_grad=True)
    loss = lambda x: (weights * x.sin()).sum()
    (expected,) = torch.autograd.grad(loss(start + space.pixels(coefficients)), coefficients)
    pixels = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(pixels), pixels)
    torch.testing.assert_close(space.gradient(gradient), expected, rtol=1e-4, atol=1e-5)


def test_steps_are_as_large_as_photographs_vary():
    exponent, chroma, size = 1.0, 0.25, (32, 32)
    space = StepSpace(3, size, exponent, chroma, "cpu")
    steps = torch.randn(300, 3, *size).sign()
    pixels = space.pixels(steps).double()
    assert pixels.square().mean().sqrt() == pytest.approx(1, abs=0.05)
    mean = pixels.mean(1)
    power = torch.from_numpy(dctn(mean.numpy(), axes=(1, 2), norm="ortho")).square().mean(0)
    assert (power[0, 4] / power[0, 16]).sqrt() == pytest.approx(4, rel=0.15)
    assert (power[3, 4] / power[12, 16]).sqrt() == pytest.approx(4, rel=0.15)
    assert power[0, 0] == pytest.approx(float(power[0, 2]), rel=0.15)  # down to one period an image
    differences = (pixels - mean[:, None]).square().sum() / 2
    assert (differences / (3 * mean.square().sum())).sqrt() == pytest.approx(chroma, rel=0.05)


def test_adam_steps_in_the_coefficients_are_torchs():
    size, lr, betas = (8, 8), 0.1, (0.5, 0.9)
    space, start = StepSpace(3, size, 1.0, 0.3, "cpu"), torch.randn(2, 3, *size)
    goal = torch.from_numpy(idctn(torch.randn(2, 3, *size).numpy(), axes=(2, 3), norm="ortho"))
    loss = lambda x: (x - goal).square().sum()
    coefficients = torch.zeros(2, 3, *size, requires_grad=True)
    theirs = torch.optim.Adam([coefficients], lr=lr, betas=betas)
    ours = Images(start.clone())
    for step in range(5):
        theirs.zero_grad()
        loss(start + space.pixels(coefficients)).backward()
        theirs.step()
        for rows in (slice(0, 1), slice(1, 2)):  # an image's step is its own
            leaf = ours.on(torch.device("cpu"), rows).requires_grad_()
            (gradient,) = torch.autograd.grad((leaf - goal[rows]).square().sum(), leaf)
            ours.adam(rows, gradient, step, lr, betas, None, space)
    torch.testing.assert_close(ours.values, start + space.pixels(coefficients.detach()), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours.values, start, atol=0.1)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("noise_exponent", -1.0, "at least 0"),
        ("noise_exponent", float("nan"), "at least 0"),
        ("step_exponent", -0.5, "at least 0"),
        ("chroma_scale", 0.0, "positive"),
        ("chroma_scale", float("inf"), "positive"),
    ],
)
def test_a_config_refuses_what_is_no_spectrum(field, value, expected):
    with pytest.raises(InputError, match=f"{field} must be {expected}"):
        SynthesisConfig(**{field: value})
