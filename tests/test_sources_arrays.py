"""Arrays in files: their axes, layouts, types, and what is no array of numbers."""

from __future__ import annotations

import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_sources import blocks, groups, read

from batchnorm.datasets.blocks import Selection
from batchnorm.datasets.sources import Options, pieces


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("axes", [1, 2, -1, (1, 2, 3), (3, 1), None])
@pytest.mark.parametrize("kind", ["npy", "npz", "compressed"])
def test_features_are_on_the_channel_axes(tmp_path: Path, kind: str, axes, order: str) -> None:
    array = np.arange(7 * 3 * 4 * 5, dtype=">i4").reshape(7, 3, 4, 5).copy(order=order)
    {"npy": np.save, "npz": np.savez, "compressed": np.savez_compressed}[kind](
        tmp_path / f"a.{kind[:3]}".replace("com", "npz"), array
    )
    found = pieces(tmp_path, options=Options(channel_axis=axes, piece_bytes=500))
    given = () if axes is None else (axes,) if isinstance(axes, int) else axes
    features = [axis % 4 for axis in given]
    moved = array.transpose([axis for axis in range(4) if axis not in features] + features)
    want = moved.reshape(-1, *moved.shape[4 - len(features) :])
    (values,) = read(found).values()
    np.testing.assert_array_equal(values, want)
    assert sum(block.rows for block in blocks(found)) == 7
    assert len(found) == (1 if kind == "compressed" else 4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(0, 40), size=st.integers(1, 3000), most=st.integers(1, 200), order=st.sampled_from("CF"))
def test_pieces_of_arrays_neither_lose_nor_double_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int, size: int, most: int, order: str
) -> None:
    monkeypatch.setattr("batchnorm.datasets.sources.array_pieces.MOST_VALUES", most)
    array = np.arange(n * 6, dtype=np.float32).reshape(n, 6).copy(order=order)
    np.save(tmp_path / "a.npy", array)
    found = pieces(tmp_path / "a.npy", options=Options(piece_bytes=size))
    np.testing.assert_array_equal(read(found)["values"], array)
    assert sum(block.rows for block in blocks(found)) == n


def test_groups_of_images_in_an_archive_have_blocks_of_their_own(tmp_path: Path) -> None:
    x = np.arange(6 * 2 * 2 * 2).reshape(6, 2, 2, 2)
    np.savez(tmp_path / "a.npz", x=x, y=np.array([1, 0, 1, 1, 0, 0]), z=np.arange(6.0))
    selection = Selection(by="y")
    found = blocks(pieces(tmp_path / "a.npz", selection), selection)
    images = [(block.group, block.rows, block.columns["x"].values[:, 0].tolist()) for block in found[:2]]
    assert images == [
        ("0", 3, x[[1, 4, 5]][:, 0].ravel().tolist()),
        ("1", 3, x[[0, 2, 3]][:, 0].ravel().tolist()),
    ]
    assert [(block.rows, list(block.columns)) for block in found[2:]] == [(0, ["z"])]


def test_groups_that_are_dates_or_bytes_are_text(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "a.npz",
        x=np.arange(3),
        day=np.array(["2024-02-03", "NaT", "2024-02-03"], "M8[D]"),
        code=np.array([b"a", b"b", b"a"]),
        flag=np.array([True, False, True]),
    )
    for by, want in (
        ("day", ["2024-02-03", "(null)", "2024-02-03"]),
        ("code", ["a", "b", "a"]),
        ("flag", ["true", "false", "true"]),
    ):
        selection = Selection(columns=("x",), by=by)
        assert groups(pieces(tmp_path / "a.npz", selection), selection) == want


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "g", "i1", "u1", "u8", ">f4", ">u2", "?"])
def test_every_type_of_numbers_is_read(tmp_path: Path, dtype: str) -> None:
    array = np.array([0, 1, 1, 0, 1], dtype)
    np.save(tmp_path / "a.npy", array)
    (block,) = blocks(pieces(tmp_path / "a.npy"))
    values = block.columns["values"].values
    assert values.dtype.isnative
    assert values.dtype.itemsize <= 8
    np.testing.assert_array_equal(values, array)


@pytest.mark.parametrize(
    ("array", "error", "words"),
    [
        (np.array([{}, 1], dtype=object), ValueError, r"pickled objects, which are not loaded.* Save it again"),
        (np.array(1.0), ValueError, "expected an array of examples.*a single value"),
        (np.array([1j]), ValueError, "expected a column of numbers.*values"),
        (np.array(["a"]), ValueError, "expected a column of numbers"),
    ],
)
def test_arrays_without_numbers_are_refused(tmp_path: Path, array, error, words: str) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(error, match=words):
        pieces(tmp_path / "a.npy")


@pytest.mark.parametrize("axes", [0, 4, -4, (1, 1), (1, -3)])
def test_an_axis_that_is_no_channel_axis_is_refused(tmp_path: Path, axes) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 3, 4, 5)))
    with pytest.raises(ValueError, match=r"expected channel axes from 1 to 3, got channel_axis=.* Choose another"):
        pieces(tmp_path / "a.npy", options=Options(channel_axis=axes))


def test_arrays_without_features_have_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 0)))
    (block,) = blocks(pieces(tmp_path / "a.npy"))
    assert (block.rows, block.columns["values"].values.shape) == (3, (3, 0))


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((100, 3)))
    whole = (tmp_path / "a.npy").read_bytes()
    for length, words in ((len(whole) - 1, "says, got .*cut off"), (60, "damaged: its header"), (9, "damaged")):
        (tmp_path / "a.npy").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=words):
            pieces(tmp_path / "a.npy")


def test_archives_without_arrays_or_with_different_lengths_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "none.npz")
    with pytest.raises(ValueError, match=r"expected an .npz file with arrays.* Save arrays with numpy.savez"):
        pieces(tmp_path / "none.npz")
    np.savez(tmp_path / "two.npz", train=np.zeros(5), test=np.zeros(3), label=np.arange(5))
    with pytest.raises(ValueError, match=r"same number of examples.* got 5 in '.*' and 3 in 'test'. Name columns"):
        pieces(tmp_path / "two.npz")
    both = Selection(columns=("train", "label"))
    assert read(pieces(tmp_path / "two.npz", both), both).keys() == {"train", "label"}
    wrong = Selection(columns=("test",), by="label")
    with pytest.raises(ValueError, match="same number of examples"):
        blocks(pieces(tmp_path / "two.npz", wrong), wrong)


def test_a_damaged_member_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", x=np.random.default_rng(0).normal(size=5000))
    damaged = bytearray((tmp_path / "a.npz").read_bytes())
    damaged[20000:20100] = bytes(100)
    (tmp_path / "a.npz").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"expected a NumPy file, got .*a.npz, which is damaged: .* Write it again"):
        blocks(pieces(tmp_path / "a.npz"))
    (tmp_path / "a.npz").write_bytes(damaged[:30000])
    with pytest.raises(ValueError, match=r"a.npz, which is damaged: File is not a zip file"):
        pieces(tmp_path / "a.npz")


def test_a_member_that_inflates_a_thousandfold_needs_little_memory(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (200 << 20,)}
        np.lib.format.write_array_header_1_0(file, header)
        for _ in range(200):
            file.write(bytes(1 << 20))
    assert (tmp_path / "a.npz").stat().st_size < 1 << 20
    tracemalloc.start()
    rows = sum(block.rows for piece in pieces(tmp_path / "a.npz") for block in piece.blocks(Selection()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == 200 << 20
    assert peak < 40 << 20


def test_stores_of_zarr_have_arrays_below_groups(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(tmp_path / "store", mode="w")
    images = np.arange(11 * 3 * 4 * 4).reshape(11, 3, 4, 4)
    group.create_array("in/images", data=images, chunks=(2, 2, 4, 2))
    group.create_array("y", data=np.arange(11) % 2, chunks=(11,))
    selection = Selection(columns=("in/images",), by="y")
    found = pieces(tmp_path / "store", selection, Options(piece_bytes=1000))
    assert [(piece.first, piece.last) for piece in found] == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 11)]
    for group_name in "01":
        mine = [b.columns["in/images"].values for b in blocks(found, selection) if b.group == group_name]
        want = images[int(group_name) :: 2].transpose(0, 2, 3, 1).reshape(-1, 3)
        np.testing.assert_array_equal(np.concatenate(mine), want)


def test_stores_of_zarr_are_found_below_folders_and_by_patterns(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    for name in "ab":
        zarr.create_array(tmp_path / "all" / f"{name}.zarr", data=np.arange(6.0).reshape(3, 2), chunks=(2, 2))
    for data in (
        tmp_path / "all",
        tmp_path / "all" / "*.zarr",
        [tmp_path / "all" / "a.zarr", tmp_path / "all/b.zarr/"],
    ):
        assert [piece.file for piece in pieces(data)] == [str(tmp_path / "all" / f"{name}.zarr") for name in "ab"]
    before = pieces(tmp_path / "all")[0].fingerprint
    zarr.open(tmp_path / "all" / "a.zarr")[0] = 9
    assert pieces(tmp_path / "all")[0].fingerprint != before


def test_damaged_stores_of_zarr_are_refused(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    array = zarr.create_array(tmp_path / "a.zarr", data=np.arange(6000.0).reshape(3000, 2), chunks=(2000, 2))
    (tmp_path / "a.zarr" / "c" / "1" / "0").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"expected a Zarr store, got .*a.zarr, which is damaged or no store"):
        read(pieces(tmp_path / "a.zarr"))
    (tmp_path / "a.zarr" / "zarr.json").write_text("{")
    with pytest.raises(ValueError, match=r"expected a Zarr store, got .*a.zarr, which is damaged or no store"):
        pieces(tmp_path / "a.zarr")
    zarr.open_group(tmp_path / "b.zarr", mode="w")
    with pytest.raises(ValueError, match=r"expected a Zarr store with arrays, got .*b.zarr without"):
        pieces(tmp_path / "b.zarr")
    assert array.shape == (3000, 2)
