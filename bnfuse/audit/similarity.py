"""Image-quality metrics, pair by pair: how much an image looks like another.

torchmetrics computes them, but for MSE, and RASE, which it divides by the window's size twice. Each is told here what images it
can be computed on: smaller ones are enlarged first, every pixel repeated, and `remarks` says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from .imports import without_broken_torchvision

with without_broken_torchvision():
    import torchmetrics.functional.image as tm

_MSSSIM_DEFAULTS = 177  # pixels from which torchmetrics' five scales of MS-SSIM fit an image
_WINDOW = 8  # pixels, of SCC and RASE
_PIXELS = 2**21  # of the enlarged images that are compared at a time


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes
    ----------
    name : the field's name for it
    compute : released images and private ones, float32 [N, C, H, W] in [0, 1] → [N]
    similar : whether a "higher" or a "lower" value means that the two are more alike
    least : pixels a side that an image needs
    unit : as in `findings.Figure`
    """

    name: str
    compute: Callable[[Tensor, Tensor], Tensor]
    similar: Literal["higher", "lower"]
    least: int = 1
    unit: str = ""

    @property
    def private(self) -> Literal["higher", "lower"]:
        """Which way reads as more private."""
        return "lower" if self.similar == "higher" else "higher"

    def enlargement(self, height: int, width: int) -> int:
        """The whole factor by which images of this size are enlarged."""
        return math.ceil(self.least / min(height, width))


def _mse(released: Tensor, private: Tensor) -> Tensor:
    return (released - private).square().mean((1, 2, 3))


def _psnr(released: Tensor, private: Tensor) -> Tensor:
    return tm.peak_signal_noise_ratio(released, private, data_range=1.0, reduction="none", dim=(1, 2, 3))


def _ssim(released: Tensor, private: Tensor) -> Tensor:
    return tm.structural_similarity_index_measure(released, private, data_range=1.0, reduction="none")


def _ms_ssim(released: Tensor, private: Tensor) -> Tensor:
    """Wang et al. 2003. Five scales where they fit, else two; a negative correlation counts as 0, its root is undefined."""
    small = min(released.shape[2:]) < _MSSSIM_DEFAULTS
    options = {"betas": (0.5, 0.5), "kernel_size": 7} if small else {}
    return tm.multiscale_structural_similarity_index_measure(
        released, private, data_range=1.0, reduction="none", normalize="relu", **options
    )


def _uqi(released: Tensor, private: Tensor) -> Tensor:
    return tm.universal_image_quality_index(released, private, reduction="none").mean((1, 2, 3))  # it gives a map


def _vif(released: Tensor, private: Tensor) -> Tensor:
    """Its noise has variance 2 for pixels in 0..255."""
    return tm.visual_information_fidelity(255 * released, 255 * private, reduction="none")


def _sam(released: Tensor, private: Tensor) -> Tensor:
    """In radians, over the pixels that are black in neither: black has no hue. Undefined for grey images."""
    if released.shape[1] == 1:
        return torch.full((len(released),), math.nan, device=released.device)
    return tm.spectral_angle_mapper(released, private, reduction="none").nanmean((1, 2))  # it gives a map


def _ergas(released: Tensor, private: Tensor) -> Tensor:
    """Both images are of one resolution, so the ratio of resolutions is 1."""
    return tm.error_relative_global_dimensionless_synthesis(released, private, ratio=1, reduction="none")


def _scc(released: Tensor, private: Tensor) -> Tensor:
    return tm.spatial_correlation_coefficient(released, private, window_size=_WINDOW, reduction="none")


def rase(released: Tensor, private: Tensor, window: int = _WINDOW) -> Tensor:
    """Relative average spectral error in per cent: the mean of 100/M · √(mean over channels of the squared RMSE).

    The mean is over all windows within the image but those where the private image is black; M is the private image's mean in
    the window, over all channels. torchmetrics 1.9 divides M by window² once more, and averages over the batch first.

    Parameters
    ----------
    released, private : [N, C, H, W], H and W at least `window`
    window : pixels a side

    Returns
    -------
    [N]; nan where the private image is all black
    """
    squared = avg_pool2d((released - private).square(), window, stride=1).mean(1)  # [N, h, w]
    mean = avg_pool2d(private, window, stride=1).mean(1)
    return torch.where(mean > 0, 100 * squared.sqrt() / mean, math.nan).nanmean((1, 2))


METRICS = (
    Metric("PSNR", _psnr, "higher", unit="dB"),
    Metric("SSIM", _ssim, "higher", least=11),
    Metric("MSE", _mse, "lower"),
    Metric("MS-SSIM", _ms_ssim, "higher", least=22),
    Metric("UQI", _uqi, "higher", least=11),
    Metric("VIF", _vif, "higher", least=41),
    Metric("SCC", _scc, "higher", least=_WINDOW),
    Metric("SAM", _sam, "lower", unit="rad"),
    Metric("ERGAS", _ergas, "lower"),
    Metric("RASE", rase, "lower", least=_WINDOW, unit="%"),
)


def compare(
    released: Tensor,
    private: Tensor,
    metrics: Sequence[Metric] = METRICS,
    *,
    device: torch.device | str = "cpu",
    step: Callable[[int], object] = lambda pairs: None,
) -> dict[str, Tensor]:
    """Every metric of every pair.

    Parameters
    ----------
    released, private : uint8 [N, H, W, C], pair by pair
    metrics : which
    device : where
    step : called with the number of pairs done since the last call

    Returns
    -------
    metric's name → float64 [N] on the CPU. PSNR of equal images is inf; what is undefined, or divided by a black image, is nan.
    """
    height, width = released.shape[1:3]
    largest = max(metric.enlargement(height, width) for metric in metrics) ** 2 * height * width
    values = {metric.name: [] for metric in metrics}
    for start in range(0, len(released), rows := max(1, _PIXELS // largest)):
        pair = [_pixels(images[start : start + rows], device) for images in (released, private)]
        for metric in metrics:
            factor = metric.enlargement(height, width)
            values[metric.name].append(metric.compute(*(_enlarged(images, factor) for images in pair)).double().cpu())
        step(len(pair[0]))
    joined = {name: torch.cat(parts) if parts else torch.empty(0).double() for name, parts in values.items()}
    return {name: v if name == "PSNR" else torch.where(v.isfinite(), v, math.nan) for name, v in joined.items()}


def remarks(image_shape: tuple[int, int, int], metrics: Sequence[Metric] = METRICS) -> list[str]:
    """What has to be said about the metrics of images of (C, H, W): a sentence each."""
    channels, height, width = image_shape
    factors = {}
    for metric in metrics:
        if (factor := metric.enlargement(height, width)) > 1:
            factors.setdefault(factor, []).append(metric.name)
    said = [
        f"{', '.join(names)}: {height}×{width} pixels are too few; images were enlarged {factor} times, each pixel repeated."
        for factor, names in sorted(factors.items())
    ]
    names = {metric.name for metric in metrics}
    if "MS-SSIM" in names and min(height, width) < _MSSSIM_DEFAULTS:
        said.append(f"MS-SSIM: two scales, weighted equally, since its usual five need {_MSSSIM_DEFAULTS} pixels.")
    if "SAM" in names:
        of_grey = "SAM: undefined, since it is the angle between colours, and grey images have none."
        said.append(of_grey if channels == 1 else "SAM: over the pixels that are black in neither image; black has no hue.")
    if "RASE" in names:
        said.append(
            "RASE was computed here: torchmetrics divides by the window's size twice. ERGAS is for one and the same resolution."
        )
    return said


def lpips(released: Tensor, private: Tensor, *, device: torch.device | str = "cpu") -> Tensor | None:
    """Learned perceptual similarity (Zhang et al. 2018, AlexNet) of each pair, float64 [N], or None.

    None where its weights are not there. Nothing is downloaded: AlexNet's weights must be among torch.hub's. The images are
    uint8 [N, H, W, C].
    """
    if not any((Path(torch.hub.get_dir()) / "checkpoints").glob("alexnet-owt-*.pth")):
        return None
    from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

    try:
        metric = LearnedPerceptualImagePatchSimilarity("alex", reduction="none", normalize=True).to(device)
    except Exception:  # torchvision, which has the network, is missing or was built for another torch
        return None
    factor = math.ceil(64 / min(released.shape[1:3]))  # AlexNet's pooling leaves nothing of less
    values = []
    with torch.no_grad():
        for start in range(0, len(released), 32):
            pair = [_enlarged(_pixels(images[start : start + 32], device), factor) for images in (released, private)]
            metric.reset()
            metric.update(*(images.expand(-1, 3, -1, -1) for images in pair))
            values.append(torch.atleast_1d(metric.compute()).double().cpu())
    return torch.cat(values)


def _pixels(images: Tensor, device: torch.device | str) -> Tensor:
    """uint8 [N, H, W, C] → float32 [N, C, H, W] in [0, 1]."""
    return images.to(device).permute(0, 3, 1, 2).float().div_(255).contiguous()


def _enlarged(images: Tensor, factor: int) -> Tensor:
    return images if factor == 1 else images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
