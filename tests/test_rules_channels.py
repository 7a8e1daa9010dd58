"""Dead and constant channels: by what is known to follow a layer, what is before it, and what data show."""

import math
from dataclasses import replace

import pytest
import torch
from planted import trained
from scipy.stats import norm as normal
from small_networks import Written
from test_rules_batches import HEALTHY, MEASURED, MODULE, STORED, values
from torch import nn

import batchnorm as bn
from batchnorm.doctor import examine
from batchnorm.doctor.measuring.neighbours_in_code import graph_of
from batchnorm.kernels.activations import TABLE
from batchnorm.rules import RULES
from batchnorm.rules.bn1_channels import ACTIVE, FAINT
from batchnorm.rules.rule_evidence import Graph

ACTS = {
    "relu": nn.ReLU(), "relu6": nn.ReLU6(), "hardswish": nn.Hardswish(), "hardsigmoid": nn.Hardsigmoid(),
    "silu": nn.SiLU(), "mish": nn.Mish(), "gelu": nn.GELU(), "elu": nn.ELU(), "softplus": nn.Softplus(),
    "sigmoid": nn.Sigmoid(), "tanh": nn.Tanh(),
}  # fmt: skip


def named(act, gamma, beta, **measured):
    """Channels that BN106 names of a layer with one activation behind it."""
    stored = replace(STORED, weight=values(*gamma), bias=values(*beta),
                     running_mean=values(*[0.5] * len(gamma)), running_var=values(*[1] * len(gamma)))  # fmt: skip
    found = {"bn": replace(MEASURED, **measured)} if measured else None
    evidence = replace(
        HEALTHY,
        stored={"bn": stored},
        measured=found,
        graph=Graph(calls={"bn": 1}, activations={"bn": act} if act else {}),
    )
    return {channel for finding in RULES["BN106"].findings(evidence) for channel in finding.channels}


def test_where_an_activation_of_the_layers_is_constant_is_known():
    ends = torch.tensor([[-60.0, -50.0], [50.0, 60.0]])
    flat = {name for name, row in TABLE.items() if (row.module()(ends).diff().abs() <= FAINT).any()}
    assert flat == ACTIVE.keys() & TABLE.keys()


@pytest.mark.parametrize("act", ACTIVE)
def test_where_an_activation_is_taken_for_constant_it_is(act):
    low, high = ACTIVE[act]
    z = torch.linspace(-60, 60, 24001, dtype=torch.float64)
    y = ACTS[act](z)
    for outside in (z <= low, z >= high):
        if outside.any():
            assert y[outside].max() - y[outside].min() <= 1e-3


@pytest.mark.parametrize(("beta", "is_dead"), [(-3.0, True), (-2.3, False), (-2.4, True), (0.0, False), (3.0, False)])
@pytest.mark.parametrize("gamma", [1.0, -1.0, 1e-4, 50.0])
def test_p_of_a_relu_is_that_of_a_normal(gamma, beta, is_dead):
    assert bool(normal.cdf(beta) < 0.01) is is_dead
    assert (named("relu", (gamma, 1.0), (beta * abs(gamma), 1.0)) == {0}) is (
        is_dead or (gamma == 1e-4 and abs(beta) < 9)
    )


CASES = {
    "relu6 above its end": ("relu6", 1.0, 9.0, True),
    "relu6 between": ("relu6", 1.0, 3.0, False),
    "relu far above": ("relu", 1.0, 9.0, False),
    "hardswish below -3": ("hardswish", 1.0, -6.0, True),
    "hardswish where a relu is dead": ("hardswish", 1.0, -3.0, False),
    "silu where a relu is dead": ("silu", 1.0, -4.0, False),
    "silu far below": ("silu", 1.0, -12.0, True),
    "sigmoid at its upper end": ("sigmoid", 1.0, 10.0, True),
    "no activation": ("", 1.0, -9.0, False),
    "leaky ReLU": ("leakyrelu", 1.0, -9.0, False),
    "gamma 0 below": ("relu", 0.0, -1.0, True),
    "gamma 0 above": ("relu", 0.0, 1.0, False),
    "gamma 0 without an activation": ("", 0.0, -1.0, False),
    "no number": ("relu", math.nan, -9.0, False),
    "infinite": ("relu", math.inf, -9.0, False),
}


@pytest.mark.parametrize("name", CASES)
def test_channels_are_dead_by_what_follows(name):
    act, gamma, beta, is_dead = CASES[name]
    assert named(act, (gamma, 1.0), (beta, 1.0)) == ({0} if is_dead else set())


def test_data_are_believed_more_than_a_normal():
    dead = {"lowest": values(-9, -9), "highest": values(-0.1, 1), "examples": 64, "values_per_example": 9.0}
    assert named("relu", (1, 1), (1, 1), **dead) == {0}
    assert named("relu", (1, 1), (-9, -9), **dead) == {0}
    few = dead | {"examples": 8}
    assert named("relu", (1, 1), (-9, 1), **few) == {0}
    assert named("relu", (1, 1), (1, 1), **(dead | {"values_per_example": 1.0})) == set()
    assert named("relu6", (1, 1), (1, 1), **(dead | {"lowest": values(6, -9), "highest": values(9, 9)})) == {0}


# -- what follows, as read from code -------------------------------------------------------------------------------


class Net(Written):
    def __init__(self, forward, **parts):
        super().__init__(forward, **{"conv": nn.Conv2d(3, 4, 1), "norm": nn.BatchNorm2d(4), **parts})

    def forward(self, x):
        return self.run(self, self.conv(x))


class NormAct(nn.BatchNorm2d):
    """As other libraries have it."""

    def __init__(self, channels, act):
        super().__init__(channels)
        self.act, self.drop = act, nn.Identity()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


BEHIND = {
    "a module": (lambda m, x: m.act(m.norm(x)), {"act": nn.ReLU()}, "relu"),
    "a function": (lambda m, x: nn.functional.relu6(m.norm(x)), {}, "relu6"),
    "a method": (lambda m, x: m.norm(x).relu(), {}, "relu"),
    "in place": (lambda m, x: nn.functional.relu_(m.norm(x)), {}, "relu"),
    "behind what does nothing": (
        lambda m, x: m.act(m.drop(m.norm(x))),
        {"act": nn.SiLU(), "drop": nn.Dropout()},
        "silu",
    ),
    "an addition first": (lambda m, x: torch.relu(m.norm(x) + x), {}, ""),
    "two readers": (lambda m, x: torch.relu(y := m.norm(x)) + y, {}, ""),
    "two readers of one kind": (lambda m, x: torch.relu(y := m.norm(x)) * y.relu(), {}, "relu"),
    "nothing": (lambda m, x: m.norm(x), {}, ""),
    "leaky": (lambda m, x: m.act(m.norm(x)), {"act": nn.LeakyReLU()}, ""),
    "ours": (lambda m, x: m.norm(x), {"norm": bn.BatchNorm2d(4, act="relu")}, "relu"),
    "ours with a residual": (lambda m, x: m.norm(x, x), {"norm": bn.BatchNorm2d(4, act="relu")}, ""),
    "another library's": (lambda m, x: m.norm(x), {"norm": NormAct(4, nn.ReLU())}, "relu"),
    "another library's without": (lambda m, x: torch.relu(m.norm(x)), {"norm": NormAct(4, nn.Identity())}, "relu"),
}


@pytest.mark.parametrize("name", BEHIND)
def test_what_follows_a_layer_is_read_from_the_code(name):
    forward, parts, act = BEHIND[name]
    assert graph_of(Net(forward, **parts)).activations == ({"norm": act} if act else {})


def test_chains_tell_what_follows_across_modules():
    block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert graph_of(nn.Sequential(block, nn.Sequential(nn.ReLU()))).activations == {"0.1": "relu"}
    fused = bn.convert(nn.Sequential(block, nn.ReLU()).eval(), fuse=True, example=torch.randn(2, 3, 5, 5))
    assert set(graph_of(fused).activations.values()) == {"relu"}


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, bn.BatchNorm2d])
@pytest.mark.parametrize("with_data", [False, True])
def test_channels_that_are_never_active_are_named_in_a_model_and_no_others(norm, with_data):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3, bias=False), norm(64), nn.ReLU(), nn.Conv2d(64, 4, 1))
    data = [torch.randn(16, 3, 8, 8) for _ in range(4)]
    trained(model, data=data)
    model[1].bias.data = torch.linspace(-6, 2, 64)
    model[1].weight.data.fill_(1.0)
    outputs = torch.cat([model[:2](x) for x in data])
    never = {int(i) for i in (outputs.amax((0, 2, 3)) <= 0).nonzero()}
    assert 5 < len(never) < 40
    found = {c for f in examine(model, data if with_data else None).findings if f.code == "BN106" for c in f.channels}
    if with_data:
        assert found == never
    else:
        assert never <= found <= {i for i in range(64) if normal.cdf(model[1].bias[i].item()) < 0.011}


def test_least_and_largest_outputs_are_those_of_the_layer():
    from batchnorm.doctor.measuring.measurement import measure

    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3)).eval()
    nn.init.uniform_(model[0].weight, -1, 1)
    nn.init.uniform_(model[0].running_var, 0.5, 2)
    nn.init.uniform_(model[0].bias, -1, 1)
    data = [torch.randn(8, 3, 4, 4) for _ in range(3)]
    found = measure(model, data, max_examples=None)[0]["0"]
    y = torch.cat([model(x) for x in data])
    # the same products and sums, once in float64 and once in float32
    tolerance = {"rtol": 8 * 2**-23, "abs": 8 * 2**-23}
    assert list(found.lowest) == pytest.approx(y.amin((0, 2, 3)).tolist(), rel=tolerance["rtol"], abs=tolerance["abs"])
    assert list(found.highest) == pytest.approx(y.amax((0, 2, 3)).tolist(), rel=tolerance["rtol"], abs=tolerance["abs"])
    data[1][0, 1, 0, 0] = math.nan
    assert measure(model, data, max_examples=None)[0]["0"].lowest is None


# -- what is before a layer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(6, 4, 3), nn.Conv2d(6, 4, 3, groups=2), nn.Linear(6, 4), nn.ConvTranspose2d(6, 4, 3, groups=2)]
)
def test_norms_of_filters_are_what_an_input_of_one_can_do(layer):
    from batchnorm.doctor.measuring.neighbours_in_code import _norms

    unit = torch.eye(6).reshape(6, 6, *[1] * (layer.weight.ndim - 2))
    flat = type(layer)
    if flat is nn.Linear:
        squares = layer.weight.square().sum(1)
    else:
        plain = {"stride": 1, "padding": 2, "groups": layer.groups}
        run = nn.functional.conv_transpose2d if flat is nn.ConvTranspose2d else nn.functional.conv2d
        squares = run(unit, layer.weight, **(plain if run is nn.functional.conv2d else plain | {"padding": 0})).square()
        squares = squares.sum((0, 2, 3))
    assert list(_norms(layer)) == pytest.approx(squares.sqrt().tolist(), rel=1e-5)


@pytest.mark.parametrize(("scale", "fires"), [(1.0, True), (1e-12, False)])
def test_a_filter_that_decayed_with_its_variance_magnifies_nothing(scale, fires):
    model = trained()
    with torch.no_grad():
        model.stem[0].weight[3] *= scale
        model.stem[1].running_var[3], model.stem[1].weight[3] = 0, 1
    assert ("BN105" in {finding.code for finding in examine(model).findings}) is fires


def test_a_feature_that_was_constant_in_training_is_magnified():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    x = torch.randn(256, 4)
    x[:, 2] = 1
    trained(model, data=list(x.split(32)), updates=400)
    model[0].running_var[2], model[0].weight.data[2] = 0, 1
    assert [f.channels for f in examine(model).findings if f.code == "BN105"] == [(2,)]


def test_a_variance_of_next_to_nothing_whose_surroundings_are_unknown_is_not_checked():
    evidence = replace(
        HEALTHY, stored={"bn": replace(STORED, running_var=values(1, 0))}, modules={"bn": MODULE}, graph=None
    )
    found, unknown = RULES["BN105"].look(evidence)
    assert found == []
    assert [(each.layer, each.reason.endswith("before the layer")) for each in unknown] == [("bn", True)]


def test_a_channel_behind_a_dead_one_is_named_where_it_dies():
    torch.manual_seed(0)
    depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), depthwise, nn.BatchNorm2d(8), nn.ReLU6()
    )
    data = [torch.randn(16, 3, 8, 8) for _ in range(4)]
    trained(model, data=data)
    with torch.no_grad():
        model[1].bias[2], model[1].weight[2] = -9, 1
        model[4].running_mean[2], model[4].running_var[2], model[4].weight[2] = 0, 0, 1
    assert graph_of(model).channel_by_channel == {"4": "1"}
    for data_given in (None, data):
        found = {(f.code, f.layer) for f in examine(model, data_given).findings if 2 in f.channels}
        assert ("BN106", "1") in found
        assert not {("BN105", "4"), ("BN211", "4")} & found


def test_what_eval_mode_does_is_read_where_train_mode_draws_random_numbers():
    def drops(m, x):
        y = torch.relu(m.norm(x))
        return y * torch.rand(1) if m.training else y

    assert graph_of(Net(drops)).activations == {"norm": "relu"}
