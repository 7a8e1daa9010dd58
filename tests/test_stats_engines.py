"""Engines: the same bits in whatever order pieces finish, errors that name the file, and what an engine needs."""

from __future__ import annotations

import random
import threading
from functools import partial

import numpy as np
import pytest
from fake_pieces import FakePiece
from hypothesis import given
from hypothesis import strategies as st

from batchnorm.datasets import group_limit
from batchnorm.datasets.blocks import Selection
from batchnorm.datasets.engines import ENGINES, engine
from batchnorm.datasets.engines.attempts import attempt
from batchnorm.datasets.engines.clusters import require_reachable
from batchnorm.datasets.engines.merging import merged
from batchnorm.datasets.measurement import measured
from batchnorm.datasets.measuring import measure
from batchnorm.datasets.statistics_files import to_bytes

ALL = Selection()
task = partial(measure, selection=ALL)


def all_values(pieces: list[FakePiece]) -> tuple[np.ndarray, np.ndarray]:
    x, v = zip(*(piece.values() for piece in pieces), strict=True)
    return np.concatenate(x), np.concatenate(v)


@given(number=st.integers(1, 40), seed=st.integers(0, 99))
def test_the_bits_of_the_sum_do_not_depend_on_the_order(number, seed):
    partials = [(i, measure(FakePiece(i, rows=3), ALL)) for i in range(number)]
    expected = to_bytes(merged(partials))
    random.Random(seed).shuffle(partials)
    assert to_bytes(merged(iter(partials))) == expected


def test_few_nodes_are_in_memory_if_pieces_arrive_in_order(monkeypatch):
    partial_of_all, alive, most = measure(FakePiece(0), ALL), [0], [0]

    class Counted:
        def __init__(self) -> None:
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __add__(self, other):
            alive[0] -= 2
            return Counted()

        groups, rows, total = {}, 0, partial_of_all.total

    monkeypatch.setattr("batchnorm.datasets.engines.merging.DataStatistics", Counted)
    merged((i, Counted()) for i in range(1000))
    assert most[0] <= 11  # log2(1000) + 1


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("by", ["", "group"])
def test_threads_give_the_same_bits_and_the_right_numbers(workers, by):
    pieces = [FakePiece(i, rows=10 + i, seconds=0.002 * (i * 7 % 5)) for i in range(11)]
    selection = Selection(by=by)
    found = measured(pieces, selection, engine("threads", workers=workers))
    expected = merged((i, measure(piece, selection)) for i, piece in enumerate(pieces))
    assert to_bytes(found.__class__(found.total, found.by, found.groups)) == to_bytes(expected)
    x, v = all_values(pieces)
    assert found.total.rows == len(x) == sum(source.rows for source in found.sources)
    assert [source.size for source in found.sources] == [200] * 5 + [100]
    for column, values in (("x", x), ("v", v)):
        statistics = found.total.columns[column]
        # the mean is rounded once; the variance has a relative error of (rows + 10 pieces) 2^-53 at most
        np.testing.assert_allclose(statistics.mean, values.mean(0), rtol=2e-16 * 4, atol=1e-15)
        exact = values.astype(np.longdouble)
        exact = ((exact - exact.mean(0)) ** 2).sum(0).astype(float)
        np.testing.assert_allclose(statistics.m2, exact, rtol=(len(x) + 110) * 2**-53)
    assert sum(group.rows for group in found.groups.values()) == (len(x) if by else 0)


def test_pieces_are_handed_out_in_order_and_few_at_a_time():
    begun, lock = [], threading.Lock()

    def slow(piece):
        with lock:
            begun.append(piece.index)
        return measure(piece, ALL)

    results = engine("threads", workers=2).partials([FakePiece(i) for i in range(100)], slow)
    next(results)
    assert len(begun) <= 5  # the window of 4 and one more that was handed out when the first was done
    list(results)
    assert sorted(begun) == list(range(100))
    assert all(abs(i - index) < 4 for i, index in enumerate(begun))


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(5, "Input/output error", "/data/3.parquet"), OSError, "/data/3.parquet: Input/output error"),
        (ValueError("broken row group"), ValueError, "/data/3.parquet: broken row group"),
        (TypeError("/data/3.parquet has text"), TypeError, "/data/3.parquet has text"),
        (ModuleNotFoundError("needs zarr"), ModuleNotFoundError, "/data/3.parquet: needs zarr"),
        (FileNotFoundError(2, "No such file"), FileNotFoundError, "/data/3.parquet: No such file"),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), ValueError, "/data/3.parquet: 'utf-8' codec"),
        (MemoryError(), MemoryError, "/data/3.parquet: MemoryError"),
    ],
)
def test_an_error_in_a_piece_names_the_file(error, kind, words):
    pieces = [FakePiece(i, error=error if i == 6 else None) for i in range(100)]
    with pytest.raises(kind, match=words) as caught:
        list(engine("threads", workers=2).partials(pieces, task))
    assert type(caught.value) is kind
    assert getattr(caught.value, "filename", None) is None  # the command line says of such that it cannot write
    assert "Traceback" in caught.value.__notes__[0]


def test_after_an_error_the_pieces_in_the_window_are_returned_and_no_further_ones():
    pieces = [FakePiece(i, error=ValueError("bad") if i == 6 else None) for i in range(100)]
    finished: list[int] = []
    with pytest.raises(ValueError, match="bad"):
        finished.extend(index for index, _ in engine("threads", workers=2).partials(pieces, task))
    assert set(finished) >= {0, 1, 2, 3, 4, 5}
    assert 6 not in finished
    assert max(finished) <= 10


def test_a_fault_of_the_program_keeps_its_traceback():
    def faulty(piece):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(engine("threads", workers=2).partials([FakePiece(0)], faulty))


def test_a_worker_with_another_version_says_so():
    _, failure = attempt(0, FakePiece(0), task, version="0.0.9")
    with pytest.raises(ModuleNotFoundError, match=r"expected batchnorm 0\.0\.9 where pieces are measured, got .* same"):
        raise failure.error()


def test_a_file_that_a_cluster_does_not_find_has_a_hint():
    _, failure = attempt(0, FakePiece(0, error=FileNotFoundError(2, "No such file")), task)
    with pytest.raises(FileNotFoundError, match=r"Workers of Ray may be on other machines: name files by addresses"):
        raise failure.error("Ray")


@pytest.mark.parametrize("where", ["a piece", "all pieces"])
def test_too_many_groups_are_refused(monkeypatch, where):
    each = group_limit._bytes(measure(FakePiece(0), ALL).total)
    monkeypatch.setattr(group_limit, "_MOST_BYTES", 2 * each + 1)
    rows = 20 if where == "a piece" else 2
    with pytest.raises(ValueError, match=r"column 'group' has 3 groups or more, expected at most 2 for 2 columns"):
        measured([FakePiece(i, rows=rows) for i in range(3)], Selection(by="group"), engine("threads"))


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"name": "flink"}, ValueError, r"engine must be one of threads, ray, dask, spark, got 'flink'"),
        ({"name": "threads", "address": "h:1"}, ValueError, r"runs in this process, got the address 'h:1'.*ray"),
        ({"name": "dask", "address": "h:1", "workers": 2}, ValueError, r"has its own workers, got workers=2"),
        ({"name": "threads", "workers": 0}, ValueError, r"workers must be 1 or more, got 0"),
        ({"name": "threads", "workers": "2"}, TypeError, r"workers must be a whole number, got str"),
    ],
)
def test_wrong_engines_are_refused(arguments, kind, words):
    with pytest.raises(kind, match=words):
        engine(**arguments)


@pytest.mark.parametrize("name", ENGINES[1:])
def test_an_engine_that_is_not_installed_says_what_to_install(monkeypatch, name):
    monkeypatch.setattr("batchnorm.datasets.engines.find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=rf"engine {name} needs .*, not installed.*'batchnorm\[{name}\]'"):
        engine(name)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "tcp://127.0.0.1:1", "spark://localhost:1", "ray://[::1]:1"])
def test_an_address_where_nothing_listens_is_refused_at_once(address):
    with pytest.raises(ConnectionError, match=r"cannot reach Dask at .*: .+\. Check that its scheduler runs"):
        require_reachable("Dask", address)


@pytest.mark.parametrize("address", ["auto", "local[2]", "yarn", "k8s://https://cluster"])
def test_an_address_without_a_port_is_left_to_the_engine(address):
    require_reachable("Spark", address)
