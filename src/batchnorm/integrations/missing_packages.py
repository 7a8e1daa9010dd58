"""Missing libraries: one sentence that says what to type."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needed(module: str, install: str) -> Iterator[None]:
    """A block that imports ``module``; if it is not installed, the error says how to install it.

    Raises:
        ModuleNotFoundError: If it is not installed. Another one that is missing inside of it is told as it is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module:
            raise
        raise ModuleNotFoundError(
            f"this integration needs {module}, which is not installed. Run: pip install {install}", name=error.name
        ) from None
