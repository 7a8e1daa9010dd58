"""The chart of docs and README: how many times the memory limit each library takes, shape by shape."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import altair as alt
import vl_convert

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

OTHERS = {"JAX": "triangle-up", "TensorFlow": "triangle-down", "ONNX Runtime": "cross", "oneDNN": "triangle-right"}
# colour and shape of each; ours and torch in the pages' colours for with and without
LOOKS = {
    "ours": ("with", "circle"),
    "torch": ("without", "square"),
    "torch.compile": ("without-2", "diamond"),
    **{name: ("neutral", shape) for name, shape in OTHERS.items()},
}
PANELS = (
    ("Train forward, float32", "forward", False),
    ("BN + ReLU forward + backward, float32", "step", False),
    ("Train forward, float32, channels_last", "forward", True),
    ("BN + ReLU forward + backward, float32, channels_last", "step", True),
)
WIDTH, ROW = 520, 21
TICKS = (1, 2, 3, 5, 10, 20, 50, 100, 200)
TITLE = "Time as a multiple of the memory limit; 1 is as fast as torch moves the bytes"


def chart(rows: Sequence[Mapping[str, Any]]) -> str:
    """The chart as a file of its own, in the colours of the pages, light or dark as the reader has it."""
    data = [[_marks(row) for row in _of_panel(rows, case, last)] for _, case, last in PANELS]
    shown = [mark["times"] for panel in data for row in panel for mark in row]
    last = [marks for marks in data if marks][-1]
    domain = [0.9 * min(1, *shown), 1.1 * max(shown)]
    panels = [
        _panel(title, [mark for row in marks for mark in row], domain, caption=TITLE if marks is last else None)
        for (title, *_), marks in zip(PANELS, data, strict=True)
        if marks
    ]
    whole = alt.VConcatChart(vconcat=panels, spacing=14, config=_config(), background="var(--ground)")
    return _standing_alone(vl_convert.vegalite_to_svg(whole.to_dict()))


def _of_panel(rows: Sequence[Mapping[str, Any]], case: str, last: bool) -> list[Mapping[str, Any]]:
    chosen = [
        row
        for row in rows
        if row["case"] == case and row["channels_last"] == last and row["dtype"] == "float32" and len(row["shape"]) == 4
    ]
    return sorted(chosen, key=lambda row: row["bytes"])


def _marks(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    shape = f"{'×'.join(map(str, row['shape']))}  {row['bytes'] / 1e6:.0f} MB"
    sides = row["contestants"]
    return [
        {"shape": shape, "library": name, "times": round(sides[name]["to_limit"]["median"], 3)}
        for name in LOOKS
        if "to_limit" in sides.get(name, {})
    ]


def _panel(title: str, marks: list[dict[str, Any]], domain: list[float], *, caption: str | None) -> alt.LayerChart:
    order = list(dict.fromkeys(mark["shape"] for mark in marks))
    ticks = [tick for tick in TICKS if domain[0] <= tick <= domain[1]]
    axis = alt.Axis(values=ticks, title=caption)
    names = list(LOOKS)
    colours = alt.Scale(domain=names, range=[f"var(--{colour})" for colour, _ in LOOKS.values()])
    shapes = alt.Scale(domain=names, range=[shape for _, shape in LOOKS.values()])
    legend = alt.Legend(title=None, orient="top", columns=len(names))
    points = (
        alt.Chart(alt.InlineData(values=marks))
        .mark_point(filled=True, opacity=1, size=60)
        .encode(
            x=alt.X("times:Q", scale=alt.Scale(type="log", domain=domain, nice=False), axis=axis),
            y=alt.Y(
                "shape:N", title=None, sort=order, axis=alt.Axis(labelLimit=0, ticks=False, domain=False, grid=True)
            ),
            color=alt.Color("library:N", scale=colours, legend=legend),
            shape=alt.Shape("library:N", scale=shapes, legend=legend),
        )
    )
    limit = alt.Chart(alt.InlineData(values=[{"times": 1}])).mark_rule(strokeDash=[5, 4], color="var(--axis)")
    return alt.LayerChart(
        layer=[limit.encode(x=alt.X("times:Q", axis=axis)), points],
        width=WIDTH,
        height=ROW * len(order),
        title=alt.Title(title),
    )


def _config() -> alt.Config:
    text = {"labelColor": "var(--muted)", "labelFontSize": 11}
    title = {"titleColor": "var(--muted)", "titleFontSize": 11, "titleFontWeight": "normal"}
    rules = {"gridColor": "var(--grid)", "domainColor": "var(--axis)", "tickColor": "var(--axis)"}
    return alt.Config(
        axis=alt.AxisConfig.from_dict(text | title | rules),
        font="Liberation Sans, Arial, Helvetica, sans-serif",
        legend=alt.LegendConfig.from_dict(text),
        title=alt.TitleConfig(anchor="start", color="var(--ink)", fontSize=12, fontWeight="normal"),
        view=alt.ViewConfig(stroke=None),
    )


def _standing_alone(svg: str) -> str:
    """The drawing with the variables that a page would define, and a title for those who do not see it."""
    css = files("batchnorm").joinpath("templates/report.css").read_text(encoding="utf-8")
    light, dark = (_used(block, svg) for block in re.findall(r":root \{(.*?)\}", css, flags=re.DOTALL)[:2])
    style = f"<style>:root{{{light}}}@media (prefers-color-scheme: dark){{:root{{{dark}}}}}</style>"
    return re.sub(r"(<svg [^>]*>)", rf"\1<title>{TITLE}</title>{style}", svg, count=1) + "\n"


def _used(block: str, svg: str) -> str:
    """The definitions of a block of CSS that the drawing uses."""
    return "".join(
        f"{name}:{value};" for name, value in re.findall(r"(--[\w-]+): ([^;]+);", block) if f"var({name})" in svg
    )
