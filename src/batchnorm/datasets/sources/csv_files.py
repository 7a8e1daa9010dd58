"""CSV and other text tables: a piece is a range of bytes that begins and ends at the end of a line.

Numbers are read as float64, so that a column of whole numbers may have fractions later. Which columns have numbers is
decided from samples of the whole file. Empty cells, and the cells in ``csv_cells.NULLS``, are null; nan and inf are
numbers. A compressed file is one piece.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import IO, TYPE_CHECKING, final

from batchnorm.datasets.blocks import Block, Selection
from batchnorm.datasets.sources.arrow_columns import columns_in, groups_in
from batchnorm.datasets.sources.arrow_errors import reading
from batchnorm.datasets.sources.byte_ranges import ByteRange
from batchnorm.datasets.sources.csv_cells import NULLS, Quotes, cells, cuts, fault, header_end, is_number
from batchnorm.datasets.sources.options import Options
from batchnorm.datasets.sources.packages import require_package
from batchnorm.datasets.sources.plans import FilePlan, empty_block
from batchnorm.datasets.sources.schemas import Feature, FileSchema, Shape, names_of, resolved, unsaid
from batchnorm.datasets.sources.stored_files import FilePiece, StoredFile

if TYPE_CHECKING:
    import pyarrow as pa

WHAT = "a CSV file"
_COMPRESSIONS = ((b"\x1f\x8b", "gzip"), (b"BZh", "bz2"), (b"\x28\xb5\x2f\xfd", "zstd"))
_UTF8_MARK = b"\xef\xbb\xbf"
# Bytes that pyarrow converts at a time; a line must fit.
_BLOCK = 1 << 20
# Bytes of a sample, and samples of a file, from which the types of columns are decided.
_SAMPLE, _SAMPLES = 1 << 16, 16


@final
@dataclass(frozen=True, slots=True)
class Table:
    """What all pieces of a CSV file have in common.

    Args:
        features: The columns, by name.
        delimiter: What separates cells.
        compression: Name of the compression, or "".
        longest: Bytes of a line that may be read, at least.
    """

    features: tuple[tuple[str, Feature], ...]
    delimiter: str
    compression: str
    longest: int

    @property
    def names(self) -> list[str]:
        """Names of the columns."""
        return [name for name, _ in self.features]


@final
@dataclass(frozen=True, slots=True)
class CsvPiece(FilePiece):
    """The lines in bytes ``start`` to ``end - 1`` of a file, which has no header there.

    Args:
        table: What the file's pieces have in common.
        start: Place of the first line; in a compressed file that of its decompressed content.
        end: Place after the last line; -1 for the end of a compressed file.
        is_only: Whether the file has no other piece.
        shapes: Columns that have no number in the samples of this file, but in other files.
    """

    table: Table
    start: int
    end: int
    is_only: bool
    shapes: tuple[tuple[str, Shape], ...] = ()

    @property
    def size(self) -> int:
        """Bytes of the file in this piece."""
        return self.stored.size if self.end < 0 else self.end - self.start

    @property
    def part(self) -> str:
        """Which part of the file this is, and how its values are read."""
        return f"bytes {self.start}-{self.end}, {self.table.delimiter!r}"

    def blocks(self, selection: Selection) -> Iterator[Block]:
        """The rows of the lines."""
        require_package("pyarrow", "CSV files")
        features = resolved(dict(self.table.features), dict(self.shapes))
        names = names_of(selection, features)
        by = selection.by if selection.by in features else ""
        constant = self.stored.partitions.get(selection.by)
        seen = False
        for batch in self._batches([name for name in names if name != by], by, features):
            groups = groups_in(batch.column(by)) if by else (constant, ())
            numbers = _with_numbers(batch, by) if by in names else batch
            yield Block(batch.num_rows, columns_in(numbers, dict.fromkeys(names, ())), *groups)
            seen = True
        if not seen:
            yield empty_block(dict.fromkeys(names, ()))

    def _batches(self, names: list[str], by: str, features: Mapping[str, Feature]) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa
        from pyarrow import csv

        types = {name: pa.bool_() if features[name].type == "bool" else pa.float64() for name in names}
        types |= {by: pa.string()} if by else {}
        with reading(self.stored, WHAT, f"bytes {self.start} to {self.end}"), self._lines() as lines:
            if lines.is_empty():
                return
            try:
                yield from csv.open_csv(pa.PythonFile(lines, "r"), *_settings(self.table, types))
            except pa.ArrowInvalid as error:
                raise ValueError(self._fault(names) or str(error)) from error
            if not self.is_only and lines.quotes % 2 and self._ends_between_quotes():
                raise ValueError(
                    "expected quotes in pairs between two cuts of the file, got a single quote, or a cell with a line "
                    f"end. Read the file in one piece: piece_bytes={self.stored.size}"
                )

    @contextmanager
    def _lines(self) -> Iterator[ByteRange]:
        with self.stored.open() as file, _plain(file, self.table.compression) as content:
            yield ByteRange(content, self.start, self.end)

    def _ends_between_quotes(self) -> bool:
        quotes = Quotes(self.table.delimiter)
        with self._lines() as lines:
            for data in iter(partial(lines.read, _BLOCK), b""):
                quotes.read(data)
        return quotes.is_open

    def _fault(self, numbers: list[str]) -> str:
        """What is wrong with the first faulty line."""
        with self.stored.open() as file, _plain(file, self.table.compression) as content:
            before = ByteRange(content, 0, self.start).count_lines()
        with self._lines() as lines:
            what = fault(lines, before + 1, self.table.names, numbers, self.table.delimiter)
        return f"{self.stored.address}: {what}" if what else ""


def _with_numbers(batch: pa.RecordBatch, name: str) -> pa.RecordBatch:
    """The batch with numbers instead of text in a column that is measured and has the groups."""
    import pyarrow as pa

    place = batch.schema.names.index(name)
    return batch.set_column(place, name, batch.column(name).cast(pa.float64()))


def plan(stored: StoredFile, options: Options) -> FilePlan:
    """The columns of a CSV file, from its header and samples of its lines, and its pieces.

    Raises:
        ValueError: If it is no text in UTF-8, if the header has a name twice, or if a line of the samples has other
            cells than the header.
        OSError: If it cannot be read.
    """
    require_package("pyarrow", "CSV files")
    delimiter = _delimiter(stored, options)
    with stored.open() as file:
        compression = _compression(file.read(8))
        file.seek(0)
        with reading(stored, WHAT, "the beginning"), _plain(file, compression) as content:
            beginning = content.read(_BLOCK)
            names, start = _header(stored, beginning, delimiter, options)
        if compression:
            is_whole = len(beginning) < _BLOCK
            starts, samples = [start], [_sample(io.BytesIO(beginning), start, len(beginning) + (not is_whole))]
        else:
            starts = [
                start,
                *_cuts(file, stored, start, delimiter, options, lambda data: _is_line(data, names, delimiter)),
            ]
            samples = [_sample(file, place, stored.size) for place in _spread(starts)]
    table = Table(_types(stored, samples, names, delimiter), delimiter, compression, _longest(samples))

    def cut(shapes: Mapping[str, Shape]) -> Iterator[CsvPiece]:
        missing = unsaid(dict(table.features), shapes)
        ends = [*starts[1:], -1 if compression else stored.size]
        for first, last in zip(starts, ends, strict=True):
            yield CsvPiece(stored, table, first, last, len(starts) == 1, missing)

    return FilePlan(FileSchema(stored.address, dict(table.features), stored.partitions), cut)


def _cuts(
    file: IO[bytes],
    stored: StoredFile,
    start: int,
    delimiter: str,
    options: Options,
    is_line: Callable[[bytes], bool],
) -> list[int]:
    places = range(start + options.piece_bytes, stored.size, max(1, options.piece_bytes))
    return cuts(file, places, stored.size, delimiter, is_line) if places else []


def _delimiter(stored: StoredFile, options: Options) -> str:
    tabs = any(ending in stored.address.lower().rpartition("/")[2] for ending in (".tsv", ".tab"))
    delimiter = options.delimiter or ("\t" if tabs else ",")
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise ValueError(f"expected a single character as delimiter, got {delimiter!r}. Use one such as ';' or a tab.")
    return delimiter


def _compression(beginning: bytes) -> str:
    return next((name for magic, name in _COMPRESSIONS if beginning.startswith(magic)), "")


@contextmanager
def _plain(file: IO[bytes], compression: str) -> Iterator[IO[bytes]]:
    """The decompressed content of a file."""
    import pyarrow as pa

    if not compression:
        yield file
        return
    with pa.CompressedInputStream(pa.PythonFile(file, "r"), compression) as content:
        yield content


def _header(stored: StoredFile, beginning: bytes, delimiter: str, options: Options) -> tuple[list[str], int]:
    """Names of the columns, and the place of the first line with values."""
    if b"\0" in beginning:
        raise ValueError(
            f"expected text in UTF-8, got {stored.address} with NUL bytes: a binary file, or text in UTF-16. Convert "
            "it: iconv -f utf-16 -t utf-8 OLD > NEW."
        )
    start = len(_UTF8_MARK) if beginning.startswith(_UTF8_MARK) else 0
    end = header_end(beginning, start)
    try:
        first = cells(beginning[start:end].lstrip(b"\r\n"), delimiter)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"expected text in UTF-8, got {stored.address} with another encoding in its first line. Convert it: "
            "iconv -f latin1 -t utf-8 OLD > NEW."
        ) from error
    if not options.header:
        return [f"f{place}" for place in range(len(first))], start
    if len(first) == 1 and not options.delimiter:
        _check_delimiter(stored, first[0], delimiter)
    _check_names(stored, first)
    return first, end


def _check_delimiter(stored: StoredFile, line: str, delimiter: str) -> None:
    other = next((each for each in ";\t|," if each in line and each != delimiter), None)
    if other is not None:
        raise ValueError(
            f"expected names of columns with {delimiter!r} between them, got {line[:80]!r} in the first line of "
            f"{stored.address}. Say what separates its cells: delimiter={other!r} (--delimiter)."
        )


def _check_names(stored: StoredFile, names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(
            f"expected different names of columns in the first line of {stored.address}, got {twice!r} twice. Rename "
            "one of them."
        )
    if not names:
        raise ValueError(f"expected names of columns in the first line, got {stored.address} with empty lines only.")
    if all(name.strip().lstrip("+-").replace(".", "", 1).isdecimal() for name in names):
        raise ValueError(
            f"expected names of columns in the first line of {stored.address}, got the numbers {','.join(names[:5])}. "
            "Add a line with names, or say that there is none (header=False, --no-header)."
        )


def _is_line(data: bytes, names: list[str], delimiter: str) -> bool:
    line = data[: header_end(data, 0)].strip(b"\r\n")
    return not line or len(cells(line.decode("utf-8", "replace").encode(), delimiter)) == len(names)


def _spread(starts: list[int]) -> list[int]:
    step = max(1, len(starts) // _SAMPLES)
    return starts[::step]


def _sample(file: IO[bytes], place: int, end: int) -> bytes:
    """Whole lines from a place on; the last is left out, unless it ends the file."""
    file.seek(place)
    data = file.read(_SAMPLE)
    while data.count(b"\n") < 2 and (more := file.read(16 * _SAMPLE)):
        data += more
    if place + len(data) >= end:
        return data
    last = data.rfind(b"\n")
    while last > 0 and data[:last].count(b'"') % 2:
        last = data.rfind(b"\n", 0, last)
    return data[: last + 1]


def _longest(samples: list[bytes]) -> int:
    lines = max((len(line) for each in samples for line in each.split(b"\n")), default=0)
    return max(_BLOCK, 16 * lines)


def _types(
    stored: StoredFile, samples: list[bytes], names: list[str], delimiter: str
) -> tuple[tuple[str, Feature], ...]:
    """What each column has in the samples."""
    import pyarrow as pa
    from pyarrow import csv

    lines = b"".join(each if each.endswith(b"\n") or not each else each + b"\n" for each in samples)
    table = Table(tuple((name, Feature("null", (), "empty")) for name in names), delimiter, "", len(lines) + 1)
    if not lines.strip():
        return table.features
    try:
        batch = csv.read_csv(pa.BufferReader(lines), *_settings(table, {}, len(lines) + 1))
    except pa.ArrowInvalid as error:
        what = fault(io.BytesIO(samples[0]), 2, names, [], delimiter)
        raise ValueError(f"{stored.address}: {what or f'expected {WHAT} ({error}). Write it again.'}") from error
    return tuple((name, _feature(batch.column(name))) for name in names)


def _feature(column: pa.ChunkedArray) -> Feature:
    from pyarrow import types

    kind = column.type
    if types.is_null(kind):
        return Feature("null", (), "empty")
    if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind):
        return Feature("number", (), str(kind))
    if not types.is_string(kind):
        return Feature("other", (), "text" if types.is_binary(kind) else str(kind))
    texts = column.drop_null().to_pylist()
    cell = next((text for text in texts if not is_number(text)), texts[0])
    return Feature("other", (), f"text such as {cell[:40]!r}")


def _settings(table: Table, types: Mapping[str, pa.DataType], block: int = 0) -> tuple:
    """The options of pyarrow: which columns are read, and how."""
    from pyarrow import csv

    read = csv.ReadOptions(use_threads=False, column_names=table.names, block_size=block or table.longest)
    parse = csv.ParseOptions(
        delimiter=table.delimiter, newlines_in_values=True, ignore_empty_lines=len(table.features) > 1
    )
    convert = csv.ConvertOptions(
        column_types=dict(types), include_columns=list(types), null_values=list(NULLS), strings_can_be_null=True
    )
    return read, parse, convert
