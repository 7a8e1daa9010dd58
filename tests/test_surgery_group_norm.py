"""to_group_norm: group normalization with the identity of the layers in whose place it is."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from fingerprint import fingerprint
from surgery_checks import ResNet, image, trained
from torch import nn
from torch.nn.utils import parametrize

import batchnorm as bn
from batchnorm.kernels.activations import NAMES
from batchnorm.surgery import convert, revert, to_group_norm


@pytest.mark.parametrize(
    ("channels", "groups"), [(1, 1), (2, 1), (3, 1), (4, 2), (7, 1), (12, 4), (16, 8), (32, 16), (48, 16), (64, 32)]
)
def test_groups_are_chosen_with_two_channels_or_more(channels, groups):
    norm = to_group_norm(nn.BatchNorm2d(channels))
    assert (type(norm), norm.num_groups, norm.num_channels) == (nn.GroupNorm, groups, channels)


def oracle(x: torch.Tensor, layer: nn.Module, groups: int) -> torch.Tensor:
    """Wu and He 2018, by a loop over examples and groups."""
    y = torch.empty_like(x, dtype=torch.float64)
    size = x.shape[1] // groups
    for n in range(x.shape[0]):
        for g in range(groups):
            part = x[n, g * size : (g + 1) * size].double()
            y[n, g * size : (g + 1) * size] = (part - part.mean()) / (part.var(correction=0) + layer.eps).sqrt()
    shape = (-1, *[1] * (x.ndim - 2))
    gamma = 1.0 if layer.weight is None else layer.weight.detach().double().reshape(shape)
    beta = 0.0 if layer.bias is None else layer.bias.detach().double().reshape(shape)
    return y * gamma + beta


LAYERS = {
    "1d": (lambda **kw: nn.BatchNorm1d(8, **kw), (4, 8)),
    "1d of sequences": (lambda **kw: nn.BatchNorm1d(8, **kw), (4, 8, 3)),
    "2d": (lambda **kw: nn.BatchNorm2d(8, **kw), (4, 8, 3, 2)),
    "3d": (lambda **kw: nn.BatchNorm3d(8, **kw), (4, 8, 3, 2, 2)),
    "SyncBatchNorm": (lambda **kw: nn.SyncBatchNorm(8, **{k: v for k, v in kw.items() if k != "bias"}), (4, 8, 3, 2)),
    "ours": (lambda **kw: bn.BatchNorm2d(8, **kw), (4, 8, 3, 2)),
    "frozen": (lambda **kw: bn.freeze(nn.BatchNorm2d(8, **kw)), (4, 8, 3, 2)),
}


@pytest.mark.parametrize("settings", [{}, {"affine": False}, {"bias": False}, {"eps": 0.3}], ids=str)
@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_it_computes_what_the_paper_says(make, shape, settings):
    layer, x = make(**settings), torch.randn(shape)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    before = fingerprint(layer)
    for groups in (None, 2):
        result = to_group_norm(layer, groups)
        for mode in (True, False):
            got = result.train(mode)(x)
            expected = oracle(x, layer, groups or 4)
            count = x[0].numel()
            assert (got - expected).abs().max() <= torch.finfo(x.dtype).eps * count**0.5 * (1 + expected.abs().max())
    assert fingerprint(layer) == before
    assert list(result.state_dict()) == list(dict(layer.named_parameters()))


def test_the_identity_of_a_layer_is_carried_over():
    shared = nn.BatchNorm2d(8, eps=0.2).eval().bfloat16()
    shared.weight.requires_grad_(False)
    calls = []
    net = nn.Sequential(shared, nn.ReLU(), shared)
    net.note = {"layer": shared}
    shared.owner = "somebody"
    shared.register_forward_hook(lambda *args: calls.append(type(args[0])))
    net[1].train()
    result = to_group_norm(net)
    norm = result[0]
    assert norm is result[2] is result.note["layer"]
    assert (type(norm), norm.eps, norm.owner, norm.training) == (nn.GroupNorm, 0.2, "somebody", False)
    assert (norm.weight.dtype, norm.weight.requires_grad, norm.bias.requires_grad) == (torch.bfloat16, False, True)
    assert torch.equal(norm.weight, shared.weight)
    assert norm.weight is not shared.weight
    assert result(torch.randn(2, 8, 3, 3).bfloat16()).dtype == torch.bfloat16
    assert calls == [nn.GroupNorm, nn.GroupNorm]
    assert not list(norm.buffers())


def test_in_place_parameters_stay_the_same_objects():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    layer, weight = model[1], model[1].weight
    assert to_group_norm(model, inplace=True) is model
    assert model[1] is layer
    assert layer.weight is weight
    assert type(layer) is nn.GroupNorm


@pytest.mark.parametrize("act", NAMES)
def test_an_activation_of_a_layer_is_still_applied(act):
    x = torch.randn(4, 8, 3, 2).double()
    layer = bn.BatchNorm2d(8, act=act, dtype=torch.float64)
    nn.init.normal_(layer.bias)
    result = to_group_norm(nn.Sequential(layer))[0]
    expected = getattr(F, act)(oracle(x, layer, 4))
    assert isinstance(result, nn.GroupNorm)
    assert f"act={act!r}" in str(result)
    torch.testing.assert_close(result(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result(x, x), getattr(F, act)(oracle(x, layer, 4) + x), rtol=1e-12, atol=1e-12)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(result)))
    assert torch.equal(copied(x), result(x))


def test_a_fused_network_does_what_the_network_does():
    x = image()
    net = trained(ResNet(), x)
    fused = to_group_norm(convert(net, fuse=True, example=x)).double().eval()
    plain = to_group_norm(net).double().eval()
    assert not bn.find(fused)
    torch.testing.assert_close(fused(x.double()), plain(x.double()), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(revert(fused)(x.double()), plain(x.double()), rtol=1e-11, atol=1e-11)


class Own(nn.BatchNorm2d):
    """A user's subclass."""


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


REFUSED = {
    "groups": (lambda: nn.BatchNorm2d(8), 3, "groups that divide the channels, got 3 groups for the 8 channels at '1'"),
    "no groups": (lambda: nn.BatchNorm2d(8), 0, "got 0 groups"),
    "lazy": (nn.LazyBatchNorm2d, None, "is known, got LazyBatchNorm2d at '1'. Run the model on a batch first"),
    "subclass": (lambda: Own(8), None, "got Own at '1', which may do more than batch norm. Choose its replacement"),
    "parametrized": (
        lambda: parametrize.register_parametrization(nn.BatchNorm2d(8), "weight", Twice()),
        None,
        "got ParametrizedBatchNorm2d at '1'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_layer_and_change_nothing(case):
    make, groups, message = REFUSED[case]
    model = nn.Sequential(nn.BatchNorm2d(9), make())
    before = [(type(m), vars(m).copy()) for m in model.modules()]
    with pytest.raises(ValueError, match=re.escape(message)):
        to_group_norm(model, groups, inplace=True)
    assert [(type(m), vars(m)) for m in model.modules()] == before
