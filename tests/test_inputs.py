"""InputNorm: exact statistics from data of any kind, scikit-learn's scaling, and no digits lost on the way."""

from __future__ import annotations

import copy
import io
import math
from collections import namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_wine
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from batchnorm import InputNorm, Moments

U32, U64 = 2.0**-24, 2.0**-53  # unit roundoffs
# scikit-learn and we add up to 400 values and then divide; both are wrong by at most n u of what they add
SAME = {"rtol": 400 * U64, "atol": 400 * U64}


def table(rows: int = 200) -> np.ndarray:
    """Features of very different place and range."""
    rng = np.random.default_rng(1)
    return rng.normal([0, 5, -300, 1e4], [1, 0.01, 30, 1e3], size=(rows, 4))


def close(a: np.ndarray | torch.Tensor, b: np.ndarray | torch.Tensor, **bounds: float) -> None:
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), **(bounds or SAME), equal_nan=True)


# --- the same answer as scikit-learn ----------------------------------------------------------------------


def test_wine_is_scaled_as_by_scikit_learn_and_scaled_back():
    x = load_wine().data
    norm, scaler = InputNorm.fit(x), StandardScaler().fit(x)
    close(norm.mean, scaler.mean_, rtol=400 * U64, atol=0)
    close(norm.var, scaler.var_, rtol=400 * U64, atol=0)
    close(norm.scale, scaler.scale_, rtol=400 * U64, atol=0)
    z = norm(torch.from_numpy(x))
    # z = (x - mean) / scale: an error of n u in the mean counts mean / scale (at most 18) times
    close(z, scaler.transform(x), rtol=400 * U64, atol=18 * 400 * U64)
    close(norm.inverse(z), x, rtol=18 * 8 * U64, atol=0)


CONSTANTS = [0.0, 1.0, 0.1, -3e7, 1e-300, 123456.789]


@pytest.mark.parametrize("rows", [1, 2, 7, 1000])
def test_constant_features_have_scale_1_as_in_scikit_learn(rows):
    x = np.tile(CONSTANTS, (rows, 1))
    norm, scaler = InputNorm.fit(x), StandardScaler().fit(x)
    assert norm.scale.tolist() == scaler.scale_.tolist() == [1] * len(CONSTANTS)
    # a mean of n equal values is wrong by at most n u of them
    close(norm(torch.from_numpy(x)), np.zeros_like(x), rtol=0, atol=rows * U64 * 3e7)


@pytest.mark.parametrize("power", range(-14, -6))
def test_what_counts_as_constant_is_decided_as_in_scikit_learn(power):
    """Around its bound, n eps mean: 1e3 rows of mean 1e4 with a spread of 1e-14 .. 1e-7 of it."""
    x = 1e4 * (1 + np.linspace(-1, 1, 1000)[:, None] * 10.0**power)
    norm, scaler = InputNorm.fit(x), StandardScaler().fit(x)
    assert (norm.scale.item() == 1) == (scaler.scale_.item() == 1) == (power <= -13)


def test_many_values_far_from_zero_are_not_taken_for_a_constant():
    many = Moments.from_var(1e9, *torch.tensor([[1e6], [1e-6]], dtype=torch.float64))
    assert InputNorm.from_moments(many).scale.item() == pytest.approx(1e-3, rel=4 * U64)


def test_a_constant_stays_one_however_many_values_and_batches_there_are():
    batch = torch.full((500_000, 1), 0.1, dtype=torch.float64)
    assert InputNorm.fit([batch] * 20 + [batch[:7]] * 20).scale.item() == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nan_is_omitted_as_in_scikit_learn(dtype):
    x = table().astype(dtype)
    x[::3, 1] = np.nan
    x[5, 2] = np.nan
    norm, scaler = InputNorm.fit(x, nan="omit"), StandardScaler().fit(x)
    assert norm.count.tolist() == scaler.n_samples_seen_.tolist() == [200, 133, 199, 200]
    wide = x.astype(np.float64)
    close(norm.mean, np.nanmean(wide, 0), rtol=400 * U64, atol=400 * U64)
    close(norm.var, np.nanvar(wide, 0), rtol=500**2 * 400 * U64, atol=0)
    z = norm(torch.from_numpy(wide))
    assert z.isnan().equal(torch.from_numpy(np.isnan(x)))
    close(z, (wide - np.nanmean(wide, 0)) / np.nanstd(wide, 0), rtol=1e-9, atol=500 * 400 * U64)


# --- data of any kind, in any pieces ----------------------------------------------------------------------

Pair = namedtuple("Pair", "x y")


SOURCES = {
    "array": lambda x: x,
    "tensor": torch.from_numpy,
    "list of arrays": lambda x: np.split(x, [3, 50]),
    "generator of tensors": lambda x: (t for t in torch.from_numpy(x).split(33)),
    "tuples": lambda x: [(part, "label") for part in np.split(x, [120])],
    "named tuples": lambda x: [Pair(x, None)],
    "lists": lambda x: [[torch.from_numpy(x), torch.zeros(3)]],
    "loader": lambda x: DataLoader(TensorDataset(torch.from_numpy(x), torch.zeros(len(x))), 64, shuffle=True),
    "read-only, reversed, big-endian": lambda x: np.frombuffer(x.astype(">f8").tobytes(), ">f8").reshape(-1, 4)[::-1],
    "empty pieces": lambda x: [x[:0], x, x[:0]],
}  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
def test_every_kind_of_source_gives_the_same_statistics(source):
    norm = InputNorm.fit(SOURCES[source](table()))
    assert norm.count.tolist() == [200] * 4
    close(norm.mean, table().mean(0), rtol=200 * U64, atol=200 * U64)
    close(norm.var, table().var(0), rtol=500**2 * 200 * U64, atol=0)  # mean / std is at most 500


def test_batches_that_are_mappings_are_read_by_key():
    parts = [{"x": part, 3: part + 1} for part in np.split(table(), 4)]
    close(InputNorm.fit(parts, key="x").mean + 1, InputNorm.fit(parts, key=3).mean, rtol=400 * U64, atol=400 * U64)


@pytest.mark.slow
@given(cuts=st.lists(st.integers(0, 200), max_size=6), order=st.randoms(use_true_random=False))
def test_neither_the_batch_sizes_nor_the_order_of_examples_matter(cuts, order):
    rows = list(range(200))
    order.shuffle(rows)
    norm = InputNorm.fit(np.split(table()[rows], sorted(cuts)))
    close(norm.mean, table().mean(0), rtol=200 * U64, atol=200 * U64)
    close(norm.var, table().var(0), rtol=500**2 * 200 * U64, atol=0)


@pytest.mark.parametrize("axis", [0, -2, 1, -1])
def test_an_array_larger_than_a_chunk_is_read_in_pieces_along_its_examples(axis, monkeypatch):
    monkeypatch.setattr("batchnorm.input_statistics._CHUNK", 40)
    x = table() if axis in {1, -1} else table().T
    norm = InputNorm.fit(x, axis)
    close(norm.var, table().var(0), rtol=500**2 * 200 * U64, atol=0)


@pytest.mark.parametrize(
    ("axis", "features", "over"),
    [
        (1, (3,), (0, 2, 3)),
        (-1, (5,), (0, 1, 2)),
        ((1, 2, 3), (3, 4, 5), (0,)),
        ((3, 1), (5, 3), (0, 2)),
        (None, (), (0, 1, 2, 3)),
    ],
)
def test_features_may_lie_on_any_axes(axis, features, over):
    x = np.random.default_rng(2).normal(3, 2, size=(7, 3, 4, 5))
    norm = InputNorm.fit(x, axis)
    assert norm.num_features == features
    expected = (x - x.mean(over, keepdims=True)) / x.std(over, keepdims=True)
    close(norm(torch.from_numpy(x)), expected)
    close(norm.inverse(torch.from_numpy(expected)), x)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "uint16", "int32", "int64", "float16", "float32"])
def test_numbers_of_every_type_are_counted_exactly(dtype):
    x = np.random.default_rng(3).integers(0, 2 if dtype == "bool" else 200, size=(6, 2, 3, 3)).astype(dtype)
    norm = InputNorm.fit(x)
    close(norm.mean, x.mean((0, 2, 3), dtype=np.float64))
    tensors = InputNorm.fit(torch.from_numpy(x))
    assert tensors.mean.equal(norm.mean)
    z = norm(torch.from_numpy(x))
    assert z.dtype == (torch.float16 if dtype == "float16" else torch.float32)
    exact = (x - norm.mean.numpy()[:, None, None]) / norm.scale.numpy()[:, None, None]
    # three float32 operations on values up to 2; in float16 the last step is rounded to 11 bits
    close(z.double(), exact, rtol=0, atol=2 * (2.0**-11 if dtype == "float16" else 6 * U32))


# --- digits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "std"), [(1e6, 0.1), (1000, 0.01), (0.1, 1e-5), (-3e4, 1), (0, 1), (1e20, 1e15)])
def test_float32_inputs_far_from_zero_lose_no_digits(mean, std):
    x = (torch.randn(4000, 1, dtype=torch.float64) * std + mean).float()
    norm = InputNorm.fit(x)
    wide = x.double()
    exact = (wide - wide.mean()) / wide.std(correction=0)
    # the deviation, its correction, the scale and the quotient are rounded once each; half of an ulp of the mean,
    # which the second part corrects, is known to u of itself
    tail = abs(mean) * U32**2 / wide.std(correction=0).item()
    close(norm(x).double(), exact, rtol=5 * U32, atol=2 * tail + 5 * U32 * 1e-3)


def test_scaling_back_is_wrong_by_the_rounding_of_the_result_only():
    mean = 1e6 + 0.03  # 0.03 below the middle between two float32 numbers
    norm = InputNorm.from_moments(Moments.from_var(9, *torch.tensor([[mean], [1e-4]], dtype=torch.float64)))
    z = torch.randn(4000, 1)
    exact = z.double() * 1e-2 + mean
    # beside it, a deviation of at most 0.05 in two operations
    close(norm.inverse(z).double(), exact, rtol=U32, atol=0.05 * 3 * U32)


def test_whole_numbers_beyond_float32_lose_no_digits():
    seconds = torch.randint(1_700_000_000, 1_700_000_100, (500, 1))
    z = InputNorm.fit(seconds)(seconds)
    wide = seconds.double()
    close(z.double(), (wide - wide.mean()) / wide.std(correction=0), rtol=2 * U32, atol=1e-9)


def test_float64_inputs_are_scaled_in_float64():
    x = torch.randn(1000, 1, dtype=torch.float64) * 1e-3 + 1e6
    norm = InputNorm.fit(x)
    centred = x - 1e6  # exact
    # a mean of 1000 values near 1e6 is wrong by at most 1000 u of it, which is 1e12 u standard deviations
    close(norm(x), (centred - centred.mean()) / centred.std(correction=0), rtol=0, atol=1e12 * U64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_shifted_in_float32_and_keep_their_type(dtype):
    x = (torch.randn(100, 2) * 8 + 500).to(dtype)
    norm = InputNorm.fit(x)
    z = norm(x)
    assert z.dtype == dtype
    wide = x.double()
    exact = (wide - wide.mean(0)) / wide.std(0, correction=0)
    close(z.double(), exact, rtol=torch.finfo(dtype).eps, atol=500 / 8 * 4 * U32)
    assert norm.inverse(z).dtype == torch.float32


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.float, nn.Module.double])
def test_casting_the_network_keeps_the_statistics_and_sets_the_type_that_integers_become(cast):
    net = nn.Sequential(InputNorm.fit(table()), nn.Linear(4, 1))
    before = copy.deepcopy(net[0].state_dict())
    cast(net)
    assert all(t.dtype == torch.float64 and t.equal(before[name]) for name, t in net[0].state_dict().items())
    assert net(torch.zeros(2, 4, dtype=torch.uint8)).dtype == net[1].weight.dtype


def test_a_network_can_be_made_on_the_meta_device_and_filled_later():
    net = InputNorm(4, device="meta")
    assert repr(net) == "InputNorm(4, channel_axis=1, on the meta device)"
    filled = InputNorm.fit(table())
    net.half().to_empty(device="cpu").load_state_dict(filled.state_dict())
    assert net.mean.equal(filled.mean)


# --- a module ---------------------------------------------------------------------------------------------


def test_an_empty_one_is_the_identity_and_a_checkpoint_fills_it():
    net = nn.Sequential(InputNorm(4), nn.Linear(4, 2))
    x = torch.from_numpy(table()).float()
    assert net[0](x).equal(x)
    assert net[0].inverse(x).equal(x)
    trained = nn.Sequential(InputNorm.fit(table()), nn.Linear(4, 2))
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    net.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert net(x).equal(trained(x))
    assert list(net[0].state_dict()) == ["count", "mean", "var"]
    assert not list(net[0].parameters())


def test_its_moments_can_be_taken_out_added_to_and_put_back():
    x = table()
    first, second = InputNorm.fit(x[:50]), InputNorm.fit(x[50:])
    both = InputNorm.from_moments(first.moments + second.moments)
    close(both.var, x.var(0), rtol=500**2 * 200 * U64, atol=0)
    assert both.count.tolist() == [200] * 4
    assert InputNorm(3).moments.mean.isnan().all()
    assert (InputNorm(4).moments + first.moments).mean.equal(first.mean)


def test_counts_of_zero_and_one_are_defined():
    one = InputNorm.fit(table(1))
    assert one.scale.tolist() == [1] * 4
    assert one(torch.from_numpy(table(1))).tolist() == [[0] * 4]
    none = InputNorm.from_moments(Moments.empty((2,)))
    assert none(torch.tensor([[3.0, -4.0]])).tolist() == [[3, -4]]


def test_train_mode_changes_nothing():
    net = InputNorm.fit(table())
    before = copy.deepcopy(net.state_dict())
    x = torch.from_numpy(table(9)) + 5
    assert net.train()(x).equal(net.eval()(x))
    assert all(t.equal(before[name]) for name, t in net.state_dict().items())


def test_gradients_pass_through():
    x = torch.from_numpy(table(5)).requires_grad_()
    norm = InputNorm.fit(table())
    norm(x).sum().backward()
    close(x.grad, (1 / norm.scale).expand(5, 4), rtol=2 * U64, atol=0)


def test_it_says_what_it_holds():
    assert repr(InputNorm(4)) == "InputNorm(4, channel_axis=1, not filled)"
    assert repr(InputNorm.fit(table())) == "InputNorm(4, channel_axis=1, count=200)"
    x = table()
    x[3:8, 0] = np.nan
    assert repr(InputNorm.fit(x, nan="omit")) == "InputNorm(4, channel_axis=1, count=195..200)"
    assert repr(InputNorm.fit(x[:, 1:, None], (1, 2))) == "InputNorm((3, 1), channel_axis=(1, 2), count=200)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_it_compiles_and_exports_as_one_graph_and_maps_over_ensembles(dtype):
    norm = InputNorm.fit(torch.randint(0, 255, (50, 3, 2, 2)))
    x = torch.randint(0, 255, (6, 3, 2, 2)).to(dtype)
    expected = norm(x)
    assert torch.compile(norm, fullgraph=True, backend="aot_eager")(x).equal(expected)
    batch = {0: torch.export.Dim("batch", min=2)}
    assert torch.export.export(norm, (x,), dynamic_shapes=(batch,)).module()(x[:4]).equal(expected[:4])
    assert torch.vmap(norm)(x.unflatten(0, (2, 3))).flatten(0, 1).equal(expected)
    state = {name: torch.stack([t, t + 1]) for name, t in norm.state_dict().items()}
    both = torch.vmap(lambda s: torch.func.functional_call(norm, s, (x,)))(state)
    assert both[0].equal(expected)
    assert not both[1].equal(expected)


# --- what is refused --------------------------------------------------------------------------------------


def holed(value: float) -> np.ndarray:
    x = table(10)
    x[2, 1] = x[4, 1] = x[4, 3] = value
    return x


BAD = {
    "NaN": (holed(math.nan), {}, ValueError, "values without NaN, got NaN in features 1 (2 times), 3 (1 times). Use"),
    "infinity": (holed(math.inf), {}, ValueError, "finite values, got infinity in features 1 (2 times), 3 (1 times)."),
    "infinity, NaN omitted": (holed(-math.inf), {"nan": "omit"}, ValueError, "finite values, got infinity in"),
    "NaN on two axes": (holed(math.nan)[:, :, None], {"channel_axis": (1, 2)}, ValueError, "values without NaN, got "
                        "NaN in features (1, 0) (2 times), (3, 0) (1 times)."),
    "NaN in many": (np.full((2, 9), math.nan), {}, ValueError, "values without NaN, got NaN in features 0 (2 times), "
                    "1 (2 times), 2 (2 times), 3 (2 times), 4 (2 times) and 4 more."),
    "too large": (np.array([[1e300, 1], [-1e300, 2]]), {}, ValueError, "values whose squares fit float64, got larger "
                  "in feature 0 (1 times)."),
    "no batch": ([], {}, ValueError, "at least one value, got no data. Check the loader's length."),
    "no rows": (table()[:0], {}, ValueError, "at least one value, got no data."),
    "only NaN": (table() * math.nan, {"nan": "omit"}, ValueError, "at least one value, got no data."),
    "strings": (np.array([["a"]]), {}, TypeError, "an array of real numbers, got dtype <U1. Encode"),
    "complex": (np.array([[1j]]), {}, TypeError, "an array of real numbers, got dtype complex128."),
    "numbers in a list": ([[1.0, 2.0]], {}, TypeError, "batches that are arrays or tensors, got float in a list."),
    "a mapping": ({"x": table()}, {}, TypeError, "an array, a tensor or batches of them, got dict."),
    "a number": (3, {}, TypeError, "an array, a tensor or batches of them, got int."),
    "a data set": (TensorDataset(torch.ones(3, 2)), {}, TypeError, "batches, got a Dataset of single examples. Pass"),
    "no key": ([{"x": table()}], {}, ValueError, "key= to name the input in a mapping, got key=None for keys ['x']."),
    "a wrong policy": (table(), {"nan": "skip"}, ValueError, "nan='raise' or 'omit', got 'skip'."),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_fitted_is_refused_in_words(case):
    data, options, error, message = BAD[case]
    with pytest.raises(error) as caught:
        InputNorm.fit(data, **options)
    assert str(caught.value).startswith(f"InputNorm.fit needs {message}")


def test_nan_is_counted_over_all_batches_before_it_is_reported():
    x = torch.from_numpy(holed(math.nan))
    with pytest.raises(ValueError, match=r"features 1 \(2 times\), 3 \(1 times\)"):
        InputNorm.fit(x.split(3))


def test_batches_that_differ_in_their_features_are_refused():
    with pytest.raises(ValueError, match="must have the same channels"):
        InputNorm.fit([table(), table()[:, :3]])


def test_a_feature_of_nothing_but_nan_is_passed_on_and_named():
    (x := table())[:, 2] = np.nan
    message = r"^InputNorm.fit needs numbers, got only NaN in feature 2 \(200 times\). Forward does not change such a f"
    with pytest.warns(RuntimeWarning, match=message):
        norm = InputNorm.fit(x, nan="omit")
    assert norm.count.tolist() == [200, 200, 0, 200]
    z = norm(torch.tensor([[0.0, 5, 7, 1e4]]))
    assert z[0, 2].item() == 7
    assert z.isfinite().all()


def test_wrong_inputs_to_a_filled_one_are_refused():
    norm = InputNorm.fit(table())
    for x in (torch.ones(4), torch.ones(2, 3), torch.ones(4, 5, 6)):
        with pytest.raises(ValueError, match=r"^InputNorm needs \(4,\) features on channel_axis=1, got shape"):
            norm(x)
        with pytest.raises(ValueError, match=r"^InputNorm needs \(4,\) features on channel_axis=1, got shape"):
            norm.inverse(x)
    with pytest.raises(
        TypeError, match=r"^InputNorm needs a real tensor, got torch.complex64\. Use torch.view_as_real"
    ):
        norm(torch.ones(2, 4, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"^InputNorm needs one size for each channel axis, got num_features=3 for"):
        InputNorm(3, (1, 2))
    with pytest.raises(ValueError, match="channel_axis inside a tensor of 1 dimension"):
        InputNorm.fit(np.ones(3))


def test_masked_arrays_are_refused_because_their_mask_would_be_ignored():
    data = np.ma.masked_array([[1.0, 999.0], [3.0, 2.0]], mask=[[0, 1], [0, 0]])
    with pytest.raises(TypeError, match=r"without a mask, got a masked one. Pass data.filled\(np.nan\)"):
        InputNorm.fit(data)
    assert InputNorm.fit(data.filled(np.nan), nan="omit").mean.tolist() == [2.0, 2.0]


def test_fx_traces_a_model_around_it():
    model = torch.nn.Sequential(InputNorm.fit(torch.randn(20, 4)), torch.nn.Linear(4, 2))
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(3, 4)
    assert traced.get_submodule("0") is model[0]
    assert torch.equal(traced(x), model(x))


def test_what_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match="InputNorm needs a tensor, got ndarray"):
        InputNorm.fit(torch.randn(5, 2))(np.zeros((5, 2)))
