"""Records: named runs of bytes of an open file, compared with their CRC before use, if they have one."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import BinaryIO, final

from batchnorm.checkpoint.refusal import RefusalError, brief

_CHUNK = 1 << 20  # bytes in memory at a time while a large record is checked
_LOCAL_HEADER = 30  # bytes of a zip entry's header before its name


@final
@dataclass(frozen=True, slots=True)
class FileRecord:
    """A run of bytes of a file."""

    start: int
    size: int
    # 0 if the file has no CRC: torch writes 0 after torch.serialization.set_crc32_options(False)
    crc: int = 0
    # whether a zip entry's local header is at ``start``, before the ``size`` bytes
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
        """Number of bytes of a record."""
        return self._record(name).size

    def read(self, name: str, start: int = 0, stop: int | None = None, *, check: bool = True) -> bytes:
        """Bytes ``start`` to ``stop`` of a record, after the whole record was compared with its CRC, if it has one.

        Args:
            name: Name of the record.
            start: Index of the first byte.
            stop: Index after the last byte, at most the record's size. None: the record's size.
            check: Whether the record is compared with its CRC. If not, only the bytes asked for are read.

        Raises:
            RefusalError: If there is no such record, it has fewer bytes, its CRC differs, or the file was cut off.
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
    """``size`` bytes from ``start``; refused if the file ends before."""
    end = file.seek(0, os.SEEK_END)
    if start + size > end:  # checked first: the declared size may be too large for the memory
        raise RefusalError(f"{brief(size)} bytes at {brief(start)}", f"a file of {end} bytes: it was cut off")
    file.seek(start)
    return file.read(size)


def _length_of_header(file: BinaryIO, record: FileRecord) -> int:
    header = exactly(file, record.start, _LOCAL_HEADER)
    if header[:4] != b"PK\x03\x04":
        raise RefusalError(f"the header of a zip entry at {record.start}", "other bytes")
    return _LOCAL_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
