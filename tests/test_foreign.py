"""Layers of other libraries: known by what they hold and compute, folded, converted and given back."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from foreign_layers import (
    Activated,
    Asks,
    Clamped,
    Clipped,
    Four,
    FrozenByHand,
    FrozenByTorch,
    FrozenWithAct,
    NoNorm,
    NormAct,
    Synced,
)  # fmt: skip
from surgery_checks import assert_same
from torch import nn

import batchnorm as bn
from batchnorm import other_libraries
from batchnorm.kernels.activations import TABLE
from batchnorm.surgery import Partner, adoption, convert, fold, foldable, revert, unfold


def settled(layer: nn.Module) -> nn.Module:
    """Parameters and statistics that are not those of construction."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, low, high in (
            ("weight", -1, 2), ("bias", -1, 1), ("running_mean", -1, 1), ("running_var", 0.5, 2),
        ):  # fmt: skip
            tensor = getattr(layer, name)
            tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=g))
    return layer


def net(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.Conv2d(4, 2, 1)).eval()


def images() -> torch.Tensor:
    return torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(1))


class InFloat32(nn.BatchNorm2d):
    """Batch norm in float32, whatever comes in."""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_casts_is_folded(dtype):
    model = net(settled(InFloat32(4))).to(dtype)
    model[1].float()
    x = images().to(dtype)
    small = fold(model, x, report=None)
    assert not bn.find(small)
    # half of the type's digits, of the largest
    line = torch.finfo(dtype).eps ** 0.5 * model(x).abs().max()
    assert (small(x) - model(x)).abs().max() <= line
    assert small(x).dtype == dtype


def test_a_folded_layer_with_an_activation_is_traced_exported_and_compiled():
    x = images()
    small = fold(net(settled(NormAct(4, nn.Mish()))), x, report=None)
    expected = small(x)
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    for run in (torch.fx.symbolic_trace(small), torch.export.export(small, (x,)).module(), compiled):
        # the same operations, in another order at most
        torch.testing.assert_close(run(x), expected, rtol=1e-5, atol=1e-6)


FOLDED = {
    "relu": lambda: settled(NormAct(4, nn.ReLU(inplace=True))),
    "no activation": lambda: settled(NormAct(4, nn.Identity())),
    "an activation that ours lack": lambda: settled(NormAct(4, nn.Mish())),
    "an activation with parameters": lambda: settled(NormAct(4, nn.PReLU(4))),
    "dropout": lambda: settled(NormAct(4, nn.SiLU(), nn.Dropout2d(0.3))),
    "more behind torch's forward": lambda: settled(Clamped(4)),
    "across processes": lambda: settled(Synced(4)),
    "frozen by hand": lambda: FrozenByHand(4),
    "frozen by torch": lambda: FrozenByTorch(4),
    "frozen with an activation": lambda: FrozenWithAct(4),
    "absolute weights": lambda: Activated(4),
    "a forward that asks for values": lambda: Asks(4),
}


@pytest.mark.parametrize("kind", FOLDED)
def test_layers_of_other_classes_are_folded_and_come_back(kind):
    model, x = net(FOLDED[kind]()), images()
    assert foldable(model)["1"] == Partner("0", "before")
    small = fold(model, x, report=None)
    assert not bn.find(small)
    wide = [copy.deepcopy(m).double()(x.double()) for m in (fold(model.double(), x.double(), report=None), model)]
    torch.testing.assert_close(*wide, rtol=0, atol=1e-12)  # rounding of float64 in sums of 27 and 4 terms of size 10
    model.float()
    for back in (unfold(small), unfold(pickle.loads(pickle.dumps(small))), unfold(copy.deepcopy(small))):
        assert type(back[1]) is type(model[1])
        assert torch.equal(back(x), model(x))


class HoldingConv(nn.Conv2d):
    """detectron2's Conv2d: batch norm and the activation are children of the convolution."""

    def __init__(self, *args, norm: nn.Module, **settings) -> None:
        super().__init__(*args, **settings)
        self.norm, self.activation = norm, nn.ReLU()

    def forward(self, x):
        if x.numel() == 0 and self.training:
            raise ValueError("expected values, got none. Look at the input.")
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return self.activation(self.norm(x))


class UsesTheSum(HoldingConv):
    def forward(self, x):
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return self.norm(x) + x


class UsesTheWeight(HoldingConv):
    def forward(self, x):
        x = F.conv2d(x, self.weight / 2, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return self.norm(x)


@pytest.mark.parametrize("norm", [FrozenByHand, FrozenByTorch, nn.BatchNorm2d])
def test_a_layer_that_the_convolution_holds_is_folded_into_it(norm):
    made = [HoldingConv(3, 4, 3, norm=norm(4), bias=False), HoldingConv(4, 4, 3, norm=norm(4), padding=1)]
    model, x = nn.Sequential(*made).double().eval(), images().double()
    [settled(layer) for layer in bn.find(model).values() if norm is nn.BatchNorm2d]
    assert foldable(model, x) == {f"{i}.norm": Partner(str(i), "before") for i in range(2)}
    small = fold(model, x, report=None)
    torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-12)
    assert torch.equal(unfold(small)(x), model(x))


@pytest.mark.parametrize("kind", [UsesTheSum, UsesTheWeight])
def test_a_convolution_that_does_more_with_what_it_holds_is_left(kind):
    model = nn.Sequential(kind(3, 4, 3, norm=settled(nn.BatchNorm2d(4)))).eval()
    assert isinstance(foldable(model, images())["0.norm"], str)


class SyncedAct(nn.SyncBatchNorm):
    def forward(self, x):
        return torch.relu(super().forward(x))


class Plain(nn.BatchNorm2d):
    """A subclass with nothing of its own."""


def test_subclasses_of_every_layer_of_torch():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), settled(SyncedAct(4)), nn.Conv2d(4, 4, 1), settled(Plain(4)), nn.ReLU()
    ).eval()  # fmt: skip
    assert not bn.find(fold(model, images(), report=None))
    with pytest.warns(UserWarning, match="'1' is a SyncedAct, which measures the batches of all processes"):
        result = convert(model, fuse=True, example=images())
    assert type(result[3]) is bn.BatchNorm2d
    assert type(revert(result)[3]) is Plain


def test_children_of_a_folded_layer_keep_their_keys():
    small = fold(net(settled(NormAct(4, nn.PReLU(4)))), images(), report=None)
    assert [key for key in small.state_dict() if key.startswith("1.")] == ["1.act.weight"]
    small.half().float().train().eval()
    assert unfold(small)[1].act is not None


@pytest.mark.parametrize("kind", [NoNorm, Clipped])
def test_four_tensors_alone_do_not_make_a_layer_that_is_folded(kind):
    model, x = net(kind(4)), images()
    reports: list = []
    assert torch.equal(fold(model, x, report=reports.append)(x), model(x))
    assert "does not multiply each channel by a number and add a number" in str(reports[0])


def test_a_wrong_map_is_found_on_the_example(monkeypatch):
    from batchnorm.surgery import layer_maps

    right = layer_maps.response

    def wrong(*args):
        scale, shift = right(*args)
        return scale * 1.01, shift

    monkeypatch.setattr(layer_maps, "response", wrong)
    with pytest.raises(ValueError, match="outputs that differ"):
        fold(net(FrozenByHand(4)), images(), report=None)


def test_a_frozen_layer_is_known_by_its_tensors():
    model = net(FrozenByHand(4))
    assert list(bn.find(model)) == ["1"]
    assert other_libraries.channels_of(model[1]) == 4
    assert math.isclose(other_libraries.eps_of(model[1]), 1e-5, rel_tol=1e-9)
    assert other_libraries.eps_of(FrozenByTorch(4)) == 1e-3
    assert other_libraries.measures(model[1]) == "nothing"
    assert other_libraries.measures(Activated(4)) == "its batch"
    assert (
        other_libraries.measures(Synced(4))
        == other_libraries.measures(nn.SyncBatchNorm(4))
        == "the batches of all processes"
    )


class Scalar(Four):
    """A running mean of returns, as in reinforcement learning."""

    def __init__(self) -> None:
        super().__init__(1)
        self.running_mean = torch.zeros(())

    def forward(self, x):
        return x


@pytest.mark.parametrize("module", [Four(3), Scalar(), nn.InstanceNorm2d(3, affine=True, track_running_stats=True)])
def test_what_only_looks_alike_is_no_layer(module):
    """What has no forward of its own, as where exported programs keep tensors; scalars; instance norm."""
    assert bn.find(nn.Sequential(module)) == {}


def test_the_table_tells_what_a_class_measures():
    made = type("NaiveSyncBatchNorm", (nn.BatchNorm2d,), {"__module__": "detectron2.layers.batch_norm"})(4)
    assert other_libraries.measures(made) == "the batches of all processes"
    with pytest.warns(UserWarning, match="'1' is a NaiveSyncBatchNorm, which measures the batches of all processes"):
        assert type(convert(net(made))[1]) is type(made)
    assert foldable(net(made))["1"] == Partner("0", "before")


class Gelu(nn.Module):
    def forward(self, x):
        return F.gelu(x)


OTHER_WAYS = [
    ("relu", nn.ReLU(inplace=True)),
    ("leaky_relu", nn.LeakyReLU(0.2)),
    (None, nn.Identity()),
    ("gelu", Gelu()),
]


@pytest.mark.parametrize(("act", "module"), [*((name, row.module()) for name, row in TABLE.items()), *OTHER_WAYS])
def test_a_subclass_with_an_activation_becomes_ours_and_comes_back(act, module):
    model, x = net(settled(NormAct(4, module, eps=1e-3, momentum=0.3))).train(), images()
    result = convert(model, example=x)
    assert (type(result[1]), result[1].act, result[1].momentum) == (bn.BatchNorm2d, act, 0.3)
    assert result.state_dict().keys() == model.state_dict().keys()
    assert_same(model, result, x)
    for back in (revert(result), revert(pickle.loads(pickle.dumps(result))), revert(bn.unfreeze(bn.freeze(result)))):
        assert type(back[1]) is NormAct
        assert repr(back) == repr(model)
        assert_same(model, back, x)
        assert {**vars(back[1])}.keys() == {**vars(model[1])}.keys()


def test_a_converted_subclass_is_fused_with_what_follows_and_folded():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), settled(NormAct(4, nn.Identity())), nn.ReLU(), nn.Conv2d(4, 2, 1))
    x = images()
    result = convert(model, fuse=True, example=x)
    assert result[1].act == "relu"
    assert not bn.find(fold(result, x, report=None))
    assert_same(model, revert(result), x)
    assert type(revert(result)[1]) is NormAct


def test_a_frozen_subclass_comes_back_frozen():
    model = bn.freeze(net(settled(NormAct(4, nn.ReLU()))))
    back = revert(convert(model, example=images()))
    assert type(bn.unfreeze(back)[1]) is NormAct


class Dropping(nn.BatchNorm2d):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class Counting(nn.BatchNorm2d):
    """In train mode it uses the stored statistics."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


STAYS = {
    "mish": (NormAct(4, nn.Mish()), "'1' is a NormAct that applies what our layers do not: Mish"),
    "clamp": (Clamped(4), "'1' is a Clamped that applies what our layers do not: clamp"),
    "dropout": (Dropping(4), "'1' is a Dropping that computes something else than our layer"),
    "stored in train mode": (Counting(4), "'1' is a Counting that computes something else than our layer"),
    "frozen with an activation": (FrozenWithAct(4), "'1' is a FrozenWithAct, which measures nothing in train mode"),
    "frozen and cut off": (Clipped(4), "'1' is a Clipped, which measures nothing in train mode and computes something"),
    "four tensors": (Activated(4), "'1' is a Activated, which is not derived from a layer of torch.nn"),
}


@pytest.mark.parametrize("kind", STAYS)
def test_what_stays_is_named_with_its_reason(kind):
    layer, reason = STAYS[kind]
    model = net(copy.deepcopy(layer))
    with pytest.warns(UserWarning, match="convert left layers of other classes as they are: " + reason):
        result = convert(model)
    assert type(result[1]) is type(layer)


def test_layers_are_looked_at_without_a_trace():
    layer = settled(NormAct(4, nn.ReLU()))
    state, attributes = copy.deepcopy(layer.state_dict()), dict(vars(layer))
    random = torch.get_rng_state()
    adoption.activation_in(layer)
    other_libraries.response_of(FrozenByHand(4))
    assert torch.equal(torch.get_rng_state(), random)
    assert vars(layer) == attributes
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in state.items())
