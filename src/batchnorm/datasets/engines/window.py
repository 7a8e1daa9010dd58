"""A window: jobs for an executor, of which a bounded number is waiting or running at any time."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from itertools import islice
from typing import TYPE_CHECKING

from batchnorm.datasets.engines.attempts import Failure, Outcome, attempt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchnorm.datasets.blocks import Piece
    from batchnorm.datasets.engines.protocol import Measure


def outcomes(executor: Executor, pieces: Sequence[Piece], measure: Measure, most: int) -> Iterator[Outcome]:
    """The outcome of each piece, as soon as it is known. Pieces are handed out in their order.

    After a failure no further piece is handed out, and the outcomes of those in the window follow.

    Args:
        executor: Runs the attempts.
        pieces: What is measured.
        measure: Computes the statistics of a piece.
        most: Size of the window.
    """
    waiting = iter(enumerate(pieces))
    running: set[Future[Outcome]] = set()
    while True:
        running |= {executor.submit(attempt, *job, measure) for job in islice(waiting, most - len(running))}
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            running.remove(future)
            outcome = future.result()
            if isinstance(outcome[1], Failure):
                waiting = iter(())
            yield outcome
