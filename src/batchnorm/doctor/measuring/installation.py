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
    """The first batchnorm.py or batchnorm/ that Python would import in place of the package; "" if there is none."""
    for entry in ["", *sys.path]:
        try:
            folder = Path(entry or ".").resolve()
        except FileNotFoundError:  # the current folder is gone
            continue
        if folder == _PACKAGE.parent:
            if entry:
                return ""
            continue
        for path in (folder / "batchnorm.py", folder / "batchnorm" / "__init__.py"):
            if path.is_file() and path.parent != _PACKAGE:
                return _shown(path if path.name == "batchnorm.py" else path.parent)
    return ""


def _shown(path: Path) -> str:
    """The path relative to the current folder; unchanged if that cannot be computed."""
    try:
        return os.path.relpath(path)
    except (FileNotFoundError, ValueError):
        return str(path)
