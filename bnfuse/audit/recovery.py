"""Images that an attack recovered: how near they are to those it was after, and to private ones, and what follows from that.

Shared by the attacks on whoever trains on the published images: gradients and memorisation. They recover what was trained on,
so what counts is whether that brings them nearer to private images than held-out and published images are anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure as Plot
from scipy.stats import mannwhitneyu
from torch import Tensor

from .context import Context
from .findings import DIAGNOSTIC, LEAK, NO_LEAK, Figure, Row
from .intervals import bootstrap
from .nearest import nearest
from .similarity import METRICS, compare

NEAREST = "PSNR to the nearest private image"
LEVEL = 0.01  # of the test that recovered images are nearer to private ones than held-out images are
GAIN = 1.0  # dB by which an attack brings images nearer to private ones, for it to count
_SSIM = [metric for metric in METRICS if metric.name == "SSIM"]

BOUNDS = (
    "What somebody gets who attacks a network that was trained on the images of an arm, or its training: he recovers the "
    "images it was trained on. With synthetic images these are the published ones. So this attack strikes whoever trains on "
    "the synthetic images in the place of private ones, and the question is whether it gets any nearer to the private ones."
)
DOES_NOT_BOUND = (
    "What the synthetic images themselves give away: nothing here looks for what the recorded statistics put into them. "
    "Membership inference and tracing do. Recovering a synthetic image is no leak; that this attack recovers nothing else is "
    "no proof that the synthetic images are private."
)
NOTE = (
    f"Nearer to private images than held-out ones means: by Mann and Whitney's test at {100 * LEVEL:g} % over all attacks. A "
    f"leak is that, and nearer by {GAIN:g} dB than the synthetic images are."
)


@dataclass(frozen=True)
class Comparison:
    """Recovered images beside what they were to be and beside private ones; all float64 [N].

    Attributes
    ----------
    psnr, ssim : to the image that it should be
    nearest_psnr, nearest_ssim : to the nearest private image, in pixels
    published_psnr : of the image that it should be, to the private image nearest to that; inf for a private one
    nearest : int64 [N], indices of the nearest private images
    """

    psnr: Tensor
    ssim: Tensor
    nearest_psnr: Tensor
    nearest_ssim: Tensor
    published_psnr: Tensor
    nearest: Tensor

    def figures(self, what: str, rng: torch.Generator) -> list[Figure]:
        """The medians, that of the distance to private images first."""
        return [
            median(f"{what}: {NEAREST}", self.nearest_psnr, rng, unit="dB", better="lower"),
            median(f"{what}: SSIM to the nearest private image", self.nearest_ssim, rng, better="lower"),
            median(f"{what}: PSNR to the image trained on", self.psnr, rng, unit="dB"),
            median(f"{what}: SSIM to the image trained on", self.ssim, rng),
        ]


def compared(context: Context, recovered: Tensor, truth: Tensor) -> Comparison:
    """`recovered` and `truth` are float [N, C, H, W] in [0, 1], image by image."""
    recovered, truth = recovered.float().cpu(), truth.float().cpu()
    nearest_psnr, indices = nearest_private(context, recovered)
    return Comparison(
        psnr=psnr(recovered, truth),
        ssim=_ssim(bytes_of(recovered), bytes_of(truth)),
        nearest_psnr=nearest_psnr,
        nearest_ssim=_ssim(bytes_of(recovered), context.private.images[indices]),
        published_psnr=nearest_private(context, truth)[0],
        nearest=indices,
    )


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, float64 [N], of pixels in [0, 1]; inf where two images are equal."""
    return -10 * (images.double() - others.double()).square().flatten(1).mean(1).log10()


def _ssim(images: Tensor, others: Tensor) -> Tensor:
    """float64 [N] of uint8 [N, H, W, C] each."""
    return compare(images, others, _SSIM)["SSIM"]


def bytes_of(images: Tensor) -> Tensor:
    """float [N, C, H, W] in [0, 1] → uint8 [N, H, W, C]."""
    return (images.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def nearest_private(context: Context, images: Tensor) -> tuple[Tensor, Tensor]:
    """PSNR to the nearest private image, float64 [N], and which it is, int64 [N].

    Images are float [N, C, H, W] in [0, 1]; what lies within a rounding error of a private image counts as equal to it.
    """
    queries = images.permute(0, 2, 3, 1).float().contiguous()
    distances, indices = nearest(queries, context.private.images, 1, device=context.device)
    mse = distances[:, 0].square() / queries[0].numel()
    return torch.where(mse < 1e-12, torch.inf, -10 * mse.log10()), indices[:, 0]


def heldout_baseline(context: Context, count: int, *words: str) -> Tensor:
    """PSNR of held-out images to the nearest private ones, float64 [N], of at most `count` drawn at random."""
    heldout = context.heldout
    drawn = torch.randperm(len(heldout), generator=context.rng(*words, "held-out"))[:count]
    return nearest_private(context, heldout.batch(drawn)[0])[0]


def heldout_row(attack: str, heldout: Tensor, rng: torch.Generator, untouched: str) -> Row:
    """The baseline beside an attack's first figure of the arms; `untouched` says what was not done to these images."""
    figure = median(f"{attack}: {NEAREST}", heldout, rng, unit="dB", better="lower")
    return Row("held-out", [figure], f"{untouched}: as near as real images are anyway")


def median(name: str, values: Tensor, rng: torch.Generator, **more) -> Figure:
    """The median with its bootstrap interval; without one where values are not finite, or too few."""
    values = values[~values.isnan()]
    if not len(values):
        return Figure(name, float("nan"), **more)
    low = high = None
    if len(values) > 2 and bool(values.isfinite().all()):
        low, high = bootstrap(values, rng, torch.median)
    return Figure(name, float(values.median()), low, high, **more)


def conclude(comparisons: Sequence[Comparison], heldout: Tensor) -> tuple[str, str]:
    """The outcome for an arm, and how its figures read.

    A leak is what is nearer to private images than held-out images are (Mann and Whitney's test, Bonferroni's correction for
    several attacks) and nearer than what was published by `GAIN`. Only the former is worth knowing, but the published images'
    doing and not the attack's.
    """
    near = [c for c in comparisons if _nearer(c.nearest_psnr, heldout, LEVEL / len(comparisons))]
    if not near:
        return NO_LEAK, "no nearer to private images than held-out images are"
    if any(float(_gain(c).median()) > GAIN for c in near):
        return LEAK, "nearer to private images than held-out images and than what was trained on"
    return DIAGNOSTIC, "nearer to private images than held-out images are, as the images trained on are themselves"


def _nearer(values: Tensor, baseline: Tensor, level: float) -> bool:
    return mannwhitneyu(values.numpy(), baseline.numpy(), alternative="greater").pvalue < level


def _gain(comparison: Comparison) -> Tensor:
    """dB by which each image came nearer; 0 where it is a private one to begin with."""
    published = comparison.published_psnr
    return torch.where(published.isinf(), 0.0, comparison.nearest_psnr - published)


def sentence(attack: str, outcome: str) -> str:
    """The result in words, with what it means and what not."""
    said = {
        LEAK: f"{attack} came nearer to private images than the synthetic images are.",
        DIAGNOSTIC: f"{attack} got the published images back and came no nearer to private ones, but the published images "
        "themselves are nearer to private ones than held-out images are: see nearest neighbours.",
        NO_LEAK: f"{attack} got nothing out of networks trained on the synthetic images that is nearer to private images than "
        "other real images are.",
    }[outcome]
    return said + " This speaks for whoever trains on them; what the images themselves give away is asked by other measures."


# How labels of rows end that anybody may see, of the synthetic images' arm; a row that is called otherwise is private.
PUBLIC_ROWS = ("trained on", "recovered", "hidden", "decoded", "generated")


def sheets(rows: Mapping[str, Tensor], titles: Sequence[str], arm: str) -> tuple[Plot, Plot | None]:
    """`sheet`, and that for everybody: of the synthetic images' arm alone, with its `PUBLIC_ROWS`."""
    public = {label: images for label, images in rows.items() if label.endswith(PUBLIC_ROWS)}
    return sheet(rows, titles), sheet(public, titles) if arm == "synthetic" else None


def sheet(rows: Mapping[str, Tensor], titles: Sequence[str]) -> Plot:
    """Images one above another: label → [N, C, H, W] in [0, 1]; `titles` stand above the columns."""
    columns = len(titles)
    plot = Plot(figsize=(0.95 * columns + 1.1, 1.0 * len(rows) + 0.4), layout="constrained")
    axes = plot.subplots(len(rows), columns, squeeze=False)
    for r, (label, images) in enumerate(rows.items()):
        for c in range(columns):
            axes[r, c].set(xticks=[], yticks=[])
            if c < len(images):
                image = np.asarray(bytes_of(images[c : c + 1])[0])
                axes[r, c].imshow(image if image.shape[2] == 3 else image[..., 0], cmap="gray", vmin=0, vmax=255)
            else:
                axes[r, c].set_axis_off()
            if r == 0:
                axes[r, c].set_title(titles[c], fontsize=8)
        axes[r, 0].set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center")
    return plot
