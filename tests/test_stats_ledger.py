"""The ledger: a measurement that was interrupted anywhere goes on, and ends with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fake_pieces import FakePiece
from hypothesis import given, settings
from hypothesis import strategies as st

from batchnorm.datasets.blocks import Selection
from batchnorm.datasets.engines import engine
from batchnorm.datasets.ledger import Ledger
from batchnorm.datasets.measurement import Advance, measured, question
from batchnorm.datasets.statistics_files import to_bytes

PIECES = [FakePiece(i, rows=5 + i) for i in range(7)]
GROUPED = Selection(by="group")


def bits(pieces: list[FakePiece], ledger: Ledger | None = None) -> bytes:
    return to_bytes(measured(pieces, GROUPED, engine("threads", workers=2), ledger))


def opened(path: Path, *, fresh: bool = False) -> Ledger:
    return Ledger(path, {"columns": []}, fresh=fresh)


@pytest.fixture(scope="module")
def whole() -> bytes:
    """The bytes of a ledger of all pieces."""
    path = Path(tempfile.mkdtemp()) / "x.bnstats.ledger"
    with opened(path) as ledger:
        bits(PIECES, ledger)
    return path.read_bytes()


EXPECTED = bits(PIECES)


@settings(max_examples=40)
@given(data=st.data())
def test_a_ledger_that_is_cut_at_any_byte_is_continued_to_the_same_bits(data, whole):
    cut = data.draw(st.integers(0, len(whole)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.bnstats.ledger"
        path.write_bytes(whole[:cut])
        with opened(path) as ledger:
            begun = len(ledger)
            assert bits(PIECES, ledger) == EXPECTED
            assert len(ledger) == len(PIECES)
        with opened(path) as ledger:  # what was cut off and written again is whole
            assert (len(ledger), ledger.damaged_bytes) == (len(PIECES), 0)
            assert bits(PIECES, ledger) == EXPECTED
    assert begun <= len(PIECES) * cut / len(whole)


@settings(max_examples=40)
@given(place=st.integers(0, 10**6), value=st.integers(1, 255))
def test_a_damaged_byte_loses_pieces_and_never_changes_the_result(place, value, whole):
    damaged = bytearray(whole)
    damaged[place % len(whole)] ^= value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.bnstats.ledger"
        path.write_bytes(damaged)
        try:
            with opened(path) as ledger:
                assert bits(PIECES, ledger) == EXPECTED
        except ValueError as error:
            assert place % len(whole) <= whole.index(b"\n")  # only a damaged first line is refused
            assert "Delete it" in str(error) or "delete the ledger" in str(error)  # noqa: PT017


def test_only_pieces_that_are_not_noted_are_measured(tmp_path):
    with opened(tmp_path / "l") as ledger:
        bits(PIECES[2:5], ledger)
    broken = [
        replace(piece, error=ValueError("read again")) if i in {2, 3, 4} else piece for i, piece in enumerate(PIECES)
    ]
    seen: list[Advance] = []
    with opened(tmp_path / "l") as ledger:
        found = measured(broken, GROUPED, engine("threads", workers=2), ledger, seen.append)
    assert to_bytes(found) == EXPECTED
    assert [advance.size for advance in seen] == [100 * (i + 1) for i in range(7)]
    assert (seen[-1].rows, seen[-1].all_bytes) == (sum(piece.rows for piece in PIECES), 700)


def test_pieces_before_an_error_stay_noted(tmp_path):
    broken = [*PIECES[:6], replace(PIECES[6], error=OSError("disk"))]
    with opened(tmp_path / "l") as ledger, pytest.raises(OSError, match="disk"):
        bits(broken, ledger)
    with opened(tmp_path / "l") as ledger:
        assert len(ledger) == 6
        assert bits(PIECES, ledger) == EXPECTED


def test_pieces_of_changed_files_are_measured_again(tmp_path):
    with opened(tmp_path / "l") as ledger:
        bits(PIECES, ledger)
    changed = [replace(piece, fingerprint="2", rows=30) if piece.index in {2, 3} else piece for piece in PIECES]
    with opened(tmp_path / "l") as ledger:
        assert ledger.require_files(changed) == 2
        assert bits(changed, ledger) == bits(changed)


def test_a_file_that_vanished_is_refused(tmp_path):
    with opened(tmp_path / "l") as ledger:
        bits(PIECES, ledger)
        with pytest.raises(
            ValueError, match=r"/data/0\.parquet is counted in the ledger .* Name the same data again, or"
        ):
            ledger.require_files(PIECES[2:])


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (Selection(columns=("a",)), Selection(columns=("b",)), r'its columns is \["a"\], asked is \["b"\]'),
        (Selection(by="g"), Selection(), r'its by is "g", asked is ""'),
    ],
)
def test_a_ledger_of_another_question_is_refused(tmp_path, old, new, words):
    Ledger(tmp_path / "l", question(old)).close()
    with pytest.raises(ValueError, match=rf"belongs to another question: {words}\. Ask the same question, or delete"):
        Ledger(tmp_path / "l", question(new))
    Ledger(tmp_path / "l", question(new), fresh=True).close()
    Ledger(tmp_path / "l", question(new)).close()


@pytest.mark.parametrize("text", [b"a,b\n1,2\n", b"\x00\xff\n", b"[1]\n", b"PAR1" * 99, b"{}\n"])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_file_that_is_no_ledger_is_refused_and_stays(tmp_path, text, fresh):
    path = tmp_path / "data.csv"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"data\.csv is not a ledger of batchnorm stats.*Delete it, or name another"):
        opened(path, fresh=fresh)
    assert path.read_bytes() == text


def test_a_ledger_that_is_in_use_is_refused(tmp_path):
    with (
        opened(tmp_path / "l"),
        pytest.raises(ValueError, match=r"another process uses the ledger .*l\. Wait for its end, or name another"),
    ):
        opened(tmp_path / "l")
    opened(tmp_path / "l").close()


def test_a_ledger_in_no_folder_is_refused(tmp_path):
    with pytest.raises(
        OSError, match=r"cannot write the ledger .*No such file or directory\. Name another place"
    ) as caught:
        opened(tmp_path / "no" / "l")
    assert caught.value.filename is None


def test_a_full_disk_is_told_and_what_is_noted_stays(tmp_path):
    with opened(tmp_path / "l") as ledger:
        bits(PIECES[:2], ledger)
    import resource

    size, limits = (tmp_path / "l").stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, limits[1]))
    try:
        with (
            opened(tmp_path / "l") as ledger,
            pytest.raises(OSError, match=r"cannot write the ledger .*l: File too large"),
        ):
            bits(PIECES, ledger)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with opened(tmp_path / "l") as ledger:
        assert len(ledger) == 2
        assert bits(PIECES, ledger) == EXPECTED


@pytest.mark.parametrize("place", ["/dev/null", "/dev/zero", "."])
def test_a_device_or_a_folder_is_no_ledger(place):
    with pytest.raises(OSError, match=r"cannot write the ledger .*: .*\. Name another place"):
        opened(Path(place))


def test_a_removed_ledger_is_gone(tmp_path):
    ledger = opened(tmp_path / "l")
    ledger.remove()
    assert list(tmp_path.iterdir()) == []
    ledger.close()  # a second time


KILLED = """
import sys
sys.path.insert(0, sys.argv[2])
from fake_pieces import FakePiece
from test_stats_ledger import *
with opened(Path(sys.argv[1])) as ledger:
    bits([FakePiece(i, rows=5 + i, seconds=0.004) for i in range(7)] * 1, ledger)
    print("end", flush=True)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_a_ledger_that_is_continued(tmp_path):
    """``benchmarks/scale/kill_stats.py`` kills 100 times."""
    path, noted = tmp_path / "l", set()
    for delay in (0.0, 0.004, 0.012):
        path.unlink(missing_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, path, str(Path(__file__).parent)], stdout=subprocess.PIPE
        )
        while not path.exists() or b"\n" not in path.read_bytes():
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        with opened(path) as ledger:
            noted.add(len(ledger))
            assert bits(PIECES, ledger) == EXPECTED
    assert noted <= set(range(8))


def test_the_header_is_one_line_of_json(whole):
    assert json.loads(whole.split(b"\n")[0]) == {"batchnorm ledger": 1, "columns": []}
