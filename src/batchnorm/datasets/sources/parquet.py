"""Parquet: a piece is a row group, or several small ones in a row.

A row group may be larger than memory. It is read in strips of columns with at most ``MOST_VALUES`` each. From a disk a
strip has an eighth of them: it fits into a processor's cache, and costs no request. A column with more values is read
in batches of rows. pyarrow holds one page of each column that it reads at a time, so strips bound its memory as well: a
batch of all of 1,000 columns would need 1,000 pages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, final

from batchnorm.datasets.blocks import Block, Selection
from batchnorm.datasets.sources.arrow_columns import TablePiece, columns_in, features_of, groups_in, leaves, shape_in
from batchnorm.datasets.sources.arrow_errors import reading
from batchnorm.datasets.sources.options import Options
from batchnorm.datasets.sources.packages import require_package
from batchnorm.datasets.sources.plans import MOST_VALUES, FilePlan, empty_block
from batchnorm.datasets.sources.schemas import Feature, FileSchema, Shape, names_of, resolved, unsaid
from batchnorm.datasets.sources.stored_files import StoredFile

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

WHAT = "a Parquet file"
# Bytes of columns that may be in memory before they are decoded; of more bytes, parts are read.
_FETCHED, _PART = 64 << 20, 8 << 20
# Row groups of fewer bytes are joined to pieces of this share of ``Options.piece_bytes``.
_JOINED = 4
# ``MOST_VALUES`` divided by this are 4 MB as float64.
_IN_CACHE = 8


@final
@dataclass(frozen=True, slots=True)
class ParquetPiece(TablePiece):
    """Row groups ``first`` to ``last - 1`` of a file."""

    @property
    def part(self) -> str:
        """Which part of the file this is, and how its values are read."""
        return f"row groups {self.first}-{self.last}"

    def blocks(self, selection: Selection) -> Iterator[Block]:
        """The rows of the row groups, in strips of columns."""
        require_package("pyarrow", "Parquet files")
        self.stored.check()
        groups = list(range(self.first, self.last))
        about = _footer(self.stored)
        features = resolved(features_of(about.schema.to_arrow_schema()), dict(self.shapes))
        shapes = {name: features[name].shape or () for name in names_of(selection, features)}
        rows = sum(about.row_group(each).num_rows for each in groups)
        if not rows:
            yield empty_block(shapes)
            return
        for number, strip in enumerate(_strips(shapes, rows, _most(self.stored))):
            for block in self._strip(groups, strip, selection.by, features):
                yield block if number == 0 else Block(0, block.columns, block.group, block.labels)

    def _strip(
        self, groups: list[int], strip: dict[str, Shape], by: str, features: Mapping[str, Feature]
    ) -> Iterator[Block]:
        constant = self.stored.partitions.get(by) if by and by not in features else None
        wanted = [*strip, by] if by and constant is None and by not in strip else list(strip)
        rows = max(1, _most(self.stored) // sum(map(math.prod, strip.values()))) if strip else MOST_VALUES
        with reading(self.stored, WHAT, f"row groups {self.first} to {self.last - 1}"):
            for batch in _batches(self.stored, groups, wanted, rows):
                columns = columns_in(batch, strip)
                if not by or constant is not None:
                    yield Block(batch.num_rows, columns, constant)
                else:
                    yield Block(batch.num_rows, columns, *groups_in(dict(leaves(batch))[by]))


def plan(stored: StoredFile, options: Options) -> FilePlan:
    """The columns of a Parquet file, from its footer, and its pieces.

    Raises:
        ValueError: If the file is no Parquet file, or damaged.
        OSError: If it cannot be read.
    """
    require_package("pyarrow", "Parquet files")
    with reading(stored, WHAT, "the footer"):
        about = _footer(stored)
        features = {
            name: _with_lengths(stored, about, name, each)
            for name, each in features_of(about.schema.to_arrow_schema()).items()
        }

    def cut(shapes: Mapping[str, Shape]) -> Iterator[ParquetPiece]:
        lists = unsaid(features_of(about.schema.to_arrow_schema()), shapes)
        for first, last, size in _joined(about, options.piece_bytes // _JOINED):
            yield ParquetPiece(stored, first, last, size, lists)

    return FilePlan(FileSchema(stored.address, features, stored.partitions), cut)


def _with_lengths(stored: StoredFile, about: pq.FileMetaData, name: str, feature: Feature) -> Feature:
    """The feature with the shape of its first list, if its type does not say the lengths of lists."""
    if feature.shape is not None or feature.kind != "number":
        return feature
    shapes = (
        shape_in(dict(leaves(batch))[name]) for batch in _batches(stored, range(about.num_row_groups), [name], 64)
    )
    shape = next((each for each in shapes if each is not None), None)
    kind = "null" if shape is None else feature.kind
    return Feature(kind, shape, feature.type, feature.groups)


def _joined(about: pq.FileMetaData, most: int) -> Iterator[tuple[int, int, int]]:
    """Ranges of row groups, and their bytes: single row groups, or several that are small."""
    first = size = 0
    for number in range(about.num_row_groups):
        group = about.row_group(number)
        bytes_ = sum(group.column(i).total_compressed_size for i in range(group.num_columns))
        if number > first and size + bytes_ > most:
            yield first, number, size
            first, size = number, 0
        size += bytes_
    yield first, about.num_row_groups, size


def _most(stored: StoredFile) -> int:
    """Most values of a strip."""
    return max(1, MOST_VALUES // _IN_CACHE) if stored.is_local else MOST_VALUES


def _strips(shapes: Mapping[str, Shape], rows: int, most: int) -> Iterator[dict[str, Shape]]:
    """The columns in parts that have at most ``most`` values in all rows, or in one part per column."""
    strip: dict[str, Shape] = {}
    values = 0
    for name, shape in shapes.items():
        more = rows * math.prod(shape)
        if strip and values + more > most:
            yield strip
            strip, values = {}, 0
        strip[name] = shape
        values += more
    yield strip


def _batches(stored: StoredFile, groups: Iterable[int], names: list[str], rows: int) -> Iterator[pa.RecordBatch]:
    """Record batches of at most ``rows`` rows.

    Columns are decoded in pyarrow's threads: they cost no more time of processors than one thread, and a file of a
    single row group keeps all processors busy.
    """
    chosen = tuple(groups)
    sizes = _sizes(stored, chosen)
    with _parquet_file(stored, sum(sizes.get(name, 0) for name in names) <= _FETCHED) as file:
        yield from file.iter_batches(rows, row_groups=chosen, columns=names, use_threads=True)


@lru_cache(maxsize=16)
def _sizes(stored: StoredFile, groups: tuple[int, ...]) -> dict[str, int]:
    """Bytes of every column in row groups; ``a`` and ``a.b`` have the bytes of the column ``a.b.list.element``."""
    about = _footer(stored)
    found: dict[str, int] = {}
    for number in groups:
        group = about.row_group(number)
        for column in map(group.column, range(group.num_columns)):
            parts = column.path_in_schema.split(".")
            for end in range(1, len(parts) + 1):
                name = ".".join(parts[:end])
                found[name] = found.get(name, 0) + column.total_compressed_size
    return found


@contextmanager
def _parquet_file(stored: StoredFile, are_few: bool) -> Iterator[pq.ParquetFile]:
    """The file, open. Few bytes of a disk are mapped, and few bytes of a store are fetched at once; others in parts."""
    import pyarrow.parquet as pq

    about, part = _footer(stored), 0 if are_few else _PART
    if stored.is_local:
        with pq.ParquetFile(stored.address, metadata=about, memory_map=are_few, buffer_size=part) as file:
            yield file
        return
    with (
        stored.open(ahead=False) as source,
        pq.ParquetFile(source, metadata=about, pre_buffer=are_few, buffer_size=part) as file,
    ):
        yield file


@lru_cache(maxsize=16)
def _footer(stored: StoredFile) -> pq.FileMetaData:
    """The footer of a file. It is cached for the pieces of the same file."""
    import pyarrow.parquet as pq

    with stored.open(ahead=False) as source:
        return pq.read_metadata(source)
