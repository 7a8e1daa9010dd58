"""Records: named stretches of an open file, each checked against its CRC before any of it is used."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import BinaryIO, final

from batchnorm.checkpoint.refusal import RefusalError, brief

_CHUNK = 1 << 20  # bytes that are held at a time while a large record is checked
_LOCAL_HEADER = 30  # bytes of a zip entry's header before its name


@final
@dataclass(frozen=True, slots=True)
class FileRecord:
    """A stretch of a file."""

    start: int
    size: int
    # 0 where the file has none: torch writes 0 after torch.serialization.set_crc32_options(False)
    crc: int = 0
    # a zip entry's own header comes first and says how long it is
    zipped: bool = False


@final
@dataclass(frozen=True, slots=True)
class Source:
    """An open file and its records by name."""

    file: BinaryIO
    records: Mapping[str, FileRecord]
    byteorder: str = "little"
    _checked: set[str] = field(default_factory=set)

    def size(self, name: str) -> int:
        """Bytes of a record."""
        return self._record(name).size

    def read(self, name: str, start: int = 0, stop: int | None = None, *, check: bool = True) -> bytes:
        """Bytes ``start`` to ``stop`` of a record, once all of it has been compared with its CRC.

        Args:
            name: The record's.
            start: First byte.
            stop: Byte after the last one, at most the record's size; None for all.
            check: Compare. Without, only the bytes asked for are read.
        """
        record = self._record(name)
        stop = record.size if stop is None else stop
        if not 0 <= start <= stop <= record.size:
            raise RefusalError(f"at least {brief(stop)} bytes in record {brief(name)}", f"{record.size}")
        at = record.start + (_length_of_header(self.file, record) if record.zipped else 0)
        if check and record.crc and name not in self._checked:
            self._compare(name, record, at)
        return exactly(self.file, at + start, stop - start)

    def _record(self, name: str) -> FileRecord:
        if name not in self.records:
            raise RefusalError(f"a record {brief(name)}", "none of that name")
        return self.records[name]

    def _compare(self, name: str, record: FileRecord, at: int) -> None:
        crc = 0
        for begin in range(0, record.size, _CHUNK):
            crc = zlib.crc32(exactly(self.file, at + begin, min(_CHUNK, record.size - begin)), crc)
        if crc != record.crc:
            raise RefusalError(f"CRC {record.crc:08x} in record {brief(name)}", f"{crc:08x}: its bytes were changed")
        self._checked.add(name)


def exactly(file: BinaryIO, start: int, size: int) -> bytes:
    """``size`` bytes from ``start``, or the refusal of a file that ends before."""
    end = file.seek(0, os.SEEK_END)
    if start + size > end:  # before any memory is taken for a size that is only declared
        raise RefusalError(f"{brief(size)} bytes at {brief(start)}", f"a file of {end} bytes: it was cut off")
    file.seek(start)
    return file.read(size)


def _length_of_header(file: BinaryIO, record: FileRecord) -> int:
    header = exactly(file, record.start, _LOCAL_HEADER)
    if header[:4] != b"PK\x03\x04":
        raise RefusalError(f"the header of a zip entry at {record.start}", "other bytes")
    return _LOCAL_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
