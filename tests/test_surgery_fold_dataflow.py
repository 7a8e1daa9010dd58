"""fold finds neighbours in the code: whatever the order of registration, and only where nothing else is concerned."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from surgery_checks import ResNet, image
from test_surgery_fold import quiet, settled
from torch import nn
from torch.nn.utils import parametrize, prune

import batchnorm as bn
from batchnorm.surgery import Partner, foldable


class Net(nn.Module):
    """A convolution, batch norm, and a forward that is given as a function; registered the other way round."""

    def __init__(self, run, **modules: nn.Module) -> None:
        super().__init__()
        self.bn = settled(nn.BatchNorm2d(6))
        self.conv = nn.Conv2d(6, 6, 1)
        for name, module in modules.items():
            self.add_module(name, module)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def checked(net: nn.Module, x: torch.Tensor) -> dict[str, Partner | str]:
    """What is foldable with an example, after the folded model was compared in float64."""
    net = net.double().eval()
    x = x.double()
    folded = quiet(net, x)
    answers = foldable(net, x)
    assert bn.find(folded).keys() == {path for path, answer in answers.items() if isinstance(answer, str)}
    torch.testing.assert_close(folded(x.clone()), net(x.clone()), rtol=1e-11, atol=1e-11)
    return answers


def features() -> torch.Tensor:
    return torch.randn(2, 6, 4, 5)


BEFORE, BEHIND = Partner("conv", "before"), Partner("conv", "behind")
FOLDED = {
    "one behind the other": (lambda n, x: n.bn(n.conv(x)), {}, BEFORE),
    "a sum behind it": (lambda n, x: F.relu(n.bn(n.conv(x)) + x), {}, BEFORE),
    "the other order": (lambda n, x: n.conv(n.bn(x)), {}, BEHIND),
    "identity between": (lambda n, x: n.bn(n.id(n.conv(x))), {"id": nn.Identity()}, BEFORE),
    "dropout between": (lambda n, x: n.bn(n.drop(n.conv(x))), {"drop": nn.Dropout2d()}, BEFORE),
    "the other order, dropout": (lambda n, x: n.conv(n.drop(n.bn(x))), {"drop": nn.Dropout(inplace=True)}, BEHIND),
    "something else in between": (lambda n, x: [y := n.conv(x), x.sin(), n.bn(y)][2], {}, BEFORE),
    "written later": (lambda n, x: n.bn(n.conv(x)).relu_(), {}, BEFORE),
    "an input that others read": (lambda n, x: n.conv(n.bn(x)) + x, {}, BEHIND),
    "an input that is written before": (lambda n, x: n.bn(n.conv(x.mul_(2))), {}, BEFORE),
    "a parameter read in between": (
        lambda n, x: [y := n.bn(x), p := n.act.weight, n.conv(y) * p.sum()][2], {"act": nn.PReLU()}, BEHIND),
    "in a branch by mode": (lambda n, x: n.bn(n.conv(x)) if not n.training else n.bn(x), {}, BEFORE),
    "two results": (lambda n, x: (n.bn(n.conv(x)), x.sum()), {}, BEFORE),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDED)
def test_neighbours_are_found(case):
    run, modules, partner = FOLDED[case]
    assert checked(Net(run, **modules), features()) == {"bn": partner}
    if "mode" not in case:  # without an example, both modes are taken to run
        assert foldable(Net(run, **modules)) == {"bn": partner}


def hooked(module: nn.Module, kind: str = "forward_hook") -> nn.Module:
    getattr(module, f"register_{kind}")(lambda *args: None)
    return module


class Square(nn.Module):
    def forward(self, x):
        return x * x


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


NEITHER = "no convolution or linear layer is next to it: "
LEFT = {
    "called twice": (lambda n, x: n.bn(n.conv(n.conv(x))), {}, "'conv' is called 2 times"),
    "called twice by itself": (lambda n, x: n.bn(n.bn(n.conv(x))), {}, "it is called 2 times"),
    "called in two branches": (lambda n, x: n.bn(n.conv(x)) + n.conv(x), {}, "'conv' is called 2 times"),
    "called in a loop": (
        lambda n, x: [x := n.bn(n.conv(x)) for _ in range(2)][-1], {}, "it is called 2 times"),
    "a result that is used again": (
        lambda n, x: [y := n.conv(x), n.bn(y) + y][1], {}, "'conv' has a result that also goes to add"),
    "a result that is returned": (
        lambda n, x: [y := n.conv(x), (n.bn(y), y)][1], {}, "'conv' has a result that also goes to the output"),
    "a result that is written": (
        lambda n, x: [y := n.conv(x), operator.iadd(y, 1), n.bn(y)][2], {},
        "'conv' has a result that also goes to iadd"),
    "a normalized result that is used again": (
        lambda n, x: [y := n.bn(x), n.conv(y) + y][1], {},
        NEITHER + "an input before it, 'conv', add behind it"),
    "function between": (lambda n, x: n.bn(F.relu(n.conv(x))), {}, NEITHER + "relu before it, the output behind"),
    "module between": (lambda n, x: n.bn(n.act(n.conv(x))), {"act": nn.ReLU()}, NEITHER + "'act' before it"),
    "functional dropout": (lambda n, x: n.bn(F.dropout(n.conv(x), 0.5, n.training)), {}, NEITHER + "dropout before"),
    "behind a concat": (
        lambda n, x: n.bn(torch.cat([n.conv(x[:, :3].repeat(1, 2, 1, 1))[:, :3], x[:, :3]], 1)), {},
        NEITHER + "cat before it"),
    "an input that is written over": (
        lambda n, x: [y := n.bn(x), x.add_(1), n.conv(y)][2], {}, "'conv' runs after other code, which may overwrite"),
    "output_size": (
        lambda n, x: n.bn(n.up(x, [4, 5])), {"up": nn.ConvTranspose2d(6, 6, 1)},
        "'up' is called with more than its input, or with keyword arguments"),
    "weight read elsewhere": (
        lambda n, x: n.bn(n.conv(x)) + F.conv2d(x, n.conv.weight), {}, "'conv' has a weight that other code reads"),
    "gamma read elsewhere": (
        lambda n, x: n.bn(n.conv(x)) + n.bn.weight.sum(), {}, "it has a weight that other code reads"),
    "hook on the convolution": (
        lambda n, x: n.bn(n.own(x)), {"own": hooked(nn.Conv2d(6, 6, 1))}, "'own' has hooks that see its input"),
    "pre-hook on the convolution": (
        lambda n, x: n.bn(n.own(x)), {"own": hooked(nn.Conv2d(6, 6, 1), "forward_pre_hook")}, "'own' has hooks"),
    "hook on what is between": (
        lambda n, x: n.bn(n.id(n.conv(x))), {"id": hooked(nn.Identity())}, NEITHER + "'id' before it"),
    "hook on what is around": (
        lambda n, x: n.bn(n.seq(x)), {"seq": hooked(nn.Sequential(nn.Conv2d(6, 6, 1)))}, NEITHER + "'seq' before it"),
    "a subclass": (
        lambda n, x: n.bn(n.own(x)), {"own": Scaled(6, 6, 1)}, "'own' is a Scaled that may use its weight or input"),
    "weight norm": (
        lambda n, x: n.bn(n.own(x)), {"own": nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 1))},
        "'own' is a ParametrizedConv2d that may use its weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_layers_are_left_with_the_reason(case):
    run, modules, reason = LEFT[case]
    net = Net(run, **copy.deepcopy(modules))
    for answers in (checked(net, features()), foldable(net)):
        assert answers["bn"].startswith(reason)


class Padded(nn.Conv2d):
    """As networks from TensorFlow have it: it pads on one side more than on the other."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Clipped(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias).clamp(-1, 1)


class Biasless(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, None)


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_of_a_class_of_its_own_takes_what_is_behind_it(bias):
    net = Net(lambda n, x: n.bn(n.own(x)), own=Padded(6, 6, 2, bias=bias))
    for answers in (checked(net, features()), foldable(net)):
        assert answers["bn"] == Partner("own", "before")


@pytest.mark.parametrize("kind", [Clipped, Biasless])
def test_a_convolution_that_does_something_else_is_left(kind):
    net = Net(lambda n, x: n.bn(n.own(x)), own=kind(6, 6, 1, bias=False))
    assert "that may use its weight or input differently from torch.nn" in foldable(net, features())["bn"]


def test_what_pads_takes_nothing_from_before_it():
    net = Net(lambda n, x: n.own(n.bn(x)), own=Padded(6, 6, 2))
    assert "that may use its weight or input differently from torch.nn" in foldable(net, features())["bn"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x, rate=None, *, skip=True):
        y = self.conv(x)
        if rate:
            y = y * rate
        return self.bn(y) + x if skip else self.bn(y)


OPTIONS = {
    "none": (lambda n, x: n.own(x), True),
    "a keyword": (lambda n, x: n.own(x, skip=False), True),
    "one that changes nothing": (lambda n, x: n.own(x, 0.0), True),
    "one that comes between": (lambda n, x: n.own(x, 0.5), False),
    "a tensor": (lambda n, x: n.own(x, x.mean()), False),
    "different ones": (lambda n, x: n.own(n.own(x), skip=False), False),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_optional_arguments_are_those_of_the_example(case):
    run, folds = OPTIONS[case]
    net = Net(run, own=Block())
    answer = checked(net, features())["own.bn"]
    assert (answer == Partner("own.conv", "before")) is folds
    assert "optional argument" in foldable(net)["own.bn"]


def test_a_pruned_weight_is_left():
    net = Net(lambda n, x: n.bn(n.own(x)), own=prune.l1_unstructured(nn.Conv2d(6, 6, 1), "weight", 0.3))
    assert (
        foldable(net, features()) == foldable(net) == {"bn": "'own' has a weight that is computed from other tensors"}
    )


def test_a_residual_that_is_the_result_itself_is_left():
    net = Net(lambda n, x: [y := n.conv(x), n.ours(y, y)][1], ours=settled(bn.BatchNorm2d(6, act="relu")))
    del net.bn
    assert checked(net, features()) == {"ours": "'conv' has a result that also goes to the layer as its residual"}


def test_what_is_behind_an_activation_of_a_layer_is_not_folded_through_it():
    net = nn.Sequential(nn.Conv2d(6, 6, 1), settled(bn.BatchNorm2d(6, act="elu")), settled(nn.BatchNorm2d(6)))
    answers = checked(net, features())
    assert answers == {"1": Partner("0", "before"), "2": NEITHER + "'1' before it, the output behind it"}


def test_a_call_by_keyword_is_left():
    net = Net(lambda n, x: n.bn(input=n.conv(x)))
    assert checked(net, features()) == {"bn": "it is called with more than its input, or with keyword arguments"}


# --- across modules -------------------------------------------------------------------------------------------


class Returns(nn.Module):
    """Ends in a convolution, or begins with one."""

    def __init__(self, *, last: bool) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(6, 6, 1), last

    def forward(self, x):
        return self.conv(x.relu()) if self.last else self.conv(x).relu()


ACROSS = {
    "a Sequential": (lambda n, x: n.bn(n.seq(x)), nn.Sequential(nn.ReLU(), nn.Conv2d(6, 6, 1)), ("seq.1", "before")),
    "nested Sequentials": (
        lambda n, x: n.bn(n.seq(x)), nn.Sequential(nn.Sequential(nn.Conv2d(6, 6, 1), nn.Identity())),
        ("seq.0.0", "before")),
    "a module's result": (lambda n, x: n.bn(n.seq(x)), Returns(last=True), ("seq.conv", "before")),
    "a module's input": (lambda n, x: n.seq(n.bn(x)), Returns(last=False), ("seq.conv", "behind")),
    "a Sequential behind": (lambda n, x: n.seq(n.bn(x)), nn.Sequential(nn.Conv2d(6, 6, 1)), ("seq.0", "behind")),
    "a list": (lambda n, x: n.bn(n.seq[0](x)), nn.ModuleList([nn.Conv2d(6, 6, 1)]), ("seq.0", "before")),
}  # fmt: skip


@pytest.mark.parametrize("case", ACROSS)
def test_neighbours_in_other_modules(case):
    run, module, partner = ACROSS[case]
    net = Net(run, seq=copy.deepcopy(module))
    assert checked(net, features()) == foldable(net) == {"bn": Partner(*partner)}


def test_batch_norm_inside_of_a_module_behind_a_convolution():
    inner = nn.Sequential(settled(nn.BatchNorm2d(6)), nn.ReLU())
    net = nn.Sequential(nn.Conv2d(6, 6, 1), inner)
    assert checked(net, features()) == foldable(net) == {"1.0": Partner("0", "before")}


def test_a_module_that_is_called_twice_is_folded_inside_and_not_across_its_border():
    inside = nn.Sequential(nn.Conv2d(6, 6, 1), settled(nn.BatchNorm2d(6)), nn.Conv2d(6, 6, 1))
    net = Net(lambda n, x: n.bn(n.inside(n.inside(x))), inside=inside)
    answers = checked(net, features())
    assert answers["inside.1"] == Partner("inside.0", "before")
    assert answers["bn"] == NEITHER + "'inside' before it, the output behind it"


def test_a_module_under_two_names_is_folded_inside():
    inside = nn.Sequential(nn.Conv2d(6, 6, 1), settled(nn.BatchNorm2d(6)))
    net = nn.Sequential(inside, nn.ReLU(), inside)
    assert checked(net, features()) == {"0.1": Partner("0.0", "before")}


def test_a_layer_under_two_names_is_left():
    norm, conv = settled(nn.BatchNorm2d(6)), nn.Conv2d(6, 6, 1)
    x = features()
    assert checked(nn.Sequential(nn.Conv2d(6, 6, 1), norm, nn.ReLU(), norm), x) == {"1": "it has several names"}
    assert checked(nn.Sequential(conv, settled(nn.BatchNorm2d(6)), conv), x)["1"].startswith("'0' has several names")


def test_tied_weights_are_left():
    net = Net(lambda n, x: n.other(n.bn(n.conv(x))), other=nn.Conv2d(6, 6, 1))
    net.other.weight = net.conv.weight
    reason = "'conv' shares its weight with another module; 'other' shares its weight with another module"
    assert checked(net, features()) == {"bn": reason}
    net = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6))
    net[3].bias = net[1].bias
    assert checked(net, features())["1"] == "it shares its bias with another module"


class Reaches(nn.Module):
    """Calls a convolution of another module, which also calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Conv2d(6, 6, 1), settled(nn.BatchNorm2d(6)))

    def forward(self, x):
        return self.part(self.part[0](x))


def test_a_convolution_that_two_modules_call_is_left():
    assert checked(Reaches(), features()) == {"part.1": "'part.0' is called 2 times"}
    assert foldable(Reaches()) == {"part.1": "'part.0' is called 2 times"}


class Detour(nn.Module):
    """Code that cannot be traced, which also calls a part of a part by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Net(lambda n, x: n.bn(n.seq(x)), seq=nn.Sequential(nn.Conv2d(6, 6, 1)))

    def forward(self, x):
        return self.part(x if x.sum() < 1e9 else -x) + self.part.seq(x)


def test_a_part_that_others_call_too_is_not_seen_through():
    assert checked(Detour(), features()) == {"part.bn": NEITHER + "'part.seq' before it, the output behind it"}


class Decides(nn.Module):
    """Code that cannot be traced, around a layer and around code that can."""

    def __init__(self, *, one_by_one: bool) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Conv2d(6, 6, 1), settled(nn.BatchNorm2d(6)))
        self.conv, self.bn = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.one_by_one = one_by_one

    def forward(self, x):
        if x.sum() > 1e9:
            x = -x
        x = self.bn(self.conv(x))
        if self.one_by_one:
            between = self.part[0](x)
            return self.part[1](between) + between
        return self.part(x)


def test_code_that_cannot_be_traced_is_named_and_what_is_below_is_folded():
    reason = "the forward of 'the model itself' (Decides) cannot be traced: TraceError: symbolically traced variables"
    net = Decides(one_by_one=False)
    answers = checked(net, features())
    assert answers["bn"].startswith(reason)
    assert answers["part.1"] == Partner("part.0", "before")
    assert foldable(net)["part.1"] == "it is called by several modules"  # for all that the code shows


def test_parts_that_run_one_by_one_are_left():
    net = Decides(one_by_one=True)
    assert checked(net, features())["part.1"].startswith("the forward of 'the model itself' (Decides) cannot be traced")
    assert isinstance(foldable(net)["part.1"], str)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Conv2d(6, 6, 1), settled(nn.BatchNorm2d(6)))
        self.never = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
        self.only_trained = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))

    def forward(self, x):
        return self.only_trained(self.part(x)) if self.training else self.part(x)


def test_what_does_not_run_is_left():
    answers = checked(Unused(), features())
    assert answers["never.1"] == answers["only_trained.1"] == "it did not run on the example"
    assert answers["part.1"] == Partner("part.0", "before")
    static = foldable(Unused())
    assert static["never.1"] == "it is not called"
    assert static["part.1"] == Partner("part.0", "before")


def test_batch_norm_alone_is_left():
    norm = settled(nn.BatchNorm2d(6))
    assert checked(norm, features()) == {"": "it is the model itself"}


# --- the layer itself -----------------------------------------------------------------------------------------


def of_layer(change) -> tuple[nn.Module, str]:
    model = nn.Sequential(nn.Conv2d(6, 6, 1), settled(nn.BatchNorm2d(6)))
    model[1] = change(model[1]) or model[1]
    answer = foldable(model, features())["1"]
    assert answer == foldable(model)["1"]
    assert bn.find(quiet(model, features())).keys() == {"1"}
    return model, answer


def without_statistics(norm):
    return nn.BatchNorm2d(6, track_running_stats=False)


class Own(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * self.running_var.view(1, -1, 1, 1).sub(x).abs()


def set_first(name: str, value: float):
    def change(norm):
        getattr(norm, name).data[0] = value

    return change


def parametrized(norm):
    return parametrize.register_parametrization(norm, "weight", Square())


def own_forward(norm):
    norm.forward = torch.sin


LAYERS = {
    "no statistics": (without_statistics, "it stores no statistics"),
    "subclass": (
        lambda norm: Own(6),
        "it is a Own with a forward that uses its tensors for more than batch norm",
    ),
    "own forward": (own_forward, "it is a BatchNorm2d whose forward may do more than batch norm"),
    "parametrized": (parametrized, "it is parametrized"),
    "hook": (hooked, "it has hooks that see its input or its result"),
    "backward hook": (lambda norm: hooked(norm, "full_backward_hook"), "it has hooks that see its input or its result"),
    "negative variance": (set_first("running_var", -0.5), "it has a negative running_var, -0.5"),
    "NaN mean": (set_first("running_mean", torch.nan), "it has statistics or parameters that are NaN or infinite"),
    "NaN variance": (set_first("running_var", torch.nan), "it has statistics or parameters that are NaN or infinite"),
    "infinite mean": (set_first("running_mean", torch.inf), "it has statistics or parameters that are NaN"),
    "NaN gamma": (set_first("weight", torch.nan), "it has statistics or parameters that are NaN or infinite"),
}


@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_that_cannot_be_folded(case):
    change, reason = LAYERS[case]
    assert of_layer(change)[1].startswith(reason)


def test_a_layer_with_no_variance_and_eps_0_is_left():
    norm = nn.BatchNorm2d(6, eps=0)
    norm.running_var.zero_()
    assert of_layer(lambda _: norm)[1] == "it would scale or shift by NaN or infinity"


def test_statistics_are_what_counts_and_not_the_flag():
    """torch.nn uses stored statistics in eval mode if they are there, whatever track_running_stats says now."""
    net = nn.Sequential(nn.Conv2d(6, 6, 1), settled(nn.BatchNorm2d(6)))
    net[1].track_running_stats = False
    assert checked(net, features()) == {"1": Partner("0", "before")}


def test_weights_that_half_precision_cannot_hold_are_left():
    model = nn.Sequential(nn.Conv2d(6, 6, 1), settled(bn.BatchNorm2d(6))).half()
    with torch.no_grad():
        model[0].weight.fill_(1000.0)
        model[1].running_var.fill_(1e-6)
    x = torch.zeros(1, 6, 2, 2).half()
    assert foldable(model, x) == {"1": "'0' would have a weight or bias that is too large for torch.float16"}
    assert bn.find(quiet(model, x))


def test_complex_channels_are_named():
    model = nn.Sequential(nn.Conv2d(6, 6, 1, dtype=torch.complex64), nn.BatchNorm2d(6))
    assert foldable(model) == {"1": "'0' has a weight of type torch.complex64"}


def test_models_without_values_are_named():
    model = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
    assert foldable(model.to("meta")) == {"1": "it has statistics on the meta device, without values"}
    model = nn.Sequential(nn.Conv2d(6, 6, 1, device="meta"), nn.BatchNorm2d(6))
    assert foldable(model)["1"].startswith("'0' has a weight that is on the meta device and has no numbers")
    assert "it is a LazyBatchNorm2d" in foldable(nn.Sequential(nn.LazyConv2d(6, 1), nn.LazyBatchNorm2d()))["1"]
    lazy = nn.Sequential(nn.LazyConv2d(6, 1), nn.BatchNorm2d(6))
    assert foldable(lazy)["1"].startswith("'0' has a weight that has no shape yet")


def test_a_residual_network_is_read_the_same_without_an_example():
    net, x = ResNet(), image()
    assert foldable(net) == foldable(net, x)
    assert foldable(net)["layer1.0.bn2"] == Partner("layer1.0.conv2", "before")
    assert list(foldable(net)) == list(bn.find(net))


class PreActivation(nn.Module):
    """Batch norm, ReLU, convolution: one layer is between convolutions, and one is not."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv1 = settled(nn.BatchNorm2d(6)), nn.Conv2d(6, 6, 3, padding=1)
        self.bn2, self.conv2 = settled(nn.BatchNorm2d(6)), nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


def test_a_pre_activation_block():
    answers = checked(PreActivation(), features())
    assert answers == {"bn1": NEITHER + "an input before it, relu behind it", "bn2": Partner("conv1", "before")}
