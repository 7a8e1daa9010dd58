"""Files of statistics: the same numbers after loading, readable JSON, and damaged or foreign files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from batchnorm.datasets.blocks import Column
from batchnorm.datasets.column_statistics import ColumnStatistics
from batchnorm.datasets.data_statistics import DataStatistics, Partial, Source, union
from batchnorm.datasets.feature_sums import COUNTS, NUMBERS
from batchnorm.datasets.statistics_files import as_json, to_bytes

NAME = "data.bnstats.safetensors"


def part(seed: int, rows: int = 50) -> Partial:
    random = np.random.default_rng(seed)
    x, v = random.normal(size=rows) + 1e9, random.normal(size=(rows, 2, 3)).astype(np.float32)
    x[:1], x[1:2] = np.nan, np.inf
    present = random.random(rows) < 0.8
    columns = {"ä \udc80\n": Column(x), "v": Column(v, present), "empty": Column(np.full(rows, np.nan))}
    return Partial(rows, {name: ColumnStatistics.of(column) for name, column in columns.items()})


def statistics() -> DataStatistics:
    groups = {"a": part(0), "": part(1, 0), "(null)": part(2)}
    sources = (Source("s3://bucket/a.parquet", "etag", 2**40, 50), Source("/b\udcff.csv", "5-6", 5, 50))
    return DataStatistics(union([DataStatistics(each) for each in groups.values()]).total, "label", groups, sources)


def test_a_loaded_file_has_the_same_bits(tmp_path: Path) -> None:
    for made in (statistics(), DataStatistics(Partial(0, {})), DataStatistics(part(3)), DataStatistics(part(4, 0))):
        made.save(tmp_path / NAME)
        assert DataStatistics.load(tmp_path / NAME) == made
        assert DataStatistics.from_bytes(to_bytes(made)) == made
        assert list(DataStatistics.load(str(tmp_path / NAME)).groups) == list(made.groups)


def test_loaded_statistics_go_on_as_if_there_was_no_file(tmp_path: Path) -> None:
    statistics().save(tmp_path / NAME)
    more = DataStatistics(part(9), "label", {"b": part(9)})
    assert DataStatistics.load(tmp_path / NAME) + more == statistics() + more


def test_the_json_file_is_for_people_and_names_the_file_that_it_was_made_from(tmp_path: Path) -> None:
    made = statistics()
    made.save(tmp_path / NAME)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bnstats.json", NAME]
    told = json.loads((tmp_path / "data.bnstats.json").read_text("ascii"))
    assert told["made_from"] == {"file": NAME, "sha256": sha256((tmp_path / NAME).read_bytes()).hexdigest()}
    assert (told["rows"], told["by"], sorted(told["groups"])) == (100, "label", ["", "(null)", "a"])
    column = made.columns["v"]
    assert told["columns"]["v"]["shape"] == [2, 3]
    np.testing.assert_array_equal(told["columns"]["v"]["mean"], column.mean)
    np.testing.assert_array_equal(told["columns"]["v"]["std"], column.std)
    assert told["columns"]["empty"]["mean"] == "nan"
    assert told["columns"]["empty"]["nan"] == 100
    assert told["sources"][0] == {"file": "s3://bucket/a.parquet", "fingerprint": "etag", "size": 2**40, "rows": 50}


def test_a_json_file_of_older_data_does_not_change_what_is_loaded(tmp_path: Path) -> None:
    """As after a kill between the two files."""
    statistics().save(tmp_path / NAME)
    old = (tmp_path / "data.bnstats.json").read_bytes()
    new = DataStatistics(part(5))
    new.save(tmp_path / NAME)
    (tmp_path / "data.bnstats.json").write_bytes(old)
    assert DataStatistics.load(tmp_path / NAME) == new
    assert json.loads(old)["made_from"]["sha256"] != sha256((tmp_path / NAME).read_bytes()).hexdigest()


def test_files_are_written_and_read_without_torch(tmp_path: Path) -> None:
    statistics().save(tmp_path / NAME)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from batchnorm.datasets.data_statistics import DataStatistics\n"
        f"found = DataStatistics.load({str(tmp_path / NAME)!r}); found.save({str(tmp_path / ('b' + NAME))!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / NAME).read_bytes() == (tmp_path / ("b" + NAME)).read_bytes()


def test_a_name_without_the_suffix_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for name in ("data.safetensors", "data.json", "data"):
        with pytest.raises(ValueError, match=r"needs a file that ends in \.bnstats\.safetensors, got"):
            statistics().save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics().save(tmp_path / NAME)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        DataStatistics(part(6)).save(tmp_path / NAME)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_missing_files_have_pythons_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        DataStatistics.load(tmp_path / NAME)


def changed(**fields: Any) -> bytes:
    """Bytes of the file with other metadata."""
    data = to_bytes(statistics())
    length = int.from_bytes(data[:8], "little")
    about = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["batchnorm.stats"]) | fields
    return save(load(data), {"batchnorm.stats": json.dumps({k: v for k, v in about.items() if v != "gone"})})


METADATA = {
    "other version": {"version": 2},
    "no version": {"version": "gone"},
    "no columns": {"columns": "gone"},
    "columns are a number": {"columns": 3},
    "a column without shape": {"columns": [["x"]]},
    "a negative size": {"columns": [["x", [-3]]]},
    "sizes that overflow": {"columns": [["x", [2**31, 2**31, 4]], ["v", [7]]]},
    "a name that is no text": {"columns": [[1, [8]]]},
    "a name twice": {"columns": [["x", [4]], ["x", [4]]]},
    "groups twice": {"groups": ["a", "a", "b"]},
    "too few groups": {"groups": ["a"]},
    "groups are null": {"groups": None},
    "no group column": {"by": 5},
    "a source with too few fields": {"sources": [["a", "b", 3]]},
    "a source with negative rows": {"sources": [["a", "b", 3, -1]]},
    "a source with half a row": {"sources": [["a", "b", 3, 1.5]]},
}


@pytest.mark.parametrize("case", METADATA)
def test_damaged_metadata_is_refused(case: str) -> None:
    with pytest.raises(
        ValueError, match=r"^the data is not statistics of data.*Write it with statistics.save\(path\)\.$"
    ):
        DataStatistics.from_bytes(changed(**METADATA[case]))


def set_to(value: float) -> Any:
    def change(values: np.ndarray) -> np.ndarray:
        changed = values.copy()
        changed[..., 0] = value
        return changed

    return change


TENSORS = [
    *((name, set_to(-1)) for name in ("rows", *COUNTS, "m2", "m4")),
    *((name, set_to(2**62)) for name in COUNTS),
    *((name, set_to(1)) for name in ("nan", "null")),
    *((name, set_to(np.nan)) for name in NUMBERS if name != "m3"),
    *((name, set_to(np.inf)) for name in ("minimum", "maximum", "mean", "mean_low", "m3")),
    ("mean", set_to(5)),
    ("mean_low", set_to(1)),
    ("m2", set_to(0)),
    *((name, lambda values: values.astype(np.float32)) for name in (*NUMBERS, *COUNTS, "rows")),
    *((name, lambda values: values[..., :-1]) for name in (*NUMBERS, *COUNTS, "rows")),
    *((name, lambda values: values[None]) for name in ("mean", "rows")),
]


@pytest.mark.parametrize(("name", "change"), TENSORS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(TENSORS)])
def test_numbers_that_no_data_can_have_are_refused(name: str, change: Any) -> None:
    data = to_bytes(statistics())
    length = int.from_bytes(data[:8], "little")
    tensors = load(data)
    tensors[name] = np.ascontiguousarray(change(tensors[name]))
    with pytest.raises(ValueError, match="not statistics of data, or it is damaged: "):
        DataStatistics.from_bytes(save(tensors, json.loads(data[8 : 8 + length])["__metadata__"]))


@pytest.mark.parametrize("name", [*NUMBERS, *COUNTS, "rows"])
def test_a_missing_number_is_named(name: str) -> None:
    data = to_bytes(statistics())
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    tensors = {key: value for key, value in load(data).items() if key != name}
    with pytest.raises(ValueError, match=f"'{name}' is missing"):
        DataStatistics.from_bytes(save(tensors, metadata))


FOREIGN = {
    "empty": b"",
    "text": b"mean,std\n1,2\n",
    "json": b'{"rows": 3}',
    "a header of 2^63 bytes": (2**63).to_bytes(8, "little") + b"{}",
    "a header of 2^64-1 bytes": b"\xff" * 8 + b"{}",
    "a header longer than the file": (1000).to_bytes(8, "little") + b"{}",
    "no metadata": save({"mean": np.zeros(3)}),
    "other metadata": save({"mean": np.zeros(3)}, {"batchnorm.bank": '{"version": 1}'}),
    "metadata that is no JSON": save({"mean": np.zeros(3)}, {"batchnorm.stats": "{"}),
    "metadata that is a list": save({"mean": np.zeros(3)}, {"batchnorm.stats": "[1]"}),
    "metadata that is deep": save({"mean": np.zeros(3)}, {"batchnorm.stats": "[" * 100_000}),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_files_are_refused_by_name(case: str, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(FOREIGN[case])
    with pytest.raises(ValueError, match=rf"{NAME} is not statistics of data"):
        DataStatistics.load(tmp_path / NAME)


def test_a_file_that_ends_anywhere_is_refused() -> None:
    data = to_bytes(statistics())
    for length in range(0, len(data), 97):
        with pytest.raises(ValueError, match="the data is not statistics of data"):
            DataStatistics.from_bytes(data[:length])


def test_groups_with_other_columns_are_refused() -> None:
    other = Partial(1, {"z": ColumnStatistics.of(Column(np.zeros(1)))})
    with pytest.raises(ValueError, match="expected groups with the columns of the data"):
        to_bytes(DataStatistics(part(0), "k", {"a": other}))


def test_json_has_no_numbers_that_only_addition_needs() -> None:
    column = as_json(statistics())["columns"]["v"]  # type: ignore[index, call-overload]
    assert not {"m2", "m3", "m4", "mean_low"} & set(column)  # type: ignore[arg-type]
