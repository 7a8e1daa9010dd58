"""Appending to a log; no error of it ever stops the training."""

from __future__ import annotations

import errno
import json
import os
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakSet

from batchnorm.files.whole import replacing
from batchnorm.record.log_entry import Described, JsonValue, Line, Record, plain
from batchnorm.record.log_reading import ARRAYS, STREAM, Log

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

SCHEMA_VERSION = 1
_ALIKE = ("name", "channels", "kind")  # what a layer has in common with one of the same model
_open: WeakSet[Writer] = WeakSet()


class Writer:
    """Appends to the log in a folder, which is made if it is not there.

    A folder that has a log of the same layers (names, channels, kinds) is continued: another ``start`` line is
    appended, and ``step`` is the last that it has. Each line reaches the operating system before the call returns, so
    a process that is killed loses none.
    What cannot be written (a full disk, a folder that is gone) is left out and warned of once.

    Args:
        folder: Where the log is.
        layers: What is known of each batch norm layer: at least ``name`` and ``channels``.
        about: More for the ``start`` line.

    Raises:
        ValueError: If the folder has a log of other layers, or another process writes to it.
        OSError: If nothing can be written there at the start.
    """

    def __init__(self, folder: str | os.PathLike[str], layers: Sequence[Described], **about: JsonValue) -> None:
        self.folder = Path(folder)
        self.layers = tuple(layer["name"] for layer in layers)
        self.failures = 0
        self.step = 0
        self._torn = False
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / STREAM
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        _open.add(self)
        try:
            _lock(self._file, self.folder)
            self._continue(path, layers)
            first = {"schema_version": SCHEMA_VERSION, "time": time.time(), "layers": list(layers), **about}
            self._append("start", first, must=True)
        except BaseException:
            self.close()
            raise

    def _continue(self, path: Path, layers: Sequence[Described]) -> None:
        if not path.stat().st_size:
            return
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            self._torn = file.read(1) != b"\n"  # what was killed in mid-line stays a damaged line of its own
        log = Log(self.folder)
        if difference := _difference(log.start.get("layers") or [], layers):
            raise ValueError(f"{self.folder} has the log of another model ({difference}). Choose a new folder.")
        self.step = log.step

    def write(self, record: Record) -> None:
        """Append a record; its arrays go to a file of their own first."""
        if record.arrays:
            self._write_arrays(record)
        self._append(record.tier, record.to_dict())

    def progress(self, step: int, seconds: float, values: Mapping[str, float], cost: float) -> None:
        """Append means of what the user logged since the last such line, and the share of time that looking took."""
        means = {name: plain(value, 5) for name, value in values.items()}
        self._append("progress", {"step": step, "seconds": round(seconds, 2), "cost": plain(cost), "values": means})

    def event(self, step: int, message: str, *, layer: str | None = None, code: str | None = None) -> None:
        """Append something that happened, with a rule's code if it is one of the doctor's."""
        self._append(
            "event", {"step": step, "seconds": round(time.time(), 2), "code": code, "layer": layer, "message": message}
        )

    def end(self, step: int, reason: str, **about: JsonValue) -> None:
        """Append how it ended, and let go of the log."""
        self._append("end", {"step": step, "seconds": round(time.time(), 2), "reason": reason, **about})
        self.close()

    def close(self) -> None:
        """Let go of the log; nothing can be written afterwards."""
        if self._file >= 0:
            _unlock(self._file)
            self.let_go()

    def let_go(self) -> None:
        """Close this process's file; another process that has the file open keeps the lock."""
        os.close(self._file)
        self._file = -1
        _open.discard(self)

    def _write_arrays(self, record: Record) -> None:
        from safetensors.numpy import save

        name = f"{record.step:09}.safetensors"
        try:
            (self.folder / ARRAYS).mkdir(exist_ok=True)
            with replacing(self.folder / ARRAYS / name) as file:
                file.write(save({key: _compact(value) for key, value in record.arrays.items()}))
        except OSError as error:
            self._failed(error)
        else:
            self._append("arrays", {"step": record.step, "file": f"{ARRAYS}/{name}", "names": sorted(record.arrays)})

    def _append(self, kind: str, fields: Line, *, must: bool = False) -> None:
        if self._file < 0:
            return
        line = json.dumps({"kind": kind, **fields}, separators=(",", ":"), allow_nan=False) + "\n"
        data = ("\n" if self._torn else "").encode() + line.encode()
        try:
            self._put(data)
        except OSError as error:
            if must:
                raise OSError(error.errno, error.strerror, str(self.folder)) from error
            self._failed(error)

    def _put(self, data: bytes) -> None:
        written = os.write(self._file, data)
        self._torn = written < len(data)
        if self._torn:  # the disk took what it had room for
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _failed(self, error: OSError) -> None:
        self.failures += 1
        if self.failures == 1:
            warnings.warn(
                f"the log in {self.folder} could not be written: {error.strerror or error}. Training goes on; what is "
                "measured until it can be written again is lost.",
                RuntimeWarning,
                stacklevel=4,
            )


def _compact(values: np.ndarray) -> np.ndarray:
    """Half precision: 3 digits, enough for what is drawn; what exceeds its range becomes the largest it has."""
    import numpy as np

    most = float(np.finfo(np.float16).max)
    return np.ascontiguousarray(np.clip(np.asarray(values, dtype=np.float64), -most, most).astype(np.float16))


def _difference(there: Sequence[Described], here: Sequence[Described]) -> str:
    """How the layers of a log differ from those that are to be logged; "" if they do not, or it names none."""
    if there and len(there) != len(here):
        return f"{len(there)} layers, expected {len(here)}"
    for old, new in zip(there, here, strict=False):
        if any(old.get(key, new.get(key)) != new.get(key, old.get(key)) for key in _ALIKE):
            return f"{_described(old)}, expected {_described(new)}"
    return ""


def _described(layer: Described) -> str:
    kind = f"{layer['kind']} " if "kind" in layer else ""
    return f"{kind}{layer.get('name')!r} of {layer.get('channels')} channels"


def _lock(file: int, folder: Path) -> None:
    """Hold the log as long as it is open; where the system or its file system has no locks, nothing is held."""
    with suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process writes to {folder}, or another watch of this one. Choose a new folder, or end it."
            ) from None
        except OSError:
            pass


def _unlock(file: int) -> None:
    """Let go of the lock, also where a process that was forked meanwhile has the file open still."""
    with suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_UN)


def _in_child() -> None:
    """In a process that was forked, as the workers of a DataLoader are: the log is not its to write or to hold."""
    for writer in list(_open):
        writer.let_go()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
