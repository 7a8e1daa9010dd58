"""Following a log's folder: the lines that are new for a page, whatever happens to the folder meanwhile.

A page knows a log by its identity, a digest of its first line, and by how many lines of each kind it has received. Both
are in the id of each message, so a page that reconnects, also to a restarted server, states what it has already.
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
        """The position in a message's id; the empty one for any other text."""
        found = _ID.fullmatch(text)
        return cls(found[1], tuple(map(int, found[2][1:].split("-")))) if found else cls()

    def continues(self, other: PagePosition, *, by: float = math.inf) -> bool:
        """Whether this is the other's log, grown by at most ``by`` lines without a new start (it may rename layers)."""
        more = [a - b for a, b in zip(self.counts, other.counts, strict=True)]
        return self.identity == other.identity and more[0] == 0 and min(more) >= 0 and sum(more) <= by

    def __str__(self) -> str:
        return "-".join([self.identity, *map(str, self.counts)])


@final
@dataclass(frozen=True, slots=True)
class Message:
    """One message to a page, as JSON: ``log`` starts anew, ``more`` adds lines, ``beat`` has the state alone."""

    kind: str
    text: str
    seen: PagePosition

    @classmethod
    def of(cls, kind: str, data: Mapping[str, JsonValue], seen: PagePosition) -> Message:
        """A message whose data are ASCII JSON, because half a surrogate pair has no UTF-8."""
        return cls(kind, json.dumps(data, separators=(",", ":"), allow_nan=False), seen)


@final
class Feed:
    """A followed log; every method may be called from any thread.

    Args:
        folder: The log's folder.

    Raises:
        FileNotFoundError: If there is no log now. Later it may vanish and return.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.name = self.folder.resolve().name or "log"
        self._lock = Lock()
        self._log: Log | None = None
        self._percentiles = Percentiles()
        self._known = ("", -1)
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
        """All data of a page at once, thinned to ``most`` columns.

        Raises:
            OSError: If the log has vanished.
            ValueError: If it cannot be read.
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
        """Percentiles of one layer over the ``arrays`` lines from ``first`` on; ``count`` is the number of all lines.

        Raises:
            IndexError: If there is no such layer.
        """
        with self._lock:
            log = self._refreshed()
            if not 0 <= index < len(log.layers):
                raise IndexError(f"expected a layer from 0 to {len(log.layers) - 1}, got {index}. Choose another.")
            count = log.count("arrays")
            rows = log.rows("arrays", first=first, most=most)
            return self._percentiles.of_layer(log, rows, index) | {"count": count}

    def _refreshed(self) -> Log:
        """The log as it is now: the same, grown, or replaced."""
        known = _file_identity(self.folder / "record.jsonl")
        if self._log is None or known != self._known:
            self._log = None  # until the new one can be read
            self._log, self._known = Log(self.folder), known
            self._identity = hashlib.sha256(known[0].encode()).hexdigest()[:16]
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
        return "The log is gone from its folder. The page shows its last state, and continues when it is back."
    if isinstance(error, OSError):
        return f"The log cannot be read: {error.strerror or 'an error of the disk'}. The page tries again."
    if isinstance(error, ValueError):
        return str(error)[:300]
    return f"The log has unexpected contents ({type(error).__name__}). The page tries again as it grows."
