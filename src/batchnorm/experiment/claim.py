"""A claim as data: its texts, its experiment, and the verdicts, charts and numbers that the experiment returns.

Nothing is computed or drawn in this file. Each claim has its own file, which measures and returns a ``Result``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from batchnorm.experiment.figures_in_words import Figure, filled, in_words
from batchnorm.experiment.judgement import Json, Verdict
from batchnorm.experiment.run_settings import Progress, RunSettings
from batchnorm.files.room_tables import Table, room_table
from batchnorm.reporting.charts.chart_data import Axis, Chart, Role, Row

# Figures worth quoting: "quantity", "quantity, unit" or "quantity, arm" -> number; or a text; None: not measured
Numbers = dict[str, float | int | str | None]


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim, of the lecture or about a user's model, and the experiment that tests it.

    Args:
        name: Name of the claim on the command line.
        title: Title of a few words.
        sentence: What is claimed, in one or two sentences.
        arms: The arms, data and budget of the experiment.
        how_to_read: How to read the charts.
        not_shown: The limits of the experiment.
        sources: Papers that the experiment follows.
        run: Measures and returns the Result. The module of ``run`` imports torch.
    """

    name: str
    title: str
    sentence: str
    arms: str
    how_to_read: str
    not_shown: str
    sources: Sequence[str]
    run: Callable[[RunSettings, Progress], Result]

    def words(self) -> Json:
        """The texts about the claim, as data."""
        names = ("title", "sentence", "arms", "how_to_read", "not_shown")
        return {**{name: getattr(self, name) for name in names}, "sources": list(self.sources)}


def claim(room: str, name: str, run: Callable[[RunSettings, Progress], Result], **figures: Figure) -> Claim:
    """A claim with its texts from the file ``claims.toml`` of a package.

    Args:
        room: The package that has the file.
        name: The claim's entry in the file; also the claim's name unless the entry has a ``name``.
        run: Measures and returns the Result.
        figures: Numbers and words that replace the names in braces in the texts.
    """
    words = room_table(room, "claims")[name]
    texts = {key: filled(text, figures) for key, text in words.items() if isinstance(text, str)}
    return Claim(**{"name": name, **texts}, sources=words["sources"], run=run)


def chart(
    room: str, claim: str, name: str, rows: Sequence[Row], series: Mapping[str, Role] | None = None, *,
    x: Axis | None = None, y: Axis | None = None, dashed: Sequence[str] = (), **figures: Figure,
) -> Chart:  # fmt: skip
    """A chart of a claim; kind, title, description and axes are from the file ``claims.toml`` of a package.

    Args:
        room: The package that has the file.
        claim, name: The entry ``[CLAIM.charts.NAME]`` of the file.
        rows, series, dashed: As in ``Chart``; a series without a row is left out.
        x, y: Axes that depend on the measurement, in place of the file's axes.
        figures: Numbers and words that replace the names in braces; must have ``title`` if the entry has no title.
    """
    entry = room_table(room, "claims")[claim]["charts"][name]
    title = in_words(entry.get("title", "{title}"), figures)
    alt = in_words(entry["alt"], {**figures, "title": title})
    axes = [given or _axis(entry.get(axis), figures) for axis, given in (("x", x), ("y", y))]
    shown = {row.get("series") for row in rows}
    roles = {name: role for name, role in (series or {}).items() if name in shown}
    dashed = [name for name in dashed if name in shown]
    return Chart(entry["kind"], title, alt, rows, *axes, series=roles, dashed=dashed)


def _axis(entry: Table | None, figures: Mapping[str, Figure]) -> Axis | None:
    if entry is None:
        return None
    domain = entry.get("domain")
    title, log, percent = filled(entry["title"], figures), entry.get("log", False), entry.get("percent", False)
    return Axis(title, log, (domain[0], domain[1]) if domain else None, percent)


@dataclass(frozen=True, slots=True)
class Result:
    """What a claim's experiment measured.

    Args:
        verdicts: One verdict for each of the claim's criteria; the first is the main verdict.
        charts: The charts; [] if the claim could not be measured.
        numbers: Further figures worth quoting, by their names.
    """

    verdicts: Sequence[Verdict]
    charts: Sequence[Chart]
    numbers: Numbers = field(default_factory=dict)

    def to_dict(self) -> Json:
        """The result as data."""
        charts, numbers = [asdict(chart) for chart in self.charts], dict(self.numbers)
        return {"verdicts": [verdict.to_dict() for verdict in self.verdicts], "charts": charts, "numbers": numbers}
