"""The run log: what is written can be read, whole or torn, copied, long, damaged or on a full disk."""

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from batchnorm.record import QUANTITIES, SCHEMA_VERSION, Log, Record, Writer
from batchnorm.record.log_reading import STREAM

LAYERS = [{"name": "a.bn", "channels": 4}, {"name": "b.bn", "channels": 8}]
NAMES = ("a.bn", "b.bn")


def record(step: int, **more: object) -> Record:
    return Record(step, NAMES, {"noise": [0.5, None], "gamma": [1.0, float("nan")]}, seconds=1.0, **more)


@pytest.fixture
def writer(tmp_path: Path):
    made = Writer(tmp_path / "run", LAYERS, model="Net")
    yield made
    made.close()


def test_what_was_written_is_read(writer: Writer) -> None:
    writer.write(record(10))
    writer.write(
        record(20, tier="probe", model={"loss_eval": 0.123456789}, arrays={"q": np.arange(10.0).reshape(2, 5)})
    )
    writer.progress(21, 5.0, {"loss": 0.25}, 0.01)
    writer.event(22, "something", layer="a.bn", code="BN116")
    writer.end(23, "finished")
    log = Log(writer.folder)
    assert log.layers == NAMES
    assert log.start["model"] == "Net"
    assert log.start["schema_version"] == SCHEMA_VERSION
    assert log.step == 23
    assert log.is_finished
    (free,) = log.rows("free")
    assert free["values"] == {"noise": [0.5, None], "gamma": [1.0, None]}
    (probe,) = log.rows("probe")
    assert probe["model"] == {"loss_eval": 0.12346}
    (arrays,) = log.rows("arrays")
    assert np.array_equal(log.arrays(arrays)["q"], np.arange(10.0).reshape(2, 5))
    assert log.rows("progress")[0]["values"] == {"loss": 0.25}
    assert log.rows("event")[0]["code"] == "BN116"


def test_a_log_is_read_while_it_is_written(writer: Writer) -> None:
    log = Log(writer.folder)
    assert not log.is_finished
    for step in (1, 2, 3):
        writer.write(record(step))
        assert log.refresh() == 1
        assert log.step == step
    assert log.refresh() == 0


def test_a_torn_last_line_is_left_for_later_and_a_damaged_one_is_counted(writer: Writer) -> None:
    writer.write(record(1))
    path = writer.folder / STREAM
    line = json.dumps({"kind": "free", "step": 2, "values": {}}, separators=(",", ":")).encode()
    with path.open("ab") as file:
        file.write(line[:20])
    log = Log(writer.folder)
    assert (log.step, log.damaged) == (1, 0)
    with path.open("ab") as file:
        file.write(line[20:] + b"\n" + b'{"kind":"free","st\x00\n' + line.replace(b"2", b"3") + b"\n")
    log.refresh()
    assert (log.step, log.damaged, log.count("free")) == (3, 1, 3)


def test_a_torn_log_is_continued_behind_the_damage(tmp_path: Path) -> None:
    first = Writer(tmp_path, LAYERS)
    first.write(record(7))
    first.close()
    with (tmp_path / STREAM).open("ab") as file:
        file.write(b'{"kind":"free","step":8,"val')
    again = Writer(tmp_path, LAYERS)
    assert again.step == 7
    again.write(record(9))
    again.close()
    log = Log(tmp_path)
    assert [row["step"] for row in log.rows("free")] == [7, 9]
    assert (log.count("start"), log.damaged) == (2, 1)


def test_a_log_of_another_model_is_not_continued(writer: Writer, tmp_path: Path) -> None:
    writer.close()
    with pytest.raises(ValueError, match=r"has the log of another model .* Choose a new folder"):
        Writer(writer.folder, [{"name": "c", "channels": 1}])
    assert Log(writer.folder).count("start") == 1


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"channels": 9}, r"'a\.bn' of 4 channels, expected BatchNorm2d 'a\.bn' of 9 channels"),
        ({"kind": "BatchNorm1d"}, r"BatchNorm2d 'a\.bn' of 4 channels, expected BatchNorm1d 'a\.bn' of 4 channels"),
        ({"name": "c.bn"}, r"'a\.bn' of 4 channels, expected BatchNorm2d 'c\.bn' of 4 channels"),
    ],
)
def test_a_log_of_a_model_with_the_same_names_is_not_continued(other: dict, message: str, tmp_path: Path) -> None:
    layers = [{"name": "a.bn", "channels": 4, "kind": "BatchNorm2d"}]
    Writer(tmp_path, layers).close()
    with pytest.raises(ValueError, match=f"the log of another model .*{message}.*Choose a new folder"):
        Writer(tmp_path, [layers[0] | other])
    Writer(tmp_path, [{**layers[0], "momentum": 0.01, "eps": 1e-3}]).close()
    Writer(tmp_path, [{"name": "a.bn", "channels": 4}]).close()  # as logs were before kinds were written
    with pytest.raises(ValueError, match="1 layers, expected 2"):
        Writer(tmp_path, LAYERS)


def _forked(work: Callable[[], None]) -> int:
    """A process that was forked, and does some work until it is killed."""
    child = os.fork()
    if not child:
        try:
            work()
            time.sleep(60)
        finally:
            os._exit(0)
    return child


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_log_can_be_opened_again_while_a_forked_process_lives(tmp_path: Path) -> None:
    writer = Writer(tmp_path, LAYERS)
    child = _forked(lambda: None)
    try:
        writer.close()
        Writer(tmp_path, LAYERS).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_process_neither_writes_nor_unlocks_a_log(tmp_path: Path) -> None:
    writer, done = Writer(tmp_path, LAYERS), tmp_path / "done"

    def meddle() -> None:
        writer.event(1, "from the child")
        writer.end(1, "of the child")
        done.touch()

    child = _forked(meddle)
    try:
        while not done.exists():
            time.sleep(0.01)
        with pytest.raises(ValueError, match=r"another process or another watch writes to"):
            Writer(tmp_path, LAYERS)
        writer.event(2, "from the parent")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        writer.close()
    assert [row["message"] for row in Log(tmp_path).rows("event")] == ["from the parent"]
    assert not Log(tmp_path).rows("end")


def test_two_processes_do_not_write_one_log(writer: Writer) -> None:
    with pytest.raises(ValueError, match=r"another process or another watch writes to .* Choose a new folder"):
        Writer(writer.folder, LAYERS)


def test_a_killed_process_loses_nothing_that_it_had_written(tmp_path: Path) -> None:
    code = f"""
        from batchnorm.record import Record, Writer
        import time
        writer = Writer({str(tmp_path)!r}, [{{"name": "bn", "channels": 1}}])
        for step in range(1, 51):
            writer.write(Record(step, ("bn",), {{"noise": [0.5]}}))
        print("written", flush=True)
        time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    log = Log(tmp_path)
    assert (log.step, log.count("free"), log.damaged, log.is_finished) == (50, 50, 0, False)


def test_a_full_disk_costs_lines_and_one_warning(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    write, room = os.write, [50]

    def tight(file: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = data[: room[0]]
        room[0] -= len(part)
        return write(file, part)

    writer.write(record(1))
    monkeypatch.setattr(os, "write", tight)
    with pytest.warns(RuntimeWarning, match=r"could not be written: No space left on device\. The training goes on"):
        writer.write(record(2))
    writer.write(record(3))
    room[0] = 10**6
    writer.write(record(4))
    log = Log(writer.folder)
    assert [row["step"] for row in log.rows("free")] == [1, 4]
    assert (log.damaged, writer.failures) == (1, 2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a Linux device")
def test_a_start_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / STREAM).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        Writer(tmp_path, LAYERS)


def test_arrays_that_cannot_be_written_cost_the_arrays(writer: Writer) -> None:
    (writer.folder / "arrays").write_text("a file is in the way")
    with pytest.warns(RuntimeWarning, match="The training goes on"):
        writer.write(record(5, tier="probe", arrays={"q": np.zeros((2, 5))}))
    log = Log(writer.folder)
    assert (log.count("probe"), log.count("arrays")) == (1, 0)


def test_a_copied_log_is_read_elsewhere(writer: Writer, tmp_path: Path) -> None:
    writer.write(record(3, tier="probe", arrays={"q": np.ones((2, 5))}))
    copy = tmp_path / "elsewhere"
    shutil.copytree(writer.folder, copy)
    shutil.rmtree(writer.folder)
    log = Log(copy)
    assert float(log.arrays(log.rows("arrays")[0])["q"].sum()) == 10


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "arrays/../../x.safetensors", "arrays/a.safetensors", ""]
)
def test_no_name_in_a_log_leads_out_of_its_folder(writer: Writer, name: str) -> None:
    with pytest.raises(ValueError, match=r"expected arrays/NUMBER.safetensors in"):
        Log(writer.folder).arrays({"file": name})


def test_no_link_in_a_log_leads_out_of_its_folder(writer: Writer, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (writer.folder / "arrays").mkdir()
    (writer.folder / "arrays" / "000000001.safetensors").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"expected arrays/NUMBER.safetensors in"):
        Log(writer.folder).arrays({"file": "arrays/000000001.safetensors"})


def test_what_is_no_log_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no record\.jsonl\. Give the folder that watch"):
        Log(tmp_path)
    (tmp_path / STREAM).write_text('{"kind":"start","schema_version":99,"layers":[]}\n')
    with pytest.raises(ValueError, match=r"has schema version 99, expected 1"):
        Log(tmp_path)


def test_a_log_that_was_replaced_is_read_anew(writer: Writer, tmp_path: Path) -> None:
    for step in range(5):
        writer.write(record(step))
    log = Log(writer.folder)
    writer.close()
    (writer.folder / STREAM).unlink()
    with_less = Writer(writer.folder, LAYERS)
    with_less.write(record(1))
    with_less.close()
    log.refresh()
    assert (log.step, log.count("free")) == (1, 1)


def test_rows_are_thinned_evenly_with_the_last_one_kept(writer: Writer) -> None:
    for step in range(1, 1001):
        writer.write(record(step))
    rows = Log(writer.folder).rows("free", most=100)
    assert len(rows) == 100
    assert rows[-1]["step"] == 1000
    assert {b["step"] - a["step"] for a, b in itertools.pairwise(rows)} == {10}


@pytest.mark.slow
def test_ten_thousand_steps_of_53_layers_take_less_than_a_megabyte(tmp_path: Path) -> None:
    """The default schedule: steps 10, 20 ... then every 100, a probe with arrays at every second look."""
    layers = [{"name": f"layer{i // 4}.{i % 4}.bn", "channels": 512} for i in range(53)]
    free, probe = (
        [q for q, known in QUANTITIES.items() if known.tier == tier and known.of == "layer"]
        for tier in ("free", "probe")
    )
    random = np.random.default_rng(0)
    writer, step, look = Writer(tmp_path, layers), 10, 0
    while step <= 10_000:
        writer.write(
            Record(step, writer.layers, {q: random.lognormal(size=53).tolist() for q in free}, seconds=time.time())
        )
        if look % 2 == 0:
            values = {q: random.lognormal(size=53).tolist() for q in probe}
            arrays = {name: random.normal(size=(53, 5)) for name in "abcdef"}
            model = {"loss_train": 0.3123, "loss_eval": 0.3, "output_gap": 0.1}
            writer.write(Record(step, writer.layers, values, model, "probe", time.time(), arrays))
        step += min(100, max(10, step // 5))
        look += 1
    for second in range(1000):  # ten steps a second
        writer.progress(10 * second, time.time(), {"loss": random.lognormal()}, 0.01)
    writer.end(10_000, "finished")
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert size < 1_000_000


def test_a_record_reads_as_a_table() -> None:
    text = str(record(10, model={"loss_eval": 0.5}))
    assert "a.bn" in text
    assert "probe's loss in eval mode: 0.5" in text
    assert record(10)["noise"] == {"a.bn": 0.5, "b.bn": None}
    with pytest.raises(KeyError, match="expected one of noise, gamma, got 'x'"):
        record(10)["x"]


def test_every_quantity_says_what_it_is() -> None:
    for name, quantity in QUANTITIES.items():
        assert quantity.tier in {"free", "probe", "lab"}, name
        assert all((quantity.title, quantity.formula, quantity.reads, quantity.misleads, quantity.floor)), name


def test_the_log_is_read_without_torch() -> None:
    code = "import sys, batchnorm.record; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
