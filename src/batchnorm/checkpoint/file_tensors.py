"""Tensors as a file describes them: the place of their numbers, and functions that read the numbers."""

from __future__ import annotations

import math
import struct
import sys
import zlib
from array import array
from dataclasses import dataclass
from typing import BinaryIO, final

from batchnorm.checkpoint.formats.checked_records import Source
from batchnorm.checkpoint.refusal import RefusalError, brief

# bytes of one element, by torch's name for the type
BYTES = {
    **dict.fromkeys(("complex128",), 16),
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    **dict.fromkeys(("float32", "int32", "uint32", "complex32", "qint32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool", "qint8", "quint8", "quint4x2", "quint2x4"), 1),
    **dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
}
# for each type that can be read, the type code of ``array``; float16 and bfloat16 are read as float32
_LETTERS = {
    "float64": "d",
    "float32": "f",
    "float16": "f",
    "bfloat16": "f",
    "int64": "q",
    "uint64": "Q",
    "int32": "i",
    "uint32": "I",
    "int16": "h",
    "uint16": "H",
    "int8": "b",
    "uint8": "B",
    "bool": "B",
}
_MOST_AXES = 64  # torch's own limit
_MOST_VALUES = 1 << 22  # of one tensor; no network has that many channels in a layer
_TOO_MANY = (
    "Load the file into its model, and examine the model: batchnorm.doctor.examine(model). If the tensor does not "
    "belong to a batch norm layer, rename it."
)
_MOST_BYTES = 1 << 24  # between the first and the last value of one tensor
_HASHED_BYTES = 4096  # at most, of a tensor


@final
@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """A run of bytes of a pickle that stays in the file until it is read."""

    file: BinaryIO
    start: int
    size: int

    def read(self, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` of the run."""
        at = self.file.tell()
        try:
            self.file.seek(self.start + start)
            return self.file.read(stop - start)
        finally:
            self.file.seek(at)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """Numbers that are in the pickle itself, and the order of their bytes."""

    data: bytes | str | Span
    byteorder: str

    @classmethod
    def of(cls, data: object, byteorder: str = "little") -> Held | None:
        """The numbers in ``data``; None if ``data`` is neither bytes, text nor a Span."""
        return cls(data, byteorder) if isinstance(data, bytes | str | Span) else None

    @property
    def size(self) -> int:
        """Number of bytes; each character of a text is one byte."""
        return self.data.size if isinstance(self.data, Span) else len(self.data)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop``."""
        if isinstance(self.data, Span):
            return self.data.read(start, stop)
        part = self.data[start:stop]
        return part.encode("latin-1") if isinstance(part, str) else part


@final
@dataclass(frozen=True, slots=True)
class Storage:
    """A record of elements of one type. The elements of an untyped storage are bytes."""

    key: str
    dtype: str
    numel: int
    # the elements, if they are in the pickle itself and not in a record
    held: Held | None = None

    def length(self, source: Source) -> int:
        """Number of bytes in the file."""
        return source.size(self.key) if self.held is None else self.held.size

    def read(self, source: Source, start: int, stop: int, *, check: bool = True) -> bytes:
        """Bytes ``start`` to ``stop``; ``check`` as in ``Source.read``."""
        return source.read(self.key, start, stop, check=check) if self.held is None else self.held.read(start, stop)

    def byteorder(self, source: Source) -> str:
        """The order of the bytes of a number: "little" or "big"."""
        return source.byteorder if self.held is None else self.held.byteorder


@final
@dataclass(frozen=True, slots=True)
class Tensor:
    """A strided view of a storage; offset and strides are counted in elements of ``dtype``."""

    storage: Storage
    dtype: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    # why its numbers cannot be read (such as for a shard), and what to do; "" if they can
    why: str = ""

    def __post_init__(self) -> None:
        axes = (self.offset, *self.size, *self.stride)
        if len(self.size) != len(self.stride) or len(self.size) > _MOST_AXES:
            what = f"at most {_MOST_AXES} axes in a tensor, and a stride for each axis"
            raise RefusalError(what, f"{len(self.stride)} for {len(self.size)} axes")
        if not all(type(number) is int and 0 <= number < 1 << 63 for number in axes):
            wrong = next(number for number in axes if type(number) is not int or not 0 <= number < 1 << 63)
            raise RefusalError("whole numbers from 0 for a tensor's offset, size and stride", brief(wrong))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.size)

    @property
    def shape(self) -> str:
        """The size of the first 8 axes as text, such as "3 x 4"; "1" without axes."""
        return " x ".join(map(brief, self.size[:8])) or "1"

    @property
    def is_floating(self) -> bool:
        """Whether the type is a floating-point type."""
        return "float" in self.dtype


def contiguous(storage: Storage, size: tuple[int, ...]) -> Tensor:
    """All of ``storage`` as a tensor of ``size``."""
    strides = [1]
    for length in reversed(size[1:]):
        strides.append(strides[-1] * max(length, 1))
    return Tensor(storage, storage.dtype, offset=0, size=size, stride=tuple(reversed(strides[: len(size)])))


def fortran(storage: Storage, size: tuple[int, ...]) -> Tensor:
    """All of ``storage`` as a tensor of ``size`` in Fortran order: neighbours on the first axis are adjacent."""
    reverse = contiguous(storage, size[::-1])
    return Tensor(storage, storage.dtype, offset=0, size=size, stride=reverse.stride[::-1])


def unreadable(dtype: str, size: tuple[int, ...], why: str) -> Tensor:
    """A tensor whose numbers cannot be read, with the reason; only its type and size are known."""
    return Tensor(Storage("", dtype, numel=0), dtype, offset=0, size=size, stride=(0,) * len(size), why=why)


def numbers(source: Source, tensor: Tensor) -> array:
    """All values of ``tensor`` in C order, in an array of its type; float16 and bfloat16 as float32.

    Raises:
        RefusalError: If the values cannot be read, are of a type without real numbers, are too many or too far apart in
            the file, or do not fit the storage.
    """
    if tensor.why:
        raise RefusalError("a tensor with its own numbers", *tensor.why.split(". ", 1))
    if tensor.dtype not in _LETTERS:
        raise RefusalError("real numbers of 8 to 64 bits", f"{brief(tensor.dtype)}", "Convert the tensor to float32.")
    if tensor.numel > _MOST_VALUES:
        raise RefusalError(f"at most {_MOST_VALUES:,} channels in a layer", f"{brief(tensor.numel)}", _TOO_MANY)
    if not tensor.numel:
        return array(_LETTERS[tensor.dtype])
    start, stop = _span(source, tensor)
    if stop - start > _MOST_BYTES:
        raise RefusalError(
            f"values within {_MOST_BYTES:,} bytes", f"{stop - start:,}", "Save tensor.contiguous() instead."
        )
    storage = tensor.storage
    flat = decoded(storage.read(source, start, stop), tensor.dtype, storage.byteorder(source))
    return array(flat.typecode, map(flat.__getitem__, _places(tensor)))


def decoded(data: bytes, dtype: str, byteorder: str = "little") -> array:
    """The numbers of type ``dtype`` that these bytes encode."""
    letter, swap = _LETTERS[dtype], byteorder != sys.byteorder
    if dtype == "float16":
        return _halves(data, byteorder)
    if dtype == "bfloat16":
        data, swap = _widened(data, byteorder), False
    values = array(letter)
    values.frombytes(data)
    if swap:
        values.byteswap()
    return values


def first_bytes(source: Source, tensor: Tensor, crc: int = 0) -> int:
    """The CRC of a tensor's first bytes in the file (4,096 at most), continued from another ``crc``."""
    if not tensor.numel:
        return crc
    start, stop = _span(source, tensor)
    return zlib.crc32(tensor.storage.read(source, start, min(stop, start + _HASHED_BYTES), check=False), crc)


def _span(source: Source, tensor: Tensor) -> tuple[int, int]:
    """The index of a tensor's first byte in its storage, and the index after its last byte."""
    item = BYTES[tensor.dtype]
    last = tensor.offset + sum((length - 1) * step for length, step in zip(tensor.size, tensor.stride, strict=True))
    declared = tensor.storage.numel * BYTES[tensor.storage.dtype]
    stored = tensor.storage.length(source)
    if declared != stored:
        raise RefusalError(f"{brief(declared)} bytes in record {brief(tensor.storage.key)}", f"{stored}")
    if (last + 1) * item > stored:
        raise RefusalError(
            f"a tensor inside its storage of {stored} bytes", f"a tensor that ends at {brief((last + 1) * item)}"
        )
    return tensor.offset * item, (last + 1) * item


def _places(tensor: Tensor) -> list[int]:
    """The index of each value in the storage, counted from the tensor's first value."""
    places = [0]
    for length, step in zip(tensor.size, tensor.stride, strict=True):
        places = [place + i * step for place in places for i in range(length)]
    return places


def _halves(data: bytes, byteorder: str) -> array:
    sign = "<" if byteorder == "little" else ">"
    return array("f", struct.unpack(f"{sign}{len(data) // 2}e", data))


def _widened(data: bytes, byteorder: str) -> bytes:
    """The bytes of bfloat16 numbers as float32: a bfloat16 is the upper half of a float32."""
    wide = bytearray(2 * len(data))
    low, high = (data[::2], data[1::2]) if byteorder == "little" else (data[1::2], data[::2])
    first, second = (2, 3) if sys.byteorder == "little" else (1, 0)
    wide[first::4], wide[second::4] = low, high
    return bytes(wide)
