"""Charts as data: rows, axes and the roles of series; the other files of this folder draw them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Row = Mapping[str, Any]
Rows = list[dict[str, Any]]

# The role of a series decides its colour in every chart: orange = without batch norm, blue = with, grey = neither.
Role = Literal["without", "with", "neutral"]

# names and roles of the series of most claims: the two arms, which train without and with batch norm
SERIES: dict[str, Role] = {"without batch norm": "without", "with batch norm": "with"}


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis: its title with the unit, and its scale. ``log`` needs positive values; ``domain`` fixes both ends."""

    title: str
    log: bool = False
    domain: tuple[float, float] | None = None
    percent: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart as data. Panels of one chart share their axes.

    The fields of a row depend on ``kind``. Every row may also have ``panel`` (the panel's column) and ``row`` (the
    panel's row); its ``series`` is a key of ``Chart.series``:

    - "lines":   x, y, series, and optionally low, high (a band); drawn in order of x
    - "points":  x, y, series, and optionally low, high (error bars): measured values against a numeric x
    - "dots":    label (a category; categories have the order of the rows), value, series, and optionally low, high
    - "ribbons": x, p2, p16, p50, p84, p98 (percentiles), series
    - "picture": png (base64), width (pixels)

    A value that does not exist (of a diverged run) has no row, so that the chart has a gap.

    Args:
        kind: How the chart is drawn.
        title: A sentence that states the finding, with its number.
        alt: A description for readers who do not see the chart.
        rows: The data: JSON values, rounded to the digits that a reader can see.
        x: Horizontal axis of "lines", "points" and "ribbons"; of "dots" the axis of the values.
        y: Vertical axis of "lines", "points" and "ribbons".
        series: Role of each series, in the order of the legend.
        dashed: Series that are drawn dashed, without symbols (theory, noise floors).
    """

    kind: Literal["lines", "points", "dots", "ribbons", "picture"]
    title: str
    alt: str
    rows: Sequence[Row]
    x: Axis | None = None
    y: Axis | None = None
    series: Mapping[str, Role] = field(default_factory=dict)
    dashed: Sequence[str] = ()
