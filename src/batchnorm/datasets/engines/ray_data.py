"""The engine ray: Ray Data on a cluster or on local workers. Ray measures the pieces of a killed worker again."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, final

from batchnorm.datasets.engines.attempts import Outcome, packed, successes, unpacked
from batchnorm.datasets.engines.clusters import explained, require_no_address, require_reachable, unreachable
from batchnorm.datasets.engines.protocol import Engine, Measure

if TYPE_CHECKING:
    from batchnorm.datasets.blocks import Piece
    from batchnorm.datasets.data_statistics import DataStatistics

_MOST_TASKS = 10_000  # Ray's scheduler has a cost for each; a task of a longer job measures several pieces


@final
class RayData(Engine):
    """Measures one piece, or a few of a very long job, in each task of Ray."""

    def __init__(self, address: str | None, workers: int | None) -> None:
        self._address, self._workers = address, workers

    def partials(self, pieces: Sequence[Piece], measure: Measure) -> Iterator[tuple[int, DataStatistics]]:
        """The statistics of each piece with its index, as soon as they are known."""
        with explained("Ray"), self._connected():
            yield from successes(_outcomes(pieces, measure), "Ray")

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """A block with a connection to Ray. A connection that the program has already is used and stays."""
        import ray

        if self._address is not None:
            require_reachable("Ray", self._address)
        if ray.is_initialized():
            require_no_address("Ray", self._address)
            yield
            return
        try:
            ray.init(
                self._address or "local", num_cpus=self._workers, include_dashboard=None if self._address else False,
                log_to_driver=False, logging_level=logging.ERROR,
            )  # fmt: skip
        except (OSError, RuntimeError, ValueError) as error:
            raise unreachable("Ray", self._address or "local", error) from error
        try:
            yield
        finally:
            ray.shutdown()


def _outcomes(pieces: Sequence[Piece], measure: Measure) -> Iterator[Outcome]:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = [{"index": i, "piece": pickle.dumps(piece)} for i, piece in enumerate(pieces)]
    jobs = ray.data.from_items(rows, override_num_blocks=min(len(rows), _MOST_TASKS))

    def measured(row: Mapping[str, Any]) -> dict[str, bytes]:
        return {"outcome": packed(row["index"], row["piece"], measure)}

    yield from unpacked(row["outcome"] for row in jobs.map(measured).iter_rows())
