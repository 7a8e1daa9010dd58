"""Averages of models: statistics of the union against float64 NumPy, other tensors by count, and every refusal."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import batchnorm as bn
from batchnorm.averaging import weights_agree

EPS32 = float(np.finfo(np.float32).eps)


def moments_of(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance of rows, in float64."""
    return x.mean(0), x.var(0, ddof=1)


def layer_with(x: np.ndarray, dtype: torch.dtype = torch.float64) -> nn.BatchNorm1d:
    """A layer whose statistics are the moments of all rows of ``x``."""
    layer = nn.BatchNorm1d(x.shape[1], dtype=dtype)
    mean, var = moments_of(x)
    with torch.no_grad():
        layer.running_mean.copy_(torch.from_numpy(mean))
        layer.running_var.copy_(torch.from_numpy(var))
        layer.num_batches_tracked.fill_(len(x))
    return layer


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    with torch.no_grad():
        net[1].weight.uniform_(0.5, 2), net[1].bias.uniform_(-1, 1)
        net[1].running_mean.uniform_(-1, 1), net[1].running_var.uniform_(0.5, 2)
    return net


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(2, 30), min_size=1, max_size=4),
    far=st.sampled_from([0.0, 5.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_the_moments_of_the_union_are_those_of_all_rows_together(sizes, far, seed):
    g = np.random.default_rng(seed)
    parts = [g.normal(far * i, 1 + i, (n, 3)) for i, n in enumerate(sizes)]
    merged = bn.merge_statistics([layer_with(x) for x in parts], sizes)
    mean, var = moments_of(np.concatenate(parts))
    # a few roundings of numbers up to the largest value, and of their squares
    largest = max(np.abs(x).max() for x in parts)
    line = 8 * len(sizes) * np.finfo(float).eps
    np.testing.assert_allclose(merged["running_mean"], mean, rtol=0, atol=line * largest)
    np.testing.assert_allclose(merged["running_var"], var, rtol=0, atol=line * max(largest, 1) ** 2)


def test_a_mean_of_variances_loses_the_variance_between_clients():
    """Ranks with means 0 and 6: the usual recipe stores 1, the union has 10."""
    g = np.random.default_rng(0)
    parts = [g.normal(mean, 1, (5000, 1)) for mean in (0, 6)]
    layers = [layer_with(x) for x in parts]
    usual = sum(layer.running_var for layer in layers) / 2
    merged = bn.merge_statistics(layers, [5000, 5000])
    assert abs(usual.item() - 1) < 0.1
    np.testing.assert_allclose(merged["running_var"], moments_of(np.concatenate(parts))[1], rtol=1e-12)
    assert 9.5 < merged["running_var"].item() < 10.5


def test_recalibrated_clients_of_one_network_give_the_statistics_of_all_data():
    """The whole path: same weights, statistics measured by each client, against one measurement of everything."""
    net = network().double()
    data = [3 * torch.randn(n, 3, 6, 6, dtype=torch.float64) + i for i, n in enumerate((8, 20, 12))]
    states, whole = [copy.deepcopy(net) for _ in data], copy.deepcopy(net)
    for client, x in zip(states, data, strict=True):
        bn.recalibrate(client, [x])
    bn.recalibrate(whole, data)
    assert weights_agree(states)
    merged = bn.merge_statistics(states, [len(x) * 16 for x in data])  # 4 x 4 positions behind the convolution
    for name, value in whole.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(merged[name], value, rtol=1e-12, atol=1e-12)


def test_biased_variances_stay_biased():
    g = np.random.default_rng(1)
    parts = [g.normal(i, 1, (n, 2)) for i, n in enumerate((1, 5, 9))]
    states = [{"running_mean": torch.from_numpy(x.mean(0)), "running_var": torch.from_numpy(x.var(0))} for x in parts]
    merged = bn.merge_statistics(states, [1, 5, 9], correction=0)
    np.testing.assert_allclose(merged["running_var"], np.concatenate(parts).var(0), rtol=1e-13)


def test_without_counts_states_count_alike():
    a, b = network(1), network(2)
    merged = bn.merge_statistics([a, b])
    means = [net[1].running_mean.double().numpy() for net in (a, b)]
    variances = [net[1].running_var.double().numpy() for net in (a, b)]
    mean = sum(means) / 2
    var = sum(variances) / 2 + sum((m - mean) ** 2 for m in means) / 2
    np.testing.assert_allclose(merged["1.running_mean"], mean, rtol=EPS32)
    np.testing.assert_allclose(merged["1.running_var"], var, rtol=EPS32)
    np.testing.assert_allclose(
        merged["4.weight"], (a[4].weight.double() + b[4].weight.double()).detach() / 2, rtol=EPS32
    )
    assert not weights_agree([a, b])


def test_other_tensors_are_averaged_by_count_in_float64_and_rounded_once():
    a, b = network(1), network(2)
    expected = (30 * a[0].weight.double() + 10 * b[0].weight.double()).detach() / 40
    merged = bn.merge_statistics([a, b], [30, 10])
    # the shares and the sum are rounded in float64, then once to float32
    np.testing.assert_allclose(merged["0.weight"], expected, rtol=EPS32)
    kept = bn.merge_statistics([a, b], [30, 10], others="keep")
    assert torch.equal(kept["0.weight"], a[0].weight)
    assert torch.equal(kept["1.weight"], a[1].weight)
    assert torch.equal(kept["1.running_var"], merged["1.running_var"])


def test_the_result_is_a_state_dict_that_loads_and_saves_and_shares_nothing():
    a, b = network(1), network(2)
    before = [copy.deepcopy(net.state_dict()) for net in (a, b)]
    merged = bn.merge_statistics([a.state_dict(), b], [3, 5])
    assert list(merged) == list(before[0])
    assert merged._metadata == before[0]._metadata
    target = network(3)
    target.load_state_dict(merged)
    buffer = io.BytesIO()
    torch.save(merged, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=True)
    assert all(torch.equal(merged[name], again[name]) for name in merged)
    for tensor in merged.values():
        tensor.zero_()
    for net, state in zip((a, b), before, strict=True):
        assert all(torch.equal(net.state_dict()[name], state[name]) for name in state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_type_comes_back_in_its_own(dtype):
    states = [network(i).to(dtype).state_dict() for i in (1, 2)]
    merged = bn.merge_statistics(states, [10, 30])
    assert {name: value.dtype for name, value in merged.items()} == {
        name: value.dtype for name, value in states[0].items()
    }
    expected = (10 * states[0]["1.running_mean"].double() + 30 * states[1]["1.running_mean"].double()) / 40
    assert torch.equal(merged["1.running_mean"], expected.to(dtype))


def test_complex_weights_are_averaged():
    states = [{"w": torch.tensor([1 + 2j, 3j]), "k": torch.tensor([1, 2])} for _ in range(2)]
    states[1]["w"] = states[1]["w"] * 3
    assert torch.equal(bn.merge_statistics(states, [10, 10])["w"], torch.tensor([2 + 4j, 6j]))


def test_complex_layers_have_the_distances_of_complex_means():
    g = np.random.default_rng(3)
    parts = [g.normal(i, 1, (n, 2)) + 1j * g.normal(2 * i, 2, (n, 2)) for i, n in enumerate((5, 9))]
    layers = []
    for x in parts:
        layer = bn.BatchNorm1d(2, dtype=torch.complex128)
        layer.running_mean.copy_(torch.from_numpy(x.mean(0)))
        layer.running_var.copy_(torch.from_numpy(x.var(0, ddof=1)))
        layers.append(layer)
    merged = bn.merge_statistics(layers, [5, 9])
    rows = np.concatenate(parts)
    np.testing.assert_allclose(merged["running_mean"], rows.mean(0), rtol=1e-14)
    np.testing.assert_allclose(merged["running_var"], rows.var(0, ddof=1), rtol=1e-14)
    layers[0].running_mean[1] = complex(1, float("nan"))
    with pytest.raises(ValueError, match=r"finite means, got 1\+nanj in 'running_mean' of state 0, channel 1"):
        bn.merge_statistics(layers, [5, 9])


def test_a_client_without_data_changes_nothing_whatever_it_holds():
    a, b = network(1), network(2)
    broken = network(3).state_dict()
    broken["1.running_var"].fill_(torch.nan)
    broken["0.weight"] = torch.zeros(9)
    del broken["4.bias"]
    merged, without = bn.merge_statistics([broken, a, b], [0, 5, 7]), bn.merge_statistics([a, b], [5, 7])
    assert all(torch.equal(merged[name], without[name]) for name in without)


def test_tensors_that_are_equal_in_all_states_keep_their_bits():
    a = network(1).state_dict()
    a["mask"] = torch.tensor([-torch.inf, 0.1, torch.nan])
    merged = bn.merge_statistics([a, copy.deepcopy(a), copy.deepcopy(a)], [3, 7, 11])
    for name, value in a.items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=0, equal_nan=True)


def test_counters_integers_and_extra_states():
    a, b = network(1).state_dict(), network(2).state_dict()
    a["1.num_batches_tracked"].fill_(100)
    b["1.num_batches_tracked"].fill_(700)
    for state, step in ((a, 3), (b, 9)):
        state["step"], state["table"], state["_extra_state"] = torch.tensor(step), torch.tensor([True]), {"seed": step}
    merged = bn.merge_statistics([a, b], [10, 1000])
    assert merged["1.num_batches_tracked"].item() == 700
    assert merged["1.num_batches_tracked"].dtype == torch.int64
    assert (merged["step"].item(), merged["_extra_state"]) == (3, {"seed": 3})
    for _ in range(80):  # a sum would overflow int64 after 63 rounds
        merged = bn.merge_statistics([merged, merged], [10, 1000])
    assert merged["1.num_batches_tracked"].item() == 700


def test_a_counter_may_be_missing_as_in_old_files():
    a, b = network(1).state_dict(), network(2).state_dict()
    del a["1.num_batches_tracked"]
    b["1.num_batches_tracked"].fill_(5)
    merged = bn.merge_statistics([a, b], [10, 10])
    network(3).load_state_dict(merged)
    assert merged["1.num_batches_tracked"].item() == 5


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
        self.out.weight = self.embed.weight
        self.first = self.second = nn.BatchNorm1d(4)


def test_a_tensor_under_two_names_stays_one_tensor():
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = Tied()
        model.first.running_var.uniform_(1, 2)
        model.first.running_mean.uniform_(1, 2)
        states.append(model.state_dict())
    merged = bn.merge_statistics(states, [4, 9])
    for one, other in (
        ("embed.weight", "out.weight"), ("first.running_var", "second.running_var"), ("first.bias", "second.bias"),
    ):  # fmt: skip
        assert merged[one].data_ptr() == merged[other].data_ptr()
        assert not torch.equal(merged[one], states[0][one]) or one == "first.bias"


def test_two_names_that_one_state_alone_shares_are_two_tensors():
    shared = torch.ones(3)
    states = [{"a": shared, "b": shared}, {"a": torch.zeros(3), "b": torch.full((3,), 5.0)}]
    merged = bn.merge_statistics(states, [10, 10])
    assert (merged["a"][0].item(), merged["b"][0].item()) == (0.5, 3.0)


def test_input_norms_are_merged_by_their_own_counts():
    g = np.random.default_rng(2)
    parts = [g.normal(3 * i, 1, (n, 2)) for i, n in enumerate((5, 50))]
    models = [nn.Sequential(bn.InputNorm.fit(torch.from_numpy(x)), nn.BatchNorm1d(2)) for x in parts]
    merged = nn.Sequential(bn.InputNorm(2), nn.BatchNorm1d(2))
    merged.load_state_dict(bn.merge_statistics(models, [9, 9]))
    rows = np.concatenate(parts)
    np.testing.assert_allclose(merged[0].mean, rows.mean(0), rtol=1e-13)
    np.testing.assert_allclose(merged[0].var, rows.var(0), rtol=1e-13)
    assert merged[0].count.tolist() == [55, 55]
    empty = nn.Sequential(bn.InputNorm(2), nn.BatchNorm1d(2))
    with torch.no_grad():
        empty[1].bias.fill_(1)
    again = bn.merge_statistics([empty, models[0]], [9, 9])
    assert torch.equal(again["0.mean"], models[0][0].mean)


def test_instance_norm_has_averages_of_examples_and_no_values_of_its_own():
    layers = [nn.InstanceNorm1d(2, track_running_stats=True) for _ in range(2)]
    layers[1].running_mean.fill_(6)
    assert bn.merge_statistics(layers, [30, 10])["running_var"].tolist() == [1, 1]
    assert bn.merge_statistics(layers, [30, 10])["running_mean"].tolist() == [1.5, 1.5]


LOCAL = {
    "statistics": ("statistics", {"1.running_mean", "1.running_var", "1.num_batches_tracked"}),
    "batch_norm": (
        "batch_norm", {"1.running_mean", "1.running_var", "1.num_batches_tracked", "1.weight", "1.bias"},
    ),
    "one path": ("4", {"4.weight", "4.bias"}),
    "paths": (["0", "4.bias"], {"0.weight", "0.bias", "4.bias"}),
    "nothing": ((), set()),
}  # fmt: skip


@pytest.mark.parametrize("kind", LOCAL)
def test_what_is_local_is_left_out(kind):
    local, left_out = LOCAL[kind]
    a, b = network(1), network(2)
    merged = bn.merge_statistics([a, b], [3, 5], local=local)
    assert set(a.state_dict()) - set(merged) == left_out
    missing, unexpected = a.load_state_dict(merged, strict=False)
    assert set(missing) == left_out
    assert not unexpected


def test_fedbn_clients_may_differ_in_their_own_layers():
    a, b = network(1).state_dict(), network(2).state_dict()
    b["1.running_var"].fill_(torch.nan)  # stays with its client, so nobody reads it
    a["4.weight"] = torch.zeros(7, 64)
    del b["4.bias"]
    assert set(bn.merge_statistics([a, b], [3, 5], local=["1", "4"])) == {"0.weight", "0.bias"}


def states() -> list[dict]:
    return [network(1).state_dict(), network(2).state_dict()]


def changed(name: str, value: object) -> list[dict]:
    first, second = states()
    if value is None:
        del second[name]
    else:
        second[name] = value
    return [first, second]


NAN, NEGATIVE = torch.tensor([1.0, torch.nan, 1, 1]), torch.tensor([1.0, 1, -2, 1])
REFUSED = {
    "no states": (lambda: bn.merge_statistics([], []), ValueError, "at least one state, got none"),
    "one state dict": (lambda: bn.merge_statistics(states()[0], [1]), TypeError, "several states, got OrderedDict"),
    "one model": (lambda: bn.merge_statistics(network(), [5]), TypeError, "several states, got Sequential"),
    "paths of files": (lambda: bn.merge_statistics(["a.pt", "b.pt"], [5, 5]), TypeError, "got str. State 0: Pass"),
    "too few counts": (lambda: bn.merge_statistics(states(), [5]), ValueError, "each of 2 states, got 1. Pass"),
    "one number": (lambda: bn.merge_statistics(states(), 5), TypeError, "counts must be .*, got int. Pass"),
    "a text": (lambda: bn.merge_statistics(states(), "55"), TypeError, "got str. Pass"),
    "true": (lambda: bn.merge_statistics(states(), [True, 5]), TypeError, "a count must be a number, got bool"),
    "negative": (lambda: bn.merge_statistics(states(), [-1, 5]), ValueError, "0 or more, got -1. Pass"),
    "nan count": (lambda: bn.merge_statistics(states(), [float("nan"), 5]), ValueError, "finite .*, got nan"),
    "infinite": (lambda: bn.merge_statistics(states(), [float("inf"), 5]), ValueError, "finite .*, got inf"),
    "all 0": (lambda: bn.merge_statistics(states(), [0, 0]), ValueError, "a count above 0, got 0 for every state"),
    "shares": (lambda: bn.merge_statistics(states(), [0.5, 0.5]), ValueError, "above 1, got 0.5. .*counts=None"),
    "negative behind one": (lambda: bn.merge_statistics(states(), [1, -1]), ValueError, "0 or more, got -1"),
    "ones": (lambda: bn.merge_statistics(states(), [1, 1]), ValueError, "above 1, got 1. .*counts=None"),
    "a table": (lambda: bn.merge_statistics(states(), torch.ones(2, 2)), TypeError, "a number, got Tensor"),
    "missing": (
        lambda: bn.merge_statistics(changed("4.bias", None), [5, 5]), ValueError,
        "got state 1 without '4.bias', unlike state 0. Pass",
    ),
    "extra": (
        lambda: bn.merge_statistics(changed("5.bias", torch.ones(1)), [5, 5]), ValueError, "state 1 with '5.bias'",
    ),
    "a wrapper's prefix": (
        lambda: bn.merge_statistics([network(1), nn.DataParallel(network(2))], [5, 5]), ValueError,
        "without '0.weight', '0.bias' and 6 more and with 'module.0.weight'.* prefixes of wrappers",
    ),
    "another width": (
        lambda: bn.merge_statistics(changed("1.running_mean", torch.ones(5)), [5, 5]), ValueError,
        r"'1.running_mean' of shape \(4,\) in state 0 and of shape \(5,\) in state 1. Pass",
    ),
    "NaN mean": (
        lambda: bn.merge_statistics(changed("1.running_mean", NAN), [5, 5]), ValueError,
        r"finite means, got nan in '1.running_mean' of state 1, channel 1 \(1 of 4 channels\). Leave .*recalibrate",
    ),
    "infinite variance": (
        lambda: bn.merge_statistics(changed("1.running_var", NAN / 0), [5, 5]), ValueError, "finite variances.*got inf",
    ),
    "negative variance": (
        lambda: bn.merge_statistics(changed("1.running_var", NEGATIVE), [5, 5]), ValueError, "got -2 in .*channel 2",
    ),
    "NaN weight": (
        lambda: bn.merge_statistics(changed("1.weight", NAN), [5, 5]), ValueError, "in '1.weight' of state 1. Leave",
    ),
    "no tensors": (
        lambda: bn.merge_statistics([{}, {"epoch": 3}]), ValueError, r"got state 0 without a tensor. Pass model",
    ),
    "whole checkpoints": (
        lambda: bn.merge_statistics([{"state_dict": states()[0], "epoch": 3}] * 2, [5, 5]), ValueError,
        r"a OrderedDict of tensors under 'state_dict'. Pass the state dict itself: checkpoint\['state_dict",
    ),
    "more variances than means": (
        lambda: bn.merge_statistics(
            [{"running_mean": torch.ones(2) * i, "running_var": torch.ones(3)} for i in (1, 2)], [5, 5]
        ), ValueError, r"variances as means in a layer, got \(3,\) and \(2,\) in 'running_mean' of state 0. Save",
    ),
    "not initialized": (
        lambda: bn.merge_statistics([nn.LazyBatchNorm1d()] * 2), ValueError, r"has no shape yet. Run a batch",
    ),
    "half a layer": (
        lambda: bn.merge_statistics([{"a.running_mean": torch.ones(2)}] * 2, [5, 5]), ValueError,
        "both statistics of a layer, got 'a.running_mean' of state 0 alone. Save",
    ),
    "does not fit": (
        lambda: bn.merge_statistics(
            [{"running_mean": torch.full((1,), s * 6e4).half(), "running_var": torch.ones(1).half()} for s in (1, -1)],
            [5, 5],
        ), ValueError, "fit float16, got 'running_var' up to 4e.09. Store",
    ),
    "unknown path": (
        lambda: bn.merge_statistics(states(), [5, 5], local=["head"]), ValueError, "got 'head', .*layers are '1'",
    ),
    "a path of a wrong type": (
        lambda: bn.merge_statistics(states(), [5, 5], local=[1]), TypeError, "paths of modules, got int. Pass",
    ),
    "others": (
        lambda: bn.merge_statistics(states(), [5, 5], others="sum"), ValueError, "'average' or 'keep', got 'sum'",
    ),
    "correction": (
        lambda: bn.merge_statistics(states(), [5, 5], correction=2), ValueError, "correction must be 0 or 1, got 2",
    ),
    "meta": (
        lambda: bn.merge_statistics([network(1), network(2).to("meta")], [5, 5]), ValueError,
        "numbers of 'state 1: 0.weight', got a tensor that is on the meta device",
    ),
    "sparse": (
        lambda: bn.merge_statistics([{"w": torch.eye(2).to_sparse()}] * 2, [5, 5]), TypeError, "sparse_coo. Convert",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_with_what_to_do(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_states_of_numpy_arrays_are_merged_as_tensors():
    arrays = [{name: value.numpy() for name, value in state.items()} for state in states()]
    merged, expected = bn.merge_statistics(arrays, [5, 7]), bn.merge_statistics(states(), [5, 7])
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    network(3).load_state_dict(merged)


def test_states_may_be_a_generator_and_counts_tensors_or_arrays():
    expected = bn.merge_statistics(states(), [5, 7])
    for counts in (torch.tensor([5, 7]), np.array([5, 7]), (5.0, np.int64(7)), [torch.tensor(5.0), 7]):
        merged = bn.merge_statistics((state for state in states()), counts)
        assert all(torch.equal(merged[name], expected[name]) for name in expected)
    assert isinstance(expected, OrderedDict)
