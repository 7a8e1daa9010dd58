"""Code that a graph would get wrong is not rewritten, and what is said about it."""

from __future__ import annotations

import abc
import operator
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from fingerprint import fingerprint
from surgery_checks import Block, ResNet, acts, assert_same, image, trained
from torch import nn
from torch.utils.checkpoint import checkpoint

from batchnorm.surgery import convert, revert


class Part(nn.Module):
    """A layer whose activation is a function, so that fusing it means rewriting this forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.register_buffer("count", torch.zeros(()))
        self.plain = torch.zeros(())
        self.seen: list = []

    def normalized(self, x):
        return F.relu(self.bn(self.conv(x)))

    def forward(self, x):
        return self.normalized(x)


class WithoutGrad(Part):
    def forward(self, x):
        with torch.no_grad():
            x = x * 2
        return self.normalized(x)


class Decorated(Part):
    @torch.no_grad()
    def forward(self, x):
        return self.normalized(x)


class Autocast(Part):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.normalized(x)


class Checkpoint(Part):
    def forward(self, x):
        return checkpoint(self.normalized, x, use_reentrant=False)


class Device(Part):
    def forward(self, x):
        with torch.device("cpu"):
            return self.normalized(x)


class SetsAttribute(Part):
    def forward(self, x):
        self.last = x
        return self.normalized(x)


class Appends(Part):
    def forward(self, x):
        self.seen.append(1)
        return self.normalized(x)


class CountsInBuffer(Part):
    def forward(self, x):
        self.count = self.count + 1
        return self.normalized(x)


class WritesPlainTensor(Part):
    def forward(self, x):
        self.plain.add_(1)
        return self.normalized(x)


class MakesConstant(Part):
    def forward(self, x):
        return self.normalized(x + torch.ones(()))


class PythonRandom(Part):
    def forward(self, x):
        return self.normalized(x * 2 if random.random() < 0.5 else x)


class TorchRandom(Part):
    def forward(self, x):
        return self.normalized(x * float(torch.rand(())))


class ByValue(Part):
    def forward(self, x):
        return self.normalized(x if x.sum() > 0 else -x)


class BySize(Part):
    def forward(self, x):
        return self.normalized(x if x.dim() == 4 else x[None])


class ByType(Part):
    def forward(self, x):
        return self.normalized(x if isinstance(x, torch.Tensor) else x[0])


class Optional(Part):
    def forward(self, x, mask=None):
        return self.normalized(x if mask is None else x * mask)


class Keywords(Part):
    def forward(self, x, **options):
        return self.normalized(x)


class Outside(Part):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = (nn.Conv2d(3, 3, 1),)

    def forward(self, x):
        return self.normalized(self.hidden[0](x))


CLOSED = {
    WithoutGrad: "context such as no_grad",
    Decorated: "context such as no_grad",
    Autocast: "context such as no_grad",
    Checkpoint: "context such as no_grad",
    Device: "context such as no_grad",
    SetsAttribute: "sets attributes",
    Appends: "sets attributes",
    CountsInBuffer: "sets attributes|TypeError",
    WritesPlainTensor: "sets attributes",
    MakesConstant: "sets attributes, makes constants",
    PythonRandom: "draws random numbers",
    TorchRandom: "draws random numbers",
    ByValue: "TraceError: symbolically traced variables",
    BySize: "TraceError: symbolically traced variables",
    ByType: "asks for the type of a value",
    Optional: "optional argument 'mask'",
    Keywords: "optional argument 'options'",
    Outside: "NameError",
}


@pytest.mark.parametrize(("kind", "reason"), CLOSED.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_code_that_a_graph_would_get_wrong_is_refused_with_the_reason(kind, reason):
    net, x = kind(), image()
    before = fingerprint(net)
    for example in (None, x):
        with pytest.raises(
            ValueError, match=rf"'the model itself' \({kind.__name__}\): .*{reason}.*or convert without"
        ):
            convert(net, fuse=True, example=example)
    assert fingerprint(net) == before
    assert acts(convert(net)) == {"bn": None}


@pytest.mark.parametrize("kind", CLOSED, ids=lambda kind: kind.__name__)
def test_the_rest_of_the_model_is_fused_and_a_warning_names_what_is_not(kind):
    net = nn.Sequential(Part(), kind(), Part())
    with pytest.warns(UserWarning, match=rf"got 1 around .* '1' \({kind.__name__}\).* converted and not fused"):
        result = convert(net, fuse=True)
    assert acts(result) == {"0.bn": "relu", "1.bn": None, "2.bn": "relu"}
    with pytest.warns(UserWarning, match="got 1 around"):
        convert(result, fuse=True)
    assert type(result[1]) is kind


def test_a_forward_that_was_put_on_the_instance_is_not_read():
    net = Part()
    net.forward = lambda x: x
    with pytest.raises(ValueError, match="forward was put on the instance"):
        convert(net, fuse=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_part_stays_scripted_and_does_not_hinder():
    x = image()
    net = trained(nn.Sequential(torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1))), nn.BatchNorm2d(3), nn.ReLU()), x)
    result = convert(net, fuse=True, memory="save")
    assert acts(result) == {"1": "relu"}
    assert isinstance(result[0], torch.jit.ScriptModule)
    torch.testing.assert_close(revert(result)(x), net(x))


class Abstract(Part, abc.ABC):
    """Has a metaclass."""


def test_a_class_with_a_metaclass_can_be_rewritten():
    result = convert(Abstract(), fuse=True)
    assert isinstance(result, Abstract)
    assert type(revert(result)) is Abstract


def test_a_compiled_model_is_refused():
    with pytest.raises(ValueError, match=r"before torch\.compile, got a compiled one"):
        convert(torch.compile(Part(), backend="eager"), fuse=True)


class Decides(nn.Module):
    """Code that cannot be traced, above blocks that can."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.Sequential(*parts)
        self.list = nn.ModuleList([Part()])

    def forward(self, x):
        return self.list[0](self.parts(x if x.sum() > 0 else -x))


def test_a_decision_at_the_top_does_not_keep_blocks_from_being_fused():
    x = image()
    net = trained(Decides(Block(3, 3), Part()), x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = convert(net, fuse=True, example=x)
    assert set(acts(result).values()) == {"relu"}
    assert type(result) is Decides
    assert_same(net, result, x)


class OneByOne(nn.Module):
    """Runs the parts of a Sequential one by one, and looks at what is between them."""

    def __init__(self, *, decide: bool) -> None:
        super().__init__()
        self.parts = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ELU())
        self.part = Part()
        self.decide = decide

    def forward(self, x):
        if self.decide and x.sum() > 1e9:
            x = -x
        between = []
        for part in self.parts:
            x = part(x)
            between.append(x)
        return self.part(sum(between))


@pytest.mark.parametrize("decide", [True, False])
@pytest.mark.parametrize("example", [True, False])
def test_parts_of_a_sequential_that_are_run_one_by_one_are_left(decide, example):
    x = image()
    net = trained(OneByOne(decide=decide), x)
    result = convert(net, fuse=True, example=x if example else None)
    assert acts(result) == {"parts.1": None, "part.bn": "relu"}
    assert_same(net, result, x)


def test_below_code_that_cannot_be_traced_an_example_shows_that_a_sequential_runs_its_parts():
    x = image()
    net = trained(Decides(nn.BatchNorm2d(3), nn.ReLU()), x)
    assert acts(convert(net, fuse=True)) == {"parts.0": None, "list.0.bn": "relu"}
    result = convert(net, fuse=True, example=x)
    assert acts(result) == {"parts.0": "relu", "list.0.bn": "relu"}
    assert_same(net, result, x)


class Reaches(nn.Module):
    """Calls a layer of another module, which also calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Part()

    def forward(self, x):
        return self.part(self.part.bn(x))


@pytest.mark.parametrize("example", [True, False])
def test_a_layer_that_two_modules_call_is_left(example):
    x = image()
    net = trained(Reaches(), x)
    assert acts(convert(net, fuse=True, example=x if example else None)) == {"part.bn": None}


class Unused(nn.Module):
    """One part never runs, and one runs by a method."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.never, self.method = Part(), Part(), Part()

    def forward(self, x):
        return self.method.normalized(self.part(x))


def test_what_never_runs_is_left_and_methods_of_parts_are_followed():
    x = image()
    net = trained(Unused(), x)
    for example in (x, None):
        result = convert(net, fuse=True, example=example)
        assert acts(result) == {"part.bn": "relu", "never.bn": None, "method.bn": "relu"}
        assert_same(net, result, x)


class WritesItsInput(Part):
    def forward(self, x):
        x += 1
        self.count.add_(1)
        x = operator.imul(x, 2)
        return self.normalized(x)


def test_what_a_forward_does_in_place_a_rewritten_one_does_too():
    net = WritesItsInput()
    result = convert(net, fuse=True)
    assert acts(result) == {"bn": "relu"}
    start = image()
    x, y = start.clone(), start.clone()
    torch.testing.assert_close(result(x), net(y))
    assert x.equal(y)
    assert x.equal(2 * (start + 1))
    assert result.count == net.count == 1
    x = start.clone()
    convert(net, fuse=True, example=[x, torch.tensor(1)])
    assert x.equal(start)


class WritesNumbers(Part):
    def forward(self, x):
        return self.normalized(x.add_(1).float())


def test_an_example_of_numbers_is_not_written_either():
    x = torch.arange(2 * 3 * 16).reshape(2, 3, 4, 4)
    before = x.clone()
    assert acts(convert(WritesNumbers(), fuse=True, example=x)) == {"bn": "relu"}
    assert x.equal(before)


class ByKeyword(nn.Module):
    """Calls a block by keyword, and takes two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Two()

    def forward(self, x, y):
        return self.block(y=y, x=x)


class Two(Part):
    def forward(self, x, y):
        return F.silu(self.bn(self.conv(x)) + y)


def test_arguments_by_keyword_and_an_example_that_is_a_mapping():
    net = ByKeyword()
    x, y = image(), image()
    result = convert(net, fuse=True, example={"x": x, "y": y})
    assert acts(result) == {"block.bn": "silu"}
    torch.testing.assert_close(result(x, y), net(x, y))
    assert revert(result).block(x, y).shape == x.shape


def test_a_graph_module_keeps_its_graph():
    x = image()
    traced = torch.fx.symbolic_trace(ResNet().eval())
    result = convert(traced, fuse=True, example=x)
    assert isinstance(result, torch.fx.GraphModule)
    assert result.graph.python_code("self").src == traced.graph.python_code("self").src
    assert_same(traced, result, x)


@pytest.mark.slow
def test_a_fused_model_can_be_traced_compiled_and_exported():
    x = image()
    net = convert(trained(ResNet(), x), fuse=True, example=x).eval()
    expected = net(x)
    torch.testing.assert_close(torch.fx.symbolic_trace(net)(x), expected)
    torch.testing.assert_close(torch.compile(net, backend="aot_eager", fullgraph=True)(x), expected)
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), expected)
