"""Plans: what is known of a file before it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar, final

import numpy as np

from batchnorm.datasets.blocks import Block, Column, Piece
from batchnorm.datasets.sources.schemas import FileSchema, Shape

_A = TypeVar("_A")
_B = TypeVar("_B")
# files that are looked at at the same time: their threads wait for a disk or a store
_THREADS = 16
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


def empty_block(shapes: Mapping[str, Shape]) -> Block:
    """A block without rows: what a piece of a file without rows has, so that its columns are known."""
    return Block(0, {name: Column(np.zeros((0, *shape))) for name, shape in shapes.items()})


def together(what: Callable[[_A], _B], items: Iterable[_A]) -> list[_B]:
    """``what`` of every item, in their order; several at a time."""
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(what, items))
