"""The two things that an engine does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from batchnorm.datasets.blocks import Piece
from batchnorm.datasets.data_statistics import DataStatistics


class Engine(Protocol):
    """Computes the statistics of pieces somewhere: in threads here, or by the workers of a cluster."""

    def partials(
        self, pieces: Sequence[Piece], measure: Callable[[Piece], DataStatistics]
    ) -> Iterator[tuple[int, DataStatistics]]:
        """The statistics of each piece with its index, as soon as they are known, in any order."""

    def merged(self, partials: Sequence[DataStatistics]) -> DataStatistics:
        """The statistics of all pieces, added in a fixed order, so that the bits do not depend on who was first."""
