"""for_export(remaining=...): layers without a partner as depthwise convolutions or as multiplication and addition."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from foreign_layers import Clamped, FrozenByTorch, NormAct
from torch import nn

import batchnorm as bn
from batchnorm.surgery.standalone import MulAdd

KINDS = ["depthwise", "mul_add"]


def settled(layer: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, low, high in (("weight", -1, 2), ("bias", -1, 1), ("running_mean", -1, 1), ("running_var", 0.5, 2)):
            if (tensor := getattr(layer, name)) is not None:
                tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=g))
    return layer


def formula(layer, x: torch.Tensor, axis: int = 1) -> np.ndarray:
    """Batch norm in eval mode, in float64."""
    shape = [1, -1] + [1] * (x.ndim - 2) if axis == 1 else [-1]

    def values(name: str, neutral: float) -> np.ndarray:
        tensor = getattr(layer, name)
        return (np.array(neutral) if tensor is None else tensor.detach().double().numpy()).reshape(shape)

    mean, var, gamma, beta = (
        values(*each) for each in (("running_mean", 0), ("running_var", 1), ("weight", 1.0), ("bias", 0.0))
    )
    return (x.double().numpy() - mean) / np.sqrt(var + layer.eps) * gamma + beta


LAYERS = {
    "rows": (lambda: nn.BatchNorm1d(4), (5, 4), MulAdd),
    "square rows": (lambda: nn.BatchNorm1d(4), (4, 4), MulAdd),
    "sequences": (lambda: nn.BatchNorm1d(4), (5, 4, 7), nn.Conv1d),
    "images": (lambda: nn.BatchNorm2d(4, eps=1e-3), (5, 4, 3, 2), nn.Conv2d),
    "volumes": (lambda: nn.BatchNorm3d(4), (5, 4, 3, 2, 2), nn.Conv3d),
    "across processes": (lambda: nn.SyncBatchNorm(4), (5, 4, 3, 2), nn.Conv2d),
    "ours": (lambda: bn.BatchNorm2d(4), (5, 4, 3, 2), nn.Conv2d),
    "ours, frozen": (lambda: bn.freeze(bn.BatchNorm2d(4)), (5, 4, 3, 2), nn.Conv2d),
    "ours, gamma alone": (lambda: bn.BatchNorm2d(4, bias=False), (5, 4, 3, 2), nn.Conv2d),
    "ours, beta alone": (lambda: bn.BatchNorm2d(4, weight=False), (5, 4, 3, 2), nn.Conv2d),
    "neither": (lambda: nn.BatchNorm2d(4, affine=False), (5, 4, 3, 2), nn.Conv2d),
    "frozen of another library": (lambda: FrozenByTorch(4), (5, 4, 3, 2), nn.Conv2d),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_the_same_as_one_operation(name, kind):
    make, shape, convolution = LAYERS[name]
    layer, x = settled(make()), torch.randn(shape)
    model = nn.Sequential(layer, nn.Identity())
    before = copy.deepcopy(model.state_dict())
    result = bn.for_export(model, example=x, remaining=kind)
    assert not bn.find(result)
    assert type(result[0]) is (convolution if kind == "depthwise" else MulAdd)
    assert not result.training
    # float32's rounding of scale, product and sum, of values up to 20
    np.testing.assert_allclose(result(x).detach(), formula(layer, x), rtol=0, atol=2e-5)
    wide = bn.for_export(model.double(), example=x.double(), remaining=kind)(x.double())
    np.testing.assert_allclose(wide.detach(), formula(layer, x), rtol=0, atol=1e-12)
    assert all(torch.equal(value, before[key]) for key, value in model.float().state_dict().items())


def test_channels_on_the_last_axis_are_multiplied_there():
    layer, x = settled(bn.BatchNorm2d(4, axis=-1)), torch.randn(5, 3, 2, 4)
    for kind in KINDS:
        result = bn.for_export(nn.Sequential(layer), example=x, remaining=kind)
        assert repr(result[0]) == "MulAdd(4, axis=-1)"
        np.testing.assert_allclose(result(x), formula(layer, x, -1), rtol=0, atol=2e-5)


def test_a_complex_layer_is_multiplied_by_complex_numbers():
    layer, x = bn.BatchNorm2d(4, dtype=torch.complex128).eval(), torch.randn(5, 4, 3, 2, dtype=torch.complex128)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean):
            tensor.copy_(torch.randn(4, dtype=torch.complex128))
    mean, gamma, beta = (t.detach().numpy().reshape(1, 4, 1, 1) for t in (layer.running_mean, layer.weight, layer.bias))
    expected = (x.numpy() - mean) / np.sqrt(1 + layer.eps) * gamma + beta
    for kind in KINDS:
        result = bn.for_export(nn.Sequential(layer), remaining=kind)
        np.testing.assert_allclose(result(x).detach(), expected, rtol=0, atol=1e-13)


class Twice(nn.Module):
    """One layer called with rows and with sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = settled(nn.BatchNorm1d(4))

    def forward(self, x):
        return self.bn(x), self.bn(x.mean(2))


def test_a_layer_with_inputs_of_several_kinds_is_multiplied():
    model, x = Twice(), torch.randn(5, 4, 7)
    result = bn.for_export(model, example=x, remaining="depthwise")
    assert type(result.bn) is MulAdd
    for found, expected in zip(result(x), (x, x.mean(2)), strict=True):
        np.testing.assert_allclose(found, formula(model.bn, expected), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_not_folded_remains_and_activations_stay(kind):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), settled(nn.BatchNorm2d(4)), nn.ReLU(), settled(bn.BatchNorm2d(4, act="relu")), nn.Flatten(),
    ).eval()  # fmt: skip
    x = torch.randn(5, 3, 6, 6)
    result = bn.for_export(model, fold=True, example=x, remaining=kind)
    assert [type(part).__name__ for part in result[3].children()] == [
        "Conv2d" if kind == "depthwise" else "MulAdd", "ReLU",
    ]  # fmt: skip
    assert not bn.find(result)
    torch.testing.assert_close(result(x), model(x), rtol=1e-4, atol=1e-5)


def test_shared_layers_stay_shared_and_tied_parameters_of_others_keep_their_numbers():
    layer = settled(nn.BatchNorm2d(4))
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Conv2d(4, 4, 1))
    model[3].bias = layer.bias
    x, before = torch.randn(2, 4, 3, 3), layer.bias.detach().clone()
    model.eval()
    result = bn.for_export(model, remaining="depthwise")
    assert result[0] is result[2]
    assert torch.equal(result[3].bias, before)
    torch.testing.assert_close(result(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_exported_as_operations_without_batch_norm(kind):
    model = nn.Sequential(nn.ReLU(), settled(nn.BatchNorm2d(4))).eval()
    x = torch.randn(2, 4, 3, 3)
    program = torch.export.export(bn.for_export(model, remaining=kind), (x,))
    assert not [node for node in program.graph.nodes if "batch_norm" in str(node.target)]
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


STAYS = {
    "no statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), "'0' has no stored statistics"),
    "another map": (lambda: settled(Clamped(4)), "'0' is a Clamped that does not multiply each channel"),
    "an activation": (lambda: settled(NormAct(4, nn.Mish())), "'0' is a NormAct that does not multiply"),
}


@pytest.mark.parametrize("name", STAYS)
def test_layers_that_are_no_such_map_stay_and_are_named(name):
    make, reason = STAYS[name]
    layer = make()
    with pytest.warns(UserWarning, match=f"for_export left batch norm as it is: {reason}"):
        result = bn.for_export(nn.Sequential(layer), remaining="mul_add")
    assert type(result[0]) is type(layer)


def test_bad_input_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"remaining must be None, 'depthwise' or 'mul_add', got 'conv'. Leave"):
        bn.for_export(nn.ReLU(), remaining="conv")
    with pytest.raises(ValueError, match=r"needs an example to see the shape of the input of '0', got none. Pass"):
        bn.for_export(nn.Sequential(nn.BatchNorm1d(4)), remaining="depthwise")
    tiny = nn.BatchNorm2d(4, eps=1e-12).half()
    tiny.running_var.zero_()
    with pytest.raises(ValueError, match=r"scales that fit torch.float16, got 1e\+06. Convert"):
        bn.for_export(nn.Sequential(tiny), remaining="mul_add")


def test_without_the_option_layers_stay_batch_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(bn.for_export(nn.Sequential(bn.BatchNorm2d(4)))[0]) is nn.BatchNorm2d
