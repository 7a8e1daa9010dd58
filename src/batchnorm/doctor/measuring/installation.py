"""The installation: which kernels run, and whether a local file hides the package. Needs no torch."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

from batchnorm.rules.rule_evidence import Environment

_PACKAGE = Path(__file__).resolve().parents[2]


def environment() -> Environment:
    """The environment of this process; scripts are assumed to start in the current folder."""
    return Environment(_shadow(), _kernels())


def _kernels() -> str:
    forced = os.environ.get("BATCHNORM_KERNELS") == "reference"
    return "reference" if forced or find_spec("batchnorm._native") is None else "native"


def _shadow() -> str:
    """The first batchnorm.py or batchnorm/ that an import would find before the package."""
    for entry in ["", *sys.path]:
        try:
            folder = Path(entry or ".").resolve()
        except FileNotFoundError:  # the current folder is gone
            continue
        if folder == _PACKAGE.parent:
            if entry:
                return ""
            continue
        for found in (folder / "batchnorm.py", folder / "batchnorm" / "__init__.py"):
            if found.is_file() and found.parent != _PACKAGE:
                return _shown(found if found.name == "batchnorm.py" else found.parent)
    return ""


def _shown(path: Path) -> str:
    """The path relative to the current folder, if there is one."""
    try:
        return os.path.relpath(path)
    except (FileNotFoundError, ValueError):
        return str(path)
