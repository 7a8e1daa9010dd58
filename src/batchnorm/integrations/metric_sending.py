"""Metric sending: if a service fails, the numbers sent to it are lost, and the training continues."""

from __future__ import annotations

import warnings
from types import TracebackType
from typing import final

_PATIENCE = 3  # failures in a row before nothing more is sent: a dead server can delay each call by minutes


@final
class MetricSending:
    """A block around the code that sends numbers; it suppresses their exceptions.

    The first failure gives a RuntimeWarning. After three failures in a row ``is_open`` is False, and the caller should
    send nothing more.

    Args:
        where: The service's name in the warning.
    """

    def __init__(self, where: str) -> None:
        self._where, self._failures, self._told = where, 0, False

    @property
    def is_open(self) -> bool:
        """Whether the caller should still send numbers."""
        return self._failures < _PATIENCE

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if error is None:
            self._failures = 0
            return False
        if not isinstance(error, Exception):
            return False
        self._failures += 1
        self._tell(error)
        return True

    def _tell(self, error: Exception) -> None:
        if self._told:
            return
        self._told = True
        warnings.warn(
            f"{self._where} did not accept numbers of batch norm: {type(error).__name__}: {error}. The training and "
            f"its log continue; after {_PATIENCE} failures in a row nothing more is sent.",
            RuntimeWarning,
            stacklevel=4,
        )
