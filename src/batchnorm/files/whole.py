"""Writes a file as a whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path, *, like: Path | None = None) -> Iterator[BinaryIO]:
    """A new binary file beside ``path``, which replaces ``path`` at the end of the block.

    Its bytes are on the disk before it replaces ``path``. Its permissions are those of ``like``; if that is None, those
    of any new file. After an error or Ctrl-C in the block, the old file is unchanged and the new file is deleted.

    Raises:
        OSError: If the file cannot be written; the error names ``path``.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        os.close(handle)
        with Path(name).open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if like is None:
            Path(name).chmod(0o666 & ~_umask())
        else:
            shutil.copymode(like, name)
        Path(name).replace(path)
    except BaseException as error:
        with suppress(OSError):
            Path(name).unlink()
        if isinstance(error, OSError) and error.errno is not None and error.filename in {None, name}:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    _keep_name(path.parent)


def _umask() -> int:
    """The current umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _keep_name(folder: Path) -> None:
    """Write the folder's entry of the new file to the disk, if the folder can be opened."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
