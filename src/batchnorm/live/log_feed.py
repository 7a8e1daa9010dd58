"""Following a log's folder: what is new since a page was last told, whatever happens to the folder meanwhile.

A page knows a log by its identity, a digest of its first line, and how many lines of each kind it was told of. Both
are in the id of each message, so a page that comes back, also to a restarted server, says itself what it has missed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, final

from batchnorm.live.page_data import MOST, told
from batchnorm.live.percentiles import Percentiles
from batchnorm.live.run_status import status
from batchnorm.record import Log

if TYPE_CHECKING:
    import os

_KINDS = ("start", "progress", "free", "probe", "lab", "arrays", "event", "end")
_ID = re.compile(rf"([0-9a-f]{{16}})((?:-\d{{1,12}}){{{len(_KINDS)}}})")
_HEAD = 1 << 16  # bytes of the first line that a log is known by


@final
@dataclass(frozen=True, slots=True)
class Seen:
    """What a page was told: of which log, and how many lines of each kind."""

    identity: str = ""
    counts: tuple[int, ...] = (0,) * len(_KINDS)

    @classmethod
    def parse(cls, text: str) -> Seen:
        """From a message's id; nothing seen for any other text."""
        found = _ID.fullmatch(text)
        return cls(found[1], tuple(map(int, found[2][1:].split("-")))) if found else cls()

    def continues(self, other: Seen, *, by: float = math.inf) -> bool:
        """Whether the other's log only grew, by at most so many lines; another start may name other layers."""
        more = [a - b for a, b in zip(self.counts, other.counts, strict=True)]
        return self.identity == other.identity and more[0] == 0 and min(more) >= 0 and sum(more) <= by

    def __str__(self) -> str:
        return "-".join([self.identity, *map(str, self.counts)])


@final
@dataclass(frozen=True, slots=True)
class Message:
    """One message to a page, as JSON: ``log`` begins anew, ``more`` adds to it, ``beat`` tells the state alone."""

    kind: str
    text: str
    seen: Seen

    @classmethod
    def of(cls, kind: str, data: dict[str, Any], seen: Seen) -> Message:
        """With its data as JSON in ASCII, as half a surrogate pair has no UTF-8."""
        return cls(kind, json.dumps(data, separators=(",", ":"), allow_nan=False), seen)


@final
class Feed:
    """A log that is followed; every method may be called from any thread.

    Args:
        folder: The log's folder.

    Raises:
        FileNotFoundError: If there is no log now; later it may go and come back.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.name = self.folder.resolve().name or "log"
        self._lock = Lock()
        self._log: Log | None = None
        self._percentiles = Percentiles()
        self._known = ("", -1)
        self._first: Message | None = None  # what pages are told first, made once for those that open close together
        self._identity = ""
        if not (self.folder / "record.jsonl").is_file():
            raise FileNotFoundError(
                f"expected the folder of a log, got {self.folder}, which has no record.jsonl. Give the folder that "
                "watch(model, log=...) writes to."
            )

    def news(self, seen: Seen) -> Message:
        """What a page that was told ``seen`` should be told now."""
        with self._lock:
            try:
                return self._message(self._refreshed(), seen)
            except Exception as error:  # noqa: BLE001 - a log may hold anything; the page says so and goes on
                return Message.of("beat", {"problem": _words(error)}, seen)

    def _message(self, log: Log, seen: Seen) -> Message:
        now = Seen(self._identity, tuple(map(log.count, _KINDS)))
        state = {"status": status(log), "name": self.name}
        if now == seen:
            return Message.of("beat", state, seen)
        if now.continues(seen):
            before = dict(zip(_KINDS, seen.counts, strict=True))
            return Message.of("more", told(log, before) | state, now)
        if self._first is None or not now.continues(self._first.seen, by=MOST):
            self._first = Message.of("log", told(log, {}) | state, now)
        return self._first  # what came since is told next

    def whole(self, *, most: int = MOST) -> dict[str, Any]:
        """All that a page can be told at once, thinned to ``most`` columns.

        Raises:
            OSError: If the log is not there any more.
            ValueError: If it cannot be read.
        """
        with self._lock:
            try:
                log = self._refreshed()
                return told(log, {}, most=most) | {"status": status(log), "name": self.name}
            except (OSError, ValueError):
                raise
            except Exception as error:
                raise ValueError(_words(error)) from error

    def layer(self, index: int, *, first: int = 0, most: int = MOST) -> dict[str, Any]:
        """Percentiles of one layer over the ``arrays`` lines after the first so many; ``count`` is how many there are.

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
        """The log as it is now: the same, grown, or the one that took its place."""
        known = _known(self.folder / "record.jsonl")
        if self._log is None or known != self._known:
            self._log = None  # until the new one can be read
            self._log, self._known = Log(self.folder), known
            self._identity = hashlib.sha256(known[0].encode()).hexdigest()[:16]
            self._percentiles.forget()
            self._first = None
        else:
            self._log.refresh()
        return self._log


def _known(path: Path) -> tuple[str, int]:
    """What tells a log from one that takes its place: its first line, and its number on the disk."""
    with path.open("rb") as file:
        head = file.readline(_HEAD)
    return hashlib.sha256(head).hexdigest(), path.stat().st_ino


def _words(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "The log is gone from its folder. What is shown is what it last said; it is read again when it is back."
    if isinstance(error, OSError):
        return f"The log cannot be read: {error.strerror or 'an error of the disk'}. It is tried again."
    if isinstance(error, ValueError):
        return str(error)[:300]
    return f"The log is not what was expected ({type(error).__name__}). It is tried again as it grows."
