"""The statistics of a piece: what an engine's worker computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from batchnorm.datasets.blocks import Block, Column
from batchnorm.datasets.column_statistics import RunningStatistics
from batchnorm.datasets.data_statistics import DataStatistics, Partial, union
from batchnorm.datasets.group_limit import require_few_groups

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchnorm.datasets.blocks import Piece, Selection


def measure(piece: Piece, selection: Selection) -> DataStatistics:
    """Statistics of all blocks of a piece, in their order, and of each group if the selection has groups.

    The total of grouped rows is the union of the groups in the order of their names.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If its content is damaged or has not what was selected, if a column's shape or unit changes, or if
            there are too many groups for memory.
        TypeError: If a selected column has no numbers.
    """
    groups: dict[str | None, _RunningPartial] = {}
    for block in piece.blocks(selection):
        before = len(groups)
        for name, rows in _by_group(block):
            groups.setdefault(name, _RunningPartial()).add(rows)
        if len(groups) > max(1, before):
            some = next(iter(groups.values())).partial
            require_few_groups(DataStatistics(some, selection.by, {str(name): some for name in groups}))
    if set(groups) <= {None}:
        return DataStatistics(groups[None].partial if groups else Partial(0, {}), selection.by)
    groups.pop(None, None)  # a block without rows, which tells the columns: it is no group
    named = {str(name): groups[name].partial for name in sorted(groups, key=str)}
    return DataStatistics(union([DataStatistics(each) for each in named.values()]).total, selection.by, named)


class _RunningPartial:
    """Statistics of rows that grow block by block."""

    def __init__(self) -> None:
        self._rows = 0
        self._columns: dict[str, RunningStatistics] = {}

    def add(self, block: Block) -> None:
        for name, column in block.columns.items():
            self._columns.setdefault(name, RunningStatistics(column)).add(column)
        self._rows += block.rows

    @property
    def partial(self) -> Partial:
        return Partial(self._rows, {name: each.statistics for name, each in self._columns.items()})


def _by_group(block: Block) -> Iterator[tuple[str | None, Block]]:
    """The rows of each group, and the group's name; all rows under the name None if the block has no groups."""
    if block.group is None or isinstance(block.group, str):
        yield block.group, block
        return
    number = len(block.group)
    if block.rows not in {0, number}:
        raise ValueError(f"expected a group for each of {block.rows} rows, got {number} groups. Name one per row.")
    order = np.argsort(block.group, kind="stable")
    keys, starts = np.unique(block.group[order], return_index=True)
    sorted_columns = {name: _rows(column, order) for name, column in block.columns.items()}
    for key, first, last in zip(keys.tolist(), starts, [*starts[1:], number], strict=True):
        columns = {name: _rows(column, slice(first, last)) for name, column in sorted_columns.items()}
        yield (block.labels[key] if block.labels else key), Block(int(last - first) if block.rows else 0, columns)


def _rows(column: Column, which: np.ndarray | slice) -> Column:
    present = None if column.present is None else column.present[which]
    return Column(column.values[which], present, column.unit)
