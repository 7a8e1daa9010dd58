"""Folding through operations that move values, behind concatenations, and in code that takes sizes for numbers."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from foreign_layers import FrozenByHand
from small_networks import Written
from torch import nn

import batchnorm as bn
from batchnorm.surgery import Partner, fold, foldable, unfold


class Recorded(Written):
    """The same with an argument that torch.fx cannot trace."""

    def forward(self, *inputs):
        return self.run(self, *inputs)


def settled(model: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(3)
    for layer in bn.find(model).values():
        for name, low, high in (
            ("weight", 0.5, 2), ("bias", -1, 1), ("running_mean", -1, 1), ("running_var", 0.5, 2),
        ):  # fmt: skip
            tensor = getattr(layer, name).data
            tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=g))
    return model.eval()


def answers(net: nn.Module, x: torch.Tensor) -> dict:
    """What fold did, after a check of its result by running both in float64, and of the way back."""
    net, x = settled(net).double(), x.double()
    before, reports = copy.deepcopy(net), []
    small = fold(net, x, report=reports.append)
    with torch.no_grad():
        # sums of some 100 terms of size 10, in float64
        torch.testing.assert_close(small(x), net(x), rtol=0, atol=1e-12)
        for back in (unfold(small), unfold(copy.deepcopy(small)), unfold(fold(small, x, report=None))):
            assert torch.equal(back(x), before(x))
    assert foldable(net, x) == dict(reports[0].layers)
    if type(net) is Written:
        net.__class__ = Recorded
        assert foldable(net, x) == dict(reports[0].layers)
    return dict(reports[0].layers)


def nodes() -> torch.Tensor:
    return torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(1))  # graphs, nodes, features


def images(channels: int = 3) -> torch.Tensor:
    return torch.randn(5, channels, 6, 6, generator=torch.Generator().manual_seed(1))


LINEAR = {
    "view of all nodes": lambda n, x: n.bn(n.fc(x).view(-1, 8)).view(x.shape[0], x.shape[1], 8).relu(),
    "reshape": lambda n, x: n.bn(n.fc(x).reshape(21, 8)).relu(),
    "flatten and reshape_as": lambda n, x: [y := n.fc(x), n.bn(y.flatten(0, 1)).reshape_as(y)][1],
    "transpose": lambda n, x: n.bn(n.fc(x).transpose(1, 2)).transpose(1, 2),
    "permute": lambda n, x: n.bn(n.fc(x).permute(0, 2, 1)).relu(),
    "swapaxes and contiguous": lambda n, x: n.bn(n.fc(x).swapaxes(1, 2).contiguous()),
    "unsqueeze": lambda n, x: n.bn(n.fc(x[:, 0]).unsqueeze(2)),
    "a part of the channels": lambda n, x: n.bn(n.wide(x).transpose(1, 2)[:, 2:10]),
}


@pytest.mark.parametrize("case", LINEAR)
def test_a_linear_layer_before_batch_norm(case):
    net = Written(LINEAR[case], **{"wide" if "part" in case else "fc": nn.Linear(4, 11 if "part" in case else 8)},
              bn=nn.BatchNorm1d(8))  # fmt: skip
    assert isinstance(answers(net, nodes())["bn"], Partner)


@pytest.mark.slow
def test_a_graph_network_without_bias_is_folded_whole():
    """Eight layers between linear ones: four on all nodes, four on channels in the middle."""

    def run(n, x):
        for i in range(4):
            b, count, _ = x.shape
            x = n.get_submodule(f"a{i}")(n.get_submodule(f"f{i}")(x).view(b * count, -1)).view(b, count, -1).relu()
            x = n.get_submodule(f"b{i}")(n.get_submodule(f"g{i}")(x).transpose(1, 2)).transpose(1, 2).relu()
        return x.mean(1)

    modules = {}
    for i in range(4):
        modules |= {f"f{i}": nn.Linear(4 if i == 0 else 6, 8, bias=False), f"a{i}": nn.BatchNorm1d(8)}
        modules |= {f"g{i}": nn.Linear(8, 6, bias=False), f"b{i}": nn.BatchNorm1d(6)}
    found = answers(Written(run, **modules), nodes())
    assert len(found) == 8
    assert all(isinstance(each, Partner) for each in found.values())


def test_channels_of_an_image_that_a_linear_layer_makes():
    net = Written(lambda n, x: n.bn(n.fc(x).view(-1, 4, 3, 3)), fc=nn.Linear(6, 36), bn=nn.BatchNorm2d(4))
    found = answers(net, torch.randn(5, 6))
    assert found["bn"].channels == tuple(channel for channel in range(4) for _ in range(9))


BEHIND = {
    "flatten": lambda n, x: n.fc(n.bn(x.sin()).flatten(1)),
    "view": lambda n, x: n.fc(n.bn(x.sin()).view(x.size(0), -1)),
    "reshape": lambda n, x: n.fc(torch.reshape(n.bn(x.sin()), (len(x), 108))),
    "module": lambda n, x: n.fc(n.flat(n.bn(x.sin()))),
    "channels last": lambda n, x: n.fc(n.bn(x.sin()).permute(0, 2, 3, 1).reshape(x.shape[0], -1)),
}


@pytest.mark.parametrize("case", BEHIND)
def test_a_linear_layer_behind_batch_norm(case):
    net = Written(BEHIND[case], fc=nn.Linear(108, 2), flat=nn.Flatten(), bn=nn.BatchNorm2d(3))
    found = answers(net, images())["bn"]
    assert (found.path, found.position) == ("fc", "behind")


def test_a_linear_layer_on_the_last_axis_behind_batch_norm():
    net = Written(lambda n, x: n.fc(n.bn(x.transpose(1, 2)).transpose(1, 2)), fc=nn.Linear(4, 2), bn=nn.BatchNorm1d(4))
    assert answers(net, nodes())["bn"].channels == (0, 1, 2, 3)


def test_a_frozen_layer_of_others_through_flatten():
    net = Written(lambda n, x: n.fc(n.bn(x.sin()).flatten(1)), fc=nn.Linear(108, 2), bn=FrozenByHand(3))
    assert answers(net, images())["bn"].position == "behind"


def test_the_scale_is_split_over_what_is_concatenated():
    net = Written(
        lambda n, x: n.bn(torch.cat([n.a(x), n.b(x), n.c(x)], 1)).relu(),
        a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 5, 3, bias=False), c=nn.Conv2d(3, 3, 3, groups=3), bn=nn.BatchNorm2d(12),
    )  # fmt: skip
    found = answers(net, images())["bn"]
    assert str(found) == "'a' and 'b' and 'c' before it"
    assert found.channels == (0, 1, 2, 3)
    assert [each.channels for each in found.others] == [(4, 5, 6, 7, 8), (9, 10, 11)]


def test_each_part_of_a_concatenation_goes_into_the_layer_behind():
    net = Written(
        lambda n, x: [y := x.sin(), n.conv(torch.cat([n.a(y), x, n.b(y * 2)], dim=1))][1],
        a=nn.BatchNorm2d(3), b=nn.BatchNorm2d(3), conv=nn.Conv2d(9, 4, 3),
    )  # fmt: skip
    found = answers(net, images())
    assert found["a"].channels == (0, 1, 2, *[-1] * 6)
    assert found["b"].channels == (*[-1] * 6, 0, 1, 2)


def test_parts_that_are_folded_together_and_one_by_one():
    """A layer behind each part and one behind all: both scales meet in the convolutions."""
    net = Written(
        lambda n, x: n.bn(torch.cat([n.na(n.a(x)), n.b(x)], 1)),
        a=nn.Conv2d(3, 4, 3), na=nn.BatchNorm2d(4), b=nn.Conv2d(3, 2, 3), bn=nn.BatchNorm2d(6),
    )  # fmt: skip
    assert set(map(str, answers(net, images()).values())) == {"'a' before it", "'a' and 'b' before it"}


STAYS = {
    "a part that is no convolution": (
        lambda n, x: n.bn(torch.cat([n.a(x), x[:, :, 1:-1, 1:-1]], 1)), "a part of its input is not made by"),
    "a part that others read": (
        lambda n, x: [y := n.a(x), n.bn(torch.cat([y, n.a2(x)], 1)), y.sum()], "also goes elsewhere"),
    "channels that meet several": (
        lambda n, x: n.bn(n.w(x).flatten(2).transpose(1, 2)[:, :7].unsqueeze(3)), "one channel of the layer before"),
    "a mean": (
        lambda n, x: n.bn(n.a7(x).flatten(2).cumsum(2).unsqueeze(2)), "no convolution or linear layer makes its input"),
    "zeros around": (lambda n, x: n.behind(torch.cat([n.bn3(x.sin()), x], 1)), "pads with zeros"),
    "written in between": (
        lambda n, x: [y := n.bn3(x), x.mul_(2), n.plain(torch.cat([y, x], 1))][2], "may overwrite"),
}  # fmt: skip


@pytest.mark.parametrize("case", STAYS)
def test_layers_are_left_with_the_reason(case):
    run, reason = STAYS[case]
    kept = {
        "a": nn.Conv2d(3, 4, 3), "a2": nn.Conv2d(3, 3, 3), "w": nn.Conv2d(3, 2, 3), "a7": nn.Conv2d(3, 7, 3),
        "behind": nn.Conv2d(6, 2, 3, padding=1), "plain": nn.Conv2d(6, 2, 3),
    }  # fmt: skip
    net = settled(Written(run, bn=nn.BatchNorm2d(7), bn3=nn.BatchNorm2d(3), **kept))
    found = foldable(net, images())
    left = found["bn3"] if "bn3" in run.__code__.co_names else found["bn"]
    assert isinstance(left, str)
    assert reason in left


@pytest.mark.parametrize(
    "run",
    [
        lambda n, x: n.behind(n.bn(x.sin(), x).flatten(1)),
        lambda n, x: [y := n.before(x[:, 0].flatten(1)).unflatten(1, (4, 3, 3)), n.bn(y, y)][1],
    ],
)
def test_a_layer_that_adds_a_residual_is_left_next_to_a_move(run):
    """Folded, the residual would be scaled too: by the layer behind it, or as the result of the layer before it."""
    parts = {"behind": nn.Linear(4 * 9, 3), "before": nn.Linear(9, 36), "bn": bn.BatchNorm2d(4)}
    x = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    assert not isinstance(foldable(settled(Written(run, **parts)), x)["bn"], Partner)


class AddsItsSum(nn.Conv2d):
    """Adds the sum of its weight behind the batch norm layer inside of it."""

    def __init__(self, *args):
        super().__init__(*args)
        self.norm = bn.BatchNorm2d(self.out_channels)

    def forward(self, x):
        y = F.conv2d(x, self.weight, self.bias)
        return self.norm(y, y)


def test_a_sum_that_is_also_the_residual_is_left():
    net = settled(nn.Sequential(AddsItsSum(3, 4, 3)))
    assert foldable(net, images())["0.norm"].endswith("computes a sum that also goes to the layer as its residual")


class SamePadding(nn.Conv2d):
    """TensorFlow's "same" padding, by numbers made of sizes."""

    def forward(self, x):
        over = [
            max((math.ceil(int(size) / s) - 1) * s + (k - 1) * d + 1 - int(size), 0)
            for size, s, k, d in zip(x.shape[-2:], self.stride, self.kernel_size, self.dilation, strict=True)
        ]
        x = F.pad(x, [over[1] // 2, over[1] - over[1] // 2, over[0] // 2, over[0] - over[0] // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Doubled(SamePadding):
    def forward(self, x):
        return super().forward(x) * 2


class InvertedResidual(nn.Module):
    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(channels, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6())
        self.depth = nn.Sequential(
            SamePadding(12, 12, 3, stride=stride, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU6()
        )
        self.project = nn.Sequential(nn.Conv2d(12, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.stride = stride

    def forward(self, x):
        y = self.project(self.depth(self.expand(x)))
        return x + y if self.stride == 1 else y


@pytest.mark.slow
def test_a_mobile_network_with_padding_by_numbers():
    stem = [SamePadding(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU6()]
    net = nn.Sequential(*stem, InvertedResidual(8, 1), InvertedResidual(8, 2))
    found = answers(net, torch.randn(2, 3, 13, 18))
    assert len(found) == 7
    assert all(isinstance(each, Partner) for each in found.values())
    assert pickle.loads(pickle.dumps(fold(net, torch.randn(2, 3, 13, 18).double(), report=None)))


def test_a_convolution_that_does_more_than_pad_is_left():
    net = nn.Sequential(Doubled(3, 8, 3), nn.BatchNorm2d(8))
    assert (
        foldable(settled(net), images())["1"]
        == "'0' is a Doubled that may use its weight or input differently from torch.nn"
    )


class PadsItself(nn.Module):
    """The padding is in the forward around the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        size = math.ceil(x.shape[-1] / 2) % 3
        return self.bn(self.conv(F.pad(x, (size, size, size, size)))).relu()


class TakesAList(PadsItself):
    def forward(self, features):
        assert isinstance(features, list)
        return super().forward(torch.cat(features, 1))


def test_a_forward_that_takes_sizes_for_numbers_is_followed():
    assert answers(PadsItself(), images())["bn"] == Partner("conv", "before")


def test_a_forward_that_takes_a_list_is_followed():
    net = Written(lambda n, x: n.inner([x[:, :1], x[:, 1:]]), inner=TakesAList())
    assert answers(net, images())["inner.bn"] == Partner("inner.conv", "before")


class ChangesAList(nn.Module):
    """HRNet's modules write their results into the list that they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, features):
        features[0] = self.bn(self.conv(features[0]))
        return features


def test_a_list_that_a_module_changes_is_followed():
    def run(n, x):
        features = n.inner([x, x * 2])
        return n.bn(n.conv(features[0][:, :, : int(x.shape[-1]) - 2])) + features[1].sum()

    net = Written(run, inner=ChangesAList(), conv=nn.Conv2d(4, 2, 3), bn=nn.BatchNorm2d(2))
    assert set(map(str, answers(net, images()).values())) == {"'inner.conv' before it", "'conv' before it"}


class Decides(PadsItself):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) if float(x.abs().sum()) > 0 else y


class Caches(PadsItself):
    def forward(self, x):
        self.sizes = [*getattr(self, "sizes", []), int(x.shape[-1])]
        return self.bn(self.conv(x))


class NoGrad(PadsItself):
    def forward(self, x):
        size = int(x.shape[-1] % 2)
        with torch.no_grad():
            y = self.conv(F.pad(x, (size, size)))
        return self.bn(y)


@pytest.mark.parametrize(
    ("kind", "reason"), [(Decides, "DataDependent"), (Caches, "sets attributes"), (NoGrad, "no_grad")]
)
def test_a_forward_that_another_run_could_decide_otherwise_is_not_believed(kind, reason):
    model, x = settled(kind()), images()
    before = {**vars(model)}
    assert reason in foldable(model, x)["bn"]
    assert vars(model) == before


def test_looking_at_sizes_leaves_no_hooks():
    net = settled(PadsItself())
    fold(net, images(), report=None)
    assert not torch.nn.modules.module._has_any_global_hook()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("kind", ["before", "behind", "cat"])
def test_a_wrong_map_of_channels_is_found_on_the_example(monkeypatch, kind):
    """Channels that meet the wrong ones give other outputs."""
    from batchnorm.surgery.folding.arithmetic import Affine

    right = Affine.spread

    def turned(self, channels):
        return right(self, channels and channels[1:] + channels[:1])

    cases = {
        "before": (Written(LINEAR["transpose"], fc=nn.Linear(4, 8), bn=nn.BatchNorm1d(8)), nodes()),
        "behind": (Written(BEHIND["view"], fc=nn.Linear(108, 2), bn=nn.BatchNorm2d(3)), images()),
        "cat": (Written(lambda n, x: n.bn(torch.cat([n.a(x), n.b(x)], 1)), a=nn.Conv2d(3, 2, 3), b=nn.Conv2d(3, 2, 3),
                    bn=nn.BatchNorm2d(4)), images()),
    }  # fmt: skip
    net, x = cases[kind]
    monkeypatch.setattr(Affine, "spread", turned)
    with pytest.raises(ValueError, match="outputs that differ"):
        fold(settled(net), x, report=None)
