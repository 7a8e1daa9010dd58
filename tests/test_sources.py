"""Readers of data sets: the same table in every format gives the same values, whatever the pieces."""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchnorm.datasets.blocks import NO_GROUP, Block, Piece, Selection
from batchnorm.datasets.sources import Options, pieces

pa = pytest.importorskip("pyarrow")
feather = pytest.importorskip("pyarrow.feather")
pq = pytest.importorskip("pyarrow.parquet")

ROWS = 23
EVERYTHING = Selection()
NAN, INF = float("nan"), float("inf")


def table() -> pa.Table:
    """Numbers of several types with nulls, NaN and infinities, vectors, and text."""
    numbers = np.arange(ROWS) * 0.1
    x = [None if i % 5 == 4 else NAN if i == 2 else INF if i == 3 else float(numbers[i]) for i in range(ROWS)]
    vectors = [[i + 0.5, i * 2.0, -i] for i in range(ROWS)]
    return pa.table(
        {
            "x": pa.array(x, pa.float64()),
            "i": pa.array(range(ROWS), pa.int16()),
            "b": pa.array([i % 3 == 0 for i in range(ROWS)]),
            "name": [f"n{i}" for i in range(ROWS)],
            "v": pa.FixedSizeListArray.from_arrays(pa.array(np.ravel(vectors), pa.float32()), 3),
            "g": pa.array([None if i == 7 else "ab"[i % 2] for i in range(ROWS)]),
        }
    )


def read(found: Sequence[Piece], selection: Selection = EVERYTHING) -> dict[str, np.ndarray]:
    """All values of every column, float64; null is -999."""
    columns: dict[str, list[np.ndarray]] = {}
    for piece in found:
        for block in pickle.loads(pickle.dumps(piece)).blocks(selection):
            for name, column in block.columns.items():
                values = np.array(column.values, dtype=np.float64)
                if column.present is not None:
                    values[~column.present] = -999
                columns.setdefault(name, []).append(values)
    return {name: np.concatenate(each) for name, each in columns.items()}


def blocks(found: Sequence[Piece], selection: Selection = EVERYTHING) -> list[Block]:
    return [block for piece in found for block in piece.blocks(selection)]


def groups(found: Sequence[Piece], selection: Selection) -> list[str]:
    """The group of every row, as the blocks of the first columns say it."""
    labels: list[str] = []
    for block in blocks(found, selection):
        if block.rows and isinstance(block.group, str):
            labels += [block.group] * block.rows
        elif block.rows and block.group is not None:
            labels += [block.labels[i] for i in block.group] if block.labels else list(block.group)
    return labels


def expected(*names: str) -> dict[str, np.ndarray]:
    full = table()
    return {
        name: np.array([-999 if each is None else each for each in full[name].to_pylist()], dtype=np.float64)
        for name in names
    }


def write_parquet(where: Path, full: pa.Table) -> Path:
    pq.write_table(full, where / "t.parquet", row_group_size=5)
    return where / "t.parquet"


def structured() -> np.ndarray:
    full = table()
    array = np.zeros(ROWS, [("x", ">f8"), ("i", "<i2"), ("b", "?"), ("v", "<f4", 3), ("g", "U6")])
    for name in ("i", "b", "v"):
        array[name] = full[name].to_pylist()
    array["x"] = [-999 if each is None else each for each in full["x"].to_pylist()]
    array["g"] = ["(null)" if each is None else each for each in full["g"].to_pylist()]
    return array


def write_npy(where: Path, full: pa.Table) -> Path:
    np.save(where / "t.npy", structured())
    return where / "t.npy"


def write_npz(where: Path, full: pa.Table) -> Path:
    array = structured()
    np.savez(where / "t.npz", **{name: array[name] for name in array.dtype.names})
    return where / "t.npz"


def write_compressed_npz(where: Path, full: pa.Table) -> Path:
    array = structured()
    np.savez_compressed(where / "t.npz", **{name: array[name] for name in array.dtype.names})
    return where / "t.npz"


def write_csv(where: Path, full: pa.Table, end: str = "\n", delimiter: str = ",") -> Path:
    """Nulls are empty cells; text has quotes, delimiters and line ends."""
    lines = [["x", "i", "b", "name", "g"]]
    for row in full.drop_columns(["v"]).to_pylist():
        text = f'"{row["name"]}{delimiter} ""quoted""{end}next line"'
        x, g = ("" if row[name] is None else str(row[name]) for name in ("x", "g"))
        lines.append([x, str(row["i"]), str(row["b"]).lower(), text, g])
    text = end.join(delimiter.join(line) for line in lines) + end
    (where / "t.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    return where / "t.csv"


def write_tsv(where: Path, full: pa.Table) -> Path:
    return write_csv(where, full, "\r\n", "\t").rename(where / "t.tsv")


def write_compressed_csv(where: Path, full: pa.Table) -> Path:
    (where / "t.csv.gz").write_bytes(gzip.compress(write_csv(where, full).read_bytes()))
    return where / "t.csv.gz"


def write_arrow(where: Path, full: pa.Table) -> Path:
    with pa.OSFile(str(where / "t.arrow"), "wb") as file, pa.ipc.new_file(file, full.schema) as writer:
        writer.write_table(full, max_chunksize=5)
    return where / "t.arrow"


def write_stream(where: Path, full: pa.Table) -> Path:
    with pa.OSFile(str(where / "t.arrows"), "wb") as file, pa.ipc.new_stream(file, full.schema) as writer:
        writer.write_table(full, max_chunksize=5)
    return where / "t.arrows"


def write_feather(where: Path, full: pa.Table) -> Path:
    feather.write_feather(full, str(where / "t.feather"), compression="zstd", chunksize=7)
    return where / "t.feather"


def write_zarr(where: Path, full: pa.Table, version: int = 3) -> Path:
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(where / "t.zarr", mode="w", zarr_format=version)
    array = structured()
    for name in ("b", "i", "v", "x"):
        data = np.ascontiguousarray(array[name].astype(array[name].dtype.newbyteorder("=")))
        group.create_array(name, data=data, chunks=(5, *data.shape[1:]))
    return where / "t.zarr"


def write_zarr2(where: Path, full: pa.Table) -> Path:
    return write_zarr(where, full, 2)


ARRAYS = {"zarr": write_zarr, "zarr 2": write_zarr2}
WRITERS = {
    "arrow": write_arrow,
    "arrow stream": write_stream,
    "feather": write_feather,
    "csv": write_csv,
    "tsv": write_tsv,
    "csv.gz": write_compressed_csv,
    "parquet": write_parquet,
    "npy": write_npy,
    "npz": write_npz,
    "compressed npz": write_compressed_npz,
}


@pytest.mark.parametrize("name", [*WRITERS, *ARRAYS])
@pytest.mark.parametrize("piece_bytes", [1, 64, 1 << 20])
def test_every_format_gives_the_same_values_whatever_the_pieces(tmp_path: Path, name: str, piece_bytes: int) -> None:
    path = {**WRITERS, **ARRAYS}[name](tmp_path, table())
    found = pieces(path, Selection(), Options(piece_bytes=piece_bytes))
    values = read(found)
    want = expected(*(each for each in ("x", "i", "b", "v") if each in values))
    assert list(values) == sorted(values) if name in ARRAYS else list(want)
    assert set(values) >= {"x", "i"}
    for column, numbers in want.items():
        np.testing.assert_array_equal(values[column], numbers, column)
    assert sum(block.rows for block in blocks(found)) == ROWS
    assert len({piece.key for piece in found}) == len(found)
    assert [piece.key for piece in pieces(path, options=Options(piece_bytes=piece_bytes))] == [p.key for p in found]
    assert {piece.file for piece in found} == {str(path)}
    assert 0 < sum(piece.size for piece in found) <= sum(each.stat().st_size for each in (path, *path.rglob("*")))


@pytest.mark.parametrize("name", WRITERS)
def test_groups_are_the_text_of_a_column(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path, table())
    text = ["ab"[i % 2] if i != 7 else NO_GROUP for i in range(ROWS)]
    for by, want in (("g", text), ("i", [str(i) for i in range(ROWS)])):
        selection = Selection(by=by)
        found = pieces(path, selection, Options(piece_bytes=64))
        assert groups(found, selection) == want
        assert by not in read(found, selection)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 30), size=st.integers(1, 2000), most=st.integers(1, 40))
def test_pieces_of_parquet_neither_lose_nor_double_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, size: int, most: int
) -> None:
    monkeypatch.setattr("batchnorm.datasets.sources.parquet.MOST_VALUES", most)
    pq.write_table(table(), tmp_path / "t.parquet", row_group_size=rows)
    found = pieces(tmp_path / "t.parquet", options=Options(piece_bytes=size))
    assert sum(block.rows for block in blocks(found)) == ROWS
    for column, numbers in expected("x", "i", "b", "v").items():
        np.testing.assert_array_equal(read(found)[column], numbers, column)
