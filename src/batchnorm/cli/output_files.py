"""The option ``-o``: it writes a whole file or nothing, and its errors name a remedy."""

from __future__ import annotations

import os
from pathlib import Path

from batchnorm.files.whole import replacing


def free(place: Path, *, force: bool) -> Path:
    """The place where a binary file will be written; for a link, its target.

    Raises:
        ValueError: If the place is a folder, pipe or device; or without ``force`` if there is a file.
    """
    if place.is_dir():
        raise ValueError(f"cannot write {place}: it is a folder. Choose another place with -o FILE.")
    if place.exists() and not place.is_file():
        raise ValueError(f"cannot write {place}: it is a pipe or device. Choose another place with -o FILE.")
    if place.exists() and not force:
        raise ValueError(f"{place} exists already. Pass --force to write over it, or another place with -o FILE.")
    return Path(os.path.realpath(place)) if place.is_symlink() else place  # the link stays, its target is written


def write(path: Path, text: str) -> None:
    """Write a text to a file, as a whole; to a pipe or device directly.

    Raises:
        OSError: If the file cannot be written. The message has the cause and a remedy.
    """
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder. Choose another place with -o FILE.")
    path = path.resolve()  # the link stays, its target is written
    if path.exists() and not path.is_file():  # a pipe or a device: no file may replace it
        path.write_text(text, encoding="utf-8")
        return
    try:
        with replacing(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}. Choose another place with -o FILE.") from error
