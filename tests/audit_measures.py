"""Measures made up for tests of the audit's frame: each verdict once, long names, pictures, what is undefined."""

import sys
import types
from dataclasses import dataclass

import torch
from PIL import Image

from bnfuse.audit import ARMS, MEASURES, Control, Figure, Finding, Row
from bnfuse.pictures import grid


@dataclass(frozen=True)
class Config:
    trials: int = 3


def module(name, run, title="A measure", needs=frozenset()):
    """A module with `run`, which `importlib` finds under "made_up_NAME"; returns that name."""
    made = types.ModuleType(f"made_up_{name}")
    made.__file__, made.NAME, made.TITLE, made.NEEDS, made.run = __file__, name, title, set(needs), run
    made.BUDGETS = {"quick": Config(), "standard": Config(30), "full": Config(300)}
    sys.modules[made.__name__] = made
    return made.__name__


def finding(context, name="first", *, positive=True, negative=True, outcome="no leak seen", title="A measure", **more):
    """A finding with a figure for each arm and the held-out images, and three pictures: private, partly so, and not."""
    rows = [
        Row(
            arm,
            [Figure("similarity to the nearest private image", 0.1 * (i + 1), 0.05, 0.5, "dB", better="lower")],
            "as expected",
        )
        for i, arm in enumerate([*ARMS, "held-out"])
    ]
    controls = [
        Control("1 % of the private images planted among the synthetic ones", 10, "all 10 found", positive),
        Control("noise in the place of images", 0.51, "at most 0.6", negative, kind="negative"),
    ]
    images = [[(context.images(arm)[i][0] * 255).byte() for i in range(6)] for arm in ARMS]
    wide = Image.linear_gradient("L").resize((2400, 300))
    pictures = [
        context.picture(f"{name}-originals", grid(images[:1]), "Original images."),
        context.picture(f"{name}-pairs", grid(images), "Original, synthetic and noised images, a row each.", grid(images[1:2])),
        context.picture(f"{name}-wide", wide, "A gradient wider than any screen.", wide),
    ]
    fields = {
        "rows": rows,
        "controls": controls,
        "bounds": "What somebody learns who sees the synthetic images and nothing else.",
        "does_not_bound": "What somebody learns who has seen the network, too.",
        "sentence": "The synthetic images are no nearer to private ones than other real images are.",
    }
    return Finding(name, title, outcome=outcome, pictures=pictures, **fields | more)


def gallery():
    """Name in `MEASURES` → module: every verdict, and what strains the page."""

    def quality(context, config):
        figures = [
            Figure(f"{name} of each synthetic image and the nearest private one of its class", v) for name, v in _ODD.items()
        ]
        rows = [Row(arm, figures, "describes, no more") for arm in (*ARMS, "held-out images, paired in the same way")]
        return finding(context, "quality", title="Image quality", outcome="diagnostic", rows=rows)

    def neighbours(context, config):
        return finding(
            context, "neighbours", title="Nearest neighbours", notes=["Copies were ranked again exactly.", "On pixels."]
        )

    def gradients(context, config):
        return finding(context, "gradients", title="Gradient matching attack", positive=False)

    def memorisation(context, config):
        return finding(context, "memorisation", title="Model memorisation attack", negative=False)

    def gan(context, config):
        return finding(context, "gan", title="G" + "AN" * 60 + "-based attack <b>with a name that has no end</b>")

    def membership(context, config):
        said = "Whose image was among the private ones can be told of 12 in 100."
        return finding(context, "membership", title="Membership inference", outcome="leak", sentence=said)

    runs = [quality, neighbours, gradients, memorisation, gan, membership]
    modules = {run.__name__: module(run.__name__, run) for run in runs}
    return modules | {"tracing": module("tracing", None, "Tracing in the statistics", {"teacher", "statistics"})}


_ODD = {"PSNR": float("inf"), "SAM": float("nan"), "MSE": 1.25e-7, "ERGAS": 12345.6, "SSIM": -0.031, "images": 1438.0}


def replace_measures(monkeypatch, modules):
    """Puts `modules` in the place of the audit's own measures."""
    for name in list(MEASURES):
        monkeypatch.delitem(MEASURES, name)
    for name, where in modules.items():
        monkeypatch.setitem(MEASURES, name, where)


def blobs(seed, count=40, size=12, channels=3, classes=4):
    """Random colours of a class each, uint8 [N, size, size, channels], and labels."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, size, size, channels), dtype=torch.uint8, generator=rng)
    return images, torch.arange(count) % classes
