"""Series: how a reader can distinguish the series of a chart, in its drawings and in its legend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from batchnorm.reporting.charts.chart_data import Chart

_SHAPES = ("circle", "square", "triangle-up", "diamond")
_DASHES = ((5, 4), (2, 3))

# A line through at most this many values also has a symbol at each value.
_DOTTED = 16


@dataclass(frozen=True, slots=True)
class Look:
    """How a series is drawn: its role decides the hue; shade, shape and dash distinguish series of one role."""

    colour: str
    shape: str
    dash: Sequence[int]


def looks(chart: Chart) -> dict[str, Look]:
    """The look of each series of ``chart``, in the order of the legend."""
    count: dict[tuple[str, bool], int] = {}
    result = {}
    for name, role in chart.series.items():
        dashed = name in chart.dashed
        nth = count[role, dashed] = count.get((role, dashed), -1) + 1
        shade = nth % len(_SHAPES)
        colour = f"var(--{role}-{shade + 1})" if shade else f"var(--{role})"
        result[name] = Look(colour, _SHAPES[shade], _DASHES[nth % len(_DASHES)] if dashed else ())
    return result


@dataclass(frozen=True, slots=True)
class Key:
    """An entry of a chart's legend: the name of a series, its look, and whether it has a line, a symbol or a band."""

    name: str
    look: Look
    line: bool
    symbol: bool
    band: bool


def legend(chart: Chart) -> list[Key]:
    """The entries of the legend of ``chart``, in order."""
    return [_key(chart, name, look) for name, look in looks(chart).items()]


def _key(chart: Chart, name: str, look: Look) -> Key:
    measured = chart.kind in {"points", "dots"}
    line = bool(look.dash) or not measured
    mine = [row for row in chart.rows if row["series"] == name]
    marked = name in short(chart) | siblings(chart)
    symbol = not look.dash and (measured or (chart.kind == "lines" and marked))
    band = chart.kind == "ribbons" or (chart.kind == "lines" and any(row.get("low") is not None for row in mine))
    return Key(name, look, line and chart.kind != "dots", symbol or chart.kind == "dots", band)


def short(chart: Chart) -> set[str]:
    """The series with at most 16 values in every panel: each of their values gets a symbol."""
    count = Counter((row["series"], row.get("row"), row.get("panel")) for row in chart.rows)
    return set(chart.series) - {place[0] for place, number in count.items() if number > _DOTTED}


def siblings(chart: Chart) -> set[str]:
    """The solid series that share their role with another solid series, so that their colours are alike."""
    solid = {name: role for name, role in chart.series.items() if name not in chart.dashed}
    count = Counter(solid.values())
    return {name for name, role in solid.items() if count[role] > 1}
