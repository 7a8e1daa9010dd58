"""The two things that an engine does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from batchnorm.datasets.blocks import Piece
from batchnorm.datasets.data_statistics import DataStatistics
from batchnorm.datasets.engines import merging

Measure = Callable[[Piece], DataStatistics]


class Engine(Protocol):
    """Computes the statistics of pieces somewhere: in threads here, or by the workers of a cluster."""

    def partials(self, pieces: Sequence[Piece], measure: Measure) -> Iterator[tuple[int, DataStatistics]]:
        """The statistics of each piece with its index, as soon as they are known, in any order.

        If a piece cannot be measured, the pieces that are already being measured are still returned. Then the error is
        raised, and no further piece is begun.

        Raises:
            OSError: If a file cannot be read, or the engine cannot be reached.
            ValueError: If a file is damaged or lacks what is measured.
            TypeError: If a selected column has no numbers.
            ModuleNotFoundError: If a package is missing, here or where the pieces are measured.
        """

    def merged(self, partials: Iterable[tuple[int, DataStatistics]]) -> DataStatistics:
        """The statistics of all pieces.

        They are added in an order that depends only on the indices, so that the bits of the result do not depend on
        which piece was measured first.
        """
        return merging.merged(partials)
