"""Data sets that cannot be measured: every error names the file, the cause and what to do; and addresses of stores."""

from __future__ import annotations

import contextlib
import datetime as dt
import http.server
import os
import sys
import threading
import zipfile
from decimal import Decimal
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from test_sources import blocks, groups, read, table, write_csv, write_npz, write_parquet

from batchnorm.datasets.blocks import Selection
from batchnorm.datasets.sources import Options, pieces
from batchnorm.datasets.sources.formats import by_suffix

fsspec = pytest.importorskip("fsspec")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def parquet(path: Path, **columns: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


@pytest.fixture
def two(tmp_path: Path):
    """A function that writes a table to each of two files, and returns their folder."""

    def write(first: dict, second: dict) -> Path:
        parquet(tmp_path / "a.parquet", **first)
        parquet(tmp_path / "b.parquet", **second)
        return tmp_path

    return write


# what the files of a data set may differ in


def test_a_missing_column_is_named_with_the_file_and_its_columns(two) -> None:
    folder = two({"x": [1.0], "y": [1.0]}, {"x": [1.0], "z": [1.0]})
    words = r"expected a column 'y' in every file, got .*b.parquet with the columns x, z. Name columns"
    with pytest.raises(ValueError, match=words):
        pieces(folder, Selection(columns=("y",)))
    with pytest.raises(
        ValueError, match=r"a column 'y' in every file.* The files differ in their columns: name columns"
    ):
        pieces(folder)
    assert list(read(pieces(folder, Selection(columns=("x",))), Selection(columns=("x",)))) == ["x"]


def test_whole_numbers_and_fractions_may_be_mixed_but_not_text(two) -> None:
    assert read(pieces(two({"x": [1]}, {"x": [2.5]})))["x"].tolist() == [1, 2.5]
    folder = two({"x": [1]}, {"x": ["a"]})
    for columns in ((), ("x",)):
        with pytest.raises(
            TypeError, match=r"numbers in column 'x', got string in .*b.parquet and int64 in .*a.parquet"
        ):
            pieces(folder, Selection(columns=columns))


def test_lengths_of_lists_agree(two) -> None:
    folder = two({"v": [[1.0, 2.0]]}, {"v": [[1.0, 2.0, 3.0]]})
    with pytest.raises(
        ValueError, match=r"vectors of 2 numbers in .*a.parquet and vectors of 3 numbers in .*b.parquet"
    ):
        pieces(folder)
    folder = two({"v": [[1.0, 2.0]]}, {"v": [1.0]})
    with pytest.raises(ValueError, match=r"got vectors of 2 numbers in .*a.parquet and single numbers in .*b.parquet"):
        pieces(folder)
    path = parquet(folder / "c" / "c.parquet", v=[[1.0, 2.0]] * 5 + [[1.0]])
    with pytest.raises(ValueError, match=r"c.parquet, .* expected lists of 2 numbers in column 'v', got a list of 1"):
        read(pieces(path))


def test_a_file_without_values_takes_the_type_of_the_others(two) -> None:
    folder = two({"x": pa.nulls(3), "v": pa.array([None] * 3, pa.list_(pa.float32()))}, {"x": [1.0], "v": [[1.0, 2.0]]})
    values = read(pieces(folder))
    assert values["x"].tolist() == [-999] * 3 + [1]
    assert values["v"].tolist() == [[-999, -999]] * 3 + [[1, 2]]
    only = parquet(folder / "only" / "o.parquet", x=pa.nulls(3))
    assert read(pieces(only))["x"].tolist() == [-999] * 3


# columns of Parquet and Arrow


def columns_of(where: Path, **columns: object) -> dict[str, np.ndarray]:
    return read(pieces(parquet(where / "t.parquet", **columns)))


def test_nested_columns_are_vectors_and_fields(tmp_path: Path) -> None:
    lists = pa.array([[1, None], None, [3, 4], [5, 6]], pa.list_(pa.int32()))
    fixed = pa.array([[1, None], None, [3, 4], [5, 6]], pa.list_(pa.float32(), 2))
    matrices = pa.array([[[1, 2], [3, 4]], [[5, None], [7, 8]], None, [None, [1, 2]]], pa.list_(pa.list_(pa.int8())))
    record = pa.array([{"a": 1, "v": [1.0]}, None, {"a": None, "v": None}, {"a": 4, "v": [2.0]}])
    values = columns_of(tmp_path, lists=lists, fixed=fixed, matrices=matrices, record=record)
    no = -999
    assert values["lists"].tolist() == values["fixed"].tolist() == [[1, no], [no, no], [3, 4], [5, 6]]
    assert values["matrices"].tolist() == [
        [[1, 2], [3, 4]], [[5, no], [7, 8]], [[no, no], [no, no]], [[no, no], [1, 2]],
    ]  # fmt: skip
    assert values["record.a"].tolist() == [1, no, no, 4]
    assert values["record.v"].tolist() == [[1], [no], [no], [2]]


def test_tensors_have_the_shape_of_their_type(tmp_path: Path) -> None:
    kind = pa.fixed_shape_tensor(pa.float32(), [2, 3], permutation=[1, 0])
    storage = pa.array([list(range(6)), None, list(range(6, 12))], pa.list_(pa.float32(), 6))
    values = columns_of(tmp_path, t=pa.ExtensionArray.from_storage(kind, storage))["t"]
    assert values.shape == (3, 3, 2)
    np.testing.assert_array_equal(values[2], np.arange(6, 12).reshape(2, 3).T)
    assert (values[1] == -999).all()


@pytest.mark.parametrize(
    "kind", [pa.int8(), pa.uint64(), pa.float16(), pa.float32(), pa.bool_(), pa.dictionary(pa.int8(), pa.int64())]
)
def test_types_of_numbers(tmp_path: Path, kind: pa.DataType) -> None:
    array = pa.array([1, None, 0, 1, 1], pa.int64()).cast(kind.value_type if pa.types.is_dictionary(kind) else kind)
    array = array.dictionary_encode() if pa.types.is_dictionary(kind) else array
    assert columns_of(tmp_path, x=array)["x"].tolist() == [1, -999, 0, 1, 1]


@pytest.mark.parametrize(
    "kind", [pa.decimal128(9, 2), pa.decimal128(38, 20), pa.decimal128(30, 0), pa.decimal256(50, 9)]
)
def test_decimals_are_rounded_once(tmp_path: Path, kind: pa.DataType) -> None:
    """Python's float(Decimal) is the nearest float64."""
    scale = min(kind.scale, 9)
    digits = [1, 3, 7, 999_999_999, -123_456_789, 10**8 + 1, *range(1, 200, 7)]
    digits += [] if kind.precision < 30 else [2**53 + 1, -(2**53) - 3, 2**63 + 5, 123456789012345678901 % 10**18]
    numbers = [Decimal(each).scaleb(-scale) for each in digits if each < 10 ** (kind.precision - kind.scale + scale)]
    array = pa.array([*numbers, None], kind)
    assert columns_of(tmp_path, x=array)["x"].tolist() == [*map(float, numbers), -999]


def test_text_and_times_are_left_out_or_refused(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "t.parquet", x=[1.0], s=["a"], t=pa.array([0], pa.timestamp("s")), m=[{"k": "v"}], b=[b"x"]
    )
    assert list(read(pieces(path))) == ["x"]
    for name, kind in (("s", "string"), ("t", r"timestamp\[.*\]"), ("m.k", "string"), ("b", "binary")):
        with pytest.raises(TypeError, match=rf"expected numbers in column '{name}', got {kind} in .*t.parquet. Name"):
            pieces(path, Selection(columns=(name,)))


def test_two_columns_of_a_name_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), tmp_path / "t.parquet")
    with pytest.raises(
        ValueError, match=r"t.parquet.*expected one column 'a', got two of this name. Rename one of them"
    ):
        pieces(tmp_path / "t.parquet")


def test_groups_may_be_folders_dates_and_booleans_but_no_fractions(tmp_path: Path) -> None:
    day = dt.date(2024, 2, 3)
    for year in ("2023", "__HIVE_DEFAULT_PARTITION__"):
        parquet(tmp_path / f"year={year}" / "p.parquet", x=[1.0, 2.0], day=[day, None], flag=[True, False])
    for by, want in (
        ("year", ["2023"] * 2 + ["(null)"] * 2),
        ("day", ["2024-02-03", "(null)"] * 2),
        ("flag", ["true", "false"] * 2),
        ("folder", ["year=2023"] * 2 + ["year=__HIVE_DEFAULT_PARTITION__"] * 2),
    ):
        assert groups(pieces(tmp_path, Selection(by=by)), Selection(by=by)) == want
    with pytest.raises(
        TypeError, match="expected text, whole numbers, booleans or dates as groups, got column 'x' of type"
    ):
        pieces(tmp_path, Selection(by="x"))
    with pytest.raises(
        ValueError, match=r"expected a column 'none' with the groups .* which has day, flag, folder, year"
    ):
        pieces(tmp_path, Selection(by="none"))


# files that are damaged, missing, or not what they seem


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    for name in ("a.parquet", "a.csv", "a.npy", "a.png", "a.tar", "a.arrow"):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=rf"expected a file with data, got .*{name}, which has 0 bytes"):
            pieces(tmp_path / name)


@pytest.mark.parametrize(("where", "words"), [(-10, "the footer"), (200, "row groups")])
def test_damaged_parquet_is_refused(tmp_path: Path, where: int, words: str) -> None:
    numbers = np.random.default_rng(0).normal(size=100)
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"x": numbers}), path, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    if where < 0:
        del data[where:]
    else:
        data[20:where] = bytes(where - 20)
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=rf"expected a Parquet file, got {path}, which is damaged.* {words}.*Write it again"
    ):
        read(pieces(path))


def test_damaged_arrow_files_are_refused(tmp_path: Path) -> None:
    with pa.OSFile(str(tmp_path / "t.arrow"), "wb") as file, pa.ipc.new_file(file, table().schema) as writer:
        writer.write_table(table())
    data = (tmp_path / "t.arrow").read_bytes()
    for damaged in (data[:-100], data[:300] + bytes(len(data) - 300), b"ARROW1 and no more", b"no Arrow file at all"):
        (tmp_path / "t.arrow").write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"expected an Arrow file, got .*t.arrow, which is damaged or no such file"
        ):
            read(pieces(tmp_path / "t.arrow"))


def test_the_first_bytes_decide_against_the_name(tmp_path: Path) -> None:
    write_parquet(tmp_path, table()).rename(tmp_path / "t.csv")
    assert read(pieces(tmp_path / "t.csv"))["i"].tolist() == list(range(23))
    (tmp_path / "t.csv").rename(tmp_path / "no_suffix")
    assert read(pieces(tmp_path / "no_suffix"))["i"].tolist() == list(range(23))
    write_csv(tmp_path, table()).rename(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"expected a file of format parquet, as its name says, got .* --format"):
        pieces(tmp_path / "t.parquet")
    assert read(pieces(tmp_path / "t.parquet", options=Options(format="csv")))["i"].tolist() == list(range(23))


def test_unknown_formats_are_refused_with_the_list_of_formats(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("{}")
    with pytest.raises(
        ValueError, match=r"expected a file of a known format, got .*t.jsonl. Formats: parquet .*csv.*tar"
    ):
        pieces(tmp_path / "t.jsonl")
    with pytest.raises(
        ValueError, match=r"expected files with data, got .* with 1 files, none of them of a known format"
    ):
        pieces(tmp_path)
    with pytest.raises(ValueError, match=r"expected a format of parquet, csv, .* got 'json'. Name one of them"):
        pieces(tmp_path / "t.jsonl", options=Options(format="json"))


def test_files_without_a_suffix_below_a_folder_are_known_by_their_first_bytes(tmp_path: Path) -> None:
    write_parquet(tmp_path, table()).rename(tmp_path / "part-0")
    assert read(pieces(tmp_path))["i"].tolist() == list(range(23))
    write_csv(tmp_path, table()).rename(tmp_path / "part-0")
    with pytest.raises(ValueError, match=r"expected a file of a known format, got .*part-0"):
        pieces(tmp_path)
    assert read(pieces(tmp_path, options=Options(format="csv")))["i"].tolist() == list(range(23))


def test_a_folder_with_several_formats_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path, table())
    write_csv(tmp_path, table())
    with pytest.raises(ValueError, match=r"files of one format, got 1 of csv, such as .*t.csv; 1 of parquet, such as"):
        pieces(tmp_path)
    assert len(read(pieces(tmp_path, options=Options(format="csv")))["i"]) == 23
    assert len(read(pieces(tmp_path / "*.csv"))["i"]) == 23


def test_other_files_below_a_folder_are_left_out(tmp_path: Path) -> None:
    write_parquet(tmp_path, table())
    for name in ("_SUCCESS", "_metadata.parquet", ".hidden.parquet", "README.md"):
        (tmp_path / name).write_text("no data")
    assert len(read(pieces(tmp_path))["i"]) == 23


def test_a_file_that_is_named_twice_is_read_once(tmp_path: Path) -> None:
    path = write_parquet(tmp_path, table())
    assert len(read(pieces([path, str(path), tmp_path]))["i"]) == 23


def test_nothing_at_an_address_is_refused(tmp_path: Path) -> None:
    for data in (tmp_path / "none.csv", tmp_path / "*.csv", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"expected a file, a folder with files, or a pattern"):
            pieces(data)
    with pytest.raises(ValueError, match=r"got \[\]. Name a file of data"):
        pieces([])
    with pytest.raises(ValueError, match=r"got ''. Name a file of data"):
        pieces("")
    for data, name in (([3], "int"), (None, "NoneType"), (b"a", "bytes"), ({"a": 1}, "dict")):
        with pytest.raises(TypeError, match=f"expected a path or an address, or a list of them, got {name}"):
            pieces(data)


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path, table())
    pieces(path)  # imports what the reader needs
    path.chmod(0)
    me = os.geteuid()
    if me == 0:  # root may read every file
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError) as error:
            pieces(path)
    finally:
        os.seteuid(me)
    assert str(tmp_path) in str(error.value)


def test_links_in_a_circle_do_no_harm(tmp_path: Path) -> None:
    write_parquet(tmp_path, table())
    (tmp_path / "circle").symlink_to(tmp_path)
    (tmp_path / "itself.parquet").symlink_to(tmp_path / "itself.parquet")
    assert len(read(pieces(tmp_path))["i"]) == 23
    with pytest.raises(OSError, match=r"itself.parquet"):
        pieces(tmp_path / "itself.parquet")


@pytest.mark.parametrize("name", ["a [1].csv", "a#b?.csv", "a b.parquet", "ä%20.npz", "a=b.csv", "a:b.csv", "*.csv"])
def test_names_may_have_any_characters(tmp_path: Path, name: str) -> None:
    writer = {"csv": write_csv, "parquet": write_parquet, "npz": write_npz}[name.rpartition(".")[2]]
    path = writer(tmp_path, table()).rename(tmp_path / name)
    assert read(pieces(path))["i"].tolist() == list(range(23))
    assert read(pieces(tmp_path))["i"].tolist() == list(range(23))


@pytest.mark.parametrize("writer", [write_parquet, write_csv, write_npz])
def test_a_file_that_changes_is_refused(tmp_path: Path, writer) -> None:
    path = writer(tmp_path, table())
    found = pieces(path)
    before = [piece.key for piece in found]
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match=r"as it was when the job was planned, got a file that changed since then"):
        read(found)
    assert not {piece.key for piece in pieces(path)} & set(before)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read(found)


@pytest.mark.parametrize(
    ("name", "package"), [("t.parquet", "pyarrow"), ("t.csv", "pyarrow"), ("t.arrow", "pyarrow"), ("t.png", "PIL")]
)
def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    (tmp_path / name).write_bytes(b"PAR1ARROW" if name != "t.arrow" else b"ARROW1")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ModuleNotFoundError, match=rf"need {package}, not installed here. Run: pip install 'batchnorm\[data\]'"
    ):
        pieces(tmp_path / name)


# addresses of stores


@pytest.fixture
def store():
    system = fsspec.filesystem("memory")
    yield system
    if system.exists("/sources"):
        system.rm("/sources", recursive=True)


@pytest.mark.parametrize("writer", [write_parquet, write_csv, write_npz])
def test_stores_give_the_same_values(tmp_path: Path, store, writer) -> None:
    path = writer(tmp_path, table())
    store.pipe(f"/sources/a/{path.name}", path.read_bytes())
    options = Options(piece_bytes=64)
    want = read(pieces(path, options=options))
    for address in (f"memory://sources/a/{path.name}", "memory://sources", f"memory://sources/*/*{path.suffix}"):
        found = pieces(address, options=options)
        assert {piece.file for piece in found} == {f"memory:///sources/a/{path.name}"} or address.endswith(path.name)
        for name, values in read(found).items():
            np.testing.assert_array_equal(values, want[name])


def test_a_file_of_a_store_that_changes_is_refused(tmp_path: Path, store) -> None:
    data = write_csv(tmp_path, table()).read_bytes()
    store.pipe("/sources/t.csv", data)
    found = pieces("memory://sources/t.csv")
    store.pipe("/sources/t.csv", data)
    with pytest.raises(ValueError, match="a file that changed since then"):
        read(found)


@pytest.fixture
def web(tmp_path: Path):
    """Address of a server that sends the files of a folder as a whole: Python's server has no range requests."""
    pytest.importorskip("aiohttp")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def copyfile(self, source, outputfile) -> None:
            with contextlib.suppress(OSError):  # who reads the beginning closes the connection
                super().copyfile(source, outputfile)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.filterwarnings("ignore:unclosed|Unclosed:ResourceWarning")
def test_servers_that_send_whole_files_only_are_read_through_a_cache(tmp_path: Path, web: str) -> None:
    write_csv(tmp_path, pa.concat_tables([table()] * 5000))
    with pytest.raises(OSError, match=r"t.csv cannot be read in parts, .* range requests. .* simplecache::http://"):
        read(pieces(f"{web}/t.csv"))
    assert len(read(pieces(f"simplecache::{web}/t.csv"))["i"]) == 5000 * 23


def test_columns_of_a_store_are_fetched_without_the_others(
    tmp_path: Path,
) -> None:
    """A file system whose files count the bytes that are fetched."""
    numbers = np.random.default_rng(0).normal(size=(20, 50000))
    path = parquet_of_columns(tmp_path / "t.parquet", numbers)
    fetched: list[int] = []

    class Counted(fsspec.spec.AbstractBufferedFile):
        def _fetch_range(self, start: int, end: int) -> bytes:
            fetched.append(end - start)
            return path.read_bytes()[start:end]

    class Counting(fsspec.AbstractFileSystem):
        def info(self, address: str, **options: object) -> dict:
            return {"name": address, "size": path.stat().st_size, "type": "file", "ETag": "1"}

        def _open(self, address: str, mode: str = "rb", **options: object) -> Counted:
            return Counted(self, address, mode, size=path.stat().st_size)

    fsspec.register_implementation("counting", Counting, clobber=True)
    selection = Selection(columns=("c3",))
    values = read(pieces("counting://t.parquet", selection), selection)["c3"]
    np.testing.assert_array_equal(values, numbers[3])
    assert sum(fetched) < 0.2 * path.stat().st_size


def parquet_of_columns(path: Path, numbers: np.ndarray) -> Path:
    pq.write_table(pa.table({f"c{i}": each for i, each in enumerate(numbers)}), path, row_group_size=10000)
    return path


def test_members_of_archives_are_read(tmp_path: Path) -> None:
    path = write_parquet(tmp_path, table())
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.write(path, "inside/t.parquet")
    assert read(pieces(f"zip://inside/t.parquet::{tmp_path}/z.zip"))["i"].tolist() == list(range(23))


def test_stores_that_cannot_be_reached_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = {"class": "no_such_package.System", "err": "Install no_such_package to read nosuch"}
    monkeypatch.setitem(import_module("fsspec.registry").known_implementations, "nosuch", needs)
    with pytest.raises(ModuleNotFoundError, match="needs another package: Install no_such_package"):
        pieces("nosuch://bucket/t.parquet")
    with pytest.raises(FileNotFoundError, match=r"memory://none/t.parquet"):
        pieces("memory://none/t.parquet")
    pytest.importorskip("aiohttp")
    with pytest.raises(OSError, match=r"http://127.0.0.1:9/t.csv cannot be read: .* Check the address, the network"):
        pieces("http://127.0.0.1:9/t.csv")


def test_blocks_of_wide_tables_count_their_rows_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchnorm.datasets.sources.parquet.MOST_VALUES", 80)  # strips of 10
    path = parquet(tmp_path / "t.parquet", **{f"c{i}": [1.0, 2.0] for i in range(12)}, g=["a", "b"])
    found = blocks(pieces(path, Selection(by="g")), Selection(by="g"))
    assert [(block.rows, len(block.columns)) for block in found] == [(2, 5), (0, 5), (0, 2)]
    assert all(block.labels == ("a", "b") for block in found)


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("https://a/t.CSV?key=b/c.npy#d", "csv"),
        ("simplecache::https://a/t.csv.gz", "csv"),
        ("zip://t.npy::simplecache::s3://a/b.csv", "npy"),
        ("a?b/c#d.parquet", "parquet"),
        ("x::y.tar.gz", "tar"),
        ("s3://b/t.zarr/", "zarr"),
        ("s3://b.csv/t", None),
        ("https://a/t?file=b.csv", None),
    ],
)
def test_the_suffix_is_that_of_the_path(address: str, name: str | None) -> None:
    found = by_suffix(address)
    assert (found.name if found else None) == name
