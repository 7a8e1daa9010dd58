"""A claim of the lecture as data: what is asked, by which pre-set criterion, what was measured, what it shows.

Nothing here computes or draws. A claim's own file measures and fills a Result; report.py and the command line
show it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Literal

# Called with the share of the claim's work that is done, 0..1.
Progress = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run of the lecture is determined by; the same settings give the same numbers.

    Args:
        seed: First seed; seed, seed + 1, ... are used.
        seeds: Number of seeds. Arms share seeds, so differences are paired.
        effort: Share of each experiment's full number of training steps, above 0 up to 1. Below 1 is for trying
            the machinery, not for verdicts.
    """

    seed: int = 0
    seeds: int = 5
    effort: float = 1.0

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise ValueError(f"seeds must be 2 or more, got {self.seeds}. One seed has no interval.")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}.")
        if not 0 < self.effort <= 1:
            raise ValueError(f"effort must be above 0 and at most 1, got {self.effort}.")

    @property
    def all_seeds(self) -> range:
        """Every seed of the run."""
        return range(self.seed, self.seed + self.seeds)

    def steps(self, full: int) -> int:
        """The number of steps where ``full`` is what a verdict needs; at least 20."""
        return max(20, round(full * self.effort))


@dataclass(frozen=True, slots=True)
class Criterion:
    """What a claim must show, fixed before anything is measured.

    The verdict is read off the confidence interval of ``effect``: inside ``supported`` the claim is supported,
    inside ``opposite`` the opposite holds, anything else is not supported.

    Args:
        key: Name, ``<claim>-<what>``.
        question: What is asked, one sentence a newcomer understands, ending in a question mark.
        effect: What is computed for each seed, with its unit.
        supported: Open interval of effects that support the claim.
        opposite: Open interval of effects that show the opposite, or None where there is none.
        guard: What must hold for the arms to be comparable, in words; "" for nothing.
    """

    key: str
    question: str
    effect: str
    supported: tuple[float, float]
    opposite: tuple[float, float] | None = None
    guard: str = ""


class Status(StrEnum):
    """Outcome of a criterion."""

    SUPPORTED = "SUPPORTED"
    NOT_SUPPORTED = "NOT SUPPORTED"
    OPPOSITE = "OPPOSITE"
    INVALID = "INVALID"


@dataclass(frozen=True, slots=True)
class Estimate:
    """Mean of an effect over seeds with its confidence interval."""

    mean: float
    low: float
    high: float
    level: float
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a criterion came to.

    Args:
        criterion: What was asked.
        status: The outcome.
        estimate: The effect; None where a guard failed before it could be computed.
        sentence: The measurement in plain words with its numbers, such as "30 steps instead of 120 (4.0× as many)".
        failed_guard: For INVALID, what did not hold, with its number.
    """

    criterion: Criterion
    status: Status
    estimate: Estimate | None
    sentence: str
    failed_guard: str = ""

    @property
    def told(self) -> str:
        """What to print beside the status: the guard that failed, else the sentence."""
        return self.failed_guard or self.sentence


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
    """A chart as data; report.py draws it. Panels of one chart share their axes.

    ``rows`` by ``kind``; ``panel`` (column) and ``row`` are optional in all of them, ``series`` is a key of
    ``series``:

    - "lines":   x, y, series, and optionally low, high (a band) - drawn in order of x
    - "points":  x, y, series, and optionally low, high (error bars): measured values against a numeric x
    - "dots":    label (category, shown in order of appearance), value, series, and optionally low, high
    - "ribbons": x, p2, p16, p50, p84, p98, series
    - "picture": png (base64), width (pixels)

    A value that does not exist (a diverged run) is left out of ``rows``, so that a gap is drawn.

    Args:
        kind: How it is drawn.
        title: A sentence that states the finding, with its number.
        alt: The same for somebody who does not see it: what is shown and what it looks like.
        rows: The data, flat, JSON-able, rounded to what the eye can use.
        x: Horizontal axis ("lines", "points", "ribbons"); for "dots" the value axis.
        y: Vertical axis ("lines", "points", "ribbons").
        series: Each series' role, in the order of the legend.
        dashed: Series drawn dashed without points (theory, noise floors).
    """

    kind: Literal["lines", "points", "dots", "ribbons", "picture"]
    title: str
    alt: str
    rows: Sequence[Mapping[str, Any]]
    x: Axis | None = None
    y: Axis | None = None
    series: Mapping[str, Role] = field(default_factory=dict)
    dashed: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim of the lecture and the experiment that tests it.

    Args:
        name: What the command line calls it.
        title: A few words.
        sentence: The lecture's sentence, in our words.
        arms: What is compared, on which data, with which budget: two to four sentences.
        how_to_read: Two sentences on reading the charts.
        not_shown: What the experiment does not show: one to three sentences.
        sources: Papers the experiment follows.
        run: Measures and returns the Result. Its module imports torch, so it is loaded when a claim runs.
    """

    name: str
    title: str
    sentence: str
    arms: str
    how_to_read: str
    not_shown: str
    sources: Sequence[str]
    run: Callable[[Settings, Progress], Result]


@dataclass(frozen=True, slots=True)
class Result:
    """What a claim's experiment measured.

    Args:
        verdicts: One for each of the claim's criteria, the main one first.
        charts: At least one.
        numbers: Further figures worth quoting, flat: "what, unit" -> number.
    """

    verdicts: Sequence[Verdict]
    charts: Sequence[Chart]
    numbers: Mapping[str, float | int | str | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-able data."""
        return asdict(self)
