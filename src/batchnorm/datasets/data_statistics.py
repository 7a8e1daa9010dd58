"""Statistics of a data set: of all its columns, and of its groups; and the union of the statistics of its parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

import numpy as np

from batchnorm.datasets import statistics_files
from batchnorm.datasets.column_statistics import ColumnStatistics
from batchnorm.datasets.feature_sums import FeatureSums
from batchnorm.datasets.partial_statistics import Partial, Source, merged_partials

if TYPE_CHECKING:
    import os

    from batchnorm.moments import Moments


@final
@dataclass(frozen=True, slots=True, eq=False)
class DataStatistics:
    """Exact statistics of a data set; ``+`` gives those of the data of both sides.

    Args:
        total: Statistics of all rows.
        by: The column whose values are the groups; "" without groups.
        groups: Statistics of each group, by the group's name. Rows without a value in the column ``by`` are the group
            "(null)", ``blocks.NO_GROUP``.
        sources: The files that were counted.
    """

    total: Partial
    by: str = ""
    groups: Mapping[str, Partial] = field(default_factory=dict)
    sources: tuple[Source, ...] = ()

    @property
    def rows(self) -> int:
        """Number of examples."""
        return self.total.rows

    @property
    def columns(self) -> Mapping[str, ColumnStatistics]:
        """Statistics of each column over all rows."""
        return self.total.columns

    def __add__(self, other: DataStatistics) -> DataStatistics:
        """Statistics of the data of both sides; groups are merged by name.

        Raises:
            ValueError: If the columns, their shapes or the column of groups differ, or a file was counted twice.
        """
        return union([self, other])

    def __eq__(self, other: object) -> bool:
        """Whether all numbers, names, groups and files are the same; NaN equals NaN. The order of groups is ignored."""
        if not isinstance(other, DataStatistics):
            return NotImplemented
        same = (self.by, self.sources) == (other.by, other.sources) and self.total == other.total
        return same and dict(self.groups) == dict(other.groups)

    __hash__ = None  # type: ignore[assignment] - arrays have no hash

    def features(self, columns: Sequence[str] | None = None) -> tuple[list[str], ColumnStatistics]:
        """The names of all features side by side, and their statistics, which have the shape (features,).

        A column of numbers is one feature with the column's name. A column of vectors is one feature for each place:
        "embedding[0]", "embedding[1]"; of matrices "pixels[0,0]".

        Args:
            columns: Names of columns, whose order is that of the features; None for all columns in their order.

        Raises:
            ValueError: If there is no such column, or none at all.
        """
        chosen = self._chosen(columns)
        sums = FeatureSums.joined([column.sums for column in chosen.values()])
        names = [name for column, each in chosen.items() for name in feature_names(column, each.shape)]
        return names, ColumnStatistics.of_sums(sums, (len(names),))

    def moments(self, columns: Sequence[str] | None = None) -> Moments:
        """Count, mean and m2 of all features as ``batchnorm.Moments`` of shape (features,), which needs torch.

        Args:
            columns: As for ``features``, whose names these moments have.

        Raises:
            ValueError: If there is no such column, or none at all.
        """
        import torch

        from batchnorm.moments import Moments

        statistics = self.features(columns)[1]
        return Moments(*(torch.from_numpy(each) for each in (statistics.count, statistics.mean, statistics.m2)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write NAME.bnstats.safetensors, and beside it NAME.bnstats.json for people; see ``statistics_files``.

        Raises:
            ValueError: If the path does not end in .bnstats.safetensors.
            OSError: If a file cannot be written. The old files are then unchanged, or the JSON file is of the old data.
        """
        statistics_files.write(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DataStatistics:
        """Read NAME.bnstats.safetensors, which ``save`` wrote. The JSON file is not read.

        Raises:
            ValueError: If the file is damaged, or of another kind or version.
            OSError: If the file cannot be read.
        """
        return cls(*statistics_files.read(path))

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "the data") -> DataStatistics:
        """The statistics in bytes from ``statistics_files.to_bytes``, the same to the bit.

        Args:
            data: The bytes.
            name: The name of the bytes in errors.

        Raises:
            ValueError: If the bytes are damaged, or of another kind or version.
        """
        return cls(*statistics_files.from_bytes(data, name))

    def _chosen(self, columns: Sequence[str] | None) -> dict[str, ColumnStatistics]:
        names = list(self.columns) if columns is None else [columns] if isinstance(columns, str) else list(columns)
        if not names:
            raise ValueError("expected at least one column, got statistics without columns. Measure data with columns.")
        for name in names:
            if name not in self.columns:
                raise ValueError(f"expected names of columns, got {name!r}. The columns are {list(self.columns)}.")
        return {name: self.columns[name] for name in names}


def feature_names(column: str, shape: tuple[int, ...]) -> list[str]:
    """The names of a column's features: the column's name, with the place in brackets if a row has several values."""
    return [f"{column}[{','.join(map(str, at))}]" if at else column for at in np.ndindex(*shape)]


def union(partials: Sequence[DataStatistics]) -> DataStatistics:
    """The statistics of all parts together, in the order of the parts, and the same bits in every run.

    Neighbours are merged first, then the results of neighbours, so that a number goes through about log2(parts)
    additions. Parts without any rows and columns add nothing. No parts give statistics without rows and columns.

    Raises:
        ValueError: If columns, their shapes or the columns of groups differ, or a file was counted in two parts.
    """
    filled = [part for part in partials if part.rows or part.columns or part.groups]
    sources = tuple(source for part in partials for source in part.sources)
    _require_once([part.sources for part in partials])
    if len({part.by for part in filled}) > 1:
        raise ValueError(
            f"expected statistics by one column of groups, got {sorted({part.by for part in filled})}. "
            "Measure all data with the same --by."
        )
    groups: dict[str, list[Partial]] = {}
    for part in filled:
        for name, group in part.groups.items():
            groups.setdefault(name, []).append(group)
    total = merged_partials([part.total for part in filled])
    merged = {name: merged_partials(groups[name]) for name in sorted(groups)}
    return DataStatistics(total, filled[0].by if filled else "", merged, sources)


def _require_once(parts: Sequence[Sequence[Source]]) -> None:
    """Refuse a file that two parts count: the same content at the same address, or at another one with its name.

    One part may have such files, in two folders: they were measured together and are different files.
    """
    times = Counter(file for part in parts for file in {_known(source) for source in part})
    twice = [file for file, count in times.items() if count > 1]
    if twice:
        places = " and ".join(dict.fromkeys(each.file for part in parts for each in part if _known(each) == twice[0]))
        raise ValueError(
            f"expected files that are counted once, got {twice[0][0]} twice{_more(len(twice) - 1)}: {places} have the "
            "same size and time of change. Leave out the statistics that count it again; if these are different files, "
            "measure them in one call."
        )


def _known(source: Source) -> tuple[str, str]:
    """By what a file is known: its name, and its size and time of change."""
    return source.file.rstrip("/").rpartition("/")[2], source.fingerprint


def _more(number: int) -> str:
    return f", and {number} more files" if number > 0 else ""
