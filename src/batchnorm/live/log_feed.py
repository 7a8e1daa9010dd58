"""Feed: follows a log's folder and returns the lines that are new for a page, also if the log vanishes or is replaced.

The state of a page is the log's identity, a digest of its first line, and the number of lines of each kind that the
page has received. Both are in the id of each message. A page that reconnects, also to a restarted server, sends the
last id, and so says what it has received.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, final

from batchnorm.live.page_data import MOST, new_data
from batchnorm.live.percentiles import Percentiles
from batchnorm.live.run_status import status
from batchnorm.record import Log
from batchnorm.record.log_entry import JsonValue

_KINDS = ("start", "progress", "free", "probe", "lab", "arrays", "event", "end")
_ID = re.compile(rf"([0-9a-f]{{16}})((?:-\d{{1,12}}){{{len(_KINDS)}}})")
_HEAD = 1 << 16  # bytes of the first line that identify a log


@final
@dataclass(frozen=True, slots=True)
class PagePosition:
    """What a page has received: from which log, and how many lines of each kind."""

    identity: str = ""
    counts: tuple[int, ...] = (0,) * len(_KINDS)

    @classmethod
    def parse(cls, text: str) -> PagePosition:
        """The position in a message's id; an empty position for any other text."""
        match = _ID.fullmatch(text)
        return cls(match[1], tuple(map(int, match[2][1:].split("-")))) if match else cls()

    def continues(self, other: PagePosition, *, by: float = math.inf) -> bool:
        """Whether this is at most ``by`` lines later in the same log. False after a new start: it may rename layers."""
        more = [a - b for a, b in zip(self.counts, other.counts, strict=True)]
        return self.identity == other.identity and more[0] == 0 and min(more) >= 0 and sum(more) <= by

    def __str__(self) -> str:
        return "-".join([self.identity, *map(str, self.counts)])


@final
@dataclass(frozen=True, slots=True)
class Message:
    """A message to a page, as JSON: ``log`` replaces the page's data, ``more`` adds lines, ``beat`` has no lines."""

    kind: str
    text: str
    seen: PagePosition

    @classmethod
    def of(cls, kind: str, data: Mapping[str, JsonValue], seen: PagePosition) -> Message:
        """A message with its data as ASCII JSON, because half a surrogate pair cannot be encoded in UTF-8."""
        return cls(kind, json.dumps(data, separators=(",", ":"), allow_nan=False), seen)


@final
class Feed:
    """A log that is read while it grows; every method may be called from any thread.

    Args:
        folder: The log's folder.

    Raises:
        FileNotFoundError: If the folder has no log now. Later the log may vanish and return.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.name = self.folder.resolve().name or "log"
        self._lock = Lock()
        self._log: Log | None = None
        self._percentiles = Percentiles()
        self._file_identity = ("", -1)
        self._first: Message | None = None  # the first message, shared by pages that open close together
        self._identity = ""
        if not (self.folder / "record.jsonl").is_file():
            raise FileNotFoundError(
                f"expected the folder of a log, got {self.folder}, which has no record.jsonl. Give the folder that "
                "watch(model, log=...) writes to."
            )

    def news(self, seen: PagePosition) -> Message:
        """The next message for a page that has received ``seen``."""
        with self._lock:
            try:
                return self._message(self._refreshed(), seen)
            except Exception as error:  # noqa: BLE001 - a log may hold anything; the page shows the problem
                return Message.of("beat", {"problem": _problem(error)}, seen)

    def _message(self, log: Log, seen: PagePosition) -> Message:
        now = PagePosition(self._identity, tuple(map(log.count, _KINDS)))
        state = {"status": status(log), "name": self.name}
        if now == seen:
            return Message.of("beat", state, seen)
        if now.continues(seen):
            before = dict(zip(_KINDS, seen.counts, strict=True))
            return Message.of("more", new_data(log, before) | state, now)
        if self._first is None or not now.continues(self._first.seen, by=MOST):
            self._first = Message.of("log", new_data(log, {}) | state, now)
        return self._first  # later lines are in the next message

    def whole(self, *, most: int = MOST) -> dict[str, Any]:
        """All data of a page at once, thinned to ``most`` lines of each kind.

        Raises:
            OSError: If the log has vanished or cannot be opened.
            ValueError: If its contents cannot be read.
        """
        with self._lock:
            try:
                log = self._refreshed()
                return new_data(log, {}, most=most) | {"status": status(log), "name": self.name}
            except (OSError, ValueError):
                raise
            except Exception as error:
                raise ValueError(_problem(error)) from error

    def layer(self, index: int, *, first: int = 0, most: int = MOST) -> dict[str, JsonValue]:
        """Percentiles of one layer in the ``arrays`` lines from ``first`` on; ``count`` counts all such lines.

        Raises:
            IndexError: If there is no such layer.
            OSError: If the log has vanished or cannot be opened.
            ValueError: If its contents cannot be read.
            ModuleNotFoundError: If safetensors or numpy is missing.
        """
        with self._lock:
            log = self._refreshed()
            if not 0 <= index < len(log.layers):
                raise IndexError(f"expected a layer from 0 to {len(log.layers) - 1}, got {index}. Choose one of these.")
            count = log.count("arrays")
            rows = log.rows("arrays", first=first, most=most)
            return self._percentiles.of_layer(log, rows, index) | {"count": count}

    def _refreshed(self) -> Log:
        """The log as it is now: with its new lines, or another log that has replaced it."""
        identity = _file_identity(self.folder / "record.jsonl")
        if self._log is None or identity != self._file_identity:
            self._log = None  # until the new log can be read
            self._log, self._file_identity = Log(self.folder), identity
            self._identity = hashlib.sha256(identity[0].encode()).hexdigest()[:16]
            self._percentiles.forget()
            self._first = None
        else:
            self._log.refresh()
        return self._log


def _file_identity(path: Path) -> tuple[str, int]:
    """The identity of a log file: its first line, and its inode number."""
    with path.open("rb") as file:
        head = file.readline(_HEAD)
    return hashlib.sha256(head).hexdigest(), path.stat().st_ino


def _problem(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "The log is gone from its folder. The page shows the last state, and continues when the log is back."
    if isinstance(error, OSError):
        return f"The log cannot be read: {error.strerror or 'an error of the disk'}. The page tries again."
    if isinstance(error, ValueError):
        return str(error)[:300]
    return f"The log has unexpected contents ({type(error).__name__}). The page tries again when the log grows."
