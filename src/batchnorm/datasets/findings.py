"""What matters in the statistics of a data set: features that a network cannot use as they are, and their scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np

from batchnorm.datasets.data_statistics import feature_names
from batchnorm.datasets.figures import figure, percent
from batchnorm.reporting.severity import Severity

if TYPE_CHECKING:
    from batchnorm.datasets.column_statistics import ColumnStatistics
    from batchnorm.datasets.data_statistics import DataStatistics

_NAMED = 5  # names of features in one sentence
# Below this ratio of standard deviations, the loss of a linear model in two such features is at most ten times steeper
# in one than in the other per unit of standard deviation, which every optimizer copes with.
_ALIKE = 10.0


@final
@dataclass(frozen=True, slots=True)
class DataFinding:
    """One thing that matters about a column.

    Args:
        rule: Its kind, a key of ``RULES``.
        column: The column; "" if it is about all.
        words: A sentence without a full stop, which begins with the column's name.
    """

    rule: str
    column: str
    words: str


@final
@dataclass(frozen=True, slots=True)
class _Rule:
    severity: Severity
    title: str
    judge: Callable[[str, ColumnStatistics], str] | None


def findings(statistics: DataStatistics) -> list[DataFinding]:
    """Everything that matters, by kinds, in the order of ``RULES``."""
    return [*_of_columns(statistics.columns), *_scales(statistics)]


def scales(statistics: DataStatistics) -> tuple[float, tuple[str, float], tuple[str, float]] | None:
    """By what factor the standard deviations of features differ; and the features with the largest and the smallest.

    Constant features are left out. None if there are fewer than two others.
    """
    largest: list[tuple[str, float]] = []
    smallest: list[tuple[str, float]] = []
    number = 0
    for name, column in statistics.columns.items():
        std = np.where(column.std > 0, column.std, np.nan).reshape(-1)
        number += (there := int(np.isfinite(std).sum()))
        if there:
            names = feature_names(name, column.shape)
            largest.append((names[int(np.nanargmax(std))], float(np.nanmax(std))))
            smallest.append((names[int(np.nanargmin(std))], float(np.nanmin(std))))
    if number < 2:
        return None
    high, low = max(largest, key=lambda each: each[1]), min(smallest, key=lambda each: each[1])
    return high[1] / low[1], high, low


def _of_columns(columns: Mapping[str, ColumnStatistics]) -> Iterator[DataFinding]:
    for rule, about in RULES.items():
        for name, column in columns.items():
            if about.judge and (words := about.judge(name, column)):
                yield DataFinding(rule, name, words)


def _scales(statistics: DataStatistics) -> Iterator[DataFinding]:
    found = scales(statistics)
    if found and found[0] >= _ALIKE:
        ratio, (large, most), (small, least) = found
        yield DataFinding(
            "different-scales", "",
            f"standard deviations differ {figure(ratio, 2)}-fold: {large} {figure(most)}, {small} {figure(least)}",
        )  # fmt: skip


def _without_values(name: str, column: ColumnStatistics) -> str:
    return _features(name, column, column.count == 0, "has no finite value", "have no finite value")


def _constant(name: str, column: ColumnStatistics) -> str:
    flags = (column.count > 1) & (column.minimum == column.maximum)
    value = f": every value is {figure(float(column.minimum))}" if not column.shape else ""
    return _features(name, column, flags, f"is constant{value}", "are constant")


def _nan(name: str, column: ColumnStatistics) -> str:
    return _share(name, column, column.nan, "NaN")


def _infinite(name: str, column: ColumnStatistics) -> str:
    return _share(name, column, column.infinite, "infinite")


def _null(name: str, column: ColumnStatistics) -> str:
    return _share(name, column, column.null, "missing")


def _features(name: str, column: ColumnStatistics, flags: np.ndarray, one: str, several: str) -> str:
    """The sentence about the features of a column for which a flag is set; "" if there are none."""
    number, all_features = int(flags.sum()), flags.size
    if not number:
        return ""
    if all_features == 1:
        return f"{name} {one}"
    some = feature_names("", column.shape)
    named = [some[i] for i in np.flatnonzero(flags)[:_NAMED]]
    more = ", ..." if number > _NAMED else ""
    return f"{name}: {number:,} of {all_features:,} features {several}: {', '.join(named)}{more}"


def _share(name: str, column: ColumnStatistics, number: np.ndarray, what: str) -> str:
    """The sentence about the share of such values in a column; "" if there are none."""
    if not (total := int(number.sum())):
        return ""
    words = f"{name}: {percent(total / int(column.values.sum()))} of values are {what}"
    if number.size == 1 or total == number.max() * number.size:
        return words
    worst = np.unravel_index(int(number.argmax()), number.shape)
    place = ",".join(map(str, worst))
    return f"{words}, at most in feature [{place}]: {percent(float(number[worst] / column.values[worst]))}"


RULES = {
    "no-values": _Rule(Severity.WARNING, "A feature has no finite value.", _without_values),
    "constant-feature": _Rule(Severity.WARNING, "A feature has the same value in all rows.", _constant),
    "nan-values": _Rule(Severity.WARNING, "A column has NaN.", _nan),
    "infinite-values": _Rule(Severity.WARNING, "A column has infinities.", _infinite),
    "missing-values": _Rule(Severity.INFO, "A column has missing values.", _null),
    "different-scales": _Rule(Severity.INFO, "The standard deviations of features are of different size.", None),
}
