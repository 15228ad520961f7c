"""The noise that images start from: its spectrum, its scale, and that each image's is its own."""

import pytest
import torch

from bnfuse import InputError, SynthesisConfig
from bnfuse.starting_noise import starting_noise


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


def test_a_config_refuses_an_exponent_that_is_none():
    for value in (-1.0, float("nan")):
        with pytest.raises(InputError, match="noise_exponent must be at least 0"):
            SynthesisConfig(noise_exponent=value)
