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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, final

import numpy as np

from batchnorm.datasets.sources.array_axes import NAME
from batchnorm.datasets.sources.array_pieces import plan_arrays
from batchnorm.datasets.sources.options import Options
from batchnorm.datasets.sources.plans import FilePlan
from batchnorm.datasets.sources.schemas import Shape
from batchnorm.datasets.sources.stored_files import StoredFile

# a header of 10,000 fields of a structured type; longer ones are damaged
_LONGEST_HEADER = 1 << 20


@final
@dataclass(frozen=True, slots=True)
class Layout:
    """Where the numbers of an array are in a file.

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
    def step(self) -> int:
        """Rows that are read together: a compressed member is read from its beginning to its end."""
        return self.shape[0] if self.member else 1

    @contextmanager
    def reader(self, stored: StoredFile) -> Iterator[Callable[[int, int], np.ndarray]]:
        """A function that reads the rows ``first`` to ``last - 1``.

        Raises:
            ValueError: If the file is damaged, or changed since the job was planned.
            OSError: If it cannot be read.
        """
        with stored.open() as file, _damage(stored), _stream(file, self) as numbers:
            yield lambda first, last: _read(numbers, self, first, last)


def plan_array(stored: StoredFile, options: Options) -> FilePlan:
    """The column of an .npy file, and its pieces.

    Raises:
        ValueError: If the file is damaged or cut off, or has objects instead of numbers.
        OSError: If it cannot be read.
    """
    with stored.open() as file, _damage(stored):
        layout = _layout(file, NAME, "")
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
    return plan_arrays(stored, (layout,), options)


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
    return plan_arrays(stored, layouts, options)


def _member_layout(stored: StoredFile, file: IO[bytes], archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Layout:
    """The layout of an array in an archive. Its bytes are in the file, if it is not compressed."""
    name = member.filename.removesuffix(".npy")
    with archive.open(member) as inside:
        layout = _layout(inside, name, member.filename)
    _check_size(stored, layout, member.file_size)
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        return layout
    file.seek(member.header_offset)
    lengths = struct.unpack("<HH", file.read(30)[26:30])  # of the name and of extra fields, before the data
    start = member.header_offset + 30 + sum(lengths)
    return Layout(name, "", start + layout.offset, layout.shape, layout.dtype, layout.fortran)


def _layout(file: IO[bytes], name: str, member: str) -> Layout:
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
        if any(each < 0 for each in shape):
            raise ValueError(f"shape {shape}")  # noqa: TRY301 - the same error as of other wrong headers
    except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError) as error:
        raise ValueError(f"its header cannot be read: {error}") from error
    return Layout(name, member, 8 + width + length, shape, dtype, bool(header["fortran_order"]))


def _end(layout: Layout) -> int:
    return layout.offset + math.prod(layout.shape) * layout.dtype.itemsize


def _check_size(stored: StoredFile, layout: Layout, size: int) -> None:
    if not layout.dtype.hasobject and _end(layout) > size:
        raise ValueError(
            f"expected {_end(layout)} bytes of array {layout.name!r} in {stored.address}, as its "
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
