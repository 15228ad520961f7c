"""Images as photographs are: the noise that they start from, and the coordinates in which they take their steps.

Photographs have an amplitude that falls with the spatial frequency as about 1/f (Field, "Relations between the statistics of
natural images and the response properties of cortical cells", JOSA A 1987) and colours that differ less than brightness does.
A loss over a network's statistics asks for neither: a step of the same size in each pixel makes fine, coloured patterns. Noise
and steps may have both instead; of steps that is the preconditioning of Olah, Mordvintsev and Schubert ("Feature
Visualization", Distill 2017), here with a cosine transform.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import InputError


def starting_noise(
    seeds: Sequence[int],
    channels: int,
    size: tuple[int, int],
    scale: float = 1.0,
    exponent: float = 0.0,
    chroma_scale: float = 1.0,
) -> Tensor:
    """Gaussian noise, an image for each seed, whatever the other seeds are.

    With an exponent the amplitude falls with the spatial frequency f as 1/f^exponent, down to that of one period an image,
    which the mean has too. Images then differ in brightness and colour as a whole, as photographs do and those from white noise
    hardly do: statistics of a batch do not ask for it.

    Parameters
    ----------
    seeds : of the N images
    size : (H, W)
    scale : standard deviation, over all pixels of many images
    exponent : 0 is white
    chroma_scale : amplitude of the differences between channels beside that of their mean; 1, each channel has its own noise

    Returns
    -------
    float32 [N, channels, H, W], channels_last
    """
    # Drawn in place: a tensor an image would leave as many holes in the C library's heap, over which the small tensors of the
    # steps would spread.
    noise = torch.empty(len(seeds), channels, *size)
    gain = _gain(_fft_frequencies(size), exponent, size) if exponent else None
    # Noise of independent channels is as independent in other orthonormal coordinates: it is drawn in those of `_colours`.
    colour_gain, colours = _colour_gain(channels, chroma_scale)[:, None, None], _colours(channels)
    for row, seed in enumerate(seeds):
        noise[row].normal_(generator=torch.Generator().manual_seed(seed))
        if gain is not None:
            noise[row] = torch.fft.irfft2(torch.fft.rfft2(noise[row]) * gain[:, : size[1] // 2 + 1], s=size)
        if chroma_scale != 1:
            noise[row] = torch.tensordot(colours.T, noise[row] * colour_gain, 1)
    return noise.mul_(scale).contiguous(memory_format=torch.channels_last)


class StepSpace:
    """Coordinates of images in which steps of the same size are large where photographs vary, and small where they do not.

    An image x is T c, with c of coefficients: T scales each by its gain, undoes an orthonormal cosine transform (DCT-II) over
    rows and columns, and an orthonormal change of channels to their mean and the differences from it. The mean square of the
    gains is 1: a step of lr in every coefficient changes pixels by lr, as root of the mean square.

    Parameters
    ----------
    channels, size : of the images, [N, C, H, W] with (H, W) = size
    exponent : gains fall with the spatial frequency f as 1/f^exponent, down to that of one period an image
    chroma_scale : gain of the differences between channels beside that of their mean
    device : of the images
    """

    def __init__(self, channels: int, size: tuple[int, int], exponent: float, chroma_scale: float, device: torch.device | str):
        self._rows, self._columns = (_cosines(n).to(device) for n in size)
        self._colours = _colours(channels).to(device)
        gain = _gain(_cosine_frequencies(size), exponent, size)
        self._gain = (_colour_gain(channels, chroma_scale)[:, None, None] * gain).to(device)

    def gradient(self, gradient: Tensor) -> Tensor:
        """Of the loss to the coefficients, from that to the pixels: Tᵀ g, the same shape, contiguous."""
        mixed = torch.einsum("oc,nchw->nohw", self._colours, gradient).contiguous()
        return (self._rows @ mixed @ self._columns.T).mul_(self._gain)

    def pixels(self, step: Tensor) -> Tensor:
        """The change of the pixels when the coefficients change by `step`: T step, the same shape."""
        return torch.einsum("oc,nohw->nchw", self._colours, self._rows.T @ (step * self._gain) @ self._columns)


def check_colours(channels: int, chroma_scale: float) -> None:
    """InputError where there are no colours to scale."""
    if channels == 1 and chroma_scale != 1:
        raise InputError(f"chroma_scale={chroma_scale} is for images of several channels, these have one: make it 1")


# ---- gains ----


def _gain(frequency: Tensor, exponent: float, size: tuple[int, int]) -> Tensor:
    """The factor of each frequency, [H, W]; of their squares the mean is 1, so that the variance of pixels stays."""
    gain = frequency.clamp_min(1 / max(size)) ** -exponent
    return gain / gain.square().mean().sqrt()


def _fft_frequencies(size: tuple[int, int]) -> Tensor:
    """Periods a pixel of a Fourier transform's coefficients, [H, W]."""
    return torch.hypot(torch.fft.fftfreq(size[0])[:, None], torch.fft.fftfreq(size[1])[None])


def _cosine_frequencies(size: tuple[int, int]) -> Tensor:
    """Periods a pixel of a cosine transform's coefficients, [H, W]: the k-th of n has k/2 periods."""
    return torch.hypot(torch.arange(size[0])[:, None] / (2 * size[0]), torch.arange(size[1])[None] / (2 * size[1]))


def _colour_gain(channels: int, chroma_scale: float) -> Tensor:
    """The factor of the channels' mean, then of the differences: [C], of mean square 1."""
    gain = torch.tensor([1.0] + [chroma_scale] * (channels - 1))
    return gain / gain.square().mean().sqrt()


# ---- orthonormal changes of coordinates: a row for each coefficient ----


def _cosines(n: int) -> Tensor:
    """The DCT-II of n values: float32 [n, n]."""
    k, position = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)[None] + 0.5
    rows = torch.cos(math.pi * k * position / n)
    return (rows / rows.norm(dim=1, keepdim=True)).float()


def _colours(channels: int) -> Tensor:
    """The mean of the channels, then each next channel against the mean of those before it (Helmert): float32 [C, C]."""
    rows = torch.ones(channels, channels, dtype=torch.float64).tril(-1)
    rows -= torch.diag(torch.arange(channels, dtype=torch.float64))
    rows[0] = 1
    return (rows / rows.norm(dim=1, keepdim=True)).float()
