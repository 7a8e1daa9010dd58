"""BN9: the Python environment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchnorm.rules.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchnorm.rules.rule_evidence import Evidence


def shadowed_package(evidence: Evidence) -> Iterator[Finding]:
    """A local file hides this package.

    Why:
        Python imports the first batchnorm that it finds. A file batchnorm.py beside a script comes before the installed
        package, and import batchnorm gives that file.

    How:
        A batchnorm.py, or a folder batchnorm with an __init__.py, in the current folder or on sys.path before the
        installed package.

    Example:
        project/batchnorm.py, from an exercise

    Fix:
        Rename the file.
    """
    if evidence.environment and evidence.environment.shadow:
        yield Finding("", f"{evidence.environment.shadow} exists", remedy=f"rename {evidence.environment.shadow}")


def reference_kernels(evidence: Evidence) -> Iterator[Finding]:
    """The package runs without its compiled kernels.

    Why:
        With the reference kernels its layers compute the same, but run slower.

    How:
        The compiled part is not installed, or BATCHNORM_KERNELS=reference is set.

    Example:
        Installed from source on a machine without a C++ compiler.

    Fix:
        Unset BATCHNORM_KERNELS if it is set. Otherwise install a C++20 compiler, and run pip install --force-reinstall
        --no-deps batchnorm.
    """
    if evidence.environment and evidence.environment.kernels == "reference":
        yield Finding("", "reference kernels")
