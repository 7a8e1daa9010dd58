"""Blocks: a part of a data set in memory, and pieces: the parts of files that are read and counted as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, final

if TYPE_CHECKING:
    import numpy as np


# the group of values whose column of groups is null
NO_GROUP = "(null)"


@final
@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """Values of one column in a block.

    Args:
        values: Array (n, *shape) of a real type (bool, integers, floats): n values of every feature. A column of
            numbers has shape (), an embedding (length,), an image (channels,): there n is the number of pixels. The
            array may be read-only and have any strides. Where a value is null, the array has any number.
        present: Boolean array (n,), False where a row is null; or (n, *shape), False where a feature of a row is null.
            None if no value is null.
        unit: The value of full scale, by which statistics are divided: 255 for images of 8 bits. 1 for other columns.
    """

    values: np.ndarray
    present: np.ndarray | None = None
    unit: float = 1.0


@final
@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A part of a data set that fits into memory.

    Wide tables come in several blocks for the same rows, each with some of the columns: the first has the number of
    rows, the others have ``rows`` 0.

    Args:
        rows: Number of examples: rows of a table, or images. 0 if an earlier block counted them.
        columns: The columns, by name, in the order of the file.
        group: The group of all rows (such as an image's class folder), or an array (n,) with the group of each value;
            None if the statistics are not grouped. An array has strings if ``labels`` is empty, or else integers.
        labels: Names of groups: ``group`` is then an integer array, and the group of a value is ``labels[group]``.
            The names are unique; some may have no value in this block.
    """

    rows: int
    columns: Mapping[str, Column]
    group: str | np.ndarray | None = None
    labels: tuple[str, ...] = ()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What of a data set is measured.

    Args:
        columns: Names of columns; () for all columns of numbers.
        by: The column whose values are the groups; "" for no groups. It can be a column, a part
            ``year=2024`` of the folders of a file, or "folder": the name of the folder in which a file is.
    """

    columns: tuple[str, ...] = ()
    by: str = ""


class Piece(Protocol):
    """A part of a file that is measured as a whole: the unit in which a job is spread, counted and resumed.

    Pieces are small values that can be pickled: they have the address of their file, and read it where they are used.
    """

    @property
    def file(self) -> str:
        """Address of the file."""

    @property
    def fingerprint(self) -> str:
        """What identifies the content of the file: size and time of change, or the store's own tag."""

    @property
    def key(self) -> str:
        """Name of this piece, the same in every run while the file does not change.

        It depends on the address and fingerprint of the file, on the part, and on the options that change the values;
        not on the selection.
        """

    @property
    def size(self) -> int:
        """Bytes of the file that belong to this piece, for progress."""

    def blocks(self, selection: Selection) -> Iterator[Block]:
        """The content, in blocks of at most about 32 MB as float64.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If its content is damaged or has not what was selected.
            TypeError: If a selected column has no numbers.
        """
