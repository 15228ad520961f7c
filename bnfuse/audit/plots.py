"""Distributions, and images beside what they resemble, as the measures show them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ..pictures import grid

_COLOURS = {"synthetic": "#c2410c", "noised": "#6b7280", "held-out": "#1d4ed8"}
_BINS = 40


def histograms(panels: Mapping[str, Mapping[str, Tensor]], columns: int = 2) -> Figure:
    """The distribution of each quantity on each arm, with a line at its median.

    panels : title → arm, of `_COLOURS` → [N]; what is not finite is left out
    """
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.4 * columns, 1.9 * rows), layout="constrained")
    for place, (title, arms) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.set_title(title, fontsize=9)
        finite = {arm: values[values.isfinite()].numpy() for arm, values in arms.items() if values.isfinite().any()}
        if not finite:
            axes.text(0.5, 0.5, "undefined", ha="center", transform=axes.transAxes)
            axes.set_axis_off()
            continue
        together = np.concatenate(list(finite.values()))
        bins = np.histogram_bin_edges(together, _BINS, np.quantile(together, (0.002, 0.998)))  # a few would squeeze the rest
        for arm, values in finite.items():
            share = np.full(len(values), 100 / len(values))  # in per cent, since arms differ in size
            axes.hist(values, bins, weights=share, histtype="stepfilled", color=_COLOURS[arm], alpha=0.25)
            axes.hist(values, bins, weights=share, histtype="step", color=_COLOURS[arm], label=arm)
            axes.axvline(np.median(values), color=_COLOURS[arm], linewidth=2)
        axes.tick_params(labelsize=8)
        axes.set_ylabel("% of images", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        if place == 1:
            axes.legend(fontsize=8)
    return figure


def pairs(rows: Sequence[Tensor], columns: int = 8) -> Image.Image:
    """Images one above another: each row is uint8 [N, H, W, C], of which the first `columns` are shown."""
    return grid([[image.permute(2, 0, 1) for image in row[:columns]] for row in rows])
