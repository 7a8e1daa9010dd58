"""Plans: what is known of a file before it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import final

from batchnorm.datasets.blocks import Piece
from batchnorm.datasets.sources.schemas import FileSchema, Shape

# values of a block: 32 MB as float64
MOST_VALUES = 1 << 22


@final
@dataclass(frozen=True, slots=True)
class FilePlan:
    """The columns of a file, and a function that cuts it into pieces.

    Args:
        schema: The columns.
        cut: Makes the pieces. Its argument is the shape of each column that is measured, as all files together say it.
    """

    schema: FileSchema
    cut: Callable[[Mapping[str, Shape]], Iterable[Piece]]
