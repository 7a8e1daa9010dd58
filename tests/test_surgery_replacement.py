"""find and replace: another module in a layer's place, with what it has a place for."""

from __future__ import annotations

import pytest
import torch
from fingerprint import fingerprint
from surgery_checks import ResNet, image, trained
from torch import nn
from torch.nn.utils import parametrize

import batchnorm as bn
from batchnorm.surgery import find, replace


class Square(nn.Module):
    def forward(self, x):
        return x * x


def parametrized() -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(3)
    parametrize.register_parametrization(layer, "weight", Square())
    return layer


def norm_of(layer: nn.BatchNorm2d) -> nn.GroupNorm:
    return nn.GroupNorm(1, layer.num_features)


def test_another_norm_takes_over_gamma_and_beta_and_what_else_it_has_a_place_for():
    x = image()
    net = trained(ResNet(), x).eval()
    net.bn1.register_forward_hook(lambda module, args, output: output + 1)
    before = fingerprint(net)
    paths = []
    result = replace(net, lambda path, layer: paths.append(path) or norm_of(layer))
    assert fingerprint(net) == before
    assert paths == list(find(net))
    assert find(result) == {}
    norm = result.bn1
    assert type(norm) is nn.GroupNorm
    assert norm.weight.equal(net.bn1.weight)
    assert norm.bias.equal(net.bn1.bias)
    assert not norm.training
    assert norm._buffers == {}
    assert vars(norm).keys() == vars(nn.GroupNorm(1, 4)).keys()
    torch.testing.assert_close(
        norm(x := torch.randn(2, 4, 3, 3)), 1 + nn.functional.group_norm(x, 1, norm.weight, norm.bias)
    )


def test_what_the_layer_does_not_have_goes_to_its_device_and_type():
    net = nn.Sequential(nn.BatchNorm1d(4, affine=False, dtype=torch.float64))
    result = replace(net, lambda path, layer: nn.Sequential(nn.GroupNorm(2, 4), nn.Linear(4, 4)))
    assert {p.dtype for p in result.parameters()} == {torch.float64}
    assert {p.device.type for p in replace(net.to("meta"), lambda _, layer: norm_of(layer)).parameters()} == {"meta"}


def test_tensors_of_other_shapes_are_not_carried():
    net = nn.Sequential(nn.BatchNorm1d(4))
    result = replace(net, lambda path, layer: nn.LayerNorm((2, 4)))
    assert result[0].weight.shape == (2, 4)


def test_none_keeps_a_layer():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    result = replace(net, lambda path, layer: norm_of(layer) if path == "1" else None)
    assert [type(m) for m in result] == [nn.BatchNorm1d, nn.GroupNorm]


ONE = nn.Identity()
REFUSED = {
    "no module": (lambda path, layer: "GroupNorm", TypeError, "needs a module or None for '0', got str"),
    "wrapped": (
        lambda path, layer: nn.Sequential(layer),
        ValueError,
        "for '0', got a Sequential that contains the old layer",
    ),
    "the same": (lambda path, layer: ONE, ValueError, "got the same Identity again for '1'"),
}


@pytest.mark.parametrize(("make", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_take_a_layers_place_is_refused_before_anything_changes(make, error, message):
    net = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    before = fingerprint(net)
    with pytest.raises(error, match=message):
        replace(net, make, inplace=True)
    assert fingerprint(net) == before


@pytest.mark.parametrize(
    ("make", "message"), [(parametrized, "got a parametrized layer at '0'"), (nn.LazyBatchNorm2d, "on a batch first")]
)
def test_layers_without_plain_tensors_are_not_replaced(make, message):
    with pytest.raises(ValueError, match=message):
        replace(nn.Sequential(make()), lambda path, layer: nn.Identity())


def test_find_lists_layers_of_every_maker_by_path():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(bn.BatchNorm2d(3), nn.SyncBatchNorm(3)), nn.LayerNorm(3))
    assert list(find(net)) == ["0", "1.0", "1.1"]
    assert list(find(net[0])) == [""]
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got int"):
        find(3)
