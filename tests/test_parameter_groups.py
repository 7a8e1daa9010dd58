"""Parameter groups: every parameter exactly once, and no weight decay on gamma and beta."""

from __future__ import annotations

import pytest
import torch
from foreign_layers import FrozenByHand, NormAct
from torch import nn
from torch.nn.utils import parametrizations

import batchnorm as bn


class Net(nn.Module):
    """Every kind of parameter: of weights, norms, biases, tied, frozen, and of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.ours, self.act = bn.BatchNorm2d(4, act="relu"), NormAct(4, nn.PReLU(4))
        self.frozen = FrozenByHand(4)
        self.head, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied.weight = self.head.weight
        self.ln, self.gn, self.rms = nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4)
        self.inn = nn.InstanceNorm1d(4, affine=True)
        self.token, self.bias = nn.Parameter(torch.ones(1, 4)), nn.Parameter(torch.ones(4))
        self.again = self.bn


WITHOUT = {
    "bn.weight", "bn.bias", "ours.weight", "ours.bias", "act.weight", "act.bias", "ln.weight", "ln.bias", "gn.weight",
    "gn.bias", "rms.weight", "inn.weight", "inn.bias",
}  # fmt: skip
BIASES = {"conv.bias", "head.bias", "tied.bias", "bias"}


def names(model: nn.Module, group: dict) -> set[str]:
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return {by_id[id(parameter)] for parameter in group["params"]}


@pytest.mark.parametrize("decay_biases", [False, True])
def test_norms_get_no_weight_decay_and_biases_as_asked(decay_biases):
    net = Net()
    decayed, without = bn.parameter_groups(net, 0.05, decay_biases=decay_biases)
    assert (decayed["weight_decay"], without["weight_decay"]) == (0.05, 0.0)
    expected = WITHOUT | (set() if decay_biases else BIASES)
    assert names(net, without) == expected
    assert names(net, decayed) == {name for name, _ in net.named_parameters()} - expected


@pytest.mark.parametrize("decay_biases", [False, True])
def test_biases_of_attention_and_recurrent_layers_are_biases(decay_biases):
    net = nn.ModuleDict(
        {"attention": nn.MultiheadAttention(4, 2, add_bias_kv=True), "lstm": nn.LSTM(3, 4, proj_size=2)}
    )
    net.register_parameter("unbiased", nn.Parameter(torch.ones(4)))
    net.register_parameter("relative_position_bias_table", nn.Parameter(torch.ones(4, 2)))
    found = names(net, bn.parameter_groups(net, 0.05, decay_biases=decay_biases)[1])
    biases = {"attention.in_proj_bias", "attention.out_proj.bias", "lstm.bias_ih_l0", "lstm.bias_hh_l0"}
    assert found == (set() if decay_biases else biases)


def test_every_parameter_is_in_one_group_exactly_once_and_in_order():
    net = Net()
    groups = bn.parameter_groups(net, 0.05)
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(ids) == sorted(id(parameter) for parameter in net.parameters())
    places = {id(parameter): i for i, parameter in enumerate(net.parameters())}
    for group in groups:
        order = [places[id(parameter)] for parameter in group["params"]]
        assert order == sorted(order)


def test_a_step_without_gradient_decays_weights_alone():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    optimizer = torch.optim.SGD(bn.parameter_groups(net, weight_decay=0.5), lr=1.0)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before[name] * (0.5 if name == "0.weight" else 1.0))
    assert "BN206" not in {finding.code for finding in bn.examine(net.train(), optimizer=optimizer).findings}
    usual = torch.optim.SGD(net.parameters(), lr=1.0, weight_decay=0.5)
    assert "BN206" in {finding.code for finding in bn.examine(net.train(), optimizer=usual).findings}


def test_frozen_parameters_are_kept_or_left_out():
    net = Net()
    net.conv.weight.requires_grad_(False)
    bn.freeze(net, affine=True)
    every = sum(len(group["params"]) for group in bn.parameter_groups(net, 0.1))
    assert every == len(list(net.parameters()))
    rest = bn.parameter_groups(net, 0.1, frozen=False)
    assert [p for group in rest for p in group["params"] if not p.requires_grad] == []
    assert sum(len(group["params"]) for group in rest) == sum(p.requires_grad for p in net.parameters())


def test_a_gamma_that_is_also_a_weight_is_not_decayed():
    net = nn.Sequential(nn.PReLU(4), nn.BatchNorm1d(4))
    net[0].weight = net[1].weight
    decayed, without = bn.parameter_groups(net, 0.1)
    assert (len(decayed["params"]), len(without["params"])) == (0, 2)
    torch.optim.SGD([decayed, without], lr=0.1)


def test_parametrized_layers_are_known_by_their_originals():
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4))
    nn.utils.parametrize.register_parametrization(net[1], "weight", nn.Softplus())
    _, without = bn.parameter_groups(net, 0.1)
    assert names(net, without) == {"0.bias", "1.bias", "1.parametrizations.weight.original"}


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager"), bn.convert])
def test_wrapped_and_converted_models_have_the_same_groups(wrap):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    plain, wrapped = (bn.parameter_groups(each, 0.1) for each in (net, wrap(net)))
    assert [len(group["params"]) for group in plain] == [len(group["params"]) for group in wrapped] == [1, 3]


def test_models_without_parameters_and_lazy_ones():
    assert [group["params"] for group in bn.parameter_groups(nn.ReLU(), 0.1)] == [[], []]
    assert [len(group["params"]) for group in bn.parameter_groups(nn.LazyBatchNorm1d(), 0.1)] == [0, 2]


class FlatParameter(nn.Parameter):
    pass


@pytest.mark.parametrize("decay", [-0.1, float("nan"), float("inf")])
def test_a_weight_decay_that_cannot_be_is_refused(decay):
    with pytest.raises(ValueError, match=r"weight_decay must be finite and 0 or more, got .*. Use 0"):
        bn.parameter_groups(nn.ReLU(), decay)


def test_flattened_parameters_are_refused():
    net = nn.Linear(2, 2)
    net.flat = FlatParameter(torch.ones(4))
    with pytest.raises(ValueError, match=r"got 'flat', into which FSDP flattened several. Wrap"):
        bn.parameter_groups(net, 0.1)
