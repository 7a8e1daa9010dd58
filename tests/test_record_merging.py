"""Run logs of replicas merged: each quantity by its own mean, each replica and step once, other models refused."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from functools import partial
from pathlib import Path

import command_line
import numpy as np
import pytest

from batchnorm.live.run_status import measured_on
from batchnorm.record import QUANTITIES, Log, Record, Writer, merge_logs
from batchnorm.record.joined_values import WAYS, number_of
from batchnorm.record.log_merging import schema_hash

NAMES = ("a.bn", "b.bn")
LAYERS = [{"name": name, "channels": 8, "kind": "BatchNorm2d", "eps": 1e-5, "momentum": 0.1} for name in NAMES]
told = partial(command_line.told, "merge")


def looked(writer: Writer, step: int, tier: str = "free", **values: object) -> None:
    rows = {name: value if isinstance(value, list) else [value] * len(NAMES) for name, value in values.items()}
    writer.write(Record(step, NAMES, rows, {}, tier, 1000.0 + step))


def log(folder: Path, seed: int, steps: tuple[int, ...] = (10, 20), *, end: str = "finished") -> Path:
    """A log whose values depend on seed and step."""
    writer = Writer(folder, LAYERS, model="Net")
    for step in steps:
        looked(writer, step, noise=seed * step / 1000, m_eff=float(10 * seed + step), dropout=seed / 10)
        writer.progress(step, 1000.0 + step, {"loss": seed / step}, 0.01 * seed)
    writer.event(steps[-1] if steps else 0, "something", layer="a.bn")
    if end:
        writer.end(steps[-1] if steps else 0, end)
    writer.close()
    return folder


def values(folder: Path, step: int, quantity: str, kind: str = "free") -> list:
    (row,) = [row for row in Log(folder).rows(kind) if row["step"] == step]
    return row["values"][quantity]


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    return [log(tmp_path / "runs" / f"r{seed}", seed) for seed in (1, 2, 4)]


def test_each_quantity_is_joined_in_its_own_way(three: list[Path], tmp_path: Path) -> None:
    merged = merge_logs(three, tmp_path / "all")
    seeds = np.array([1.0, 2.0, 4.0])
    odds = (seeds / 10 / (1 - seeds / 10)).mean()
    for step in (10, 20):
        expected = {
            "noise": (seeds * step / 1000).mean(),
            "m_eff": 1 / (1 / (10 * seeds + step)).mean(),
            "dropout": odds / (1 + odds),
        }
        for quantity, value in expected.items():
            assert values(tmp_path / "all", step, quantity) == [pytest.approx(value, rel=1e-2)] * 2  # 3 digits of each
    rows = Log(tmp_path / "all").rows("progress")
    assert [row["values"]["loss"] for row in rows] == [pytest.approx((seeds / s).mean(), rel=1e-4) for s in (10, 20)]
    assert (merged.looks, len(merged.replicas)) == (2, 3)
    assert merged.notes == ()


def test_the_other_ways_are_root_mean_square_and_largest(tmp_path: Path) -> None:
    for name, value in (("a", 3.0), ("b", 4.0)):
        writer = Writer(tmp_path / name, LAYERS)
        looked(writer, 5, gap=[value, None], rank_means=value, stable_rank=value, users=value)
        writer.close()
    merged = merge_logs([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    assert values(tmp_path / "all", 5, "gap") == [pytest.approx(math.sqrt(12.5), rel=1e-4), None]
    assert values(tmp_path / "all", 5, "rank_means") == [4.0, 4.0]
    assert "stable_rank" not in Log(tmp_path / "all").rows("free")[0]["values"]
    assert merged.notes == ("left out, since they describe one replica: stable_rank, users. Read them in its log",)


@pytest.mark.parametrize("way", WAYS)
def test_a_way_does_not_depend_on_the_order_and_keeps_what_is_equal(way: str) -> None:
    given = [(0.3, 1.0), (0.2, 2.0), (0.7, 1.0)]
    assert WAYS[way](given) == pytest.approx(WAYS[way](given[::-1]), rel=1e-12)
    assert WAYS[way]([(0.3, 1.0), (0.3, 5.0)]) == pytest.approx(0.3, rel=1e-12)
    assert WAYS[way]([(0.3, 2.0), (0.7, 1.0)]) == pytest.approx(WAYS[way]([(0.3, 1.0), (0.7, 1.0), (0.3, 1.0)]))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("numbers", [(1e308, 1e308), (-1e308, 1e308), (1e-320, 1e-320), (-1.0, 1.0), (0.0, 0.0)])
def test_any_finite_numbers_join_to_a_finite_number_or_none(way: str, numbers: tuple[float, float]) -> None:
    found = number_of([(numbers[0], 1), (numbers[1], 2), (None, 5)], way)
    assert found is None or math.isfinite(found)
    assert number_of([(None, 1)], way) is None


def test_every_quantity_has_a_way_that_the_documents_name() -> None:
    page = Path(__file__).parents[1].joinpath("docs", "record.md").read_text(encoding="utf-8")
    rows = {"mean, weighted": "mean", "harmonic": "harmonic", "mean of the odds": "odds", "root mean": "rms",
            "largest": "largest", "left out": "each"}  # fmt: skip
    for beginning, way in rows.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {beginning}")]
        named = set(re.findall(r"`(\w+)`", row.split("|")[2]))
        assert named == {name for name, quantity in QUANTITIES.items() if quantity.merges == way}
    assert {quantity.merges for quantity in QUANTITIES.values()} <= {*WAYS, "each"}


def test_steps_are_aligned_and_say_how_many_replicas_there_were(tmp_path: Path) -> None:
    folders = [log(tmp_path / "a", 1, (10, 20, 30)), log(tmp_path / "b", 2, (20,)), log(tmp_path / "c", 3, ())]
    merge_logs(folders, tmp_path / "all")
    rows = Log(tmp_path / "all").rows("free")
    assert [(row["step"], row["model"]["replicas"]) for row in rows] == [(10, 1), (20, 2), (30, 1)]
    assert rows[0]["values"]["noise"] == [0.01, 0.01]
    events = [(row["step"], row["message"]) for row in Log(tmp_path / "all").rows("event")]
    assert events == [
        (0, f"{folders[2]}: something"),
        (20, f"{folders[1]}: something"),
        (30, f"{folders[0]}: something"),
    ]
    assert Log(tmp_path / "all").is_finished
    assert measured_on(Log(tmp_path / "all").start) == "3 replicas"


def test_a_log_that_is_given_twice_counts_once(three: list[Path], tmp_path: Path) -> None:
    shutil.copytree(three[0], tmp_path / "copy")
    once = merge_logs(three, tmp_path / "once")
    twice = merge_logs([*three, three[1], tmp_path / "copy", tmp_path / "runs" / "*"], tmp_path / "twice")
    assert len(twice.replicas) == len(once.replicas) == 3
    for kind in ("free", "progress"):
        assert Log(tmp_path / "once").rows(kind) == Log(tmp_path / "twice").rows(kind)
    assert twice.notes == (f"{tmp_path / 'copy'} is a copy of {three[0]}: its steps count once",)


def test_a_run_that_was_resumed_elsewhere_counts_its_steps_once(tmp_path: Path) -> None:
    log(tmp_path / "a", 1, (10, 20), end="")
    shutil.copytree(tmp_path / "a", tmp_path / "resumed")
    looked(writer := Writer(tmp_path / "resumed", LAYERS), 30, noise=0.5)
    writer.close()
    merge_logs([tmp_path / "a", tmp_path / "resumed", log(tmp_path / "b", 3)], tmp_path / "all")
    rows = Log(tmp_path / "all").rows("free")
    assert [(row["step"], row["model"]["replicas"]) for row in rows] == [(10, 2), (20, 2), (30, 1)]
    assert rows[0]["values"]["noise"] == [pytest.approx(0.02)] * 2
    assert not Log(tmp_path / "all").is_finished  # one of them goes on


def test_a_log_of_before_ids_is_known_by_its_first_line(tmp_path: Path) -> None:
    log(tmp_path / "a", 1)
    stream = tmp_path / "a" / "record.jsonl"
    first, *rest = stream.read_text().splitlines()
    old = {k: v for k, v in json.loads(first).items() if k not in {"id", "quantities"}}
    stream.write_text("\n".join([json.dumps(old, separators=(",", ":")), *rest]) + "\n")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    Writer(tmp_path / "copy", LAYERS).close()  # continued by this version: the id is kept
    merged = merge_logs([tmp_path / "a", tmp_path / "copy", log(tmp_path / "b", 3)], tmp_path / "all")
    assert len(merged.replicas) == 2


def test_merged_logs_merge_by_their_number_of_replicas_and_no_replica_counts_twice(
    three: list[Path], tmp_path: Path
) -> None:
    merge_logs(three[:2], tmp_path / "two")
    merge_logs([tmp_path / "two", three[2]], tmp_path / "nested")
    merge_logs(three, tmp_path / "flat")
    for quantity in ("noise", "m_eff", "dropout"):
        nested, flat = (values(tmp_path / each, 20, quantity) for each in ("nested", "flat"))
        assert nested == pytest.approx(flat, rel=1e-2)
    assert len(Log(tmp_path / "nested").start["replicas"]) == 3
    with pytest.raises(ValueError, match=r"each replica counts once, got one .* in .*two.* and in .*r1"):
        merge_logs([tmp_path / "two", three[0]], tmp_path / "again")


CHANGES = {
    "2 layers, expected 1|1 layers, expected 2": lambda layers: layers[:1],
    "'b.bn' of 9 channels": lambda layers: [layers[0], layers[1] | {"channels": 9}],
    "'c.bn' of 8 channels": lambda layers: [layers[0], layers[1] | {"name": "c.bn"}],
    "BatchNorm1d 'b.bn'": lambda layers: [layers[0], layers[1] | {"kind": "BatchNorm1d"}],
    "momentum 0.5 of BatchNorm2d 'b.bn'": lambda layers: [layers[0], layers[1] | {"momentum": 0.5}],
    "eps 0.001 of BatchNorm2d 'a.bn'": lambda layers: [layers[0] | {"eps": 1e-3}, layers[1]],
}


@pytest.mark.parametrize("words", CHANGES)
def test_logs_of_other_models_are_refused_by_what_differs(tmp_path: Path, words: str) -> None:
    log(tmp_path / "a", 1)
    other = Writer(tmp_path / "b", CHANGES[words](LAYERS))
    other.close()
    assert schema_hash(Log(tmp_path / "a").start) != schema_hash(Log(tmp_path / "b").start)
    with pytest.raises(ValueError, match=rf"got .*a and .*b, which differ: .*({words}).* Merge the logs of each model"):
        merge_logs([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_other_quantities_and_newer_versions_are_refused(tmp_path: Path) -> None:
    log(tmp_path / "a", 1)
    Writer(tmp_path / "b", LAYERS, quantities="another", versions={"batchnorm": "9.9"}).close()
    with pytest.raises(ValueError, match=r"which differ: quantities another \(batchnorm 9\.9\), not"):
        merge_logs([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    stream = log(tmp_path / "c", 2) / "record.jsonl"
    stream.write_text(stream.read_text().replace('"schema_version":1', '"schema_version":2'))
    with pytest.raises(ValueError, match="schema version 2, expected 1"):
        merge_logs([tmp_path / "a", tmp_path / "c"], tmp_path / "all")


def test_what_is_whole_of_a_damaged_log_is_read_and_the_rest_is_said(tmp_path: Path) -> None:
    log(tmp_path / "a", 1)
    stream = log(tmp_path / "b", 3, (10, 20, 30), end="") / "record.jsonl"
    whole = stream.read_bytes()
    lines = whole.splitlines(keepends=True)
    short = b'{"kind":"free","step":20,"values":{"noise":[1]},"model":{}}\n'  # of one layer, not two
    broken = [short if b'"step":20' in line and b"free" in line else line for line in lines]
    stream.write_bytes(b"".join(broken[:-1]) + b"\x00garbage\n" + lines[-1][:25])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "record.jsonl").touch()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "record.jsonl").write_bytes(whole[:40])
    names = ["a", "b", "empty", "torn"]
    merged = merge_logs([tmp_path / name for name in names], tmp_path / "all")
    assert set(merged.notes) == {
        f"{tmp_path / 'b'}: 2 damaged lines skipped, the last 25 bytes are a line that was cut off",
        f"{tmp_path / 'empty'}: left out, without a whole start line (it is empty)",
        f"{tmp_path / 'torn'}: left out, without a whole start line (the last 40 bytes are a line that was cut off)",
    }
    rows = Log(tmp_path / "all").rows("free")
    assert [(row["step"], row["model"]["replicas"]) for row in rows] == [(10, 2), (20, 1), (30, 1)]
    with pytest.raises(ValueError, match=r"expected logs with lines, got .*empty: left out"):
        merge_logs([tmp_path / "empty"], tmp_path / "none")


def test_a_log_that_is_cut_anywhere_merges(tmp_path: Path) -> None:
    whole = (log(tmp_path / "b", 3, tuple(range(10, 60, 10))) / "record.jsonl").read_bytes()
    first = whole.index(b"\n") + 1
    log(tmp_path / "a", 1)
    for i, end in enumerate(random.Random(0).sample(range(first, len(whole)), 25)):
        (tmp_path / "b" / "record.jsonl").write_bytes(whole[:end])
        merged = merge_logs([tmp_path / "a", tmp_path / "b"], tmp_path / f"all{i}")
        count = whole[:end].count(b'\n{"kind":"free"') - (b'{"kind":"free"' in whole[:end].rpartition(b"\n")[2])
        assert merged.looks == max(2, count)
        assert bool(merged.notes) == (whole[:end][-1:] != b"\n")


def test_logs_at_addresses_of_an_object_store_merge(three: list[Path], tmp_path: Path) -> None:
    system = pytest.importorskip("fsspec").filesystem("memory")
    for folder in three:
        system.put(str(folder), f"/merging/{folder.name}", recursive=True)
    try:
        for i, address in enumerate(("memory://merging", "memory://merging/*", "memory://merging/r*/record.jsonl")):
            merged = merge_logs([address], tmp_path / f"all{i}")
            assert merged.replicas == tuple(f"memory:///merging/{folder.name}" for folder in three)
            merge_logs(three, tmp_path / f"local{i}")
            assert Log(tmp_path / f"all{i}").rows("free") == Log(tmp_path / f"local{i}").rows("free")
    finally:
        system.rm("/merging", recursive=True)


def test_wrong_places_are_errors_and_leave_nothing(three: list[Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"expected run logs at .*other, got no record.jsonl there"):
        merge_logs([tmp_path / "other"], tmp_path / "all")
    with pytest.raises(ValueError, match=r"other exists already\. Name a new folder"):
        merge_logs(three, tmp_path / "other")
    with pytest.raises(TypeError, match="needs a list of addresses, got 'runs'"):
        merge_logs("runs", tmp_path / "all")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*none\. Make it first"):
        merge_logs(three, tmp_path / "none" / "all")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "runs"]


def test_the_command_merges_logs_and_says_so(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = "merged the logs of 3 replicas: 2 looks wrote all next: batchnorm watch all"
    assert told("runs/*", "-o", "all") == (0, words)
    code, text = told("runs/r1", "runs/r2", "-o", "all")
    assert (code, "all exists already. Name a new folder" in text) == (2, True)
    code, text = told("runs/r1", "runs/r2", "-o", "b", "--counts", "1,2", "--force")
    assert (code, "--counts, --force cannot be used with run logs" in text) == (2, True)
    code, text = told("runs", "-o", "none/b")
    assert (code, "there is no folder none. Make it first." in text) == (2, True)
    code, text = told("none/*", "-o", "b")
    assert (code, "got none/*, where there is no file. Check the address." in text) == (2, True)
    code, text = told("foo://runs", "-o", "b")
    assert (code, "Protocol not known: foo" in text) == (2, True)
    assert not list(tmp_path.glob(".*"))
