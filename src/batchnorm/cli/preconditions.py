"""Checks before the work begins: packages are installed, and the output can be written."""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path


def require(*modules: str, what: str, extra: str) -> None:
    """Raise an error that says what to install, if a module is missing."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{what} needs {' and '.join(missing)}, not installed here. Run: pip install 'batchnorm[{extra}]'"
        )


def check_writable(output: Path) -> None:
    """Raise an OSError with the reason, if the file cannot be written: before the work, not after it."""
    try:
        with tempfile.TemporaryFile(dir=output.parent):
            pass
        if output.exists() and not os.access(output, os.W_OK):
            raise PermissionError(None, "the file is write-protected")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(output)) from error
