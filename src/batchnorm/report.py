"""The report of verdicts, on the lecture or on a user's model, with their charts, as one file.

The HTML page loads nothing, and runs a script only if it is interactive. Before each result it states the criterion.
This module turns verdicts into plain text, numbers and SVG; the layout is in templates/.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from batchnorm.experiment.judgement import Status
from batchnorm.files.whole import replacing
from batchnorm.lecture import NAMES
from batchnorm.reporting import formats
from batchnorm.reporting.blocks import CommandText, Text, TextTable
from batchnorm.reporting.page_shell import TEMPLATES, shell, template
from batchnorm.reporting.rows import Check, Report, Row, RuleWords, Suite
from batchnorm.reporting.severity import Severity
from batchnorm.reporting.text import paragraphs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from markupsafe import Markup

    from batchnorm.experiment.judgement import Verdict
    from batchnorm.experiment.outcomes import ClaimOutcome, Verdicts
    from batchnorm.reporting.blocks import Block
    from batchnorm.reporting.charts.chart_data import Axis, Chart
    from batchnorm.reporting.charts.drawings import Panel
    from batchnorm.reporting.json_values import Json

Value = float | int | str | None  # in a row of a chart
Cells = Mapping[str, Value]
GLYPHS = {Status.SUPPORTED: "✓", Status.NOT_SUPPORTED: "–", Status.OPPOSITE: "✗", Status.INVALID: "?"}

# About this many rows are in the table under a chart: enough to see the finding, few enough for one file.
_TABLE_ROWS = 40

# The labels of two bounds would touch if the bounds are closer than this percentage of a strip's width.
_CLOSE = 22

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def render(verdicts: Verdicts, *, interactive: bool = False) -> str:
    """The report as the text of one HTML page; the same verdicts give the same text.

    Args:
        verdicts: The outcomes of the claims.
        interactive: Whether charts react to the pointer. The page then contains the Vega library (0.9 MB) and runs it.
            It still loads nothing, and if scripts are off it shows the same charts.

    Raises:
        ModuleNotFoundError: If a package of the extra ``report`` is missing.
        ValueError: If a chart's data cannot be drawn; the message names the chart.
    """
    require_extra()
    from batchnorm.experiment.environment import environment
    from batchnorm.reporting.charts.series import legend

    sections = [_section(outcome) for outcome in verdicts.outcomes]
    page = template(
        "report.html", number=_number, region=_region, percent=_percent, text=_text, strip=_strip, table=_table,
        legend=legend, svg=_svg,
    )  # fmt: skip
    body = page.render(
        verdicts=verdicts, environment=environment(), sections=sections, failed=list(_failed(verdicts)),
        LEVEL=verdicts.level, VERSION=verdicts.version, claims_in_all=len(NAMES), interactive=interactive,
    )  # fmt: skip
    data = {"specifications": _specifications(sections)} if interactive else {}
    return shell(verdicts.title, body, data=data, script=_script() if interactive else "")


def report(verdicts: Verdicts, *, interactive: bool = False) -> Report:
    """The verdicts as a report, which every output format can show. No verdict makes a check fail."""
    all_verdicts = [verdict for outcome in verdicts.outcomes for verdict in outcome.result.verdicts]
    return Report(
        command="batchnorm why", target=verdicts.title, headline=verdicts.headline, seconds=verdicts.seconds,
        json=verdicts.to_json, document=_document(verdicts, all_verdicts, {}),
        full=lambda width: paragraphs(_document(verdicts, all_verdicts, GLYPHS), width),
        lines=[f"{v.criterion.key}: {v.status}: {v.statement}" for v in all_verdicts],
        records=[{"criterion": v.criterion.key, "status": v.status, "measured": v.statement} for v in all_verdicts],
        rows=[Row(rule=v.criterion.key, severity=Severity.INFO, place="model", words=f"{v.status}: {v.statement}",
                  identity=(verdicts.title, v.criterion.key)) for v in all_verdicts],
        rules=[RuleWords(code=v.criterion.key, title=v.criterion.question) for v in all_verdicts],
        suites=[Suite(name=outcome.claim.name, checks=list(map(_check, outcome.result.verdicts)))
                for outcome in verdicts.outcomes],
        page=lambda: render(verdicts, interactive=interactive),
    )  # fmt: skip


def _document(verdicts: Verdicts, all_verdicts: Sequence[Verdict], glyphs: Mapping[Status, str]) -> list[Block]:
    rows = [(v.criterion.key, f"{glyphs.get(v.status, '')} {v.status}".strip(), v.statement) for v in all_verdicts]
    table = TextTable(("criterion", "verdict", "measured"), rows, words=3)
    second = [Text(verdicts.second)] if verdicts.second else []
    return [Text(strong=verdicts.headline), *second, table, CommandText("Repeat", verdicts.command)]


def _check(verdict: Verdict) -> Check:
    is_valid = verdict.status != Status.INVALID
    output, skipped = (f"{verdict.status}: {verdict.statement}", "") if is_valid else ("", verdict.statement)
    return Check(name=verdict.criterion.key, output=output, skipped=skipped)


def write(verdicts: Verdicts, path: str | os.PathLike[str], *, interactive: bool = False) -> None:
    """Write the report to ``path``; if an error is raised, no file is written or changed.

    Args:
        verdicts: The outcomes of the claims.
        path: The file, in a folder that exists; its ending selects the format.
        interactive: As in `render`; other formats than HTML ignore it.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If no format has the ending of ``path``, or as `render` for a page.
        ModuleNotFoundError: As `render`, for a page.
    """
    path = Path(path).resolve()
    text = formats.rendered(report(verdicts, interactive=interactive), checked_suffix(path), to_file=True)
    with replacing(path) as file:
        file.write(text.rstrip("\n").encode() + b"\n")


def checked_suffix(path: Path) -> str:
    """The name of the format whose files have the ending of ``path``.

    Raises:
        ValueError: If no format has this ending.
    """
    if not (name := formats.by_suffix(path)):
        endings = ", ".join(sorted(each.suffix for each in formats.FORMATS.values() if each.suffix))
        raise ValueError(
            f"a report needs a file that ends in one of {endings}, got {path.name!r}. Write why.html, for example."
        )
    return name


def require_extra() -> None:
    """Check that the packages that draw a report are installed. Call it before an experiment that takes minutes.

    Raises:
        ModuleNotFoundError: If a package is missing; the message has the command that installs it.
    """
    try:
        for name in ("altair", "jinja2", "vl_convert"):
            import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The report needs altair, vl-convert-python and jinja2. Run: pip install 'batchnorm[report]'",
            name=error.name,
        ) from error


# -- the page's contents --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Figure:
    """A chart with its drawings; a chart of kind "picture" has no drawings.

    A chart of one column takes half of the page's width; ``lone`` says that no other chart is beside it.
    """

    chart: Chart
    name: str
    panels: Sequence[Panel]
    lone: bool = False

    @property
    def rows(self) -> list[tuple[str, list[tuple[str, Panel]]]]:
        """Row titles, each with the row's panels and the names of these panels in the page."""
        pairs = [(f"{self.name}-{n}", panel) for n, panel in enumerate(self.panels, start=1)]
        return [(row, list(group)) for row, group in groupby(pairs, key=lambda pair: pair[1].row)]

    @property
    def columns(self) -> int:
        """Number of panels side by side."""
        return min(len({panel.column for panel in self.panels}) or 1, 4)


@dataclass(frozen=True, slots=True)
class _Section:
    """A claim as the page shows it."""

    outcome: ClaimOutcome
    figures: Sequence[_Figure]

    @property
    def further(self) -> str:
        """The verdicts on the claim's criteria after the first, counted, such as "2 supported, 1 opposite"."""
        words = [verdict.status.lower() for verdict in self.outcome.result.verdicts[1:]]
        return ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))


def _section(outcome: ClaimOutcome) -> _Section:
    from batchnorm.reporting.charts.drawings import panels

    name, charts = outcome.claim.name, outcome.result.charts
    drawn = [() if chart.kind == "picture" else panels(chart) for chart in charts]
    figures = [_Figure(chart, f"{name}-{n}", drawn[n - 1]) for n, chart in enumerate(charts, start=1)]
    lone = {id(pair[0]) for pair in _neighbours(figures) if len(pair) == 1}
    return _Section(outcome, [replace(figure, lone=id(figure) in lone) for figure in figures])


def _neighbours(figures: Sequence[_Figure]) -> Iterator[list[_Figure]]:
    """Consecutive figures of one column in pairs, which the page shows side by side; if odd, the last is alone."""
    for narrow, group in groupby(figures, key=lambda figure: figure.columns == 1):
        if narrow:
            run = list(group)
            yield from (run[i : i + 2] for i in range(0, len(run), 2))


def _failed(verdicts: Verdicts) -> Iterator[tuple[ClaimOutcome, Verdict]]:
    """Every verdict that does not support its claim, with the claim."""
    for outcome in verdicts.outcomes:
        for verdict in outcome.result.verdicts:
            if verdict.status != Status.SUPPORTED:
                yield outcome, verdict


@dataclass(frozen=True, slots=True)
class _Data:
    """A chart's data as text: column titles, the cells of some rows, and the number of all rows."""

    head: Sequence[str]
    body: Sequence[Sequence[str]]
    total: int


def _table(chart: Chart) -> _Data:
    rows = _selection(chart.rows)
    columns = [(key, title, axis) for key, title, axis in _columns(chart) if any(key in row for row in rows)]
    return _Data(
        head=[title for _, title, _ in columns],
        body=[[_cell(row.get(key), axis) for key, _, axis in columns] for row in rows],
        total=len(chart.rows),
    )


def _columns(chart: Chart) -> list[tuple[str, str, Axis | None]]:
    """Key, title and axis of every field that a row may have; the axis is None for a text."""
    along, across = (chart.x.title if chart.x else "", chart.y.title if chart.y else "")
    quantiles = [(f"p{p}", f"{p} %", chart.y) for p in (2, 16, 50, 84, 98)]
    measured = chart.x if chart.kind == "dots" else chart.y
    return [
        ("row", "Row", None),
        ("panel", "Panel", None),
        ("label", "What", None),
        ("series", "Series", None),
        ("x", along, chart.x),
        ("y", across, chart.y),
        ("value", along, chart.x),
        ("low", "From", measured),
        ("high", "To", measured),
        *quantiles,
    ]


def _selection(rows: Sequence[Cells]) -> list[Cells]:
    """About ``_TABLE_ROWS`` of the rows, evenly spread over each series of each panel."""
    groups: dict[tuple[Value, ...], list[Cells]] = {}
    for row in rows:
        groups.setdefault((row.get("row"), row.get("panel"), row.get("series")), []).append(row)
    if len(rows) <= _TABLE_ROWS:
        return [row for group in groups.values() for row in group]
    size = max(2, _TABLE_ROWS // len(groups))
    return [group[round(i)] for group in groups.values() for i in _spread(len(group), size)]


def _spread(total: int, size: int) -> list[float]:
    """At most ``size`` positions from 0 to ``total`` - 1, including both ends."""
    return [i * (total - 1) / (size - 1) for i in range(size)] if total > size else list(range(total))


def _cell(value: Value, axis: Axis | None) -> str:
    if isinstance(value, float | int) and axis is not None and axis.percent:
        return f"{_number(100 * value)} %"
    return _number(value)


# -- words ----------------------------------------------------------------------------------------------------


def _number(value: Value) -> str:
    """A float with four significant digits, an integer with commas, a text unchanged, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    digits, _, power = f"{value:.4g}".partition("e")
    if power:
        return f"{digits}\u00a0×\u00a010{str(int(power)).translate(_SUPERSCRIPT)}".replace("-", "−")
    return digits.replace("-", "−")


def _region(interval: tuple[float, float]) -> str:
    """An open interval in words, such as "above 0.301"."""
    low, high = interval
    if high == float("inf"):
        return f"above {_number(low)}"
    if low == -float("inf"):
        return f"below {_number(high)}"
    return f"between {_number(low)} and {_number(high)}"


def _text(sentence: str) -> str:
    """The sentence with a no-break space before each percent sign, so that number and sign stay on one line."""
    return sentence.replace(" %", "\u00a0%")


def _percent(share: float) -> str:
    return _text(f"{100 * share:g} %")


@dataclass(frozen=True, slots=True)
class _Strip:
    """A strip that shows an estimate and its criterion's regions; positions are percentages of the strip's width."""

    regions: Mapping[str, tuple[float, float]]
    bounds: Sequence[tuple[float, str, str]]
    interval: tuple[float, float]
    mean: float
    seeds: Sequence[float]


def _strip(verdict: Verdict) -> _Strip | None:
    if (estimate := verdict.estimate) is None:
        return None
    regions = {"supported": verdict.criterion.supported, "opposite": verdict.criterion.opposite}
    bounds = [edge for region in regions.values() for edge in region or () if abs(edge) != float("inf")]
    shown = [estimate.low, estimate.high, *estimate.values, *bounds]
    margin = 0.08 * (max(shown) - min(shown)) or 1.0
    low, high = min(shown) - margin, max(shown) + margin

    def at(value: float) -> float:
        return round(100 * (min(max(value, low), high) - low) / (high - low), 2)

    return _Strip(
        regions={name: (at(region[0]), at(region[1])) for name, region in regions.items() if region},
        bounds=_labels([(at(edge), _number(edge)) for edge in sorted(set(bounds))]),
        interval=(at(estimate.low), at(estimate.high)),
        mean=at(estimate.mean),
        seeds=[at(value) for value in estimate.values],
    )


def _labels(bounds: list[tuple[float, str]]) -> list[tuple[float, str, str]]:
    """Position, text and anchor of the bounds' labels; the labels of two close bounds point away from each other."""
    close = len(bounds) == 2 and bounds[1][0] - bounds[0][0] < _CLOSE
    anchors = ("end", "start") if close else ("middle", "middle")
    return [(at, text, anchor) for (at, text), anchor in zip(bounds, anchors, strict=False)]


# -- the template ---------------------------------------------------------------------------------------------


def _svg(panel: Panel, name: str) -> Markup:
    from markupsafe import Markup

    from batchnorm.reporting.charts.svg import to_svg

    return Markup(to_svg(panel.drawing, name))  # noqa: S704 - vl-convert has escaped every text in it


def _specifications(sections: Sequence[_Section]) -> dict[str, Json]:
    """The Vega-Lite specifications that the script draws, by the name of the panel."""
    from batchnorm.reporting.charts.svg import to_specification

    return {
        name: to_specification(panel.drawing, zoom=figure.chart.kind != "dots")
        for section in sections
        for figure in section.figures
        for _, panels in figure.rows
        for name, panel in panels
    }


def _script() -> str:
    """The script that makes charts interactive, with the Vega library."""
    import vl_convert

    snippet = TEMPLATES.joinpath("interactive.js").read_text(encoding="utf-8")
    return vl_convert.javascript_bundle(snippet).replace("</script", "<\\/script")
