"""Attempts: what a worker does with a piece, and how it reports an error, so that no engine shows its own traceback."""

from __future__ import annotations

import builtins
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from batchnorm import __version__

if TYPE_CHECKING:
    from batchnorm.datasets.blocks import Piece
    from batchnorm.datasets.data_statistics import DataStatistics
    from batchnorm.datasets.engines.protocol import Measure

# errors of users' data and machines. Others are faults of the program and keep their traceback
_EXPECTED = (OSError, ValueError, TypeError, ModuleNotFoundError, MemoryError)


@final
@dataclass(frozen=True, slots=True)
class Failure:
    """An error of a worker, as texts: the exception's own class may not exist where the error is shown.

    Args:
        kind: Name of the built-in exception.
        words: Its message, which names the file.
        trace: The worker's traceback, a note that is shown with --debug.
    """

    kind: str
    words: str
    trace: str

    def error(self) -> Exception:
        """The exception to raise."""
        error = getattr(builtins, self.kind)(self.words)
        error.add_note(self.trace)
        return error


Outcome = tuple[int, "DataStatistics | Failure"]


def attempt(index: int, piece: Piece, measure: Measure, version: str = __version__) -> Outcome:
    """The index and the statistics of a piece, or the error for which it has none.

    Args:
        index: Index of the piece, returned with the outcome.
        piece: The piece.
        measure: Computes its statistics.
        version: The version of batchnorm that sent the piece. A worker with another version reports an error, because
            its statistics might have other bits.
    """
    try:
        if version != __version__:
            raise ModuleNotFoundError(
                f"expected batchnorm {version} where pieces are measured, got {__version__}. Install the same version."
            )
        return index, measure(piece)
    except _EXPECTED as error:
        return index, Failure(_kind(error), _words(error, piece), traceback.format_exc())


def _kind(error: Exception) -> str:
    """The nearest built-in class of an exception whose constructor needs only a message."""
    return (
        "OSError"
        if isinstance(error, OSError)
        else next(
            each.__name__
            for each in (ModuleNotFoundError, MemoryError, TypeError, ValueError)
            if isinstance(error, each)
        )
    )


def _words(error: Exception, piece: Piece) -> str:
    """The message with the file's name. An error of the operating system becomes its reason in words."""
    is_plain = isinstance(error, OSError) and error.strerror
    words = error.strerror if is_plain else str(error) or type(error).__name__
    return words if piece.file in words else f"{piece.file}: {words}"


def successes(outcomes: Iterator[Outcome]) -> Iterator[tuple[int, DataStatistics]]:
    """The outcomes that are statistics. After all outcomes the first error is raised, if there was one."""
    failure: Failure | None = None
    for index, outcome in outcomes:
        if isinstance(outcome, Failure):
            failure = failure or outcome
        else:
            yield index, outcome
    if failure:
        raise failure.error()
