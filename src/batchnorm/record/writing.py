"""Appending to a log, in a way that never stops the training that it is about."""

from __future__ import annotations

import errno
import json
import os
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchnorm.record.entry import Record, plain
from batchnorm.record.reading import ARRAYS, STREAM, Log
from batchnorm.replacing import replacing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

SCHEMA_VERSION = 1


class Writer:
    """Appends to the log in a folder, which is made if it is not there.

    A folder that has a log of the same layers is continued: another ``start`` line is appended, and ``step`` is the
    last that it has. Each line reaches the operating system before the call returns, so a process that is killed
    loses none. What cannot be written (a full disk, a folder that is gone) is left out and warned of once.

    Args:
        folder: Where the log is.
        layers: What is known of each batch norm layer: at least ``name`` and ``channels``.
        about: More for the ``start`` line.

    Raises:
        ValueError: If the folder has a log of other layers, or another process writes to it.
        OSError: If nothing can be written there at the start.
    """

    def __init__(self, folder: str | os.PathLike[str], layers: Sequence[Mapping[str, Any]], **about: Any) -> None:
        self.folder = Path(folder)
        self.layers = tuple(layer["name"] for layer in layers)
        self.failures = 0
        self.step = 0
        self._torn = False
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / STREAM
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            _lock(self._file, self.folder)
            self._continue(path)
            first = {"schema_version": SCHEMA_VERSION, "time": time.time(), "layers": list(layers), **about}
            self._append("start", first, must=True)
        except BaseException:
            self.close()
            raise

    def _continue(self, path: Path) -> None:
        if not path.stat().st_size:
            return
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            self._torn = file.read(1) != b"\n"  # what was killed in mid-line stays a damaged line of its own
        log = Log(self.folder)
        if log.layers and log.layers != self.layers:
            raise ValueError(
                f"{self.folder} has the log of another model ({len(log.layers)} layers, expected {len(self.layers)} "
                f"of the same names). Choose a new folder."
            )
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

    def end(self, step: int, reason: str, **about: Any) -> None:
        """Append how it ended, and let go of the log."""
        self._append("end", {"step": step, "seconds": round(time.time(), 2), "reason": reason, **about})
        self.close()

    def close(self) -> None:
        """Let go of the log; nothing can be written afterwards."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

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

    def _append(self, kind: str, fields: Mapping[str, Any], *, must: bool = False) -> None:
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


def _compact(values: Any) -> np.ndarray:
    """Half precision: 3 digits, enough for what is drawn; what exceeds its range becomes the largest it has."""
    import numpy as np

    most = float(np.finfo(np.float16).max)
    return np.ascontiguousarray(np.clip(np.asarray(values, dtype=np.float64), -most, most).astype(np.float16))


def _lock(file: int, folder: Path) -> None:
    """Hold the log as long as it is open; where the system or its file system has no locks, nothing is held."""
    with suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process writes to {folder}. Choose a new folder, or end that process.") from None
        except OSError:
            pass
