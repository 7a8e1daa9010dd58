"""Charts as data: rows, axes and the roles of series; the rest of this folder draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Row = Mapping[str, Any]
Rows = list[dict[str, Any]]

# Colour follows meaning in every chart: orange = without batch norm, blue = with, grey = neither.
Role = Literal["without", "with", "neutral"]

# The two arms of most claims, as charts call them
SERIES: dict[str, Role] = {"without batch norm": "without", "with batch norm": "with"}


@dataclass(frozen=True, slots=True)
class Axis:
    """Title with unit, and scale; ``log`` needs positive values."""

    title: str
    log: bool = False
    domain: tuple[float, float] | None = None
    percent: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart as data. Panels of one chart share their axes.

    ``rows`` by ``kind``; ``panel`` (column) and ``row`` are optional in all of them, ``series`` is a key of
    ``series``:

    - "lines":   x, y, series, and optionally low, high (a band) - drawn in order of x
    - "points":  x, y, series, and optionally low, high (error bars): measured values against a numeric x
    - "dots":    label (category, shown in order of appearance), value, series, and optionally low, high
    - "ribbons": x, p2, p16, p50, p84, p98, series
    - "picture": png (base64), width (pixels)

    A value that does not exist (a diverged run) has no row, so that the chart has a gap.

    Args:
        kind: How it is drawn.
        title: A sentence that states the finding, with its number.
        alt: A description for readers who do not see the chart.
        rows: The data, flat, JSON-able, rounded to what the eye can use.
        x: Horizontal axis ("lines", "points", "ribbons"); for "dots" the value axis.
        y: Vertical axis ("lines", "points", "ribbons").
        series: Each series' role, in the order of the legend.
        dashed: Series drawn dashed without points (theory, noise floors).
    """

    kind: Literal["lines", "points", "dots", "ribbons", "picture"]
    title: str
    alt: str
    rows: Sequence[Row]
    x: Axis | None = None
    y: Axis | None = None
    series: Mapping[str, Role] = field(default_factory=dict)
    dashed: Sequence[str] = ()
