"""The engine dask: workers of a distributed cluster. Dask measures the piece of a killed worker on another one."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, final

from batchnorm.datasets.engines.attempts import successes
from batchnorm.datasets.engines.clusters import explained, require_reachable, unreachable
from batchnorm.datasets.engines.protocol import Engine, Measure
from batchnorm.datasets.engines.threads import processors
from batchnorm.datasets.engines.window import outcomes

if TYPE_CHECKING:
    from distributed import Client

    from batchnorm.datasets.blocks import Piece
    from batchnorm.datasets.data_statistics import DataStatistics


@final
class DaskCluster(Engine):
    """Hands out four pieces for each thread of the workers at a time."""

    def __init__(self, address: str | None, workers: int | None) -> None:
        self._address, self._workers = address, workers

    def partials(self, pieces: Sequence[Piece], measure: Measure) -> Iterator[tuple[int, DataStatistics]]:
        """The statistics of each piece with its index, as soon as they are known."""
        with explained("Dask"), self._client() as client, client.get_executor(pure=False) as executor:
            threads = sum(client.nthreads().values()) or processors()
            yield from successes(outcomes(executor, pieces, measure, 4 * threads), "Dask")

    @contextmanager
    def _client(self) -> Iterator[Client]:
        """A client of the cluster, or of local workers, which end with the block."""
        from distributed import Client, LocalCluster

        if self._address is None:
            workers = self._workers or processors()
            local = LocalCluster(
                n_workers=workers, threads_per_worker=1, silence_logs=logging.CRITICAL,
                dashboard_address="127.0.0.1:0", scheduler_kwargs={"dashboard": False},
            )  # fmt: skip
            with local, Client(local) as client:
                yield client
            return
        require_reachable("Dask", self._address)
        try:
            client = Client(self._address, timeout=10)
        except (OSError, ValueError) as error:
            raise unreachable("Dask", self._address, error) from error
        with client:
            yield client
