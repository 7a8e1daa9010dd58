"""Statistics of a data set: of all its columns, and of its groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

from batchnorm.datasets.column_statistics import ColumnStatistics


@final
@dataclass(frozen=True, slots=True, eq=False)
class Partial:
    """Statistics of some rows: of a piece, of a group, or of all data.

    Args:
        rows: Number of examples.
        columns: Statistics of each column, by name, in the order of the first file.
    """

    rows: int
    columns: Mapping[str, ColumnStatistics]

    def __add__(self, other: Partial) -> Partial:
        """Statistics of the rows of both sides."""
        if not self.columns or not other.columns:
            return other if not self.columns else self
        return Partial(
            self.rows + other.rows, {name: each + other.columns[name] for name, each in self.columns.items()}
        )


@final
@dataclass(frozen=True, slots=True, eq=False)
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


@final
@dataclass(frozen=True, slots=True, eq=False)
class DataStatistics:
    """Exact statistics of a data set.

    Args:
        total: Statistics of all rows.
        by: The column whose values are the groups; "" without groups.
        groups: Statistics of each group.
        sources: The files that were counted.
    """

    total: Partial
    by: str = ""
    groups: Mapping[str, Partial] = field(default_factory=dict)
    sources: tuple[Source, ...] = ()

    def __add__(self, other: DataStatistics) -> DataStatistics:
        """Statistics of the data of both sides."""
        groups = dict(self.groups)
        for name, each in other.groups.items():
            groups[name] = groups[name] + each if name in groups else each
        return DataStatistics(self.total + other.total, self.by or other.by, groups, self.sources + other.sources)
