"""The option ``-o``: it writes a whole file or nothing, and its errors name a remedy."""

from __future__ import annotations

from pathlib import Path

from batchnorm.files.whole import replacing


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
