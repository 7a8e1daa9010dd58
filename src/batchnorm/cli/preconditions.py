"""What has to be there before the work begins: packages, and a place to write to."""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path


def require(*modules: str, what: str, extra: str) -> None:
    """Return if all modules are installed; else say what to run."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{what} needs {' and '.join(missing)}, not installed here. Run: pip install 'batchnorm[{extra}]'"
        )


def check_writable(output: Path) -> None:
    """Return if a file can be written there; else the reason, before the work and not after it."""
    try:
        with tempfile.TemporaryFile(dir=output.parent):
            pass
        if output.exists() and not os.access(output, os.W_OK):
            raise PermissionError(None, "the file is write-protected")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(output)) from error
