"""convert(memory="save"): fewer tensors are kept, and gradients are the same bits."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from fingerprint import fingerprint
from surgery_checks import ResNet, assert_same, image, trained
from torch import nn

import batchnorm as bn
from batchnorm import memory
from batchnorm.surgery import convert, find, revert
from batchnorm.surgery.saving import _open


class Looks(nn.Module):
    """Notes whether results are being saved for while it runs."""

    def __init__(self, error: Exception | type[BaseException] | None = None) -> None:
        super().__init__()
        self.error, self.seen = error, []

    def forward(self, x):
        self.seen.append(is_saving())
        if self.error is not None:
            raise self.error
        return x


def is_saving() -> bool:
    return memory._recipes.by_address is not None


def test_layers_are_told_and_the_forward_of_the_whole_model_saves():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(bn.BatchNorm2d(3), Looks()))
    before = fingerprint(net)
    result = convert(net, memory="save")
    assert fingerprint(net) == before
    assert [layer.memory for layer in find(result).values()] == ["save", "save"]
    for model in (result, copy.deepcopy(result), pickle.loads(pickle.dumps(result)), convert(result, memory="save")):
        looks = model[1][1]
        looks.seen.clear()
        model(image())
        assert looks.seen == [True]
        assert not is_saving()
        assert not _open.blocks
        model[1](image())
        assert looks.seen == [True, False]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_after_an_error_it_does_not_go_on_saving(error):
    result = convert(nn.Sequential(nn.BatchNorm2d(3), Looks(error)), memory="save")
    with pytest.raises(type(error)):
        result(image())
    result[1].error = None
    result(image())  # torch calls no hook after Ctrl-C, so that it ends with the next forward
    assert not is_saving()
    assert not _open.blocks


def test_an_error_ends_the_saving_at_once():
    result = convert(nn.Sequential(nn.BatchNorm2d(3), Looks(ValueError("no"))), memory="save")
    with pytest.raises(ValueError, match="no"):
        result(image())
    assert not is_saving()
    assert not _open.blocks


def test_an_error_before_the_block_was_entered_leaves_nothing():
    result = convert(nn.Sequential(nn.BatchNorm2d(3)), memory="save")
    result.register_forward_pre_hook(lambda module, args: 1 / 0, prepend=True)
    with pytest.raises(ZeroDivisionError):
        result(image())
    assert not is_saving()


def test_models_within_models_save_until_the_outermost_ends():
    inner = convert(nn.Sequential(nn.BatchNorm2d(3)), memory="save")
    outer = convert(nn.Sequential(inner, Looks()), memory="save")
    outer(image())
    assert outer[1].seen == [True]
    assert not is_saving()


def test_reverting_stops_it():
    result = revert(convert(nn.Sequential(nn.BatchNorm2d(3), Looks()), memory="save"))
    result(image())
    assert result[1].seen == [False]
    assert not result._forward_hooks
    assert not result._forward_pre_hooks
    assert not result._forward_hooks_always_called


@pytest.mark.slow
@pytest.mark.parametrize("fuse", [True, False])
def test_gradients_have_the_same_bits(fuse):
    x = image()
    net = trained(ResNet(), x)
    saving, plain = convert(net, fuse=fuse, example=x, memory="save"), convert(net, fuse=fuse, example=x)
    assert_same(net, saving, x)
    for model in (saving, plain):
        torch.manual_seed(0)
        model(x).square().sum().backward()
    for p, q in zip(saving.parameters(), plain.parameters(), strict=True):
        assert p.grad.equal(q.grad)


class Shortcut(nn.Module):
    """A leaky layer whose input is needed by something else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return F.leaky_relu(self.bn(y)) + y


class ToItself(Shortcut):
    def forward(self, x):
        y = self.conv(x)
        return F.leaky_relu(self.bn(y) + y)


class Alone(Shortcut):
    def forward(self, x):
        return F.leaky_relu(self.bn(self.conv(x)) + x)


@pytest.mark.parametrize(("kind", "saves"), [(Shortcut, None), (ToItself, None), (Alone, "save")])
def test_a_result_is_written_over_an_input_only_where_nothing_else_reads_it(kind, saves):
    x = image()
    net = trained(nn.Sequential(kind(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.LeakyReLU(), nn.Conv2d(3, 3, 1)), x)
    result = convert(net, fuse=True, example=x, memory="save")
    assert result[0].bn.act == result[2].act == "leaky_relu"
    assert (result[0].bn.memory, result[2].memory) == (saves, "save")
    assert_same(net, result, x)


def test_a_hook_that_sees_the_input_keeps_it_from_being_written_over():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), bn.BatchNorm2d(3, act="leaky_relu"))
    assert convert(net, memory="save")[1].memory == "save"
    net[0].register_forward_hook(lambda module, args, output: None)
    assert convert(net, memory="save")[1].memory is None


class Again(nn.Module):
    """Calls a layer of a part of it once more, on what others read too."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Conv2d(3, 3, 1), bn.BatchNorm2d(3, act="leaky_relu"))

    def forward(self, x):
        x = x * 1
        return self.part(x) + self.part[1](x) + x


def test_a_layer_that_is_called_elsewhere_too_does_not_write():
    x = image()
    net = trained(Again(), x)
    result = convert(net, example=x, memory="save")
    assert result.part[1].memory is None
    assert_same(net, result, x)


def test_another_word_for_memory_is_refused():
    with pytest.raises(ValueError, match="memory must be None or 'save', got 'less'"):
        convert(nn.BatchNorm1d(3), memory="less")


@pytest.mark.slow
def test_a_compiled_model_leaves_memory_to_the_compiler():
    x = image()
    net = convert(trained(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), x), fuse=True, memory="save")
    expected = copy.deepcopy(net)(x)
    torch.testing.assert_close(torch.compile(net, backend="aot_eager", fullgraph=True)(x), expected)
