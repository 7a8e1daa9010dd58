"""Missing packages: an error that says how to install a missing package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needed(module: str, install: str) -> Iterator[None]:
    """A block that imports ``module``; if it is not installed, the error says how to install it.

    Raises:
        ModuleNotFoundError: If ``module`` is not installed. The error of another missing module is not changed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module:
            raise
        raise ModuleNotFoundError(
            f"this integration needs {module}, which is not installed. Run: pip install {install}", name=error.name
        ) from None
