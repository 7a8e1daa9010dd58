"""The ledger: a file with the statistics of every finished piece, from which an interrupted measurement goes on.

The file is a line of JSON, which says what is measured, and records to which others are only appended. A record has
the length and checksum of its body; the body is the piece's key and file, as a line of JSON, and its statistics. A
process that is killed while it writes leaves half a record at the end, which the next process cuts off.

Every record is given to the operating system at once, so that a killed process (kill -9) loses only the pieces that it
was reading. The records are on the disk after a second at the latest, so that a power failure loses one second more.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import time
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, final

from batchnorm.datasets.data_statistics import DataStatistics
from batchnorm.datasets.statistics_files import to_bytes
from batchnorm.files.locks import lock, unlock

if TYPE_CHECKING:
    from types import TracebackType

    from batchnorm.datasets.blocks import Piece
    from batchnorm.reporting.json_values import Json

SUFFIX = ".bnstats.ledger"
_KIND = "batchnorm ledger"
_VERSION = 1
_HEAD = struct.Struct("<QI")  # length of the body, and its CRC-32
_LONGEST_LINE = 1 << 20  # of the header: a longer first line is another kind of file
_SECONDS_IN_MEMORY = 1.0


@final
class Ledger:
    """An open ledger, which no other process can open until it is closed.

    Args:
        path: The file. It is made if it does not exist.
        question: What is measured, as JSON. A ledger is continued only for the same question.
        fresh: Forget the records that the ledger has.

    Raises:
        ValueError: If the file is not a ledger, is in use, or belongs to another question.
        OSError: If it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], question: Mapping[str, Json], *, fresh: bool = False) -> None:
        self.path = Path(path)
        self._places: dict[str, tuple[int, int]] = {}  # key of a piece -> offset and length of its body
        self.files: dict[str, str] = {}  # key of a piece -> its file
        self.damaged_bytes = 0
        self._file = _locked(self.path)
        self._synced = time.monotonic()
        try:
            self._begin({_KIND: _VERSION, **question}, fresh=fresh)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, key: str) -> DataStatistics:
        """The statistics of a finished piece."""
        offset, length = self._places[key]
        self._file.seek(offset)
        return DataStatistics.from_bytes(self._file.read(length).partition(b"\n")[2])

    def append(self, piece: Piece, statistics: DataStatistics) -> None:
        """Add the record of a piece.

        Raises:
            OSError: If the file cannot be written.
        """
        about = json.dumps({"key": piece.key, "file": piece.file}).encode()
        body = about + b"\n" + to_bytes(statistics)
        try:
            offset = self._file.seek(0, os.SEEK_END) + _HEAD.size
            self._file.write(_HEAD.pack(len(body), zlib.crc32(body)) + body)
            self._flush()
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self._places[piece.key], self.files[piece.key] = (offset, len(body)), piece.file

    def require_files(self, pieces: Iterable[Piece]) -> int:
        """The number of records whose file has changed since. Their pieces are measured again.

        Raises:
            ValueError: If a file of the ledger is not among the files of the pieces.
        """
        keys = {piece.key: piece.file for piece in pieces}
        files = set(keys.values())
        for file in self.files.values():
            if file not in files:
                raise ValueError(
                    f"{file} is counted in the ledger {self.path}, and is not among the data now. Name the same data "
                    f"again, or delete the ledger to start anew."
                )
        return sum(key not in keys for key in self._places)

    def remove(self) -> None:
        """Close and delete the file, when the result is written."""
        self.path.unlink(missing_ok=True)  # first, so that no process can lock it before it is gone
        self.close()

    def close(self) -> None:
        """Write everything to the disk, unlock and close."""
        if not self._file.closed:
            with suppress(OSError):  # a disk that was full: ``append`` has raised the error
                os.fsync(self._file.fileno())
                unlock(self._file.fileno())
            with suppress(OSError):
                self._file.close()

    def _begin(self, header: dict[str, Json], *, fresh: bool) -> None:
        """Check the header, or write it, and find the records."""
        line = json.dumps(header).encode() + b"\n"
        found = self._file.readline(_LONGEST_LINE)
        if line.startswith(found) and found != line:  # an empty file, or one whose writer was killed at once
            self._start(line)
            return
        old = _header(found, self.path)
        if fresh:
            self._start(line)
        else:
            _require_same(old, header, self.path)
            self._find_records(len(found))

    def _start(self, line: bytes) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._file.write(line)
        self._file.flush()

    def _find_records(self, start: int) -> None:
        """Find all whole records; what follows the first record that is not whole is cut off."""
        end = self._file.seek(0, os.SEEK_END)
        self._file.seek(start)
        while (body := self._body(end)) is not None:
            about = json.loads(body.partition(b"\n")[0])
            self._places[about["key"]] = self._file.tell() - len(body), len(body)
            self.files[about["key"]] = about["file"]
            start = self._file.tell()
        self.damaged_bytes = end - start
        self._file.truncate(start)

    def _body(self, end: int) -> bytes | None:
        """The body of the next record, or None if there is none that is whole."""
        head = self._file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            return None
        length, checksum = _HEAD.unpack(head)
        if not 0 < length <= end - self._file.tell():
            return None
        body = self._file.read(length)
        return body if zlib.crc32(body) == checksum else None

    def _flush(self) -> None:
        self._file.flush()
        if time.monotonic() - self._synced > _SECONDS_IN_MEMORY:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()


def _locked(path: Path) -> BinaryIO:
    """The file, opened and locked."""
    try:
        while True:
            if path.exists() and not path.is_file():
                raise OSError(errno.EINVAL, "it is a folder, pipe or device")  # noqa: TRY301 - one message for all
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
            try:
                lock(
                    file.fileno(), f"another process uses the ledger {path}. Wait for its end, or name another ledger."
                )
                if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                    return file
            except BaseException:
                file.close()
                raise
            file.close()  # its last user deleted it in the meantime
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> OSError:
    return OSError(f"cannot write the ledger {path}: {error.strerror or error}. Name another place for it.")


def _header(line: bytes, path: Path) -> dict[str, Json]:
    """The first line of a ledger, as JSON."""
    try:
        header = json.loads(line)
    except ValueError:
        header = None
    if not isinstance(header, dict) or _KIND not in header:
        raise ValueError(
            f"{path} is not a ledger of batchnorm stats, or its first line is damaged. Delete it, or name another "
            "place for the ledger."
        )
    return header


def _require_same(old: Mapping[str, Json], new: Mapping[str, Json], path: Path) -> None:
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            raise ValueError(
                f"the ledger {path} belongs to another question: its {name} is {json.dumps(old.get(name))}, asked is "
                f"{json.dumps(new.get(name))}. Ask the same question, or delete the ledger to start anew."
            )
