"""batchnorm stats: what is measured, written, said and refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import command_line
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchnorm.cli.stats_options import LEDGER, SUFFIX
from batchnorm.datasets.blocks import Selection
from batchnorm.datasets.data_statistics import DataStatistics
from batchnorm.datasets.ledger import Ledger
from batchnorm.datasets.measurement import data_statistics, question
from batchnorm.datasets.sources import pieces
from batchnorm.datasets.statistics_files import to_bytes
from batchnorm.reporting.formats import FORMATS

told = partial(command_line.told, "stats")
ALL, A, B = f"all{SUFFIX}", f"a{SUFFIX}", f"b{SUFFIX}"
ROWS = 60


def values(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "age": random.normal(40, 10, ROWS), "income": random.lognormal(10, 1, ROWS), "one": np.ones(ROWS),
        "v": random.normal(size=(ROWS, 3)).astype(np.float32),
    }  # fmt: skip


def table(seed: int) -> pa.Table:
    columns = {name: pa.array(x) for name, x in values(seed).items() if x.ndim == 1}
    v = values(seed)["v"]
    return pa.table(
        columns | {"v": pa.FixedSizeListArray.from_arrays(v.ravel(), 3), "g": ["a", "b", "c"] * (ROWS // 3)}
    )


def written(path: str, seed: int) -> str:
    pq.write_table(table(seed), path, row_group_size=20)
    return path


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    for seed in range(3):
        written(f"t{seed}.parquet", seed)


def left_over() -> set[str]:
    return {path.name for path in Path().iterdir() if not re.fullmatch(r"t\d\.parquet", path.name)}


def test_the_numbers_of_all_columns_are_printed_and_written():
    code, text = told("t*.parquet", "-o", ALL)
    assert code == 0, text
    assert text.startswith("180 rows, 4 columns, 6 features: 1 feature constant; scales differ")
    income = np.concatenate([values(seed)["income"] for seed in range(3)])
    assert f"income 180 {income.mean():,.0f} {income.std():,.0f}" in text
    assert "one is constant: every value is 1.000" in text
    assert f"wrote: {ALL}" in text
    assert f"next: batchnorm.InputNorm.load('{ALL}')" in text
    found = DataStatistics.load(ALL)
    for name in ("age", "income", "v"):
        x = np.concatenate([values(seed)[name] for seed in range(3)]).astype(np.float64)
        np.testing.assert_allclose(found.columns[name].mean, x.mean(0), rtol=1e-13, atol=1e-14)
        np.testing.assert_allclose(found.columns[name].var, x.var(0), rtol=1e-12)
    assert json.loads(Path(f"all{LEDGER[:8]}.json").read_text())["rows"] == 180
    assert left_over() == {ALL, "all.bnstats.json"}  # no ledger is left


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_what_matters(name):
    code, text = told("t0.parquet", "--output-format", name)
    assert code == 0
    if name == "jsonl":
        assert {"constant-feature", "different-scales"} == {json.loads(x)["rule"] for x in re.findall(r"\{.*?\}", text)}
    elif name == "json":
        assert {"findings", "columns", "rows"} <= set(json.loads(text))
    else:
        assert "constant" in text


def test_a_report_and_statistics_are_written_at_once():
    assert told("t0.parquet", "-o", A, "-o", "a.html", "-q") == (0, "")
    assert "60 rows" in Path("a.html").read_text()
    assert Path(A).exists()


def test_columns_are_chosen_by_name_and_groups_by_a_column():
    code, text = told("t*.parquet", "--columns", "age,v", "--by", "g", "-o", ALL)
    assert code == 0, text
    assert "180 rows, 2 columns, 4 features, 3 groups" in text
    assert re.search(r"group rows age \(.*%\)", text)
    found = DataStatistics.load(ALL)
    assert list(found.columns) == ["age", "v"]
    assert {name: group.rows for name, group in found.groups.items()} == {"a": 60, "b": 60, "c": 60}
    ages = np.concatenate([values(seed)["age"][1::3] for seed in range(3)])
    np.testing.assert_allclose(found.groups["b"].columns["age"].mean, ages.mean(), rtol=1e-14)


def test_missing_values_are_told_by_column():
    pq.write_table(
        pa.table(
            {"x": [1.0, None, float("nan"), float("inf")], "v": [[1.0, 2.0], [None, 3.0], [0.5, 1.0], [2.0, 2.5]]}
        ),
        "t3.parquet",
    )
    text = told("t3.parquet")[1]
    assert "column count mean std min max NaN Inf null" in text
    assert "x: 25 % of values are NaN" in text
    assert "x: 25 % of values are infinite" in text
    assert "x: 25 % of values are missing" in text
    assert "v: 12.5 % of values are missing, at most in feature [0]: 25 %" in text


def test_an_update_reads_new_files_alone_and_equals_a_measurement_of_all():
    told("t0.parquet", "t1.parquet", "-o", A)
    first = Path("t0.parquet").read_bytes()
    code, text = told("--update", A, "t*.parquet", "-o", ALL)
    assert code == 0, text
    assert f"2 files left out: {A} has counted them" in text
    both, at_once = DataStatistics.load(ALL), data_statistics("t*.parquet")
    assert [Path(source.file).name for source in both.sources] == ["t0.parquet", "t1.parquet", "t2.parquet"]
    for name, column in at_once.columns.items():
        np.testing.assert_allclose(both.columns[name].var, column.var, rtol=1e-13)
    assert told("--update", ALL, "t*.parquet", "-o", ALL, "--force")[0] == 0  # nothing is new
    assert to_bytes(DataStatistics.load(ALL)) == to_bytes(both)
    Path("t0.parquet").unlink()
    Path("t0.parquet").write_bytes(first + b"")
    os.utime("t0.parquet", (1, 1))
    code, text = told("--update", ALL, "t*.parquet")
    assert code == 2
    assert "t0.parquet has changed since it was counted" in text


def test_an_update_keeps_columns_and_groups():
    told("t0.parquet", "--columns", "age", "--by", "g", "-o", A)
    told("--update", A, "t1.parquet", "-o", ALL)
    found = DataStatistics.load(ALL)
    assert (list(found.columns), found.by, list(found.groups)) == (["age"], "g", ["a", "b", "c"])


def test_statistics_are_merged():
    told("t0.parquet", "-o", A)
    told("t1.parquet", "t2.parquet", "-o", B)
    code, text = told("--merge", A, B, "-o", ALL)
    assert code == 0, text
    assert "180 rows" in text
    assert len(DataStatistics.load(ALL).sources) == 3
    code, text = told("--merge", ALL, A)
    assert code == 2
    assert "t0.parquet twice" in text


def test_training_data_are_compared_with_serving_data():
    told("t0.parquet", "t1.parquet", "-o", A)
    code, text = told("--compare", A, "t2.parquet", "--limit", "1")
    assert code == 0, text
    moved = table(2).set_column(0, "age", pa.array(values(2)["age"] + 20))
    pq.write_table(moved, "t3.parquet")
    code, text = told("--compare", A, "t3.parquet")
    assert code == 1, text
    assert "age" in text
    code, text = told("--compare", A, "t3.parquet", "--output-format", "json")
    assert code == 1
    assert "age" in json.dumps(json.loads(text))


def test_data_are_measured_for_a_comparison_as_the_statistics_were():
    told("t0.parquet", "-o", A, "--columns", "age", "--by", "g")
    code, text = told("--compare", A, "t0.parquet", "--output-format", "json")
    assert code == 0, text
    code, text = told("--compare", "t0.parquet", "t1.parquet", "--columns", "age", "--limit", "2")
    assert (code, "income" in text) == (0, False)


def test_the_limit_of_a_comparison_is_that_of_the_library():
    from batchnorm.cli.stats_command import stats
    from batchnorm.datasets.comparison import LIMIT

    assert next(param.default for param in stats.params if param.name == "limit") == LIMIT


def test_an_interrupted_run_goes_on(monkeypatch):
    found, selection = pieces(["t0.parquet", "t1.parquet"]), Selection()
    place = Path(f"all{LEDGER}")
    with Ledger(place, question(selection)) as ledger:
        from batchnorm.datasets.measuring import measure

        ledger.append(found[0], measure(found[0], selection))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("batchnorm.datasets.engines.threads.Threads.partials", interrupted)
        code, text = told("t0.parquet", "t1.parquet", "-o", ALL)
    assert code == 130
    assert f"1 of {len(found)} pieces are noted in {place}; the same command goes on" in text
    code, text = told("t0.parquet", "t1.parquet", "-o", ALL)
    assert code == 0
    assert f"going on: 1 of {len(found)} pieces are noted in {place}" in text
    assert to_bytes(DataStatistics.load(ALL)) == to_bytes(data_statistics(["t0.parquet", "t1.parquet"]))
    assert not place.exists()


def test_a_ledger_is_forgotten_on_demand():
    Ledger(f"all{LEDGER}", question(Selection(columns=("other",)))).close()
    code, text = told("t0.parquet", "-o", ALL)
    assert code == 2
    assert "belongs to another question" in text
    assert told("t0.parquet", "-o", ALL, "--no-resume")[0] == 0


def damaged_statistics() -> None:
    told("t0.parquet", "-o", A)
    data = bytearray(Path(A).read_bytes())
    Path(A).write_bytes(data[: len(data) // 2])


def other_columns() -> None:
    told("t0.parquet", "-o", A, "--columns", "age")
    told("t1.parquet", "-o", B)


def a_ledger(text: bytes) -> None:
    Path(f"all{LEDGER}").write_bytes(text)


WRONG = {
    "no data": ((), None, "stats needs data: files, folders or patterns, got 0. For example: batchnorm stats"),
    "an empty name": (("",), None, "DATA needs a value"),
    "no such file": (("nowhere.parquet",), None, "nowhere.parquet, where there is no file. Check the address"),
    "a missing column": (("t0.parquet", "--columns", "age,height"), None, "height"),
    "a column of text": (("t0.parquet", "--columns", "g"), None, "g"),
    "an empty column": (("t0.parquet", "--columns", "age,,v"), None, "--columns needs names with commas between them"),
    "a missing column of groups": (("t0.parquet", "--by", "color"), None, "color"),
    "another format": (("t0.parquet", "--format", "xls"), None, "'xls'"),
    "the same file twice": (("t0.parquet", "t0.parquet"), None, "t0.parquet is named twice, expected once"),
    "the same file by two names": (("t0.parquet", "../{here}/t0.parquet"), None, "which would count twice"),
    "a link to a file": (("*.parquet",), lambda: Path("t3.parquet").symlink_to("t0.parquet"), "are the same file"),
    "an engine that does not exist": (("t0.parquet", "--engine", "flink"), None, "engine must be one of threads, ray"),
    "an address for threads": (("t0.parquet", "--address", "h:1"), None, "the engine threads runs in this process"),
    "a scheduler that is down": (
        ("t0.parquet", "--engine", "dask", "--address", "tcp://127.0.0.1:1"), None, "cannot reach Dask at tcp://127.0.0.1:1",
    ),
    "an output that exists": (("t0.parquet", "-o", ALL), lambda: Path(ALL).touch(), "exists already. Pass --force"),
    "an output in no folder": (("t0.parquet", "-o", f"no/{ALL}"), None, "cannot write"),
    "a folder as output": (("t0.parquet", "-o", ALL), lambda: Path(ALL).mkdir(), "it is a folder"),
    "an output of another kind": (("t0.parquet", "-o", "x.safetensors"), None, "Rename it x.bnstats.safetensors"),
    "two outputs of a kind": (("t0.parquet", "-o", A, "-o", B), None, "-o names two files of one kind"),
    "two kinds of work": (("--merge", "--compare", A, B), None, "--merge and --compare are different commands"),
    "a limit without a comparison": (("t0.parquet", "--limit", "3"), None, "--limit has no effect here"),
    "columns of an update": (("--update", A, "t0.parquet", "--columns", "age"), None, "--columns has no effect here"),
    "an engine of a merge": (("--merge", A, B, "--engine", "ray"), None, "--engine has no effect here"),
    "statistics from a comparison": (("--compare", "t0.parquet", "t1.parquet", "-o", A), None, "writes a report"),
    "a merge of one": (("--merge", A), None, "--merge needs two files of statistics or more, got 1"),
    "a comparison of three": (("--compare", A, B, ALL), None, "--compare needs two, statistics or data, got 3"),
    "a merge of data": (("--merge", "t0.parquet", "t1.parquet"), None, "expected a file of statistics"),
    "no such statistics": (("--update", A, "t0.parquet"), None, f"no file of statistics {A}. Make it:"),
    "damaged statistics": (("--update", A, "t1.parquet"), damaged_statistics, f"{A} is not statistics of data"),
    "statistics of other columns": (("--merge", A, B), other_columns, "same columns"),
    "a damaged ledger": (("t0.parquet", "-o", ALL), lambda: a_ledger(b"\x00\n\x01"), "is not a ledger of"),
    "no ledger to forget": (("t0.parquet", "--no-resume"), None, "--no-resume needs a ledger"),
    "a ledger in no folder": (("t0.parquet", "--ledger", "no/x"), None, "cannot write the ledger no/x"),
    "wrong axes": (("t0.parquet", "--channel-axis", "x"), None, "--channel-axis needs a whole number"),
    "too few workers": (("t0.parquet", "--workers", "0"), None, "--workers"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs_have_a_cause_a_remedy_and_no_traceback(name):
    words, before, cause = WRONG[name]
    if before:
        before()
    here = left_over()
    code, text = told(*(word.replace("{here}", Path().absolute().name) for word in words))
    assert code == 2, text
    assert cause in text
    assert "Traceback" not in text
    assert left_over() == here


def test_an_engine_that_is_not_installed_is_told(monkeypatch):
    monkeypatch.setattr("batchnorm.datasets.engines.find_spec", lambda _: None)
    code, text = told("t0.parquet", "--engine", "ray")
    assert code == 2
    assert "engine ray needs ray.data, not installed here. Run: pip install 'batchnorm[ray]'" in text


def test_too_many_groups_are_told(monkeypatch):
    monkeypatch.setattr("batchnorm.datasets.group_limit._MOST_BYTES", 10_000)
    code, text = told("t0.parquet", "--by", "g")
    assert code == 2
    assert "column 'g' has 3 groups or more" in text
    assert "Name a column with fewer values" in text


def test_a_file_that_may_not_be_read_is_no_trouble_with_writing(monkeypatch):
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "t0.parquet")

    monkeypatch.setattr("batchnorm.datasets.sources.pieces", refused)
    code, text = told("t0.parquet")
    assert code == 2
    assert "cannot read t0.parquet: Permission denied. Check the path and its permissions." in text


def test_names_of_columns_and_groups_cannot_control_a_terminal_or_a_page():
    evil = "\x1b[31m<script>alert(1)</script>\n# x"
    pq.write_table(pa.table({evil: [1.0, 2.0, 2.0], "g": [evil, "b", "b"]}), "t3.parquet")
    for name in FORMATS:
        code, text = command_line.call("stats", "t3.parquet", "--by", "g", "--output-format", name), ""
        text, code = code.output, code.exit_code
        assert code == 0, text
        assert "\x1b" not in text
        if name in {"html", "md"}:
            assert "<script>alert(1)" not in text


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from batchnorm.cli import main
main(["stats", "t0.parquet", "t1.parquet", "-o", "x.bnstats.safetensors", "--by", "g"], standalone_mode=False)
"""


def test_the_command_needs_no_torch():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "120 rows" in done.stdout
    assert done.stderr == ""  # no progress bar without a terminal


def test_the_help_loads_neither_numpy_nor_pyarrow():
    code = "import sys; from batchnorm.cli import main; main(['stats', '--help'], standalone_mode=False); "
    code += "sys.exit(bool({'numpy', 'pyarrow', 'torch', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
