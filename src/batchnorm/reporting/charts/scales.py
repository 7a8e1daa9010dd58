"""Scales: where the axes of a chart begin and end in all of its panels, and errors for data that cannot be drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from batchnorm.reporting.charts.chart_data import Axis, Chart

# The fields of rows whose values must be inside the scale, by axis and kind of chart.
_QUANTILES = ("p2", "p16", "p50", "p84", "p98")
_FIELDS = {
    "x": {"lines": ("x",), "points": ("x",), "ribbons": ("x",), "dots": ("value", "low", "high")},
    "y": {"lines": ("y", "low", "high"), "points": ("y", "low", "high"), "ribbons": _QUANTILES},
}


@dataclass(frozen=True, slots=True)
class Scale:
    """One axis of a chart, shared by its panels.

    Args:
        title: The quantity, with its unit.
        low: Value at the beginning.
        high: Value at the end, above ``low``.
        log: Whether the scale is logarithmic.
        nice: Whether the drawing library may extend it to round numbers.
        ticks: The values with a tick; None: the drawing library chooses them.
        form: The format of values, by the rules of d3; "": the drawing library chooses it.
    """

    title: str
    low: float
    high: float
    log: bool
    nice: bool
    ticks: Sequence[float] | None
    form: str


def scale(chart: Chart, which: Literal["x", "y"]) -> Scale:
    """The scale of an axis of ``chart``, the same in all panels: the axis's fixed domain, or a range of its values.

    The range contains every value and the ends of its interval. At both ends a linear range has a margin of 4 % of its
    length. If all values are equal, the margin is 4 % of their size; for values that are all 0, the range is 0 to 1.
    The margin never crosses 0, nor 100 % on an axis in percent. A linear x axis of lines and ribbons has no margin,
    unless all values are equal. On a logarithmic axis the margin is 4 % of the length in logarithms, but at least a
    factor of 1.02.

    Raises:
        ValueError: If the axis is missing, there are no values, a value is not finite, or a logarithmic axis has a
            value that is not positive; the message names the chart.
    """
    axis = chart.x if which == "x" else chart.y
    if axis is None:
        raise ValueError(
            f"a chart of {chart.kind} needs an axis for {which}, got None in {chart.title!r}. Add the axis."
        )
    values = _values(chart, which)
    _check(chart, which, axis, [*values, *(axis.domain or ())])
    low, high = axis.domain or _ends(chart, which, axis, values)
    run = which == "x" and chart.kind in {"lines", "ribbons"}
    form = "~%" if axis.percent else ",~g" if axis.log else ""
    measured = values if which == "x" and chart.kind in {"lines", "points"} else []
    ticks = log_ticks(low, high, measured) if axis.log else None
    return Scale(axis.title, low, high, axis.log, not (run or axis.log or axis.domain), ticks, form)


def _values(chart: Chart, which: str) -> list[float]:
    fields = _FIELDS[which][chart.kind]
    return [row[field] for row in chart.rows for field in fields if row.get(field) is not None]


def _check(chart: Chart, which: str, axis: Axis, values: Sequence[float]) -> None:
    """Refuse data that cannot be drawn."""
    if not values:
        raise ValueError(f"a chart needs at least one {which} value, got none in {chart.title!r}. Leave the chart out.")
    for value in values:
        if not math.isfinite(value):
            raise ValueError(
                f"{which} values must be finite, got {value} in {chart.title!r}. Leave such rows out; the chart "
                "then shows a gap."
            )
        if axis.log and value <= 0:
            raise ValueError(
                f"a logarithmic {which} axis needs positive values, got {value} in {chart.title!r}. "
                "Leave such rows out, or use a linear axis."
            )


def _ends(chart: Chart, which: str, axis: Axis, values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if axis.log:
        margin = max((high / low) ** 0.04, 1.02)
        return low / margin, high * margin
    if which == "x" and chart.kind in {"lines", "ribbons"} and low < high:
        return low, high
    margin = 0.04 * (high - low) or 0.04 * abs(high)
    if not margin:
        return 0.0, 1.0
    bounds = (0.0, 1.0) if axis.percent else (0.0,)
    bottom = max([low - margin, *(bound for bound in bounds if bound <= low and bound < high)])
    return bottom, min([high + margin, *(bound for bound in bounds if bound >= high and bound > bottom)])


def log_ticks(low: float, high: float, measured: Sequence[float] = ()) -> list[float]:
    """Ticks of a logarithmic scale: the measured values if there are 2 to 9, otherwise at most nine round numbers."""
    if 2 <= len(set(measured)) <= 9:
        return sorted(set(measured))
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for multiples in ((1, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**d for d in decades for m in multiples if low <= m * 10.0**d <= high]
        if len(ticks) <= 6:
            break
    return ticks[:: 1 + len(ticks) // 9]
