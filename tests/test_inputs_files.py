"""InputNorm from files of data and of statistics: values, names of features, missing values, and errors."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save

import batchnorm as bn
from batchnorm.datasets.blocks import Column
from batchnorm.datasets.column_statistics import ColumnStatistics
from batchnorm.datasets.data_statistics import DataStatistics, Partial
from batchnorm.datasets.sources import Options

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
csv = pytest.importorskip("pyarrow.csv")

STATS = "data.bnstats.safetensors"


def columns(rows: int = 300) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {"a": random.normal(3, 2, rows), "n": random.integers(0, 9, rows), "c": np.full(rows, 0.1)}


def write_parquet(path: Path, **more: Any) -> Path:
    parquet.write_table(pyarrow.table({**columns(), **more}), path)
    return path


def in_order(names: list[str]) -> torch.Tensor:
    return torch.from_numpy(np.stack([columns()[name] for name in names], 1).astype(float))


def test_parquet_csv_and_arrays_give_what_the_same_tensor_gives(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet")
    csv.write_csv(pyarrow.table(columns()), tmp_path / "x.csv")
    np.save(tmp_path / "x.npy", in_order(["a", "n", "c"]).numpy())
    expected = bn.InputNorm.fit(in_order(["a", "n", "c"]))
    for name in ("x.parquet", "x.csv", "x.npy"):
        for data in (tmp_path / name, str(tmp_path / name), [tmp_path / name], str(tmp_path / f"x*{name[1:]}")):
            norm = bn.InputNorm.fit(data)
            torch.testing.assert_close(norm.mean, expected.mean, rtol=1e-14, atol=0)
            torch.testing.assert_close(norm.scale, expected.scale, rtol=1e-13, atol=0)
            assert norm.count.tolist() == [300] * 3


def test_features_follow_the_columns_that_are_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", text=["t"] * 300)
    norm = bn.InputNorm.fit(path, columns=["n", "a"])
    assert norm.feature_names == ("n", "a")
    torch.testing.assert_close(norm.mean, in_order(["n", "a"]).mean(0), rtol=1e-14, atol=0)
    assert bn.InputNorm.fit(path, columns="a").feature_names == ("a",)
    assert bn.InputNorm.fit(path).feature_names == ("a", "n", "c")
    assert repr(norm) == "InputNorm(2, channel_axis=1, count=300, feature_names=('n', 'a'))"


def test_vectors_are_features_in_their_place(tmp_path: Path) -> None:
    vectors = np.random.default_rng(1).normal(size=(300, 4)).astype(np.float32)
    column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.ravel()), 4)
    norm = bn.InputNorm.fit(write_parquet(tmp_path / "x.parquet", v=column), columns=["v", "a"])
    assert norm.feature_names == ("v[0]", "v[1]", "v[2]", "v[3]", "a")
    assert repr(norm).endswith("feature_names=('v[0]', 'v[1]', 'v[2]', ...))")
    torch.testing.assert_close(norm.mean[:4], torch.from_numpy(vectors.astype(float).mean(0)), rtol=1e-13, atol=1e-15)


def test_images_are_three_channels_in_0_to_1(tmp_path: Path) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (5, 9, 7, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    norm = bn.InputNorm.fit(tmp_path)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 255
    torch.testing.assert_close(norm.mean, x.mean((0, 2, 3)), rtol=1e-13, atol=0)
    assert norm(x.float()).shape == x.shape


@pytest.mark.parametrize("bad", [np.nan, None], ids=["NaN", "null"])
def test_missing_values_are_refused_by_name_or_left_out(tmp_path: Path, bad: float | None) -> None:
    values: list[float | None] = columns()["a"].tolist()
    values[:2] = [bad, bad]
    path = write_parquet(tmp_path / "x.parquet", b=pyarrow.array(values, from_pandas=False))
    with pytest.raises(ValueError, match=r"got NaN or missing values in feature 'b' \(2 times\). Use nan='omit'"):
        bn.InputNorm.fit(path)
    norm = bn.InputNorm.fit(path, nan="omit", columns=["b", "a"])
    assert norm.count.tolist() == [298, 300]
    torch.testing.assert_close(norm.mean[0], torch.tensor(columns()["a"][2:].mean()), rtol=1e-14, atol=0)


def test_infinities_and_features_without_numbers_have_their_names(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", big=[np.inf] * 300, none=[np.nan] * 300)
    with pytest.raises(ValueError, match=r"infinity in feature 'big' \(300 times\)"):
        bn.InputNorm.fit(path)
    with pytest.warns(RuntimeWarning, match=r"only NaN or missing values in feature 'none'") as caught:
        norm = bn.InputNorm.fit(path, nan="omit", columns=["a", "none"])
    assert caught[0].filename == __file__
    assert norm.count.tolist() == [300, 0]
    assert norm(torch.ones(1, 2, dtype=torch.float64))[0, 1] == 1


def statistics(tmp_path: Path) -> Path:
    parts = {name: ColumnStatistics.of(Column(values)) for name, values in columns().items()}
    DataStatistics(Partial(300, parts)).save(tmp_path / STATS)
    return tmp_path / STATS


def test_a_file_of_statistics_is_loaded_and_gives_what_the_data_give(tmp_path: Path) -> None:
    path, expected = statistics(tmp_path), bn.InputNorm.fit(write_parquet(tmp_path / "x.parquet"))
    for norm in (
        bn.InputNorm.load(path),
        bn.InputNorm.load(str(path)),
        bn.InputNorm.fit(path),
        bn.InputNorm.fit(str(path)),
    ):
        assert norm.state_dict().keys() == expected.state_dict().keys()
        for key, value in expected.state_dict().items():
            assert norm.state_dict()[key].equal(value), key
    chosen = bn.InputNorm.load(path, ["c", "a"], channel_axis=-1)
    assert (chosen.feature_names, chosen.channel_axis) == (("c", "a"), -1)
    assert chosen.scale[0] == 1  # a constant feature
    assert bn.InputNorm.load(path, "n").feature_names == ("n",)


def test_loading_has_the_same_policy_for_missing_values(tmp_path: Path) -> None:
    values = ColumnStatistics.of(Column(np.array([1.0, np.nan, 3.0])))
    DataStatistics(Partial(3, {"x": values})).save(tmp_path / STATS)
    with pytest.raises(ValueError, match=r"in feature 'x' \(1 times\)"):
        bn.InputNorm.load(tmp_path / STATS)
    assert bn.InputNorm.load(tmp_path / STATS, nan="omit").mean == 2
    with pytest.raises(ValueError, match="nan='raise' or 'omit', got 'drop'"):
        bn.InputNorm.load(tmp_path / STATS, nan="drop")  # type: ignore[arg-type]


def test_wrong_files_and_columns_are_refused(tmp_path: Path) -> None:
    path = statistics(tmp_path)
    with pytest.raises(ValueError, match="expected names of columns, got 'z'"):
        bn.InputNorm.load(path, ["z"])
    with pytest.raises(FileNotFoundError):
        bn.InputNorm.load(tmp_path / f"no.{STATS}")
    with pytest.raises(FileNotFoundError):
        bn.InputNorm.fit(tmp_path / "no.parquet")
    (tmp_path / f"text.{STATS}").write_text("mean")
    with pytest.raises(ValueError, match="is not statistics of data"):
        bn.InputNorm.load(tmp_path / f"text.{STATS}")
    with pytest.raises(ValueError, match="needs files for columns='a', got Tensor"):
        bn.InputNorm.fit(torch.ones(2, 2), columns="a")


def test_names_are_saved_in_the_state_and_replaced_by_a_loaded_one(tmp_path: Path) -> None:
    norm = bn.InputNorm.load(statistics(tmp_path))
    net = torch.nn.Sequential(norm, torch.nn.Linear(3, 1))
    state = load(save(net.state_dict()))
    other = torch.nn.Sequential(bn.InputNorm(3), torch.nn.Linear(3, 1))
    assert other.load_state_dict(state) == torch.nn.modules.module._IncompatibleKeys([], [])
    assert other[0].feature_names == ("a", "n", "c")
    assert copy.deepcopy(norm).feature_names == pickle.loads(pickle.dumps(norm)).feature_names == ("a", "n", "c")
    # a state without names has other features
    other.load_state_dict(torch.nn.Sequential(bn.InputNorm(3), torch.nn.Linear(3, 1)).state_dict())
    assert other[0].feature_names == ()
    assert list(bn.InputNorm.fit(torch.ones(2, 2)).state_dict()) == ["count", "mean", "var"]


@pytest.mark.parametrize(
    "stored", [torch.tensor([1, 2]), torch.tensor(list(b"[1]")), torch.tensor(3.0), torch.empty(0)]
)
def test_damaged_names_are_refused(stored: torch.Tensor, tmp_path: Path) -> None:
    norm = bn.InputNorm.load(statistics(tmp_path))
    state = {**norm.state_dict(), "feature_names": stored}
    with pytest.raises(RuntimeError, match="feature_names: expected"):
        norm.load_state_dict(state)
    assert norm.feature_names == ("a", "n", "c")


def test_the_number_of_names_is_that_of_the_features(tmp_path: Path) -> None:
    norm = bn.InputNorm.load(statistics(tmp_path))
    two = bn.InputNorm.load(statistics(tmp_path), ["a", "n"]).state_dict()["feature_names"]
    with pytest.raises(RuntimeError, match="feature_names: expected 3 names, got 2"):
        norm.load_state_dict({**norm.state_dict(), "feature_names": two})


def test_lists_of_batches_are_still_batches() -> None:
    x = torch.arange(12.0).reshape(6, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bn.InputNorm.fit([x[:3], x[3:]]).mean.tolist() == [5, 6]
    for data in ([], ()):
        with pytest.raises(ValueError, match="at least one value"):
            bn.InputNorm.fit(data)


@pytest.mark.parametrize("channel_axis", [1, 2, 3, -1, (1, 2, 3), (3, 1), None])
def test_arrays_have_their_features_on_the_channel_axis(
    tmp_path: Path, channel_axis: int | tuple[int, ...] | None
) -> None:
    x = np.random.default_rng(0).normal(size=(20, 3, 3, 3)) + np.arange(27.0).reshape(3, 3, 3)
    np.save(tmp_path / "x.npy", x)
    norm = bn.InputNorm.fit(tmp_path / "x.npy", channel_axis)
    want = bn.InputNorm.fit(torch.from_numpy(x), channel_axis)
    assert norm.num_features == want.num_features
    torch.testing.assert_close(norm.moments.mean, want.moments.mean)
    torch.testing.assert_close(norm.moments.var, want.moments.var)


def test_statistics_of_several_channel_axes_are_loaded_and_their_nan_is_named(tmp_path: Path) -> None:
    x = np.arange(24.0).reshape(4, 2, 3)
    np.save(tmp_path / "x.npy", x)
    options = Options(channel_axis=(1, 2))
    bn.data_statistics(tmp_path / "x.npy", options=options).save(tmp_path / "x.bnstats.safetensors")
    np.testing.assert_array_equal(bn.InputNorm.load(tmp_path / "x.bnstats.safetensors", (), (1, 2)).mean, x.mean(0))
    x[0, 1, 2] = np.nan
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(ValueError, match=r"'values\[1,2\]' \(1 times\)"):
        bn.InputNorm.fit(tmp_path / "x.npy", (1, 2))
