"""Byte ranges: a part of a file as a file."""

from __future__ import annotations

import io
from typing import IO, final

_READ = 1 << 20


@final
class ByteRange(io.RawIOBase):
    """The bytes ``start`` to ``end - 1`` of a file, as a file that is read from its beginning to its end.

    Args:
        file: The file. It need not be able to seek.
        start: The first byte.
        end: The byte after the last one; -1 for the end of the file.
    """

    def __init__(self, file: IO[bytes], start: int, end: int) -> None:
        self.quotes = 0
        self._file, self._left = file, end - start if end >= 0 else -1
        self._ahead = b""
        if file.seekable():
            file.seek(start)
        else:
            while start and (data := file.read(min(start, _READ))):
                start -= len(data)

    def readable(self) -> bool:
        """True: the file can be read."""
        return True

    def is_empty(self) -> bool:
        """Whether there is no byte; before the first byte is read."""
        self._ahead = self._ahead or self._next(_READ)
        return not self._ahead

    def readinto(self, buffer: memoryview) -> int:  # pyrefly: ignore[bad-override]
        """Read bytes into a buffer; returns how many were read."""
        data = self._ahead or self._next(len(buffer))
        part, self._ahead = data[: len(buffer)], data[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)

    def _next(self, size: int) -> bytes:
        data = self._file.read(size if self._left < 0 else min(size, self._left))
        self._left -= len(data) if self._left >= 0 else 0
        self.quotes += data.count(b'"')
        return data

    def count_lines(self) -> int:
        """How many line ends there are."""
        lines = 0
        while data := self._next(_READ):
            lines += data.count(b"\n")
        return lines
