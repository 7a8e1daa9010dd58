"""Ray and Dask with two local workers: the bits of threads, also if a worker is killed, and errors without tracebacks.

Each engine is started once for its tests; a start takes seconds.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_pieces import FakePiece

from batchnorm.datasets.blocks import Selection
from batchnorm.datasets.engines import engine
from batchnorm.datasets.engines.clusters import explained, require_no_address
from batchnorm.datasets.engines.protocol import Engine
from batchnorm.datasets.measurement import measured
from batchnorm.datasets.statistics_files import to_bytes

PIECES = [FakePiece(i, rows=10 + i) for i in range(12)]
ALL = Selection()
LOCAL = {
    "n_workers": 2, "threads_per_worker": 1, "silence_logs": logging.CRITICAL, "dashboard_address": "127.0.0.1:0",
    "scheduler_kwargs": {"dashboard": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def dask() -> Iterator[Engine]:
    """The engine on a cluster that runs already."""
    from distributed import LocalCluster

    with LocalCluster(**LOCAL) as cluster:
        yield engine("dask", address=cluster.scheduler_address)


@pytest.fixture(scope="module")
def ray() -> Iterator[Engine]:
    """The engine with a connection of the program to local workers."""
    import ray

    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # workers import the pieces
        warnings.simplefilter("ignore")  # Ray's own
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.CRITICAL)
        yield engine("ray")
        ray.shutdown()


@pytest.fixture(params=["dask", "ray"])
def cluster(request: pytest.FixtureRequest) -> Engine:
    return request.getfixturevalue(request.param)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the engines themselves
def test_the_bits_are_those_of_threads_also_if_a_worker_is_killed(cluster, tmp_path):
    expected = to_bytes(measured(PIECES, ALL, engine("threads", workers=1)))
    assert to_bytes(measured(PIECES, ALL, cluster)) == expected
    deadly = [FakePiece(i, rows=10 + i, kills=str(tmp_path / "killed") if i == 5 else "") for i in range(12)]
    assert to_bytes(measured(deadly, ALL, cluster)) == expected
    assert (tmp_path / "killed").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_error_of_a_worker_is_ours(cluster):
    broken = [FakePiece(i, error=ValueError("broken") if i == 3 else None) for i in range(6)]
    with pytest.raises(ValueError, match="broken") as caught:
        measured(broken, ALL, cluster)
    assert str(caught.value) == "/data/1.parquet: broken"  # the worker's traceback is a note
    lost = [FakePiece(i, error=FileNotFoundError(2, "No such file") if i == 3 else None) for i in range(6)]
    with pytest.raises(FileNotFoundError, match=r"^/data/1\.parquet: No such file\. Workers of (Ray|Dask) may be on"):
        measured(lost, ALL, cluster)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_piece_that_kills_every_worker_ends_the_job_with_an_error(dask):
    """Dask gives up after the fourth worker."""
    import distributed

    deadly = [FakePiece(0), FakePiece(1, kills="always"), FakePiece(2)]
    with (
        distributed.LocalCluster(**LOCAL) as cluster,
        pytest.raises(ChildProcessError, match=r"Dask could not measure every piece: KilledWorker: .* memory\.$"),
    ):
        measured(deadly, ALL, engine("dask", address=cluster.scheduler_address))


def test_errors_of_an_engine_become_ours():
    with (
        pytest.raises(
            ModuleNotFoundError, match=r"workers of Ray need batchnorm.*batchnorm is not installed there.*pip"
        ),
        explained("Ray"),
    ):
        raise RuntimeError("The remote function failed.\nModuleNotFoundError: No module named 'batchnorm'")
    with (
        pytest.raises(
            ChildProcessError, match=r"Spark could not measure every piece: RuntimeError: out of heap\. Read"
        ),
        explained("Spark"),
    ):
        raise RuntimeError("long\n trace\nout of heap.")
    with pytest.raises(ValueError, match=r"^ours$"), explained("Dask"):
        raise ValueError("ours")


def test_an_address_is_refused_beside_a_connection():
    """The connection would be used, and the address ignored."""
    require_no_address("Ray", None)
    with pytest.raises(ValueError, match=r"connected to Ray already, got the address 'h:1'\. Leave the address out"):
        require_no_address("Ray", "h:1")


@pytest.mark.parametrize("name", ["dask", "ray"])
def test_a_scheduler_that_is_down_is_told_at_once(name):
    with pytest.raises(
        ConnectionError, match=r"cannot reach \w+ at tcp://127\.0\.0\.1:1: .*Check that its scheduler runs"
    ):
        measured(PIECES, ALL, engine(name, address="tcp://127.0.0.1:1"))
