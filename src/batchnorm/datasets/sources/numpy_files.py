"""NumPy files: .npy has one array, the column "values"; .npz has several, each a column with the name of its key.

A piece is a range of rows. Arrays that are compressed in an .npz file can only be read from their beginning; then the
piece is the file. Pickled objects are never loaded.
"""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from ast import literal_eval
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, final

import numpy as np

from batchnorm.datasets.blocks import Block, Selection
from batchnorm.datasets.sources.array_axes import Axes, column_of, feature_of, fields_in, fields_of, grouped, groups_in
from batchnorm.datasets.sources.options import Options
from batchnorm.datasets.sources.plans import MOST_VALUES, FilePlan
from batchnorm.datasets.sources.schemas import Feature, FileSchema, Shape, names_of
from batchnorm.datasets.sources.stored_files import StoredFile

NAME = "values"
# a header of 10,000 fields of a structured type; longer ones are damaged
_LONGEST_HEADER = 1 << 20


@final
@dataclass(frozen=True, slots=True)
class Layout:
    """Where the numbers of an array are.

    Args:
        name: Name of the array.
        member: Name of the compressed member of an .npz file that has the array; "" if its bytes are in the file.
        offset: Place of the first number, in the file or in the member.
        shape: Shape of the array.
        dtype: Type of its elements.
        fortran: Whether the first axis is the fastest.
    """

    name: str
    member: str
    offset: int
    shape: Shape
    dtype: np.dtype
    fortran: bool

    @property
    def row_values(self) -> int:
        """Numbers in a row."""
        return max(1, sum(math.prod(shape[1:]) for _, shape in fields_of(self.name, self.dtype, self.shape).values()))

    @property
    def bytes(self) -> int:
        """Bytes of all numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


@final
@dataclass(frozen=True, slots=True)
class ArrayPiece:
    """Rows ``first`` to ``last - 1`` of the arrays of a file."""

    stored: StoredFile
    layouts: tuple[Layout, ...]
    first: int
    last: int
    size: int
    axes: Axes

    @property
    def file(self) -> str:
        """Address of the file."""
        return self.stored.address

    @property
    def fingerprint(self) -> str:
        """What identifies the content of the file."""
        return self.stored.fingerprint

    @property
    def key(self) -> str:
        """Name of this piece, the same in every run while the file does not change."""
        names = ",".join(each.name for each in self.layouts)
        return self.stored.key(f"rows {self.first}-{self.last} of {names}, axis {self.axes}")

    def blocks(self, selection: Selection) -> Iterator[Block]:
        """The rows, one array after another."""
        names = names_of(selection, _features(self.stored, self.layouts, self.axes))
        counted = False
        with self.stored.open() as file, _damage(self.stored):
            for layout in self.layouts:
                inside = [name for name in fields_of(layout.name, layout.dtype, layout.shape) if name in names]
                if inside:
                    yield from self._rows(file, layout, inside, selection.by, counted)
                    counted = True

    def _rows(self, file: IO[bytes], layout: Layout, names: list[str], by: str, counted: bool) -> Iterator[Block]:
        many = max(1, MOST_VALUES // layout.row_values)
        with ExitStack() as stack:
            numbers = stack.enter_context(_stream(file, layout))
            grouping = next((each for each in self.layouts if by in fields_of(each.name, each.dtype, each.shape)), None)
            if by and grouping:
                _common_rows(self.stored, [layout, grouping])
            groups = stack.enter_context(_stream(file, grouping)) if by and grouping else None
            for first in range(self.first, max(self.last, self.first + 1), many):
                last = min(first + many, self.last)
                rows = 0 if counted else last - first
                fields = fields_in(layout.name, _read(numbers, layout, first, last))
                columns = {name: column_of(fields[name], self.axes) for name in names}
                if groups is None or grouping is None:
                    yield Block(rows, columns, self.stored.partitions.get(by) if by else None)
                else:
                    labels = fields_in(grouping.name, _read(groups, grouping, first, last))[by]
                    yield from grouped(rows, columns, *groups_in(labels))


def plan_array(stored: StoredFile, options: Options) -> FilePlan:
    """The column of an .npy file, and its pieces.

    Raises:
        ValueError: If the file is damaged or cut off, or has objects instead of numbers.
        OSError: If it cannot be read.
    """
    with stored.open() as file, _damage(stored):
        layout = _layout(file, NAME, "", 0)
    if layout.dtype.hasobject:
        raise ValueError(
            f"expected an array of numbers, got {stored.address} with pickled objects, which are not loaded, because a "
            "pickle can run any code. Save it again as an array of numbers."
        )
    if not layout.shape:
        raise ValueError(
            f"expected an array of examples, got {stored.address} with a single value. Save an array with examples."
        )
    _check_size(stored, layout, stored.size)
    return _plan(stored, (layout,), options)


def plan_archive(stored: StoredFile, options: Options) -> FilePlan:
    """The columns of an .npz file, and its pieces.

    Raises:
        ValueError: If the file is damaged, has no arrays, or arrays of different lengths are measured together.
        OSError: If it cannot be read.
    """
    with stored.open() as file, _damage(stored), zipfile.ZipFile(file) as archive:
        members = [each for each in archive.infolist() if each.filename.endswith(".npy")]
        layouts = tuple(_member_layout(stored, file, archive, each) for each in members)
    if not layouts:
        raise ValueError(
            f"expected an .npz file with arrays, got {stored.address}, a zip file without a member that ends in .npy. "
            "Save arrays with numpy.savez."
        )
    return _plan(stored, layouts, options)


def _plan(stored: StoredFile, layouts: tuple[Layout, ...], options: Options) -> FilePlan:
    axes = options.channel_axis
    features = _features(stored, layouts, axes)

    def cut(shapes: Mapping[str, Shape]) -> Iterator[ArrayPiece]:
        chosen = [each for each in layouts if any(n in shapes for n in fields_of(each.name, each.dtype, each.shape))]
        rows = _common_rows(stored, chosen)
        total = sum(each.bytes for each in chosen)
        whole = any(each.member for each in layouts) or not total
        many = rows if whole else max(1, rows * options.piece_bytes // total)
        for first in range(0, max(rows, 1), max(1, many)):
            last = min(first + many, rows)
            size = stored.size * last // max(rows, 1) - stored.size * first // max(rows, 1)
            yield ArrayPiece(stored, layouts, first, last, size, axes)

    return FilePlan(FileSchema(stored.address, features, stored.partitions), cut)


def _features(stored: StoredFile, layouts: tuple[Layout, ...], axes: Axes) -> dict[str, Feature]:
    return {
        name: feature_of(dtype, shape, axes, f"{name!r} in {stored.address}")
        for layout in layouts
        for name, (dtype, shape) in fields_of(layout.name, layout.dtype, layout.shape).items()
    }


def _common_rows(stored: StoredFile, layouts: list[Layout]) -> int:
    lengths = {each.shape[0]: each.name for each in layouts}
    if len(lengths) > 1:
        (first, one), (second, other), *_ = lengths.items()
        raise ValueError(
            f"expected arrays with the same number of examples in {stored.address}, got {first} in {one!r} and "
            f"{second} in {other!r}. Name columns that belong together."
        )
    return next(iter(lengths))


def _member_layout(stored: StoredFile, file: IO[bytes], archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Layout:
    """The layout of an array in an archive. Its bytes are in the file, if it is not compressed."""
    name = member.filename.removesuffix(".npy")
    with archive.open(member) as inside:
        layout = _layout(inside, name, member.filename, 0)
    _check_size(stored, layout, member.file_size)
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        return layout
    file.seek(member.header_offset)
    lengths = struct.unpack("<HH", file.read(30)[26:30])  # of the name and of extra fields, before the data
    start = member.header_offset + 30 + sum(lengths)
    return Layout(name, "", start + layout.offset, layout.shape, layout.dtype, layout.fortran)


def _layout(file: IO[bytes], name: str, member: str, start: int) -> Layout:
    """The layout that the header of an .npy file describes."""
    magic = file.read(8)
    if magic[:6] != b"\x93NUMPY" or len(magic) < 8:
        raise ValueError(f"its first bytes are {magic!r}, not those of an .npy file")
    width = 2 if magic[6] == 1 else 4
    length = int.from_bytes(file.read(width), "little")
    if length > _LONGEST_HEADER:
        raise ValueError(f"its header has {length} bytes")
    text = file.read(length)
    try:
        header = literal_eval(text.decode("utf-8" if magic[6] > 2 else "latin-1"))
        dtype = np.lib.format.descr_to_dtype(header["descr"])
        shape = tuple(int(each) for each in header["shape"])
    except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError) as error:
        raise ValueError(f"its header cannot be read: {error}") from error
    return Layout(name, member, start + 8 + width + length, shape, dtype, bool(header["fortran_order"]))


def _check_size(stored: StoredFile, layout: Layout, size: int) -> None:
    if not layout.dtype.hasobject and layout.offset + layout.bytes > size:
        raise ValueError(
            f"expected {layout.offset + layout.bytes} bytes of array {layout.name!r} in {stored.address}, as its "
            f"header says, got {size}: the file was cut off. Write it again, or leave it out."
        )


@contextmanager
def _stream(file: IO[bytes], layout: Layout) -> Iterator[IO[bytes]]:
    """What an array is read from: the file, or a compressed member of it."""
    if not layout.member:
        yield file
        return
    with zipfile.ZipFile(file) as archive, archive.open(layout.member) as member:
        yield member  # pyrefly: ignore[invalid-yield]


def _read(file: IO[bytes], layout: Layout, first: int, last: int) -> np.ndarray:
    """Rows of an array."""
    shape = (last - first, *layout.shape[1:])
    if not layout.fortran or len(layout.shape) == 1:
        start = layout.offset + first * math.prod(shape[1:]) * layout.dtype.itemsize
        return _numbers(file, layout.dtype, start, math.prod(shape)).reshape(shape)
    places = range(math.prod(shape[1:]))  # the rows of each feature are together
    starts = (layout.offset + (place * layout.shape[0] + first) * layout.dtype.itemsize for place in places)
    parts = [_numbers(file, layout.dtype, start, shape[0]) for start in starts]
    return np.concatenate(parts or [np.empty(0, layout.dtype)]).reshape(shape, order="F")


def _numbers(file: IO[bytes], dtype: np.dtype, start: int, count: int) -> np.ndarray:
    file.seek(start)
    data = bytearray(count * dtype.itemsize)
    view, done = memoryview(data), 0
    while done < len(data):
        got = file.readinto(view[done:])  # pyrefly: ignore[missing-attribute]
        if not got:
            raise ValueError(f"it ends after {start + done} bytes")
        done += got
    return np.frombuffer(data, dtype) if count else np.empty(0, dtype)


@contextmanager
def _damage(stored: StoredFile) -> Iterator[None]:
    """A block that reads a file; errors of damaged content say which file it is, and what to do."""
    try:
        yield
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        if stored.address in str(error):
            raise
        raise ValueError(
            f"expected a NumPy file, got {stored.address}, which is damaged: {error}. Write it again, or leave it out."
        ) from error
