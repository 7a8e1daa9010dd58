"""convert(fuse=True): what is fused, what is not, and that nothing else can be told from the outside."""

from __future__ import annotations

import copy
import inspect
import operator
import pickle

import pytest
import torch
import torch.nn.functional as F
from fingerprint import fingerprint
from surgery_checks import ResNet, acts, assert_same, image, trained
from torch import nn

import batchnorm as bn
from batchnorm.kernels.activations import TABLE
from batchnorm.surgery import convert, revert


class Net(nn.Module):
    """Two branches of convolution and batch norm; what follows is given as a function of the module and the input."""

    def __init__(self, tail, **modules: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        for name, module in modules.items():
            self.add_module(name, module)
        self.tail = tail

    def forward(self, x):
        return self.tail(self, x)


def both(tail, *, example: bool = True, **modules: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A net and what it is converted to; they do the same, and the net is as before."""
    x = image()
    net = trained(Net(tail, **modules), x)
    before = fingerprint(net)
    result = convert(net, fuse=True, example=x if example else None)
    assert fingerprint(net) == before
    assert_same(net, result, x)
    assert_same(net, revert(result), x)
    assert list(result.state_dict()) == list(net.state_dict())
    return net, result


FUSED = {
    f"{way.__module__}.{way.__qualname__}": (way() if way is row.module else way, name, row.default)
    for name, row in TABLE.items()
    for way in (row.module, *row.functions)
}
FUSED |= {
    f"x.{method}": (lambda x, method=method: getattr(x, method)(), name, row.default)
    for name, row in TABLE.items()
    for method in row.methods
}
FUSED |= {
    "nn.ReLU in place": (nn.ReLU(inplace=True), "relu", 0.0),
    "nn.LeakyReLU": (nn.LeakyReLU(0.2), "leaky_relu", 0.2),
    "nn.ELU": (nn.ELU(0.7), "elu", 0.7),
    "F.relu in place": (lambda x: F.relu(x, inplace=True), "relu", 0.0),
    "F.relu by name": (lambda x: F.relu(input=x), "relu", 0.0),
    "F.leaky_relu": (lambda x: F.leaky_relu(x, 0.3), "leaky_relu", 0.3),
    "F.leaky_relu_": (lambda x: F.leaky_relu_(x, negative_slope=0.3), "leaky_relu", 0.3),
    "F.elu": (lambda x: F.elu(x, alpha=2), "elu", 2.0),
    "F.gelu": (lambda x: F.gelu(x, approximate="none"), "gelu", 0.0),
}


@pytest.mark.parametrize("example", [True, False], ids=["example", "no example"])
@pytest.mark.parametrize(("act", "name", "parameter"), FUSED.values(), ids=FUSED)
def test_an_activation_is_fused(act, name, parameter, example):
    if isinstance(act, nn.Module):
        _, result = both(lambda self, x: self.act(self.bn(self.conv(x))), act=act, example=example)
    else:
        _, result = both(lambda self, x: act(self.bn(self.conv(x))), example=example)
    assert (result.bn.act, result.bn.act_param) == (name, parameter)


ADDITIONS = {
    "+": lambda a, b: a + b,
    "+ on the other side": lambda a, b: b + a,
    "torch.add": torch.add,
    "torch.add alpha=1": lambda a, b: torch.add(a, b, alpha=1),
    "x.add": lambda a, b: a.add(b),
    "x.add_": lambda a, b: a.add_(b),
    "+=": operator.iadd,
}


@pytest.mark.parametrize("add", ADDITIONS.values(), ids=ADDITIONS)
def test_an_addition_before_the_activation_is_fused(add):
    _, result = both(lambda self, x: F.relu(add(self.bn(self.conv(x)), x)))
    assert acts(result) == {"bn": "relu", "bn2": None}
    assert "add" not in str(forward_code(result))


def forward_code(model: nn.Module) -> str:
    return model._codes[0].source


def test_a_resnet_is_fused_to_the_last_activation_and_is_still_a_resnet():
    x = image()
    net = trained(ResNet(), x)
    before = fingerprint(net)
    result = convert(net, fuse=True, example=x)
    assert fingerprint(net) == before
    assert_same(net, result, x)
    shortcut = "layer2.0.downsample.1"
    assert acts(result) == {path: None if path == shortcut else "relu" for path in acts(net)}
    assert isinstance(result, ResNet)
    assert type(result.layer1[0]).__name__ == "FusedBlock"
    assert [*dict(result.named_modules())] == [*dict(net.named_modules())]
    for a, b in ((net, result), (result, net)):
        assert b.load_state_dict(a.state_dict(), strict=True)
    back = revert(result)
    assert [type(m) for m in back.modules()] == [type(m) for m in net.modules()]
    assert_same(net, back, x)


def test_without_an_example_additions_are_left():
    _, result = both(lambda self, x: F.relu(self.bn(self.conv(x)) + x), example=False)
    assert acts(result) == {"bn": None, "bn2": None}
    assert type(result) is Net


def test_of_two_normalized_operands_exactly_one_is_fused():
    _, result = both(lambda self, x: F.relu(self.bn(self.conv(x)) + self.bn2(self.conv2(x))))
    assert sorted(acts(result).values(), key=str) == [None, "relu"]


# what is left as it is, with the result of a layer and the input

LEFT = {
    "used elsewhere": lambda self, x: (y := self.bn(self.conv(x))) * F.relu(y),
    "used beside the sum": lambda self, x: (y := self.bn(self.conv(x))) * F.relu(y + x),
    "written and used": lambda self, x: [y := self.bn(self.conv(x)), F.relu_(y)][0],
    "returned too": lambda self, x: torch.cat([y := self.bn(self.conv(x)), y.relu()]),
    "gelu by tanh": lambda self, x: F.gelu(self.bn(self.conv(x)), approximate="tanh"),
    "another activation": lambda self, x: torch.sigmoid(self.bn(self.conv(x))),
    "between them": lambda self, x: F.relu(2 * self.bn(self.conv(x))),
    "a relu by another name": lambda self, x: F.threshold(self.bn(self.conv(x)), 0.0, 0.0),
    "alpha": lambda self, x: F.relu(torch.add(self.bn(self.conv(x)), x, alpha=2)),
    "a number": lambda self, x: F.relu(self.bn(self.conv(x)) + 1),
    "broadcast": lambda self, x: F.relu(self.bn(self.conv(x)) + x.mean((2, 3), keepdim=True)),
    "broadcast the layer": lambda self, x: F.relu(self.bn(self.conv(x)) + x[None]),
    "added to itself": lambda self, x: F.relu((y := self.bn(self.conv(x))) + y),
    "into the other, +=": lambda self, x: [r := 2 * x, F.relu(operator.iadd(r, self.bn(self.conv(x)))), r][1] * r,
    "into the input": lambda self, x: F.relu(operator.iadd(x, self.bn(self.conv(2 * x)))),
    "called twice": lambda self, x: F.relu(self.bn(self.conv(x))) + F.silu(self.bn(self.conv2(x))),
    "the sum used elsewhere": lambda self, x: (y := self.bn(self.conv(x)) + x) * F.relu(y),
    "written after it": lambda self, x: F.leaky_relu(self.bn(self.conv(x))).mul_(2),
}


@pytest.mark.parametrize("example", [True, False], ids=["example", "no example"])
@pytest.mark.parametrize("tail", LEFT.values(), ids=LEFT)
def test_it_is_left_as_it_is(tail, example):
    net, result = both(tail, example=example)
    assert acts(result) == {"bn": None, "bn2": None}
    assert type(result) is Net
    assert [type(m) for m in revert(result).modules()] == [type(m) for m in net.modules()]


def test_a_layer_does_not_run_after_its_input_is_written():
    x = image()
    net = trained(Net(lambda self, x: [y := 2 * x, z := self.bn(y), r := y.sigmoid_(), F.relu(z + r)][-1]), x)
    result = convert(net, fuse=True, example=x)  # which has no gradients to compare: batch norm needs its input
    assert acts(result)["bn"] is None
    assert result(x).equal(convert(net)(x))


def test_other_types_are_not_added():
    x = image()
    net = trained(Net(lambda self, x: F.relu(self.bn(self.conv(x)) + x.double())), x)
    assert acts(convert(net, fuse=True))["bn"] is None
    assert acts(convert(net.half().float(), fuse=True, example=x))["bn"] is None


def test_an_activation_module_elsewhere_in_the_code_keeps_working():
    _, result = both(lambda self, x: self.act(self.act(self.conv2(x)) + self.act(self.bn(self.conv(x)))), act=nn.ELU())
    assert acts(result) == {"bn": "elu", "bn2": None}
    assert type(result.act) is nn.ELU


def test_one_activation_at_many_places_of_a_sequential():
    act = nn.SiLU()
    x = image()
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), act, nn.BatchNorm2d(3), act, nn.Conv2d(3, 3, 1), act)
    net = trained(net, x)
    result = convert(net, fuse=True, example=x)
    assert_same(net, result, x)
    assert acts(result) == {"1": "silu", "3": "silu"}
    assert type(result[6]) is nn.SiLU
    assert "SiLU(), applied by" in repr(result[2])
    back = revert(result)
    assert back[2] is back[4] is back[6]


def test_a_layer_at_the_end_of_an_inner_sequential():
    x = image()
    inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    net = trained(nn.Sequential(inner, nn.ReLU()), x)
    assert acts(convert(net, fuse=True, example=x)) == {"0.1": "relu"}
    inner.register_forward_hook(lambda module, args, output: None)
    assert acts(convert(net, fuse=True, example=x)) == {"0.1": None}


def test_a_layer_under_two_names_is_left():
    x = image()
    shared = nn.BatchNorm2d(3)
    net = trained(nn.Sequential(shared, nn.ReLU(), shared, nn.SiLU()), x)
    result = convert(net, fuse=True, example=x)
    assert acts(result) == {"0": None}
    assert result[0] is result[2]


@pytest.mark.parametrize("where", ["bn", "act"])
@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_where_a_hook_looks_nothing_is_fused(where, register):
    x = image()
    net = trained(Net(lambda self, x: self.act(self.bn(self.conv(x))), act=nn.ReLU()), x)
    assert acts(convert(net, fuse=True, example=x))["bn"] == "relu"
    getattr(net.get_submodule(where), register)(lambda *args: None)
    assert acts(convert(net, fuse=True, example=x))["bn"] is None


def test_hooks_of_the_module_around_and_of_everything_else_see_what_they_saw():
    x = image()
    net = trained(ResNet(), x)
    seen: list[tuple[str, torch.Tensor]] = []
    for name, module in net.named_modules():
        if not isinstance(module, (nn.BatchNorm2d, nn.ReLU)):
            module.register_forward_hook(lambda module, args, output, name=name: seen.append((name, output.clone())))
    result = convert(net, fuse=True, example=x).eval()
    seen.clear()
    net.eval()(x)
    expected = list(seen)
    seen.clear()
    result(x)
    assert [name for name, _ in seen] == [name for name, _ in expected]
    torch.testing.assert_close([y for _, y in seen], [y for _, y in expected])


class ByMode(Net):
    """What the forward does depends on its mode."""

    def forward(self, x):
        y = F.relu(self.bn(self.conv(x)))
        y = F.dropout(y, 0.5, self.training)
        if self.training:
            return y + F.relu(self.bn2(self.conv2(x)))
        return y


def test_train_and_eval_mode_are_fused_apart_and_followed():
    x = image()
    net = trained(ByMode(None), x)
    result = convert(net, fuse=True, example=x)
    assert acts(result) == {"bn": "relu", "bn2": "relu"}
    assert_same(net, result, x)
    assert_same(net, pickle.loads(pickle.dumps(result)), x)
    assert_same(net, convert(result, fuse=True, example=x), x)
    assert list(inspect.signature(result.forward).parameters) == ["x"]
    torch.testing.assert_close(result.eval()(x), net.eval()(x))
    assert result.train()(x).shape == x.shape


class Disagreeing(Net):
    """The layer's result is seen by something else in one mode only."""

    def forward(self, x):
        y = self.bn(self.conv(x))
        return F.relu(y) if self.training else F.relu(y) + y


def test_modes_that_disagree_are_left():
    x = image()
    net = trained(Disagreeing(None), x)
    assert acts(convert(net, fuse=True, example=x)) == {"bn": None, "bn2": None}
    assert_same(net, convert(net, fuse=True, example=x), x)


class OtherActivation(Net):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return F.relu(y) if self.training else F.silu(y)


def test_modes_with_different_activations_are_left():
    x = image()
    net = trained(OtherActivation(None), x)
    assert acts(convert(net, fuse=True)) == {"bn": None, "bn2": None}
    assert_same(net, convert(net, fuse=True, example=x), x)


def test_a_layer_with_an_activation_of_its_own_gets_no_other():
    x = image()
    net = trained(nn.Sequential(bn.BatchNorm2d(3, act="elu"), nn.SiLU()), x)
    result = convert(net, fuse=True)
    assert acts(result) == {"0": "elu"}
    assert_same(net, result, x)


def test_a_layer_with_a_second_name_is_left():
    net = Net(lambda self, x: F.relu(self.bn(self.conv(x))))
    net.alias = net.bn
    assert acts(convert(net, fuse=True))["bn"] is None


def test_an_activation_with_two_names_is_taken_away_under_none_of_them():
    x = image()
    act = nn.ELU()
    net = trained(Net(lambda self, x: self.b(self.bn(self.conv(x))), a=act, b=act), x)
    result = convert(net, fuse=True)
    assert acts(result)["bn"] == "elu"
    assert result.a is result.b
    assert_same(net, result, x)


class Borrows(nn.Module):
    """Calls an activation of a part of it, which calls it behind a layer."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x) + self.part.get_submodule("1" if isinstance(self.part, nn.Sequential) else "act")(x)


@pytest.mark.parametrize("example", [True, False])
def test_an_activation_that_another_module_calls_too_keeps_working(example):
    x = image()
    chain = nn.Sequential(nn.BatchNorm2d(3), nn.ELU())
    for part in (chain, Net(lambda self, x: self.act(self.bn(x)), act=nn.ELU())):
        net = trained(Borrows(part), x)
        result = convert(net, fuse=True, example=x if example else None)
        assert_same(net, result, x)
        assert_same(net, revert(result), x)


def test_frozen_layers_are_fused_and_stay_frozen():
    x = image()
    net = bn.freeze(trained(ResNet(), x), affine=True)
    result = convert(net, fuse=True, example=x)
    assert_same(net, result, x)
    assert acts(result)["bn1"] == "relu"
    assert not result.train().bn1.training
    assert not result.bn1.weight.requires_grad
    assert bn.unfreeze(result).bn1.training
    assert result.bn1.weight.requires_grad


def test_a_fused_model_survives_copies_and_pickle_and_is_reverted_after_them():
    x = image()
    net = trained(ResNet(), x)
    result = convert(net, fuse=True, example=x)
    for other in (copy.deepcopy(result), pickle.loads(pickle.dumps(result)), copy.deepcopy(copy.deepcopy(result))):
        assert_same(net, other, x)
        assert isinstance(other, ResNet)
        assert [type(m) for m in revert(other).modules()] == [type(m) for m in net.modules()]


def test_converting_twice_changes_nothing_more():
    x = image()
    net = trained(ResNet(), x)
    once = convert(net, fuse=True, example=x)
    twice = convert(once, fuse=True, example=x)
    assert [type(m).__name__ for m in twice.modules()] == [type(m).__name__ for m in once.modules()]
    assert_same(net, twice, x)
    assert_same(net, revert(twice), x)


def test_in_two_steps_what_the_first_left_is_fused_and_all_of_it_is_reverted():
    x = image()
    net = trained(ResNet(), x)
    twice = convert(convert(net, fuse=True), fuse=True, example=x)
    assert_same(net, twice, x)
    assert acts(twice)["layer1.0.bn2"] == "relu"
    assert pickle.loads(pickle.dumps(twice)).layer1[0].bn2.act == "relu"
    assert [type(m) for m in revert(twice).modules()] == [type(m) for m in net.modules()]


def test_training_flags_of_activations_are_followed_while_they_are_away():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    result = convert(net, fuse=True)
    result.eval()
    assert not revert(result)[1].training


def test_in_place_keeps_objects_and_a_refusal_changes_nothing():
    x = image()
    net = trained(ResNet(), x)
    expected, parameters, layer = copy.deepcopy(net), list(net.parameters()), net.bn1
    assert convert(net, fuse=True, example=x, inplace=True) is net
    assert all(p is q for p, q in zip(net.parameters(), parameters, strict=True))
    assert net.bn1 is layer
    assert layer.act == "relu"
    assert_same(expected, net, x)
    assert revert(net, inplace=True) is net
    assert [type(m) for m in net.modules()] == [type(m) for m in expected.modules()]
    before = fingerprint(net)
    with pytest.raises(ValueError, match="needs an example on which the model runs"):
        convert(net, fuse=True, example=x[:, :2], inplace=True)
    assert fingerprint(net) == before
