"""Append to a log; after the start, a write that the operating system refuses does not raise."""

from __future__ import annotations

import errno
import json
import os
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4
from weakref import WeakSet

from batchnorm.files.locks import lock, unlock
from batchnorm.files.whole import replacing
from batchnorm.record.log_entry import Described, JsonValue, Line, Record, plain
from batchnorm.record.log_reading import ARRAYS, STREAM, Log
from batchnorm.record.quantities import quantities_hash

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

SCHEMA_VERSION = 1
_ALIKE = ("name", "channels", "kind")  # equal in the log and in the model if the layer is the same
_LOCKED = (
    "another process or another watch writes to {folder}. Choose a new folder, or stop the other writer. If it is "
    "another rank of the same training, call init_process_group before watch."
)
_open: WeakSet[Writer] = WeakSet()


class Writer:
    """Appends lines to the log in a folder; a missing folder is created.

    If the folder has a log of the same layers (names, channels, kinds), the log is continued: another ``start`` line
    is appended, and ``step`` is the log's last step. Each line is passed to the operating system before the call
    returns, so a killed process loses no line. A line that cannot be written (a full disk, a deleted folder) is lost;
    the first time there is a RuntimeWarning.

    Args:
        folder: The folder of the log.
        layers: A description of each batch norm layer, at least ``name`` and ``channels``.
        about: Further fields of the ``start`` line.

    Raises:
        ValueError: If the folder has a log of other layers or of a newer schema version, or another writer has the log
            open.
        OSError: If the folder cannot be created, or the ``start`` line cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], layers: Sequence[Described], **about: JsonValue) -> None:
        self.folder = Path(folder)
        self.layers = tuple(layer["name"] for layer in layers)
        self.failures = 0
        self.step = 0
        self._id = uuid4().hex  # of the log; its copies and continuations share it
        self._torn = False
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / STREAM
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        _open.add(self)
        try:
            lock(self._file, _LOCKED.format(folder=self.folder))
            self._continue(path, layers)
            first = {
                "schema_version": SCHEMA_VERSION, "id": self._id, "time": time.time(), "quantities": quantities_hash(),
                "layers": list(layers), **about,
            }  # fmt: skip
            self._append("start", first, must=True)
        except BaseException:
            self.close()
            raise

    def _continue(self, path: Path, layers: Sequence[Described]) -> None:
        if not path.stat().st_size:
            return
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            self._torn = file.read(1) != b"\n"  # a torn last line must not be continued
        log = Log(self.folder)
        if difference := difference_of_layers(log.start.get("layers") or [], layers):
            raise ValueError(f"{self.folder} has the log of another model ({difference}). Choose a new folder.")
        self.step = log.step
        self._id = log.identity if log.start else self._id

    def write(self, record: Record) -> None:
        """If the record has arrays, write their file and append an ``arrays`` line; then append the record."""
        if record.arrays:
            self._write_arrays(record)
        self._append(record.tier, record.to_dict())

    def progress(self, step: int, seconds: float, values: Mapping[str, float], cost: float) -> None:
        """Append means of the numbers that the user logged, and the cost of measuring as a share of the time."""
        means = {name: plain(value, 5) for name, value in values.items()}
        self._append("progress", {"step": step, "seconds": round(seconds, 2), "cost": plain(cost), "values": means})

    def event(self, step: int, message: str, *, layer: str | None = None, code: str | None = None) -> None:
        """Append an event; ``code`` is the code of a rule of the doctor, if there is one."""
        self._append(
            "event", {"step": step, "seconds": round(time.time(), 2), "code": code, "layer": layer, "message": message}
        )

    def copy(self, kind: str, fields: Line) -> None:
        """Append a line of another log."""
        self._append(kind, {key: value for key, value in fields.items() if key != "kind"})

    def end(self, step: int, reason: str, **about: JsonValue) -> None:
        """Append the ``end`` line, and close the log."""
        self._append("end", {"step": step, "seconds": round(time.time(), 2), "reason": reason, **about})
        self.close()

    def close(self) -> None:
        """Unlock and close the log; later writes do nothing."""
        if self._file >= 0:
            unlock(self._file)
            self.let_go()

    def let_go(self) -> None:
        """Close the file in this process without unlocking it for other processes that have it open."""
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
        if self._torn:  # the disk is full
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _failed(self, error: OSError) -> None:
        self.failures += 1
        if self.failures == 1:
            warnings.warn(
                f"the log in {self.folder} could not be written: {error.strerror or error}. The training goes on, but "
                "measurements are lost until the log can be written again.",
                RuntimeWarning,
                stacklevel=4,
            )


def _compact(values: np.ndarray) -> np.ndarray:
    """The values in float16, whose 3 digits are enough for charts; larger numbers become the largest of float16."""
    import numpy as np

    most = float(np.finfo(np.float16).max)
    return np.ascontiguousarray(np.clip(np.asarray(values, dtype=np.float64), -most, most).astype(np.float16))


def difference_of_layers(
    old_layers: Sequence[Described], new_layers: Sequence[Described], keys: Sequence[str] = _ALIKE
) -> str:
    """How the layers of a log differ from other layers; "" if they are equal, or if the log names no layers.

    Keys that only one of two layers has are not compared.
    """
    if old_layers and len(old_layers) != len(new_layers):
        return f"{len(old_layers)} layers, expected {len(new_layers)}"
    for old, new in zip(old_layers, new_layers, strict=False):
        unequal = [key for key in keys if old.get(key, new.get(key)) != new.get(key, old.get(key))]
        if unequal and set(unequal).isdisjoint(_ALIKE):
            key = unequal[0]
            return f"{key} {old.get(key)} of {_described(old)}, expected {new.get(key)}"
        if unequal:
            return f"{_described(old)}, expected {_described(new)}"
    return ""


def _described(layer: Described) -> str:
    kind = f"{layer['kind']} " if "kind" in layer else ""
    return f"{kind}{layer.get('name')!r} of {layer.get('channels')} channels"


def _in_child() -> None:
    """Close the logs in a forked process, such as a worker of a DataLoader, which must not write to them."""
    for writer in list(_open):
        writer.let_go()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
