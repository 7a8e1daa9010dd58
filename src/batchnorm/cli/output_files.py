"""What ``-o`` does: it writes a file whole or not at all, and its errors name a remedy."""

from __future__ import annotations

from pathlib import Path

from batchnorm.files.whole import replacing


def write(path: Path, text: str) -> None:
    """Replace a file by this text; write to pipes and devices as they are.

    Raises:
        OSError: If it cannot be written, with the cause and a remedy.
    """
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder. Choose another place with -o FILE.")
    path = path.resolve()  # a link stays one
    if path.exists() and not path.is_file():  # a pipe or a device, which nothing may replace
        path.write_text(text, encoding="utf-8")
        return
    try:
        with replacing(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}. Choose another place with -o FILE.") from error
