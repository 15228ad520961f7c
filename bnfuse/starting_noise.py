"""What images start from: noise of their own, white or with the spectrum of photographs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def starting_noise(
    seeds: Sequence[int], channels: int, size: tuple[int, int], scale: float = 1.0, exponent: float = 0.0
) -> Tensor:
    """Gaussian noise, an image for each seed, whatever the other seeds are.

    With an exponent the amplitude falls with the spatial frequency f as 1/f^exponent, about 1 in photographs (Field, "Relations
    between the statistics of natural images and the response properties of cortical cells", JOSA A 1987), down to that of one
    period an image, which the mean has too. Images then differ in brightness and colour as a whole, as photographs do and those
    from white noise hardly do: statistics of a batch do not ask for it.

    Parameters
    ----------
    seeds : of the N images
    size : (H, W)
    scale : standard deviation, over all pixels of many images
    exponent : 0 is white

    Returns
    -------
    float32 [N, channels, H, W], channels_last
    """
    # Drawn in place: a tensor an image would leave as many holes in the C library's heap, over which the small tensors of the
    # steps would spread.
    noise = torch.empty(len(seeds), channels, *size)
    gain = _gain(size, exponent) if exponent else None
    for row, seed in enumerate(seeds):
        noise[row].normal_(generator=torch.Generator().manual_seed(seed))
        if gain is not None:
            noise[row] = torch.fft.irfft2(torch.fft.rfft2(noise[row]) * gain[:, : size[1] // 2 + 1], s=size)
    return noise.mul_(scale).contiguous(memory_format=torch.channels_last)


def _gain(size: tuple[int, int], exponent: float) -> Tensor:
    """The factor of each frequency, [H, W]; of their squares the mean is 1, so that the noise's variance stays."""
    height, width = size
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None])
    gain = frequency.clamp_min(1 / max(size)) ** -exponent
    return gain / gain.square().mean().sqrt()
