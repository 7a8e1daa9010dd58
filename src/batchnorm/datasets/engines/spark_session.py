"""The engine spark: a session of Spark, or local workers. Spark measures the pieces of a killed executor again."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, final

from batchnorm.datasets.engines.attempts import Outcome, packed, successes, unpacked
from batchnorm.datasets.engines.clusters import explained, require_no_address, require_reachable, unreachable
from batchnorm.datasets.engines.protocol import Engine, Measure

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import SparkSession

    from batchnorm.datasets.blocks import Piece
    from batchnorm.datasets.data_statistics import DataStatistics

_Job = tuple[int, bytearray]
_WAVE = 4  # pieces for each core in one job of Spark, whose results come when all of the job is done

_ATTEMPTS = 4  # of a piece whose worker is killed, as clusters have it; local sessions make one by default
_REMOTE_CORES = 16  # assumed for Spark Connect, which does not say how many there are
_SETTINGS = {"spark.ui.enabled": "false", "spark.ui.showConsoleProgress": "false", "spark.log.level": "ERROR"}


@final
class SparkEngine(Engine):
    """Measures pieces in jobs of four for each core, so that a ledger notes them while the measurement goes on."""

    def __init__(self, address: str | None, workers: int | None) -> None:
        self._address, self._workers = address, workers

    def partials(self, pieces: Sequence[Piece], measure: Measure) -> Iterator[tuple[int, DataStatistics]]:
        """The statistics of each piece with its index, as soon as those of a job are known."""
        with explained("Spark"), self._session() as session:
            yield from successes(_outcomes(session, pieces, measure), "Spark")

    @contextmanager
    def _session(self) -> Iterator[SparkSession]:
        """The program's session, which stays; or a new one, which ends with the block."""
        from pyspark.sql import SparkSession

        if self._address is not None:
            require_reachable("Spark", self._address)
        if (active := SparkSession.getActiveSession()) is not None:
            require_no_address("Spark", self._address)
            yield active
            return
        address = self._address or f"local[{self._workers or '*'},{_ATTEMPTS}]"
        with _this_python() if address.startswith("local") else nullcontext():
            try:
                builder = SparkSession.builder.appName("batchnorm stats")
                for name, value in _SETTINGS.items():
                    builder = builder.config(name, value)
                session = (builder.remote if address.startswith("sc:") else builder.master)(address).getOrCreate()
            except Exception as error:  # Java's errors have no common class
                raise unreachable("Spark", address, error) from error
        try:
            yield session
        finally:
            session.stop()


@contextmanager
def _this_python() -> Iterator[None]:
    """A block in which local workers start with this Python, unless PYSPARK_PYTHON names another one."""
    if "PYSPARK_PYTHON" in os.environ:
        yield
        return
    os.environ["PYSPARK_PYTHON"] = sys.executable
    try:
        yield
    finally:
        del os.environ["PYSPARK_PYTHON"]


def _outcomes(session: SparkSession, pieces: Sequence[Piece], measure: Measure) -> Iterator[Outcome]:
    def measured(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa

        for row in (row for batch in batches for row in batch.to_pylist()):
            outcome = packed(row["index"], row["piece"], measure)
            yield pa.RecordBatch.from_pydict({"outcome": [outcome]})

    jobs = [(i, bytearray(pickle.dumps(piece))) for i, piece in enumerate(pieces)]
    yield from unpacked(
        bytes(row["outcome"])
        for wave in _waves(jobs, _WAVE * _cores(session))
        for row in session.createDataFrame(wave, "index long, piece binary")
        .repartition(len(wave))
        .mapInArrow(measured, "outcome binary")
        .collect()
    )


def _waves(jobs: list[_Job], size: int) -> Iterator[list[_Job]]:
    return (jobs[start : start + size] for start in range(0, len(jobs), size))


def _cores(session: SparkSession) -> int:
    """Number of tasks that run at the same time; Spark Connect does not say it."""
    try:
        return session.sparkContext.defaultParallelism
    except Exception:  # noqa: BLE001 - PySpark's own errors, which differ between its versions
        return _REMOTE_CORES
