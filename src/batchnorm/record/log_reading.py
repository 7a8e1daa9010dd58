"""Read a log, also while it is written and if a line is damaged, without parsing all lines of a long log."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from batchnorm.record.log_entry import JsonValue, Line

STREAM = "record.jsonl"
ARRAYS = "arrays"
_KINDS = ("start", "progress", "free", "probe", "lab", "arrays", "event", "end")
_KIND = re.compile(rb'^\{"kind":"(\w+)"(?:,"step":(\d+))?')
_FILE = re.compile(rf"{ARRAYS}/\d+\.safetensors")
_READABLE = 1  # the newest schema version that this reader knows
_BLOCK = 1 << 24  # bytes
Place = tuple[int, int, int]  # a line's step, its offset in the file, and its length


class Log:
    """The lines of a log that are written so far; ``refresh`` adds the lines that were appended since.

    Lines are indexed at first and parsed only on demand, so that a log of a hundred thousand steps opens quickly. A
    last line without a newline is left for the next ``refresh``. Lines that are damaged or of an unknown kind are
    skipped and counted in ``damaged``.

    Args:
        folder: The folder of the log, or a copy of it.

    Raises:
        FileNotFoundError: If the folder has no log.
        ValueError: If the log's schema version is newer than this reader, or if it has lines but no ``start`` line.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._path = self.folder / STREAM
        if not self._path.is_file():
            raise FileNotFoundError(
                f"{self.folder} has no {STREAM}. Give the folder that watch(model, log=...) writes to."
            )
        self.damaged = 0
        self._size = 0
        self._lines: dict[str, list[Place]] = {kind: [] for kind in _KINDS}  # step, offset, length
        self.refresh()

    def refresh(self) -> int:
        """Index the lines that were appended, and return their number; a log that became shorter is read again."""
        size = self._path.stat().st_size
        if size < self._size:
            self._size, self.damaged = 0, 0
            self._lines = {kind: [] for kind in _KINDS}
        new = 0
        with self._path.open("rb") as file:
            file.seek(self._size)
            rest = b""
            while block := file.read(_BLOCK):
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    new += self._index(line)
        if new:
            self._check()
        return new

    def _index(self, line: bytes) -> int:
        """Add the position of a complete line to the index; return 1, or 0 for a damaged line or an unknown kind."""
        start, length = self._size, len(line)
        self._size += length + 1
        match = _KIND.match(line)
        kind = match[1].decode() if match else ""
        if kind not in _KINDS or not line.endswith(b"}"):
            self.damaged += bool(line.strip())
            return 0
        step = int(match[2]) if match and match[2] else 0
        self._lines[kind].append((step, start, length))
        return 1

    def _check(self) -> None:
        version = self.start.get("schema_version", 0)
        if not isinstance(version, int) or not 1 <= version <= _READABLE:
            raise ValueError(
                f"{self._path} has schema version {version!r}, expected {_READABLE}. Read it with the version of "
                "batchnorm that wrote it."
            )

    @property
    def start(self) -> Line:
        """The last ``start`` line; {} if there is none yet."""
        rows = self.rows("start")
        return rows[-1] if rows else {}

    @property
    def identity(self) -> str:
        """The id of the log, which its copies and continuations share; of older logs a digest of the first line."""
        given = self.start.get("id")
        if isinstance(given, str) and given:
            return given
        with self._path.open("rb") as file:
            return hashlib.sha256(file.readline()).hexdigest()[:32]

    @property
    def unfinished(self) -> int:
        """Number of bytes behind the last newline: a line that is being written, or that was cut off."""
        return max(0, self._path.stat().st_size - self._size)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in the model's order."""
        return tuple(layer["name"] for layer in self.start.get("layers", ()))

    @property
    def step(self) -> int:
        """The last step in any line; 0 for an empty log."""
        return max((step for lines in self._lines.values() for step, _, _ in lines[-1:]), default=0)

    @property
    def is_finished(self) -> bool:
        """Whether an ``end`` line follows the last ``start`` line; a killed process writes no ``end`` line."""
        ends, starts = self._lines["end"], self._lines["start"]
        return bool(ends) and ends[-1][1] > starts[-1][1]

    def count(self, kind: str) -> int:
        """Number of lines of a kind."""
        return len(self._lines[kind])

    def rows(self, kind: str, *, first: int = 0, most: int | None = None) -> list[Line]:
        """Lines of a kind as dicts, in the order in which they were written.

        Args:
            kind: One of the kinds of lines.
            first: Leave out this number of lines at the start.
            most: Return at most this number of lines, evenly spread, with the last line; None returns all.
        """
        return self._parsed(self._thinned(self._lines[kind][first:], most))

    @staticmethod
    def _thinned(items: list[Place], most: int | None) -> list[Place]:
        if most is None or len(items) <= most:
            return items
        stride = -(-len(items) // most)
        return items[(len(items) - 1) % stride :: stride]

    def _parsed(self, lines: list[Place]) -> list[Line]:
        rows = []
        with self._path.open("rb") as file:
            for _, start, length in lines:
                file.seek(start)
                try:
                    row = json.loads(file.read(length))
                except ValueError:
                    self.damaged += 1
                    continue
                rows.append(row)
        return rows

    def arrays(self, row: Mapping[str, JsonValue]) -> dict[str, np.ndarray]:
        """The arrays in the file that an ``arrays`` line names.

        Raises:
            ValueError: If the line names a file that is not in the folder ``arrays`` of the log.
            OSError: If the file cannot be read.
        """
        from safetensors.numpy import load_file

        name = str(row.get("file", ""))
        path = (self.folder / name).resolve()
        if not _FILE.fullmatch(name) or not path.is_relative_to(self.folder.resolve()):
            raise ValueError(f"expected {ARRAYS}/NUMBER.safetensors in {self.folder}, got {name!r}. Skip this line.")
        return load_file(path)
