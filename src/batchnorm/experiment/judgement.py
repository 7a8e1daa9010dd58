"""Verdicts: the confidence interval of the effects of several seeds decides about a criterion."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import partial
from typing import Literal

from batchnorm.experiment.figures_in_words import Figure, filled, in_words
from batchnorm.files.room_tables import Table, room_table

# A run that never reaches the target counts as reaching it at the last step; the effect is then a bound
Bound = Literal["", "at least", "at most"]
Interval = tuple[float, float]
Json = dict[str, object]


@dataclass(frozen=True, slots=True)
class Criterion:
    """What a claim must show, fixed before anything is measured.

    The confidence interval of the effect decides: if it is inside ``supported``, the claim is supported; if it is
    inside ``opposite``, the opposite is; otherwise the claim is not supported.

    Args:
        key: Name of the criterion, ``<claim>-<quantity>``.
        question: One sentence that a newcomer understands, ending in a question mark.
        quantity: The quantity that is computed for each seed, with its unit.
        supported: Open interval of effects that support the claim.
        opposite: Open interval of effects that show the opposite; None if no effect shows it.
        guard: The condition under which the compared networks ("arms") can be compared, in words; "" if there is no
            condition.
        log: Base of the logarithm if the effect is the logarithm of a ratio, else 0.
        compares: The two sides of the comparison and its condition; "" if ``quantity`` names them.
    """

    key: str
    question: str
    quantity: str
    supported: Interval
    opposite: Interval | None = None
    guard: str = ""
    log: int = 0
    compares: str = ""

    @property
    def effect(self) -> str:
        """The quantity that is computed for each seed, in words."""
        logarithm = f"log{self.log} of " if self.log else ""
        return f"{logarithm}{self.quantity}" + (f", {self.compares}" if self.compares else "")

    @classmethod
    def read(cls, key: str, table: Table, figures: Mapping[str, Figure]) -> Criterion:
        """A criterion from an entry of a file ``criteria.toml``; ``figures`` replace the names in braces in its texts.

        In the file, ``above = x`` means effects above x as ``supported`` and effects below -x as ``opposite``. If the
        effect is a logarithm, the numbers in the file are ratios.
        """
        names = ("question", "quantity", "guard", "compares")
        question, quantity, guard, compares = (filled(table.get(name, ""), figures) for name in names)
        supported, opposite = _regions(table, _LOGARITHMS[table.get("log", 0)])
        return cls(key, question, quantity, supported, opposite, guard, table.get("log", 0), compares)

    def natural(self, effect: float) -> float:
        """The effect as a ratio if it is a logarithm, else the effect itself; infinity if the ratio is too large."""
        try:
            return float(self.log**effect) if self.log else effect
        except OverflowError:
            return math.inf

    def to_dict(self) -> Json:
        """The criterion as data."""
        names = ("key", "question", "effect", "supported", "opposite", "guard")
        return {name: getattr(self, name) for name in names}


def _regions(table: Table, scale: Callable[[float], float]) -> tuple[Interval, Interval | None]:
    if "above" in table:
        least = scale(table["above"])
        return (least, math.inf), (-math.inf, -least)
    supported, opposite = (
        (scale(ends[0]), scale(ends[1])) for ends in (table["supported"], table.get("opposite", (1, 1)))
    )
    return supported, opposite if "opposite" in table else None


def _log(log: Callable[[float], float], ratio: float) -> float:
    return log(ratio) if ratio else -math.inf


_LOGARITHMS: dict[int, Callable[[float], float]] = {
    0: float,
    2: partial(_log, math.log2),
    10: partial(_log, math.log10),
}


@dataclass(frozen=True, slots=True)
class Estimate:
    """Mean of an effect over seeds, with the confidence interval from ``low`` to ``high`` of confidence ``level``."""

    mean: float
    low: float
    high: float
    level: float
    values: tuple[float, ...]


def estimate(values: Sequence[float], level: float) -> Estimate:
    """Mean over two or more seeds with Student's t interval; equal values give an interval of width 0."""
    import numpy as np
    from scipy import stats

    values = [float(value) for value in values]
    mean = float(np.mean(values))
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * error
    return Estimate(mean, mean - half, mean + half, level, tuple(values))


class Status(StrEnum):
    """Outcome of a criterion."""

    SUPPORTED = "SUPPORTED"
    NOT_SUPPORTED = "NOT SUPPORTED"
    OPPOSITE = "OPPOSITE"
    INVALID = "INVALID"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of a criterion with its figures, from which every sentence about it is made.

    Args:
        criterion: The criterion.
        status: The outcome.
        estimate: The effect; None if it could not be computed.
        words: The measurement as a template that names its figures, such as "{fast} steps instead of {slow}".
        figures: Figure in ``words`` -> its value, a number or a text.
        bound: "at least" or "at most" if one side never reached the target, else "".
        failed_guard: The failed condition with its number if the status is INVALID, else "".
    """

    criterion: Criterion
    status: Status
    estimate: Estimate | None
    words: str
    figures: Mapping[str, Figure] = field(default_factory=dict)
    bound: Bound = ""
    failed_guard: str = ""

    @property
    def sentence(self) -> str:
        """The measurement in plain words with its numbers, such as "30 steps instead of 120 (4.0× as many)."."""
        return in_words(self.words, self.figures, bound=self.bound and f"{self.bound} ")

    @property
    def statement(self) -> str:
        """``failed_guard`` if there is one, else ``sentence``."""
        return self.failed_guard or self.sentence

    @property
    def heading(self) -> str:
        """``statement`` as a heading, without a full stop."""
        return self.statement.removesuffix(".")

    @property
    def ratios(self) -> tuple[float, float, float]:
        """Effect and ends of its interval, as ratios if the effect is a logarithm; NaN without an estimate."""
        if self.estimate is None:
            return math.nan, math.nan, math.nan
        low, high = self.estimate.low, self.estimate.high
        return self.criterion.natural(self.estimate.mean), self.criterion.natural(low), self.criterion.natural(high)

    def to_dict(self) -> Json:
        """The verdict as data."""
        return {
            "criterion": self.criterion.to_dict(),
            "status": self.status,
            "estimate": None if self.estimate is None else asdict(self.estimate),
            "sentence": self.sentence,
            "failed_guard": self.failed_guard,
        }


@dataclass(frozen=True, slots=True)
class Criteria(Mapping[str, Criterion]):
    """All criteria of a package by key, with their version and confidence level.

    Args:
        version: Version of the criteria; it is increased when a criterion changes.
        level: Confidence level of the intervals that decide the verdicts.
        table: The criteria in the order of the questions.
    """

    version: str
    level: float
    table: tuple[Criterion, ...]

    @classmethod
    def read(cls, room: str, **figures: Figure) -> Criteria:
        """The criteria in the file ``criteria.toml`` of a package; ``figures`` replace the names in braces."""
        file = room_table(room, "criteria")
        entries = ((key, table) for key, table in file.items() if isinstance(table, dict))
        return cls(file["version"], file["level"], tuple(Criterion.read(key, t, figures) for key, t in entries))

    def __getitem__(self, key: str) -> Criterion:
        return {criterion.key: criterion for criterion in self.table}[key]

    def __iter__(self) -> Iterator[str]:
        return (criterion.key for criterion in self.table)

    def __len__(self) -> int:
        return len(self.table)

    def of(self, claim: str) -> list[Criterion]:
        """The criteria of one claim, the main criterion first."""
        return [criterion for criterion in self.table if criterion.key.startswith(f"{claim}-")]

    def judge(
        self, key: str, values: Sequence[float], words: str, figures: Mapping[str, Figure] | None = None, /, *,
        bound: Bound = "", failed_guard: str = "", **more: Figure,
    ) -> Verdict:  # fmt: skip
        """The verdict on one criterion.

        Args:
            key: The criterion's key.
            values: The effect for each seed; with fewer than two values, or one that is not finite, the verdict is
                INVALID.
            words: The measurement as a template that names its figures. If there is no estimate, and the template is ""
                or a figure is not finite, a standard sentence is used instead.
            figures: Numbers and names for the template; more of them as keywords.
            bound: "at least" or "at most" if the effect is a bound, else "".
            failed_guard: The condition that failed, with its number; makes the verdict INVALID.
        """
        finite = len(values) > 1 and all(map(math.isfinite, values))
        failed = failed_guard or ("" if finite else "the effect is not a finite number in every seed")
        effect = estimate(values, self.level) if finite else None
        status = status_of(self[key], effect) if effect and not failed else Status.INVALID
        named = {**(figures or {}), **more}
        plain = {name: value if isinstance(value, (str, int)) else float(value) for name, value in named.items()}
        if not finite and (not words or any(isinstance(v, float) and not math.isfinite(v) for v in plain.values())):
            words = "The arms could not be compared."
        return Verdict(self[key], status, effect, words, plain, bound, failed)

    def unjudged(self, claim: str, reason: str) -> list[Verdict]:
        """An INVALID verdict with this reason for every criterion of a claim."""
        return [self.judge(criterion.key, [], "", failed_guard=reason) for criterion in self.of(claim)]


def status_of(criterion: Criterion, measured: Estimate) -> Status:
    """The outcome: which region contains the whole confidence interval."""
    if _inside(measured, criterion.supported):
        return Status.SUPPORTED
    if criterion.opposite is not None and _inside(measured, criterion.opposite):
        return Status.OPPOSITE
    return Status.NOT_SUPPORTED


def _inside(measured: Estimate, interval: Interval) -> bool:
    return interval[0] < measured.low and measured.high < interval[1]
