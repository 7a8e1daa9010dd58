"""Drawings: the data of a ``chart_data.Chart`` as Altair charts, one for each panel.

Every panel of a chart has the same explicit scales, so panels can be compared, side by side or one below the other. The
page writes titles and the legend, because there text wraps. Colours are the page's CSS variables, such as
``var(--with)``, so a drawing has the page's light or dark theme.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from batchnorm.reporting.charts.chart_data import Chart
from batchnorm.reporting.charts.scales import Scale, scale
from batchnorm.reporting.charts.series import Look, looks, short, siblings

Row = Mapping[str, Any]

# Size in pixels of a panel with its axes, by the number of panels in a row. No panel is much wider than a telephone,
# where each panel has a row of its own, so that its labels stay readable.
_SIZES = {1: (380, 230), 2: (380, 230), 3: (300, 200)}
_SMALL = (250, 170)
_LOW = 150  # height of a panel in a chart of three or more rows


@dataclass(frozen=True, slots=True)
class Panel:
    """One drawing of a chart, and the titles of its row and column; "" without a title."""

    row: str
    column: str
    drawing: alt.LayerChart


@dataclass(frozen=True, slots=True)
class _Frame:
    """What all panels of a chart share: the chart, the looks of its series, and its scales."""

    chart: Chart
    looks: dict[str, Look]
    x: Scale
    y: Scale | None

    @property
    def clip(self) -> bool:
        """Whether an axis has a fixed domain, so that values may lie outside it."""
        return any(axis is not None and axis.domain is not None for axis in (self.chart.x, self.chart.y))


def panels(chart: Chart) -> list[Panel]:
    """Every panel of ``chart``, row by row; rows and columns have the order in which the data name them.

    A panel without data is drawn empty, so that columns stay aligned.

    Raises:
        ValueError: If the chart's data cannot be drawn; the message names the chart.
    """
    unknown = sorted({str(row.get("series")) for row in chart.rows} - set(chart.series))
    if unknown:
        raise ValueError(
            f"every row's series must be one of {', '.join(chart.series)}, got {unknown[0]!r} in {chart.title!r}. "
            "Add it to the chart's series."
        )
    y = None if chart.kind == "dots" else scale(chart, "y")
    frame = _Frame(chart, looks(chart), scale(chart, "x"), y)
    rows = list(dict.fromkeys(row.get("row", "") for row in chart.rows))
    columns = list(dict.fromkeys(row.get("panel", "") for row in chart.rows))
    width, height = _SIZES.get(len(columns), _SMALL)
    height = _dots_height(chart) if chart.kind == "dots" else min(height, _LOW if len(rows) > 2 else height)
    return [
        Panel(row, column, _draw(frame, _inside(chart, row, column), width, height))
        for row in rows
        for column in columns
    ]


def _inside(chart: Chart, row: str, column: str) -> list[Row]:
    return [r for r in chart.rows if (r.get("row", ""), r.get("panel", "")) == (row, column)]


def _draw(frame: _Frame, rows: Sequence[Row], width: int, height: int) -> alt.LayerChart:
    # Altair checks every object against its schema, which takes four fifths of the time. Drawings of one kind differ
    # only in their data, so it is enough that the tests check one drawing of each kind.
    with alt.utils.schemapi.debug_mode(False):
        layers = _KINDS[frame.chart.kind](frame, rows)
        fit = alt.AutoSizeParams(type="fit", contains="padding")
        return alt.LayerChart(layer=layers, width=width, height=height, autosize=fit, config=_config())


def _config() -> alt.Config:
    """The settings of all drawings; the page replaces the font by one of nearly the same width."""
    labels = {"labelColor": "var(--muted)", "labelFontSize": 11, "labelPadding": 4, "tickSize": 4}
    rules = {"gridColor": "var(--grid)", "domainColor": "var(--axis)", "tickColor": "var(--axis)"}
    return alt.Config(
        aria=False,
        axis=alt.AxisConfig.from_dict({**labels, **rules}),
        axisX=alt.AxisConfig(grid=False, labelFlush=False),
        axisY=alt.AxisConfig(domain=False, ticks=False, labelPadding=8),
        background="transparent",
        font="Liberation Sans, Arial, Helvetica, sans-serif",
        lineBreak="\n",
        padding=2,
        view=alt.ViewConfig(stroke=None),
    )


# -- kinds of chart -------------------------------------------------------------------------------------------


def _lines(frame: _Frame, rows: Sequence[Row]) -> list[alt.Chart]:
    rows = with_gaps(rows, frame.chart.dashed)
    bands = [_band(frame, rows, "low", "high", 0.2)] if _with_interval(rows) else []
    lines = [_line(frame, rows, name, "y") for name in frame.looks]
    return [*bands, *lines, _symbols(frame, _marked(frame.chart, rows), 36)]


def _points(frame: _Frame, rows: Sequence[Row]) -> list[alt.Chart]:
    theory = [_line(frame, rows, name, "y") for name in frame.chart.dashed]
    measured = [row for row in rows if row["series"] not in frame.chart.dashed]
    bars = _base(frame, _with_interval(measured)).mark_rule(strokeWidth=1.5, clip=frame.clip)
    bars = bars.encode(x=_x(frame, "x"), y=_y(frame, "low"), y2="high:Q")
    return [*theory, bars, _symbols(frame, measured, 55)]


def _ribbons(frame: _Frame, rows: Sequence[Row]) -> list[alt.Chart]:
    bands = [_band(frame, rows, "p2", "p98", 0.18), _band(frame, rows, "p16", "p84", 0.3)]
    return [*bands, *(_line(frame, rows, name, "p50") for name in frame.looks)]


def _dots(frame: _Frame, rows: Sequence[Row]) -> list[alt.Chart]:
    rows = [{**row, "label": _wrapped(row["label"])} for row in rows]
    place = _category(frame)
    bars = _base(frame, _with_interval(rows)).mark_rule(strokeWidth=1.5, clip=frame.clip)
    bars = bars.encode(x=_x(frame, "low"), x2="high:Q", **place)
    rows = [row for row in rows if _inside_scale(frame.x, row["value"])]
    symbols = _base(frame, rows).mark_point(filled=True, opacity=1, size=65)
    return [bars, symbols.encode(x=_x(frame, "value"), shape=_shape(frame), **place)]


_KINDS: dict[str, Callable[[_Frame, Sequence[Row]], list[alt.Chart]]] = {
    "lines": _lines,
    "points": _points,
    "ribbons": _ribbons,
    "dots": _dots,
}


# -- marks ----------------------------------------------------------------------------------------------------


def _base(frame: _Frame, rows: Iterable[Row]) -> alt.Chart:
    """A chart of ``rows`` in the colours of their series, with the tooltip of an interactive page."""
    values = [{key: value for key, value in row.items() if key not in {"row", "panel"}} for row in rows]
    colours = alt.Scale(domain=list(frame.looks), range=[look.colour for look in frame.looks.values()])
    return alt.Chart(alt.InlineData(values=values)).encode(
        color=alt.Color("series:N", legend=None, scale=colours), tooltip=_tooltip(frame)
    )


def _tooltip(frame: _Frame) -> list[alt.Tooltip]:
    series = alt.Tooltip("series:N", title="series")
    if frame.y is None:
        return [alt.Tooltip("label:N", title="what"), series, alt.Tooltip("value:Q", title=frame.x.title)]
    value = "p50" if frame.chart.kind == "ribbons" else "y"
    return [series, alt.Tooltip("x:Q", title=frame.x.title), alt.Tooltip(f"{value}:Q", title=frame.y.title)]


def _line(frame: _Frame, rows: Sequence[Row], series: str, field: str) -> alt.Chart:
    dash = list(frame.looks[series].dash) or alt.Undefined
    line = _base(frame, [row for row in rows if row["series"] == series])
    line = line.mark_line(strokeWidth=2, strokeDash=dash, clip=frame.clip)
    return line.encode(x=_x(frame, "x"), y=_y(frame, field))


def _band(frame: _Frame, rows: Sequence[Row], low: str, high: str, opacity: float) -> alt.Chart:
    area = _base(frame, rows).mark_area(opacity=opacity, clip=frame.clip)
    return area.encode(x=_x(frame, "x"), y=_y(frame, low), y2=f"{high}:Q")


def _symbols(frame: _Frame, rows: Sequence[Row], size: int) -> alt.Chart:
    # symbols outside the scale are left out, not clipped, so that a symbol on the edge stays whole
    rows = [row for row in rows if _inside_scale(frame.x, row["x"]) and _inside_scale(frame.y, row["y"])]
    symbols = _base(frame, rows).mark_point(filled=True, opacity=1, size=size)
    return symbols.encode(x=_x(frame, "x"), y=_y(frame, "y"), shape=_shape(frame))


def _inside_scale(shared: Scale | None, value: float) -> bool:
    return shared is None or shared.nice or shared.low <= value <= shared.high


def _shape(frame: _Frame) -> alt.Shape:
    shapes = alt.Scale(domain=list(frame.looks), range=[look.shape for look in frame.looks.values()])
    return alt.Shape("series:N", legend=None, scale=shapes)


# -- axes -----------------------------------------------------------------------------------------------------


def _x(frame: _Frame, field: str) -> alt.X:
    axis = _axis(frame.x, grid=frame.y is None)
    return alt.X(f"{field}:Q", title=None, scale=_scale(frame.x), axis=axis)


def _y(frame: _Frame, field: str) -> alt.Y:
    assert frame.y is not None  # noqa: S101 - only charts of dots have no y scale, and they call _category instead
    return alt.Y(f"{field}:Q", title=None, scale=_scale(frame.y), axis=_axis(frame.y, grid=True))


def _category(frame: _Frame) -> dict[str, Any]:
    """The vertical position of a dot: by its category, and within the category by its series."""
    labels = [_wrapped(label) for label in _labels(frame.chart)]
    lanes = alt.Scale(domain=labels, paddingInner=0.25, paddingOuter=0.1)
    # a label of two lines is centred if the bottom of its first line is in the middle
    baseline = alt.condition("indexof(datum.value, '\\n') >= 0", alt.value("bottom"), alt.value("middle"))
    axis = alt.Axis(labelLimit=0, labelColor="var(--ink)", labelPadding=8, labelBaseline=baseline)
    place: dict[str, object] = {"y": alt.Y("label:N", title=None, sort=labels, scale=lanes, axis=axis)}
    if _lanes(frame.chart) > 1:
        place["yOffset"] = alt.YOffset("series:N", scale=alt.Scale(domain=list(frame.looks)))
    return place


def _scale(shared: Scale) -> alt.Scale:
    domain = [shared.low, shared.high]
    if shared.log:
        return alt.Scale(type="log", domain=domain, nice=False)
    return alt.Scale(type="linear", domain=domain, nice=shared.nice, zero=False)


def _axis(shared: Scale, *, grid: bool) -> alt.Axis:
    if shared.ticks is None:
        return alt.Axis(tickCount=5, format=shared.form or alt.Undefined, grid=grid)
    # by default, a logarithmic axis leaves out the labels of some ticks
    label = f"format(datum.value, datum.value < 1e-4 || datum.value >= 1e6 ? '~e' : '{shared.form}')"
    return alt.Axis(values=list(shared.ticks), labelExpr=label, labelOverlap="greedy", grid=grid)


# -- rows -----------------------------------------------------------------------------------------------------


def _labels(chart: Chart) -> list[str]:
    return list(dict.fromkeys(row["label"] for row in chart.rows))


def _wrapped(label: str) -> str:
    """The label on at most two lines: up to 22 characters wide, or wider if two such lines are not enough."""
    lines = (textwrap.wrap(label, width, break_on_hyphens=False) for width in range(22, 22 + len(label)))
    return "\n".join(next((wrapped for wrapped in lines if len(wrapped) <= 2), [label]))


def _dots_height(chart: Chart) -> int:
    """The height at which each series of each category has its own line, and two-line labels do not overlap."""
    labels = [_wrapped(label) for label in _labels(chart)]
    room = 34 if any("\n" in label for label in labels) else 23
    return 34 + len(labels) * max(room, 10 + 13 * _lanes(chart))


def _lanes(chart: Chart) -> int:
    """Number of lines for the dots of a category: the number of series; 1 if no category has two values in a panel."""
    places = Counter((row.get("row"), row.get("panel"), row["label"]) for row in chart.rows)
    return len(chart.series) if max(places.values()) > 1 else 1


def _with_interval(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.get("low") is not None and row.get("high") is not None]


def with_gaps(rows: Sequence[Row], dashed: Sequence[str] = ()) -> list[Row]:
    """``rows`` in order of x, with an empty row wherever a series has no value at an x of the panel's other series.

    The line of the series is broken at an empty row. A series that has no value at more than a third of the x within
    its range was measured on another grid, and gets no empty rows; nor do dashed series.
    """
    solid = [row for row in rows if row["series"] not in dashed]
    grid = sorted({row["x"] for row in solid})
    gaps = []
    for name in dict.fromkeys(row["series"] for row in solid):
        mine = {row["x"] for row in solid if row["series"] == name}
        missing = [x for x in grid if min(mine) < x < max(mine) and x not in mine]
        if 2 * len(missing) <= len(mine):
            gaps += [{"x": x, "y": None, "low": None, "high": None, "series": name} for x in missing]
    return sorted([*rows, *gaps], key=lambda row: row["x"])


def _marked(chart: Chart, rows: Sequence[Row]) -> list[Row]:
    """The rows of a chart of lines that are drawn with a symbol.

    They are all rows of a short series, single values between two gaps, and about six rows of each series that shares
    its role with another.
    """
    result = []
    for nth, name in enumerate(name for name in chart.series if name not in chart.dashed):
        mine = [row for row in rows if row["series"] == name]
        if name in short(chart):
            result += mine
            continue
        exists = [False, *(row["y"] is not None for row in mine), False]
        neighbours = zip(exists, exists[2:], strict=False)
        result += [row for row, sides in zip(mine, neighbours, strict=True) if not any(sides)]
        if name in siblings(chart):
            every = max(len(mine) // 6, 1)
            result += mine[(nth + 1) * every // (len(chart.series) + 1) :: every]
    return [row for row in result if row["y"] is not None]
