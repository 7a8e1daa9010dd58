"""Pieces of arrays: ranges of rows of the arrays of a file, whatever its format."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Protocol, final

import numpy as np

from batchnorm.datasets.blocks import Block, Selection
from batchnorm.datasets.sources.array_axes import Axes, column_of, feature_of, fields_in, fields_of, grouped, groups_in
from batchnorm.datasets.sources.options import Options
from batchnorm.datasets.sources.plans import MOST_VALUES, FilePlan
from batchnorm.datasets.sources.schemas import Feature, FileSchema, Shape, names_of
from batchnorm.datasets.sources.stored_files import FilePiece, StoredFile


class StoredArray(Protocol):
    """An array in a file: a small value that can be pickled."""

    @property
    def name(self) -> str:
        """Name of the array."""

    @property
    def shape(self) -> Shape:
        """Its shape."""

    @property
    def dtype(self) -> np.dtype:
        """Type of its elements."""

    @property
    def step(self) -> int:
        """Rows that are stored together: pieces begin at multiples of it."""

    def reader(self, stored: StoredFile) -> AbstractContextManager[Callable[[int, int], np.ndarray]]:
        """A function that reads the rows ``first`` to ``last - 1``."""


@final
@dataclass(frozen=True, slots=True)
class ArrayPiece(FilePiece):
    """Rows ``first`` to ``last - 1`` of the arrays of a file, of which ``size`` bytes are in this piece."""

    arrays: tuple[StoredArray, ...]
    first: int
    last: int
    size: int
    axes: Axes

    @property
    def part(self) -> str:
        """Which part of the file this is, and how its values are read."""
        names = ",".join(each.name for each in self.arrays)
        return f"rows {self.first}-{self.last} of {names}, axis {self.axes}"

    def blocks(self, selection: Selection) -> Iterator[Block]:
        """The rows, one array after another."""
        features = _features(self.stored, self.arrays, self.axes)
        names = names_of(selection, features)
        grouping = next((each for each in self.arrays if selection.by in _fields(each)), None) if selection.by else None
        constant = self.stored.partitions.get(selection.by) if selection.by else None
        counted = False
        for array in self.arrays:
            inside = [name for name in _fields(array) if name in names]
            for rows, columns, groups in self._rows(array, inside, grouping, selection.by) if inside else ():
                count = 0 if counted else rows
                if groups is None:
                    yield Block(count, columns, constant)
                else:
                    yield from grouped(count, columns, *groups_in(groups))
            counted = counted or bool(inside)

    def _rows(
        self, array: StoredArray, names: list[str], grouping: StoredArray | None, by: str
    ) -> Iterator[tuple[int, dict, np.ndarray | None]]:
        """For every range of rows their number, their columns, and their groups."""
        with ExitStack() as stack:
            read = stack.enter_context(array.reader(self.stored))
            labels = stack.enter_context(grouping.reader(self.stored)) if grouping else None
            if grouping:
                _common_rows(self.stored, [array, grouping])
            for first, last in _ranges(array, self.first, self.last):
                fields = fields_in(array.name, read(first, last))
                columns = {name: column_of(fields[name], self.axes) for name in names}
                groups = fields_in(grouping.name, labels(first, last))[by] if labels and grouping else None
                yield last - first, columns, groups


def plan_arrays(stored: StoredFile, arrays: Sequence[StoredArray], options: Options) -> FilePlan:
    """The columns of a file with arrays, and its pieces.

    Raises:
        ValueError: If an array does not have the channel axes. ``cut`` raises it if arrays that are measured have
            different numbers of rows.
    """
    axes = options.channel_axis
    features = _features(stored, arrays, axes)

    def cut(shapes: Mapping[str, Shape]) -> Iterator[ArrayPiece]:
        chosen = [each for each in arrays if any(name in shapes for name in _fields(each))]
        rows = _common_rows(stored, chosen)
        total = sum(math.prod(each.shape) * each.dtype.itemsize for each in chosen)
        step = max(1, *(each.step for each in chosen))
        many = max(1, rows * options.piece_bytes // max(total, 1) // step) * step
        for first in range(0, max(rows, 1), many):
            last = min(first + many, rows)
            size = stored.size * last // max(rows, 1) - stored.size * first // max(rows, 1)
            yield ArrayPiece(stored, tuple(arrays), first, last, size, axes)

    return FilePlan(FileSchema(stored.address, features, stored.partitions), cut)


def _fields(array: StoredArray) -> dict[str, tuple[np.dtype, Shape]]:
    return fields_of(array.name, array.dtype, array.shape)


def _features(stored: StoredFile, arrays: Sequence[StoredArray], axes: Axes) -> dict[str, Feature]:
    return {
        name: feature_of(dtype, shape, axes, f"{name!r} in {stored.address}")
        for array in arrays
        for name, (dtype, shape) in _fields(array).items()
    }


def _ranges(array: StoredArray, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that have at most ``MOST_VALUES``; a single empty range if there are no rows."""
    values = max(1, sum(math.prod(shape[1:]) for _, shape in _fields(array).values()))
    many = max(1, MOST_VALUES // values)
    step = array.step if array.step * values <= 4 * MOST_VALUES else 1  # what is stored together is read at once
    many = max(1, many // step) * step
    return ((start, min(start + many, last)) for start in range(first, max(last, first + 1), many))


def _common_rows(stored: StoredFile, arrays: list[StoredArray]) -> int:
    lengths = {each.shape[0]: each.name for each in arrays}
    if len(lengths) > 1:
        (first, one), (second, other), *_ = lengths.items()
        raise ValueError(
            f"expected arrays with the same number of examples in {stored.address}, got {first} in {one!r} and "
            f"{second} in {other!r}. Name columns that belong together."
        )
    return next(iter(lengths))
