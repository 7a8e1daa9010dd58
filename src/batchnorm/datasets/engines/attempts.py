"""Attempts: what a worker does with a piece, and how it reports an error, so that no engine shows its own traceback."""

from __future__ import annotations

import builtins
import pickle
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from batchnorm.package_version import VERSION

if TYPE_CHECKING:
    from batchnorm.datasets.blocks import Piece
    from batchnorm.datasets.data_statistics import DataStatistics
    from batchnorm.datasets.engines.protocol import Measure

# errors of users' data and machines. Others are faults of the program and keep their traceback
_EXPECTED = (OSError, ModuleNotFoundError, MemoryError, TypeError, ValueError)


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

    def error(self, engine: str = "") -> Exception:
        """The exception to raise; ``engine`` names the one whose workers may be on other machines."""
        words = self.words
        if engine and self.kind == "FileNotFoundError":
            words += (
                f". Workers of {engine} may be on other machines: name files by addresses that all workers can open."
            )
        error = getattr(builtins, self.kind)(words)
        error.add_note(self.trace)
        return error


Outcome = tuple[int, "DataStatistics | Failure"]


def attempt(index: int, piece: Piece, measure: Measure, version: str = VERSION) -> Outcome:
    """The index and the statistics of a piece, or the error for which it has none.

    Args:
        index: Index of the piece, returned with the outcome.
        piece: The piece.
        measure: Computes its statistics.
        version: The version of batchnorm that sent the piece. A worker with another version reports an error, because
            its statistics might have other bits.
    """
    try:
        if version != VERSION:
            raise ModuleNotFoundError(
                f"expected batchnorm {version} where pieces are measured, got {VERSION}. Install the same version."
            )
        return index, measure(piece)
    except _EXPECTED as error:
        return index, Failure(_kind(error), _words(error, piece), traceback.format_exc())


def _kind(error: Exception) -> str:
    """The nearest built-in class whose constructor needs only a message."""
    return next(kind.__name__ for kind in (FileNotFoundError, *_EXPECTED) if isinstance(error, kind))


def _words(error: Exception, piece: Piece) -> str:
    """The message with the file's name. An error of the operating system becomes its reason in words."""
    words = (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__
    return words if piece.file in words else f"{piece.file}: {words}"


def packed(index: int, piece: bytes, measure: Measure) -> bytes:
    """``attempt`` for engines whose rows have bytes: a pickled piece gives a pickled outcome."""
    return pickle.dumps(attempt(index, pickle.loads(piece), measure))  # noqa: S301 - made by an engine of ours


def unpacked(outcomes: Iterable[bytes]) -> Iterator[Outcome]:
    """The outcomes of ``packed``, until the first failure."""
    for outcome in outcomes:
        yield (found := pickle.loads(outcome))  # noqa: S301 - from our own workers
        if isinstance(found[1], Failure):
            return


def successes(outcomes: Iterable[Outcome], engine: str = "") -> Iterator[tuple[int, DataStatistics]]:
    """The outcomes that are statistics. After all outcomes the first error is raised, if there was one."""
    failure: Failure | None = None
    for index, outcome in outcomes:
        if isinstance(outcome, Failure):
            failure = failure or outcome
        else:
            yield index, outcome
    if failure:
        raise failure.error(engine)
