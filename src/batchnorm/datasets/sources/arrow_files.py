"""Arrow files (IPC, Feather): a piece is some record batches of a file; a stream is one piece."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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

WHAT = "an Arrow file"
MAGIC = b"ARROW1"


@final
@dataclass(frozen=True, slots=True)
class ArrowPiece(TablePiece):
    """Record batches ``first`` to ``last - 1`` of a file; all batches if ``last`` is -1."""

    @property
    def part(self) -> str:
        """Which part of the file this is, and how its values are read."""
        return f"batches {self.first}-{self.last}"

    def blocks(self, selection: Selection) -> Iterator[Block]:
        """The rows of the record batches."""
        require_package("pyarrow", "Arrow files")
        with reading(self.stored, WHAT, f"batches from {self.first} on"), _opened(self.stored) as (schema, batches):
            features = resolved(features_of(schema), dict(self.shapes))
            shapes = {name: features[name].shape or () for name in names_of(selection, features)}
            yield empty_block(shapes)
            for batch in batches(self.first, self.last):
                for part in _parts(batch, sum(map(math.prod, shapes.values()))):
                    yield self._block(part, shapes, selection.by, features)

    def _block(self, batch: pa.RecordBatch, shapes: Mapping[str, Shape], by: str, features: Mapping) -> Block:
        columns = columns_in(batch, shapes)
        if not by or by not in features:
            return Block(batch.num_rows, columns, self.stored.partitions.get(by) if by else None)
        return Block(batch.num_rows, columns, *groups_in(dict(leaves(batch))[by]))


def plan(stored: StoredFile, options: Options) -> FilePlan:
    """The columns of an Arrow file, from its schema, and its pieces.

    Raises:
        ValueError: If it is no Arrow file, or damaged.
        OSError: If it cannot be read.
    """
    require_package("pyarrow", "Arrow files")
    with reading(stored, WHAT, "the schema"), _opened(stored) as (schema, batches):
        count = batches.count
        found = features_of(schema)
        lists = [name for name, each in found.items() if each.shape is None and each.kind == "number"]
        features = {**found, **{name: _with_lengths(stored, name, found[name]) for name in lists}}

    def cut(shapes: Mapping[str, Shape]) -> Iterator[ArrowPiece]:
        lists = unsaid(features_of(schema), shapes)
        if count is None:
            yield ArrowPiece(stored, 0, -1, stored.size, lists)
            return
        step = max(1, count * options.piece_bytes // stored.size)
        for first in range(0, max(count, 1), step):
            last = min(first + step, count)
            size = stored.size * last // max(count, 1) - stored.size * first // max(count, 1)
            yield ArrowPiece(stored, first, last, size, lists)

    return FilePlan(FileSchema(stored.address, features, stored.partitions), cut)


@final
@dataclass(frozen=True, slots=True)
class _Batches:
    """The record batches of an open file; ``count`` is None for a stream."""

    reader: pa.RecordBatchFileReader | pa.RecordBatchStreamReader
    count: int | None

    def __call__(self, first: int, last: int) -> Iterator[pa.RecordBatch]:
        if self.count is None:
            yield from self.reader
        else:
            yield from (self.reader.get_batch(each) for each in range(first, min(last, self.count)))


@contextmanager
def _opened(stored: StoredFile) -> Iterator[tuple[pa.Schema, _Batches]]:
    """The schema and the record batches of a file or stream."""
    import pyarrow as pa
    from pyarrow import ipc

    stored.check()
    with stored.open() as file:
        is_file = file.read(len(MAGIC)) == MAGIC
        file.seek(0)
        source = pa.memory_map(stored.address) if stored.is_local else pa.PythonFile(file, "r")
        with source, ipc.open_file(source) if is_file else ipc.open_stream(source) as reader:
            yield reader.schema, _Batches(reader, reader.num_record_batches if is_file else None)


def _with_lengths(stored: StoredFile, name: str, feature: Feature) -> Feature:
    """The feature with the shape of its first list in a file, because its type does not say the lengths of lists."""
    with _opened(stored) as (_, batches):
        shapes = (shape_in(dict(leaves(batch))[name]) for batch in batches(0, batches.count or 0))
        shape = next((each for each in shapes if each is not None), None)
    return Feature("null" if shape is None else feature.kind, shape, feature.type, feature.groups)


def _parts(batch: pa.RecordBatch, width: int) -> Iterator[pa.RecordBatch]:
    """Slices of a batch that have at most ``MOST_VALUES``."""
    step = max(1, MOST_VALUES // max(1, width))
    return (batch.slice(start, step) for start in range(0, batch.num_rows, step))
