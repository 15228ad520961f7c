"""The findings as one file that opens without a network, on a phone and in print. Its words: audit.html.j2."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from .context import ARMS
from .findings import DIAGNOSTIC, LEAK, NO_LEAK, NOT_RUN, VOID, Control, Figure, Finding, Picture

# These strike whoever trains on the synthetic data; the rest, whoever is in the private data.
AGAINST_TRAINERS = ("gradients", "memorisation", "gan")

ARM_NAMES = {"original": "original images", "synthetic": "synthetic images", "noised": "noised originals"}
VERDICTS = {  # verdict → sign, CSS class, meaning
    LEAK: ("✗", "leak", "The attack gets more out of the synthetic images than it would if they gave nothing away."),
    NO_LEAK: ("✓", "clear", "The attack works where it has to, and got nothing out of the synthetic images."),
    DIAGNOSTIC: ("i", "diagnostic", "Worth knowing, but no attack: it can neither clear the images nor convict them."),
    VOID: ("∅", "void", "The attack failed where it had to succeed, so its result says nothing. Void does not mean private."),
    NOT_RUN: ("–", "not-run", "The measure was not made; the reason stands beside it."),
}

_PICTURE_BYTES = 7_000_000  # of all pictures, which base64 makes a third larger
# (largest width in pixels, bytes above which a PNG becomes a JPEG): the first that fits is taken
_QUALITIES = ((1600, 400_000), (1200, 150_000), (900, 60_000), (600, 0), (300, 0))


def render(record: dict, findings: Sequence[Finding], out: Path, *, public: bool = False) -> str:
    """The page.

    Parameters
    ----------
    record : the content of audit.json
    findings : in the order in which they are shown
    out : the audit's folder, which the pictures' paths begin from
    public : whether private images, and what was recovered from networks trained on them, are left out
    """
    if public:
        findings = [
            replace(finding, pictures=[*filter(None, map(Picture.published, finding.pictures))]) for finding in findings
        ]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "figure": figure_text,
        "interval": interval_text,
        "control": control_text,
        "duration": duration,
    }
    return environment.get_template("audit.html.j2").render(
        record=record,
        findings=findings,
        public=public,
        pictures=inlined([out / picture.path for finding in findings for picture in finding.pictures], out),
        arms=ARMS,
        arm_names=ARM_NAMES,
        verdicts=VERDICTS,
        against_trainers=AGAINST_TRAINERS,
        columns=columns,
        headline=headline,
        negative_failed=lambda finding: any(control.kind == "negative" for control in finding.failed_controls),
        table=figure_table,
    )


def columns(finding: Finding) -> list[str]:
    """The arms that the finding has, in their order, then its baselines."""
    there = [row.arm for row in finding.rows]
    return [arm for arm in ARMS if arm in there] + [arm for arm in there if arm not in ARMS]


def figure_table(finding: Finding) -> list[tuple[Figure, list[Figure | None]]]:
    """For each name of a figure: one that has it, for its unit, and that of each of `columns`, None where it has none."""
    names = dict.fromkeys(figure.name for row in finding.rows for figure in row.figures)
    by_arm = {row.arm: {figure.name: figure for figure in row.figures} for row in finding.rows}
    table = []
    for name in names:
        cells = [by_arm[arm].get(name) for arm in columns(finding)]
        table.append((next(cell for cell in cells if cell is not None), cells))
    return table


def number(value: float, like: float | None = None) -> str:
    """With three significant digits, or whole: 0.0123, 36.2, 1,438; or with as many decimals as `like` gets."""
    if math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    like = value if like is None or not math.isfinite(like) else like
    if like == int(like) and value == int(value) and abs(value) < 1e6:
        text = f"{int(value):,}"
    elif like == 0 or 1e-3 <= abs(like) < 1e6:
        decimals = 3 if like == 0 else max(0, 2 - math.floor(math.log10(abs(like))))
        text = f"{value:,.{decimals}f}"
    else:
        text = f"{value:.2e}"
    return text.replace("-", "−")


def figure_text(figure: Figure) -> str:
    """The value with its unit: "36.2 dB"."""
    return f"{number(figure.value)}{' ' if figure.unit else ''}{figure.unit}"


def interval_text(figure: Figure) -> str:
    """The interval, "35.0 to 37.1"; nothing where there is none."""
    return "" if figure.low is None else f"{number(figure.low, figure.value)} to {number(figure.high, figure.value)}"


def headline(finding: Finding) -> str:
    """What the first figure of every arm is called, if they are all called the same."""
    names = {row.figures[0].name for row in finding.rows if row.arm in ARMS and row.figures}
    return names.pop() if len(names) == 1 else ""


def control_text(control: Control) -> str:
    kind = "must succeed" if control.kind == "positive" else "must find nothing"
    return f"{kind}: needed {control.needed}, got {number(control.value)}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def inlined(paths: Sequence[Path], out: Path) -> dict[str, str]:
    """Path below `out` → a data: URI, so small that the page stays below some 10 MB."""
    for width, jpeg_above in _QUALITIES:
        encoded = {path: _encoded(path, width, jpeg_above) for path in paths}
        if sum(len(content) for _, content in encoded.values()) <= _PICTURE_BYTES:
            break
    return {
        path.relative_to(out).as_posix(): f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
        for path, (kind, content) in encoded.items()
    }


def _encoded(path: Path, width: int, jpeg_above: int) -> tuple[str, bytes]:
    """The kind and the bytes of a picture at most so wide: PNG where that is small enough, else JPEG if that is smaller."""
    png = path.read_bytes()
    with Image.open(path) as picture:
        picture.load()
    if picture.width > width:
        height = max(1, round(picture.height * width / picture.width))
        picture = picture.convert("RGBA").resize((width, height), Image.LANCZOS)
        png = _bytes(picture, format="PNG")
    if len(png) <= jpeg_above:
        return "png", png
    white = Image.new("RGBA", picture.size, "white")
    jpeg = _bytes(Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB"), format="JPEG", quality=85)
    return ("jpeg", jpeg) if len(jpeg) < len(png) else ("png", png)


def _bytes(picture: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, **options)
    return buffer.getvalue()
