"""Keras, TensorFlow and Flax: their layers in ours give the same numbers in eval mode, and come back unchanged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from foreign_frameworks import FlaxLayer, KerasLayer, KerasModel, TensorFlowVariable, array_of
from foreign_layers import FrozenByTorch
from torch import nn

import batchnorm as bn
from batchnorm.other_frameworks import LayerState, flax_variables, load, read, states_of

SWITCHES = [(True, True), (True, False), (False, True), (False, False)]


def agrees(layer: nn.Module, theirs, channels: int) -> None:
    """Eval outputs in float64: ours with channels first, theirs with channels last, against each other."""
    x = np.random.default_rng(9).normal(1, 2, (5, 4, 3, channels))
    found = layer.double()(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    # a few roundings of float64, of values up to 40
    np.testing.assert_allclose(found.detach().numpy(), theirs(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("center", "scale"), SWITCHES)
@pytest.mark.parametrize("source", ["layer", "config and weights", "config and dict", "TensorFlow"])
def test_a_keras_layer_becomes_ours_and_comes_back(source, center, scale):
    made = {"variable": TensorFlowVariable} if source == "TensorFlow" else {}
    theirs = KerasLayer(6, 3, center=center, scale=scale, momentum=0.9, epsilon=2e-3, **made)
    named = {f"bn_3/{n}:0": v for n, v in zip(_names(theirs), theirs.get_weights(), strict=True)}
    given = {
        "layer": theirs, "TensorFlow": theirs, "config and weights": (theirs.get_config(), theirs.get_weights()),
        "config and dict": (theirs.get_config(), named),
    }  # fmt: skip
    (state,) = read(given[source]).values()
    assert (state.name, state.eps, state.axis) == ("bn_3", 2e-3, -1)
    assert state.momentum == pytest.approx(0.1, rel=1e-15)
    layer = state.layer(2)
    assert not layer.training
    assert isinstance(layer, bn.BatchNorm2d)
    assert (layer.weight is not None, layer.bias is not None) == (scale, center)
    agrees(layer, theirs, 6)
    config, weights = states_of(state.layer(2))[""].keras()
    wanted = theirs.get_config()
    assert config == {key: wanted[key] for key in config} | {"momentum": config["momentum"]}
    assert config["momentum"] == pytest.approx(0.9, rel=1e-15)
    assert set(config) == {"axis", "momentum", "epsilon", "center", "scale"}
    assert list(weights) == _names(theirs)
    assert all(
        np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(weights.values(), theirs.get_weights(), strict=True)
    )


def test_the_channels_may_stay_on_the_last_axis():
    theirs = KerasLayer(6, 3)
    x = np.random.default_rng(9).normal(1, 2, (5, 4, 3, 6))
    layer = read(theirs)["bn_3"].layer(2, axis=-1).double()
    np.testing.assert_allclose(layer(torch.from_numpy(x)).detach(), theirs(x), rtol=0, atol=1e-13)


def _names(layer: KerasLayer) -> list[str]:
    return [n for n in ("gamma", "beta", "moving_mean", "moving_variance") if getattr(layer, n) is not None]


@pytest.mark.parametrize("source", ["layer", "variables", "nnx state", "flat"])
def test_a_flax_layer_becomes_ours_and_comes_back(source):
    theirs = FlaxLayer(6, 3)
    pure = {"scale": theirs.scale.value, "bias": theirs.bias.value, "mean": theirs.mean, "var": theirs.var}
    given = {
        "layer": theirs, "variables": {k: {"net": {"bn": v}} for k, v in theirs.variables().items()},
        "nnx state": {"net": {"bn": pure}}, "flat": {f"net/bn/{name}": value for name, value in pure.items()},
    }  # fmt: skip
    settings = {} if source == "layer" else {"eps": 1e-5, "momentum": 0.9}
    ((name, state),) = read(given[source], **settings).items()
    assert name == ("" if source == "layer" else "net/bn")
    agrees(state.layer(2), theirs, 6)
    settings, variables = states_of(state.layer(2))[""].flax()
    assert settings == {"momentum": 1 - state.momentum, "epsilon": 1e-5, "use_scale": True, "use_bias": True}
    for collection, arrays in theirs.variables().items():
        assert all(np.array_equal(variables[collection][key], value) for key, value in arrays.items())


def test_trees_have_their_layers_in_natural_order_and_nothing_else():
    layers = {f"BatchNorm_{i}": FlaxLayer(3, i) for i in range(12)}
    tree: dict = {"params": {}, "batch_stats": {}}
    for name in sorted(layers):  # as JAX orders them: BatchNorm_10 before BatchNorm_2
        for collection, arrays in layers[name].variables().items():
            tree[collection][name] = arrays
    tree["params"]["LayerNorm_0"] = {"scale": np.ones(3), "bias": np.ones(3)}
    tree["params"]["Dense_0"] = {"kernel": np.ones((3, 3)), "bias": np.ones(3)}
    found = read(tree, eps=1e-5)
    assert list(found) == list(layers)
    model = nn.Sequential(*(nn.BatchNorm1d(3) for _ in layers)).eval()
    load(model, found, "order")
    x = np.random.default_rng(0).normal(0, 1, (4, 3))
    expected = x
    for layer in layers.values():
        expected = layer(expected)
    np.testing.assert_allclose(model.double()(torch.from_numpy(x)).detach(), expected, rtol=1e-12)
    back = flax_variables(states_of(model.float()))
    assert np.array_equal(back["batch_stats"]["10"]["var"], layers["BatchNorm_10"].var.value)


def test_a_keras_model_is_read_layer_by_layer_and_loaded_by_names():
    shared = KerasLayer(4, 7, name="twice")
    theirs = KerasModel(object(), KerasLayer(4, 1, name="a"), KerasModel(shared, shared), KerasLayer(5, 2, name="c"))
    states = read(theirs)
    assert list(states) == ["a", "twice", "c"]
    model = nn.Sequential(nn.BatchNorm2d(5), bn.BatchNorm2d(4), FrozenByTorch(4)).eval()
    load(model, states, {"0": "c", "1": "a", "2": "twice"})
    assert (model[0].eps, model[0].momentum) == (1e-3, pytest.approx(0.01))
    agrees(model[0], theirs.layers[3], 5)
    agrees(model[1], theirs.layers[1], 4)
    agrees(model[2], shared, 4)
    assert not isinstance(model[2].weight, nn.Parameter)


def test_the_numbers_are_copied_unchanged_and_the_counter_begins_anew():
    theirs = KerasLayer(4)
    layer = nn.BatchNorm1d(4)
    layer.num_batches_tracked.fill_(7)
    load(layer, {"": read(theirs)["bn_0"]})
    assert np.array_equal(layer.running_var, array_of(theirs.moving_variance))
    assert (layer.eps, layer.num_batches_tracked.item()) == (1e-3, 0)


@pytest.mark.parametrize("make", [nn.BatchNorm2d, bn.BatchNorm2d, nn.SyncBatchNorm])
def test_layers_of_torch_go_out_and_come_back(make):
    torch.manual_seed(0)
    layer = make(4, eps=1e-4, momentum=0.3).eval()
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            tensor.uniform_(0.5, 2)
    config, weights = states_of(layer)[""].keras()
    again = read((config, list(weights.values())))[""].layer(2)
    for key in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(again, key), getattr(layer, key))
    assert (again.eps, again.momentum) == (1e-4, pytest.approx(0.3))


def test_a_missing_gamma_becomes_ones_in_a_layer_that_has_one():
    layer = nn.BatchNorm2d(6)
    nn.init.uniform_(layer.weight, 2, 3)
    theirs = KerasLayer(6, scale=False)
    load(layer.eval(), {"": read(theirs)["bn_0"]})
    assert layer.weight.tolist() == [1] * 6
    agrees(layer, theirs, 6)


def test_half_precision_keeps_its_numbers():
    arrays = {"mean": np.ones(3, np.float16), "var": np.full(3, 0.1, np.float16)}
    (state,) = read({"batch_stats": {"bn": arrays}, "params": {}}, eps=1e-5, momentum=0.9).values()
    var = state.layer(1).running_var  # our layers store statistics in float32
    assert (var.dtype, var.tolist()) == (torch.float32, [float(np.float16(0.1))] * 3)
    assert states_of(state.layer(1).bfloat16())[""].keras()[1]["moving_variance"].dtype == np.float32


def small(**changes) -> LayerState:
    arrays = {"running_mean": torch.zeros(3), "running_var": torch.ones(3), "eps": 1e-3, "momentum": 0.1}
    return LayerState("bn", **(arrays | changes))


def tree(**changes) -> dict:
    return {"bn": {"moving_mean": np.zeros(3), "moving_variance": np.ones(3), **changes}}


class Untracked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3, track_running_stats=False)


REFUSED = {
    "a model of torch": (lambda: read(nn.BatchNorm1d(3)), TypeError, r"got BatchNorm1d. Use states_of"),
    "an array": (lambda: read(np.ones(3)), TypeError, r"or a dict of arrays, got ndarray. Pass"),
    "nothing": (lambda: read({"dense": {"kernel": np.ones(3)}}), ValueError, r"got none in a dict. Pass"),
    "no variance": (
        lambda: read({"bn": {"moving_mean": np.ones(3)}}), ValueError, r"'bn' needs both statistics, got no moving_var",
    ),
    "two axes": (
        lambda: read(tree(moving_mean=np.ones((8, 3)))), ValueError, r"one axis, got shape \(8, 3\).* first replica",
    ),
    "lengths": (lambda: read(tree(gamma=np.ones(4))), ValueError, r"tensors of one length, got .*'weight': 4"),
    "texts": (lambda: read(tree(gamma=np.array(["a"] * 3))), TypeError, r"weight of layer 'bn' must be floating"),
    "integers": (lambda: read(tree(gamma=np.ones(3, int))), TypeError, r"floating-point numbers, got torch.int64"),
    "eps of a wrong type": (lambda: read(tree(), eps="1e-3"), TypeError, r"eps must be a number, got str"),
    "several axes": (
        lambda: read(({"axis": [1, 2]}, [np.ones(3)] * 4)), ValueError, r"one channel axis, got \[1, 2\]",
    ),
    "too few weights": (lambda: read(({}, [np.ones(3)] * 3)), ValueError, r"needs 4 weights \(gamma, .*got 3. Pass"),
    "no eps": (lambda: small(eps=None).layer(2), ValueError, r"needs an eps, which its source does not store. Pass"),
    "no momentum": (lambda: small(momentum=None).keras(), ValueError, r"needs a momentum for keras, got None. Set"),
    "dims": (lambda: small().layer(4), ValueError, r"dims must be 1, 2 or 3, got 4. Use"),
    "no statistics": (lambda: states_of(Untracked()), ValueError, r"stored statistics, got 'bn' without. Construct"),
    "lazy": (lambda: states_of(nn.LazyBatchNorm1d()), ValueError, r"run a lazy one on a batch first"),
    "no module": (lambda: states_of("net"), TypeError, r"needs an nn.Module, got str"),
    "not states": (lambda: load(nn.BatchNorm1d(3), tree()), TypeError, r"a dict of LayerStates, got dict. Pass"),
    "names": (lambda: load(nn.BatchNorm1d(3), {"bn": small()}, 3), TypeError, r"names must be a dict, .* got int"),
    "other names": (
        lambda: load(nn.BatchNorm1d(3), {"bn": small()}), ValueError, r"layers \[''\] and the states \['bn'\]. Pass",
    ),
    "one state too many": (
        lambda: load(nn.BatchNorm1d(3), {"": small(), "b": small()}), ValueError, r"the states \['b'\]",
    ),
    "order of other lengths": (
        lambda: load(nn.BatchNorm1d(3), {"": small(), "b": small()}, "order"), ValueError, r"1 layers, got 2 states",
    ),
    "one state twice": (
        lambda: load(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)), {"a": small()}, {"0": "a", "1": "a"}),
        ValueError, r"needs one state for each of 2 layers",
    ),
    "channels": (lambda: load(nn.BatchNorm1d(4), {"": small()}), ValueError, r"got 4 at '' and 3 in 'bn'. Correct"),
    "no gamma here": (
        lambda: load(nn.BatchNorm1d(3, affine=False), {"": small(weight=torch.ones(3))}), ValueError,
        r"a weight in layer '' for that of 'bn', got None. Construct",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_with_what_to_do(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_nothing_is_loaded_if_one_layer_does_not_fit():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="channels"):
        load(model, {"0": small(running_mean=torch.ones(3)), "1": small()})
    assert model[0].running_mean.tolist() == [0] * 3
