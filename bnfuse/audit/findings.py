"""What a measure hands back: figures for each arm, controls, pictures, and words. Nothing is computed here, nothing drawn."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

LEAK, NO_LEAK, DIAGNOSTIC, VOID, NOT_RUN = "leak", "no leak seen", "diagnostic", "void", "not run"
OUTCOMES = (LEAK, NO_LEAK, DIAGNOSTIC, NOT_RUN)  # what a measure may set; void follows from its controls


@dataclass(frozen=True)
class Figure:
    """One number, with its 95 % interval where there is one.

    Attributes
    ----------
    name : what was measured, "PSNR to the nearest private image"
    value : nan and inf are allowed
    low, high : the interval's ends, both or neither
    unit : "dB", "%", "images"; "" for a plain number
    better : which way reads as more private, "higher" or "lower"; None where neither does
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    unit: str = ""
    better: Literal["higher", "lower"] | None = None

    def __post_init__(self):
        if (self.low is None) != (self.high is None):
            raise ValueError(
                f"the figure {self.name!r} has one end of an interval, {self.low} to {self.high}: give both or none"
            )
        if self.better not in ("higher", "lower", None):
            raise ValueError(f"the figure {self.name!r}: better is {self.better!r}, expected 'higher', 'lower' or None")


@dataclass(frozen=True)
class Control:
    """A run of the attack whose result is known beforehand.

    Attributes
    ----------
    name : what was done, "1 % of the private images planted among the synthetic ones"
    value : what came out
    needed : what had to come out, in words: "all 10 found", "≥ 30 dB"
    passed : whether it did
    kind : "positive", the attack must succeed here, or its result is void; "negative", it must find nothing
    """

    name: str
    value: float
    needed: str
    passed: bool
    kind: Literal["positive", "negative"] = "positive"

    def __post_init__(self):
        if self.kind not in ("positive", "negative"):
            raise ValueError(f"the control {self.name!r} is of kind {self.kind!r}, expected 'positive' or 'negative'")


@dataclass(frozen=True)
class Row:
    """What was measured on one arm.

    Attributes
    ----------
    arm : of `context.ARMS`, or a baseline of the measure's own, "held-out"
    figures : the first is the one that the report's table shows
    reading : in a few words, what they say: "no nearer than held-out images"
    """

    arm: str
    figures: list[Figure]
    reading: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG file below the audit's folder, and what is to be seen on it.

    Attributes
    ----------
    path : below the audit's folder
    caption : what is to be seen
    public : the picture without private images, nor what was recovered from networks trained on them: `path` where it shows
        none anyway, None where nothing would be left
    """

    path: str
    caption: str
    public: str | None = None

    def published(self) -> Picture | None:
        """This picture as anybody may see it."""
        if self.public in (None, self.path):
            return self if self.public else None
        return Picture(self.public, f"{self.caption} Private images are left out.", self.public)


@dataclass(frozen=True)
class Finding:
    """The result of one measure.

    Attributes
    ----------
    measure, title : the measure's NAME and TITLE
    rows : one for each arm, and for each baseline
    controls : at least one is positive, or the finding is void
    bounds, does_not_bound : what the result says something about, and what not, each in a plain sentence or two
    sentence : the result, for somebody who is no engineer
    outcome : what the measure concludes, one of `OUTCOMES`; read `verdict`, which heeds the controls
    pictures, notes : as many as are needed; a note is a sentence on the set-up, "VIF needs 41 pixels: images were enlarged"
    command, seconds, budget : how to make it again, how long it took; the audit fills them in
    """

    measure: str
    title: str
    rows: list[Row]
    controls: list[Control]
    bounds: str
    does_not_bound: str
    sentence: str
    outcome: str
    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    command: str = ""
    seconds: float = 0.0
    budget: str = ""

    def __post_init__(self):
        if self.outcome not in OUTCOMES:
            raise ValueError(f"{self.measure}: the outcome is {self.outcome!r}, expected one of {', '.join(OUTCOMES)}")

    @property
    def verdict(self) -> str:
        """`VOID` where a positive control failed or there is none, else the outcome."""
        if self.outcome == NOT_RUN:
            return NOT_RUN
        positive = [control for control in self.controls if control.kind == "positive"]
        return self.outcome if positive and all(control.passed for control in positive) else VOID

    @property
    def failed_controls(self) -> list[Control]:
        return [control for control in self.controls if not control.passed]

    def row(self, arm: str) -> Row | None:
        return next((row for row in self.rows if row.arm == arm), None)

    def to_dict(self) -> dict:
        """JSON's types alone; what is not finite becomes "nan", "inf" or "-inf". `from_dict` is the inverse."""
        return _spelled_out(dataclasses.asdict(self) | {"verdict": self.verdict})

    @classmethod
    def from_dict(cls, fields: dict) -> Finding:
        fields = {name: value for name, value in fields.items() if name != "verdict"}
        rows = [row | {"figures": [_figure(figure) for figure in row["figures"]]} for row in fields["rows"]]
        controls = [control | {"value": float(control["value"])} for control in fields["controls"]]
        return cls(
            **fields
            | {
                "rows": [Row(**row) for row in rows],
                "controls": [Control(**control) for control in controls],
                "pictures": [Picture(**picture) for picture in fields["pictures"]],
            }
        )


def not_run(measure: str, title: str, reason: str) -> Finding:
    """The finding of a measure that could not be made, and why."""
    return Finding(measure, title, [], [], bounds="", does_not_bound="", sentence=reason, outcome=NOT_RUN)


def _figure(fields: dict) -> Figure:
    return Figure(**fields | {key: None if fields[key] is None else float(fields[key]) for key in ("value", "low", "high")})


def _spelled_out(value):
    if isinstance(value, dict):
        return {key: _spelled_out(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_spelled_out(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value
