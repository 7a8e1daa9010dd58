"""The environment of a run: versions and the machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version


def environment() -> dict[str, str]:
    """The versions and the machine on which numbers depend, without host name and paths."""
    from batchnorm.kernels.cpu import INSTRUCTION_SET

    versions = {name: _version(name) for name in ("batchnorm", "torch", "numpy", "scipy", "scikit-learn")}
    return versions | {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "kernels": f"native, {INSTRUCTION_SET}" if INSTRUCTION_SET else "reference",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """The processor's name if the system reports it, else its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123 - a Linux interface, absent elsewhere
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
