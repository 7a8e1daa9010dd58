"""Frozen layers of other libraries become frozen layers of ours, with the same numbers and keys, and come back."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from foreign_layers import Asks, Four, FrozenByHand, FrozenByTorch
from torch import nn

import batchnorm as bn
from batchnorm.population.freezing import Frozen


def net(layer: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.Conv2d(4, 2, 1)).train()


def images() -> torch.Tensor:
    return torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(1))


class FrozenRows(Four):
    """A frozen layer for rows, with an eps of its own and an attribute."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.eps, self.owner = 1e-3, "me"

    def forward(self, x):
        if x.ndim != 2:
            raise ValueError("expected rows, got others. Pass (N, C).")
        return (x - self.running_mean) / (self.running_var + self.eps).sqrt() * self.weight + self.bias


class WrongEps(FrozenByTorch):
    """Its attribute says another eps than it uses."""

    def forward(self, x):
        scale = self.weight * (self.running_var + 0.1).rsqrt()
        return (x - self.running_mean.reshape(1, -1, 1, 1)) * scale.reshape(1, -1, 1, 1) + self.bias.reshape(
            1, -1, 1, 1
        )


def formula(layer: Four, x: torch.Tensor, eps: float) -> np.ndarray:
    """Batch norm of (N, C, H, W) in float64."""
    mean, var, gamma, beta = (
        getattr(layer, name).double().numpy().reshape(1, -1, 1, 1)
        for name in ("running_mean", "running_var", "weight", "bias")
    )
    return (x.double().numpy() - mean) / np.sqrt(var + eps) * gamma + beta


@pytest.mark.parametrize(("kind", "eps"), [(FrozenByHand, 1e-5), (FrozenByTorch, 1e-3), (Asks, 1e-5)])
def test_a_frozen_layer_becomes_ours_frozen_and_comes_back(kind, eps):
    model, x = net(kind(4)), images()
    result = bn.convert(model, example=x)
    layer = result[1]
    assert isinstance(layer, bn.BatchNorm2d)
    assert isinstance(layer, Frozen)
    assert list(result.state_dict()) == list(model.state_dict())
    assert not [name for name, p in result.named_parameters() if p.requires_grad and name.startswith("1.")]
    between = torch.randn(5, 4, 3, 3)
    # the type's rounding of a handful of operations, of values up to 10
    np.testing.assert_allclose(layer(between), formula(model[1], between, eps), rtol=0, atol=1e-5)
    wide = copy.deepcopy(result).double()[1](between.double())
    np.testing.assert_allclose(wide, formula(model[1], between, eps), rtol=1e-9, atol=1e-9)  # eps may be computed
    for back in (bn.revert(result), bn.revert(pickle.loads(pickle.dumps(result))), bn.revert(copy.deepcopy(result))):
        assert type(back[1]) is kind
        assert list(back.state_dict()) == list(model.state_dict())
        assert not list(back[1].parameters())
        assert torch.equal(back(x), model(x))
        assert vars(back[1]).keys() == vars(model[1]).keys()
        assert back[1].training


def test_rows_get_the_layer_for_rows_and_attributes_come_back():
    model = nn.Sequential(nn.Linear(3, 4), FrozenRows(4))
    model[1].later = "set by the owner"
    result = bn.convert(model)
    assert isinstance(result[1], bn.BatchNorm1d)
    assert (result[1].eps, result[1].later) == (1e-3, "set by the owner")
    back = bn.revert(result)
    assert (back[1].eps, back[1].owner, back[1].later) == (1e-3, "me", "set by the owner")


def test_new_numbers_go_back_too_and_buffers_stay_buffers():
    result = bn.convert(net(FrozenByTorch(4)))
    result[1].load_state_dict(
        {name: torch.full((4,), 2.0) for name in ("weight", "bias", "running_mean", "running_var")}
    )
    back = bn.revert(result)
    assert all(buffer.tolist() == [2.0] * 4 for buffer in back[1].buffers())
    assert len(list(back[1].buffers())) == 4


@pytest.mark.parametrize("kind", [FrozenByHand, FrozenByTorch])
def test_states_of_the_frozen_class_are_loaded_strictly_and_states_of_the_result_too(kind):
    model, other = net(kind(4)), net(kind(4))
    other[1].running_mean.fill_(3)
    result = bn.convert(model)
    for state in (other.state_dict(), dict(other.state_dict()), bn.convert(other).state_dict()):
        into = pickle.loads(pickle.dumps(result))
        into.load_state_dict(state, strict=True)
        assert into[1].running_mean.tolist() == [3] * 4
        back = bn.revert(into)
        back.load_state_dict(into.state_dict(), strict=True)
        assert not back[1]._load_state_dict_pre_hooks


def test_a_layer_that_was_unfrozen_learns_and_stays_a_live_layer():
    result = bn.convert(net(FrozenByTorch(4)))
    assert not result[1].weight.requires_grad
    bn.unfreeze(result)
    assert result[1].weight.requires_grad
    assert result[1].bias.requires_grad
    before = result[1].running_mean.clone()
    result.train()(images())
    assert not torch.equal(result[1].running_mean, before)
    back = bn.revert(result)
    assert type(back[1]) is nn.BatchNorm2d
    assert torch.equal(back[1].running_mean, result[1].running_mean)


def test_activations_behind_it_are_fused_and_given_back():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), FrozenByTorch(4), nn.ReLU()).eval(), images()
    result = bn.convert(model, fuse=True, example=x)
    assert result[1].act == "relu"
    back = bn.revert(result)
    assert [type(part) for part in back] == [nn.Conv2d, FrozenByTorch, nn.ReLU]
    assert torch.equal(back(x), model(x))


def test_a_layer_that_does_not_do_what_its_tensors_say_stays():
    model = net(WrongEps(4))
    with pytest.warns(UserWarning, match="WrongEps, which measures nothing in train mode and computes something else"):
        assert type(bn.convert(model)[1]) is WrongEps


def test_shared_frozen_layers_stay_shared():
    layer = FrozenByTorch(4)
    result = bn.convert(nn.Sequential(layer, nn.ReLU(), layer))
    assert result[0] is result[2]
    assert bn.revert(result)[0] is bn.revert(result)[2] or type(bn.revert(result)[0]) is FrozenByTorch


@pytest.mark.parametrize("make", [nn.BatchNorm2d, bn.BatchNorm2d])
def test_any_layer_is_replaced_by_a_frozen_class_with_its_tensors(make):
    torch.manual_seed(0)
    layer = make(4, eps=1e-3)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            tensor.uniform_(0.5, 2)
    model, x = net(layer).eval(), images()
    frozen = bn.replace(model, lambda path, layer: FrozenByTorch(layer.num_features))
    assert type(frozen[1]) is FrozenByTorch
    assert not list(frozen[1].parameters())
    torch.testing.assert_close(frozen(x), model(x), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(getattr(frozen[1], k), getattr(layer, k)) for k in ("weight", "bias", "running_var"))
