"""The limit on the number of groups: statistics of all groups are in memory, here and in every worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batchnorm.datasets.data_statistics import DataStatistics, Partial

# bytes of one DataStatistics. Up to 25 of them are in memory: a merge tree of 2^17 pieces has 17 levels, and each
# thread has one. All of them and the blocks of 8 threads, 64 MB each, are below 1 GB
_MOST_BYTES = 16_000_000
_BYTES_PER_COLUMN = 1500  # the Python objects of one ColumnStatistics, measured
_BYTES_PER_FEATURE = 88  # its eleven numbers


def require_few_groups(statistics: DataStatistics) -> DataStatistics:
    """The statistics themselves, if their groups are few enough to be in memory.

    Raises:
        ValueError: If all groups and columns together need more than 16 MB. For ten columns of numbers that is more
            than about 1,000 groups.
    """
    groups, columns = len(statistics.groups), len(statistics.total.columns)
    if groups and groups * (each := _bytes(statistics.total)) > _MOST_BYTES:
        raise ValueError(
            f"column {statistics.by!r} has {groups:,} groups or more, expected at most {max(1, _MOST_BYTES // each):,} "
            f"for {columns:,} columns, so that they fit into memory. Name a column with fewer values, or measure fewer "
            "columns."
        )
    return statistics


def _bytes(partial: Partial) -> int:
    """Memory of the statistics of one group."""
    return sum(_BYTES_PER_COLUMN + _BYTES_PER_FEATURE * column.mean.size for column in partial.columns.values())
