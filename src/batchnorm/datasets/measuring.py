"""The statistics of a piece: what an engine's worker computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchnorm.datasets.column_statistics import ColumnStatistics
from batchnorm.datasets.data_statistics import DataStatistics, Partial

if TYPE_CHECKING:
    from batchnorm.datasets.blocks import Piece, Selection


def measure(piece: Piece, selection: Selection) -> DataStatistics:
    """Statistics of all blocks of a piece, in their order."""
    total: Partial | None = None
    for block in piece.blocks(selection):
        columns = {name: ColumnStatistics.of(column) for name, column in block.columns.items()}
        before = total
        known = before.columns if before else {}
        total = Partial(
            block.rows + (before.rows if before else 0),
            {**known, **{name: known[name] + each if name in known else each for name, each in columns.items()}},
        )
    return DataStatistics(total or Partial(0, {}))
