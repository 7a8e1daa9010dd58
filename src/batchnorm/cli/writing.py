"""Write a file whole or not at all."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def write(path: Path, text: str) -> None:
    """To a new file beside it, which then takes its name: an error leaves the file that was there."""
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder. Choose another place with -o FILE.")
    path = path.resolve()  # a link stays one
    if path.exists() and not path.is_file():  # a pipe or a device, which nothing may replace
        path.write_text(text, encoding="utf-8")
        return
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with fresh.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror or error}. Choose another place with -o FILE.") from error
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
