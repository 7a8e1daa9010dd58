"""preserve_state: no tool leaves a trace, and graphs, optimizers, handles and ties go on working."""

from __future__ import annotations

import copy
import random
import warnings
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from fingerprint import Net, bits, data, fingerprint, same, trained_net
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import update_bn

import batchnorm as bn
from batchnorm import preserve_state
from batchnorm.population.eval_mode import to_eval

if TYPE_CHECKING:
    from collections.abc import Callable


TOOLS: list[Callable[[Net], None]] = []


def tool(function: Callable[[Net], None]) -> Callable[[Net], None]:
    TOOLS.append(function)
    return function


@tool
def draw_random_numbers(net: Net) -> None:
    torch.rand(1)
    random.random()
    np.random.rand()


@tool
def train_a_step(net: Net) -> None:
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    net.train()
    net(data()).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@tool
def accumulate_gradients(net: Net) -> None:
    net(data()).sum().backward()


@tool
def zero_gradients_in_place(net: Net) -> None:
    net.zero_grad(set_to_none=False)


@tool
def write_one_flag_to_all(net: Net) -> None:
    was = net.training
    net.eval()
    net.train(was)


@tool
def leave_hooks(net: Net) -> None:
    net.first.register_forward_hook(print)
    net.first.register_forward_pre_hook(print, with_kwargs=True)
    net.ours.register_full_backward_hook(print)
    net.register_state_dict_pre_hook(print)
    net.last.weight.register_hook(print)
    net.last.weight.register_post_accumulate_grad_hook(print)
    net.last._forward_hooks.clear()


@tool
def count_in_buffers(net: Net) -> None:
    for module in net.modules():
        module.register_buffer("total_ops", torch.zeros(1))


@tool
def rebuild(net: Net) -> None:
    del net.drop
    net.theirs = nn.Identity()
    net.first.weight = nn.Parameter(torch.zeros(4, 3))
    net.first.bias = None
    net.tied.weight = nn.Parameter(net.last.weight.detach().clone())
    net.add_module("head", nn.Linear(4, 2))


@tool
def write_plain_attributes(net: Net) -> None:
    net.theirs.momentum = None
    net.history[0].append(3.0)
    net.history[1]["losses"][0] = float("nan")
    net.names.add("c")
    net.recent.append(3)
    net.pair[0].zero_()
    net.cache.mul_(2)
    net.last.weight.note = "seen"
    net.forward = lambda x: x
    net.new = 1
    torch.rand(1, generator=net.generator)


@tool
def cast(net: Net) -> None:
    net.half()


@tool
def cast_and_back(net: Net) -> None:
    net.half().float()


@tool
def move_to_meta(net: Net) -> None:
    net.to("meta")


@tool
def write_data(net: Net) -> None:
    net.last.weight.data = torch.ones(2, 2)
    net.phase.zero_()
    net.mask.logical_not_()
    net.short.add_(1)


@tool
def transpose(net: Net) -> None:
    net.last.weight.data = net.last.weight.data.t()


@tool
def poison(net: Net) -> None:
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)


@tool
def load_other_weights(net: Net) -> None:
    net.load_state_dict(Net().state_dict(), assign=True)


@tool
def freeze_parts(net: Net) -> None:
    bn.freeze(net, affine=True)


@tool
def freeze_parameters(net: Net) -> None:
    net.requires_grad_(False)


@tool
def parametrize_a_layer(net: Net) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parametrize.register_parametrization(net.last, "weight", nn.Tanh())


@tool
def trace(net: Net) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and in train mode its own check finds the dropout
        torch.jit.trace(net, data())


@tool
def update_bn_of_torch(net: Net) -> None:
    update_bn([data(), data()], net)


@tool
def count_flops(net: Net) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operators that it cannot count, and of torch.jit
        pytest.importorskip("fvcore.nn").FlopCountAnalysis(net, data()).total()


@pytest.mark.parametrize("look", TOOLS, ids=lambda look: look.__name__)
def test_a_tool_leaves_no_trace_inside_the_shield_and_one_outside(look):
    net = trained_net()
    before = fingerprint(net)
    with preserve_state(net) as inside:
        assert inside is net
        look(net)
    assert fingerprint(net) == before
    look(net)
    assert fingerprint(net) != before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_passes_through_and_leaves_no_trace(error):
    def look() -> None:
        with preserve_state(net):
            leave_hooks(net)
            rebuild(net)
            poison(net)
            raise error

    net = trained_net()
    before = fingerprint(net)
    with pytest.raises(error):
        look()
    assert fingerprint(net) == before


def test_shields_inside_each_other_each_take_back_to_their_own_beginning():
    net = trained_net()
    before = fingerprint(net)
    with preserve_state(net):
        net.theirs.momentum = 0.5
        middle = fingerprint(net)
        with preserve_state(net):
            train_a_step(net)
        assert fingerprint(net) == middle
    assert fingerprint(net) == before


def test_a_graph_recorded_before_a_look_can_still_be_differentiated(capsys):
    net = trained_net()
    net.zero_grad()
    twin = copy.deepcopy(net)
    x = data()
    torch.manual_seed(3)
    loss = net(x).square().sum()
    with preserve_state(net):
        net.eval()(data())
        leave_hooks(net)
        net.zero_grad()
    loss.backward()
    torch.manual_seed(3)
    twin(x).square().sum().backward()
    for mine, other in zip(net.parameters(), twin.parameters(), strict=True):
        assert same(mine.grad, other.grad)
    assert not capsys.readouterr().out, "a hook from inside the block ran"


def test_memory_that_did_not_change_is_not_written():
    net = trained_net()
    versions = [t._version for t in (*net.parameters(), *net.buffers())]
    with preserve_state(net):
        net.eval()(data())
    assert [t._version for t in (*net.parameters(), *net.buffers())] == versions


def test_a_graph_recorded_inside_over_changed_weights_refuses_to_be_differentiated_outside():
    """The weights that it saved are gone; a silent wrong gradient would be worse."""
    net = trained_net()
    with preserve_state(net):
        with torch.no_grad():
            net.last.weight.add_(1)
        loss = net(data()).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_optimizer_goes_on_as_if_nothing_had_happened():
    net = trained_net()
    net.zero_grad()
    twin = copy.deepcopy(net)
    x = data()
    for model in (net, twin):
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
        optimizer.step()
        if model is net:
            with preserve_state(net):
                cast(net)
                train_a_step(net.float())
        torch.manual_seed(0)
        model(x).sum().backward()
        optimizer.step()
    for mine, other in zip(net.state_dict().values(), twin.state_dict().values(), strict=True):
        assert same(mine, other)


def test_a_handle_from_before_the_block_still_removes_its_hook():
    net = Net()
    handle = net.first.register_forward_hook(print)
    with preserve_state(net):
        handle.remove()
        net.first._forward_hooks[99] = print
    assert list(net.first._forward_hooks) == [handle.id]
    handle.remove()
    assert not net.first._forward_hooks


def test_two_kinds_of_nan_are_different_bits():
    net = nn.Module()
    odd = torch.tensor([0x7FC00001], dtype=torch.int32)
    net.register_buffer("x", odd.clone().view(torch.float32))
    with preserve_state(net):
        net.x.fill_(torch.nan)
    assert net.x.view(torch.int32).equal(odd)


def test_a_lazy_model_is_lazy_again_after_a_look():
    net = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.LazyLinear(1))
    with preserve_state(net):
        net(data())
        assert type(net[1]) is nn.BatchNorm1d
    assert [type(m) for m in net] == [nn.LazyLinear, nn.LazyBatchNorm1d, nn.LazyLinear]
    assert all(isinstance(p, nn.UninitializedParameter) for p in net.parameters())
    assert net(torch.randn(8, 7)).shape == (8, 1)


def test_a_scripted_model_is_restored_too():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        net = torch.jit.script(nn.Sequential(nn.BatchNorm1d(3), nn.Dropout()))
    before = [bits(t) for t in net.state_dict().values()]
    with preserve_state(net):
        net(data())
        net.eval()
    assert [bits(t) for t in net.state_dict().values()] == before
    assert [m.training for m in net.modules()] == [True] * 3


def test_sparse_gradients_are_restored():
    net = nn.Embedding(5, 2, sparse=True)
    net(torch.tensor([1, 3])).sum().backward()
    gradient = net.weight.grad
    before = gradient.to_dense().clone()
    with preserve_state(net):
        net(torch.tensor([1])).sum().backward()
        net.weight.grad.mul_(7)
    assert net.weight.grad is gradient
    assert gradient.is_sparse
    assert gradient.to_dense().equal(before)


def test_a_tensor_made_in_inference_mode_is_restored():
    net = nn.Module()
    with torch.inference_mode():
        net.table = torch.ones(3)
    with preserve_state(net), torch.inference_mode():
        net.table.zero_()
    assert net.table.equal(torch.ones(3))


def test_cuda_random_states_are_kept_where_cuda_is_in_use(monkeypatch):
    states = [torch.tensor([1]), torch.tensor([2])]
    put_back = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", put_back.append)
    with preserve_state(nn.Linear(1, 1)):
        assert not put_back
    assert put_back == [states]


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"^preserve_state needs an nn.Module, got dict. Pass the model itself.$"):
        preserve_state({}).__enter__()


def programs() -> dict[str, Callable[[], nn.Module]]:
    x = torch.randn(8, 3)

    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()

    return {
        "exported": lambda: torch.export.export(net(), (x,)).module(),
        "exported in train mode": lambda: torch.export.export(net().train(), (x,)).module(),
        "scripted and frozen": lambda: torch.jit.freeze(torch.jit.script(net())),
        "traced": lambda: torch.jit.trace(net(), x),
        "by torch.fx": lambda: torch.fx.symbolic_trace(net()),
    }


@pytest.mark.parametrize("kind", programs())
def test_programs_are_looked_at_whatever_modes_they_have(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        net = programs()[kind]()
    before = [bits(t) for t in net.state_dict().values()]
    x = torch.randn(8, 3)
    with preserve_state(net), torch.no_grad():
        first = to_eval(net)(x)
    with torch.no_grad():
        assert torch.equal(to_eval(net)(x), first)
        again = [bits(t) for t in net.state_dict().values()]
    # only a program that was exported in train mode moves its statistics, when it runs outside of the block
    assert (again == before) == (kind != "exported in train mode")


def test_a_module_whose_eval_refuses_is_passed_over_and_its_children_are_not():
    class Stubborn(nn.Sequential):
        def train(self, mode: bool = True):
            raise RuntimeError("no")

    net = Stubborn(nn.BatchNorm1d(3), nn.Dropout())
    assert [module.training for module in to_eval(net).modules()] == [False] * 3


def test_a_step_that_fails_keeps_no_other_from_running():
    class Shut(nn.Module):
        def __setattr__(self, name, value):
            if name == "training" and value and "training" in vars(self):
                raise RuntimeError("shut")
            super().__setattr__(name, value)

    net = nn.Sequential(Shut(), nn.Linear(2, 2), Shut())
    before = net[1].weight.detach().clone()

    def look() -> None:
        with preserve_state(net):
            net.eval()
            net[1].weight.data.zero_()

    with pytest.raises(RuntimeError, match=r"^shut$"):
        look()
    assert torch.equal(net[1].weight, before)
    assert [module.training for module in net[1].modules()] == [True]
