"""Statistics of some rows and the files that were counted: what the statistics of a data set consist of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from batchnorm.datasets.column_statistics import ColumnStatistics
from batchnorm.datasets.feature_sums import FeatureSums

_STACKED = 1 << 21  # features of all parts that are merged at once: with 11 numbers of 8 bytes, about 200 MB


@final
@dataclass(frozen=True, slots=True, eq=False)
class Partial:
    """Statistics of some rows: of a piece, of a group, or of all data; ``+`` gives those of the rows of both sides.

    Args:
        rows: Number of examples.
        columns: Statistics of each column, by name, in the order of the first file.
    """

    rows: int
    columns: Mapping[str, ColumnStatistics]

    @staticmethod
    def of_sums(rows: int, sums: FeatureSums, shapes: Mapping[str, tuple[int, ...]]) -> Partial:
        """Statistics from the sums of the features of all columns side by side."""
        columns, first = {}, 0
        for name, shape in shapes.items():
            last = first + math.prod(shape)
            columns[name] = ColumnStatistics.of_sums(sums.mapped(_slice(first, last)), shape)
            first = last
        return Partial(rows, columns)

    @property
    def sums(self) -> FeatureSums:
        """The sums of the features of all columns side by side."""
        return FeatureSums.joined([FeatureSums.empty((0,)), *(column.sums for column in self.columns.values())])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of the features of each column."""
        return {name: column.shape for name, column in self.columns.items()}

    def __add__(self, other: Partial) -> Partial:
        """Statistics of the rows of both sides, with the columns in this side's order. No rows and columns add nothing.

        Raises:
            ValueError: If the columns or the shapes of their features differ.
        """
        return merged_partials([self, other])

    def __eq__(self, other: object) -> bool:
        """Whether rows, names and order of columns, and all numbers are the same; NaN equals NaN."""
        if not isinstance(other, Partial):
            return NotImplemented
        same = self.rows == other.rows and list(self.columns) == list(other.columns)
        return same and all(column == other.columns[name] for name, column in self.columns.items())

    __hash__ = None  # type: ignore[assignment] - arrays have no hash


@final
@dataclass(frozen=True, slots=True)
class Source:
    """A file that was counted.

    Args:
        file: Its address.
        fingerprint: What identifies its content: size and time of change, or the store's own tag.
        size: Bytes.
        rows: Number of examples in it.
    """

    file: str
    fingerprint: str
    size: int
    rows: int


def merged_partials(partials: Sequence[Partial]) -> Partial:
    """The statistics of the rows of all parts, neighbours merged first.

    Raises:
        ValueError: If columns, or the shapes of their features, differ.
    """
    filled = [part for part in partials if part.rows or part.columns]
    if not filled:
        return Partial(0, {})
    shapes = filled[0].shapes
    for part in filled[1:]:
        _require_alike(shapes, part.shapes)
    if len(filled) == 1:
        return filled[0]
    # the features of all columns side by side: one merge for all columns, not one for each
    sums = _folded([Partial(part.rows, {name: part.columns[name] for name in shapes}).sums for part in filled])
    return Partial.of_sums(sum(part.rows for part in filled), sums, shapes)


def _slice(first: int, last: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda rows: rows[:, first:last]


def _require_alike(a: Mapping[str, tuple[int, ...]], b: Mapping[str, tuple[int, ...]]) -> None:
    if a.keys() != b.keys():
        only = [f"only one side has {sorted(names)}" for names in (a.keys() - b.keys(), b.keys() - a.keys()) if names]
        raise ValueError(
            f"expected statistics of the same columns, got different ones: {'; '.join(only)}. Measure the columns that "
            "all data have, by their names."
        )
    for name, shape in a.items():
        if b[name] != shape:
            raise ValueError(
                f"expected features of one shape in column {name!r}, got {shape} and {b[name]}. Merge only data whose "
                "rows have the same shape."
            )


def _folded(parts: Sequence[FeatureSums]) -> FeatureSums:
    """All parts merged, neighbours first; several pairs at once, as many as memory allows."""
    pairs = max(1, _STACKED // max(1, parts[0].counts.shape[-1]))
    while len(parts) > 1:
        even, merged = len(parts) - len(parts) % 2, []
        for start in range(0, even, 2 * pairs):
            some = FeatureSums.stacked(parts[start : min(start + 2 * pairs, even)])
            both = some.mapped(lambda rows: rows[:, 0::2]) + some.mapped(lambda rows: rows[:, 1::2])
            merged += [both.mapped(lambda rows, i=i: rows[:, i]) for i in range(both.counts.shape[1])]
        parts = [*merged, *parts[even:]]
    return parts[0]
