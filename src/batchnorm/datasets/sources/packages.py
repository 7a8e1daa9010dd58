"""Packages that read a format: an error that says how to install a missing package."""

from __future__ import annotations

from importlib.util import find_spec


def require_package(module: str, what: str, extra: str = "data") -> None:
    """Raise an error that says what to install, unless the package ``module`` is installed.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    try:
        missing = find_spec(module) is None
    except ValueError:  # a module without a specification, such as None in sys.modules
        missing = True
    if missing:
        raise ModuleNotFoundError(f"{what} need {module}, not installed here. Run: pip install 'batchnorm[{extra}]'")
