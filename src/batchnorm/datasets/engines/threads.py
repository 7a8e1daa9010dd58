"""The engine threads: the threads of this process, in which readers and native code release Python's lock."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, final

from batchnorm.datasets.engines.attempts import successes
from batchnorm.datasets.engines.protocol import Engine, Measure
from batchnorm.datasets.engines.window import outcomes

if TYPE_CHECKING:
    from batchnorm.datasets.blocks import Piece
    from batchnorm.datasets.data_statistics import DataStatistics


@final
class Threads(Engine):
    """Measures pieces in threads, twice as many pieces as threads being handed out at a time."""

    def __init__(self, address: None = None, workers: int | None = None) -> None:  # noqa: ARG002 - no address
        self._threads = workers or processors()

    def partials(self, pieces: Sequence[Piece], measure: Measure) -> Iterator[tuple[int, DataStatistics]]:
        """The statistics of each piece with its index, as soon as they are known."""
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="batchnorm-stats")
        try:
            yield from successes(outcomes(pool, pieces, measure, 2 * self._threads))
        finally:  # after Ctrl-C too: pieces that no thread has begun are dropped
            pool.shutdown(cancel_futures=True)


def processors() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
