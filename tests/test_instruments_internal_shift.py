"""Gradient shift against a gradient written out by hand and against real steps of a twin; nothing is left behind."""

import copy
import math

import numpy as np
import pytest
import torch
from fingerprint import fingerprint, trained_net
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import batchnorm as bn
from batchnorm.instruments.internal_covariate_shift import gradient_shift

U = 2.0**-53


def half_square(y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (y - batch[1]).square().sum() / 2


def test_a_linear_network_shifts_as_written_out_by_hand():
    rate, net = 0.01, nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)).double()
    batch = torch.randn(5, 4).double(), torch.randn(5, 2).double()
    found = gradient_shift(net, batch, half_square, torch.optim.SGD(net.parameters(), lr=rate))

    x, t, w1, w2 = (v.detach().numpy() for v in (*batch, net[0].weight, net[1].weight))
    error = x @ w1.T @ w2.T - t
    g = error.T @ (x @ w1.T)
    w1_after = w1 - rate * (error @ w2).T @ x
    h = x @ w1_after.T
    g_after = (h @ w2.T - t).T @ h
    (weight,) = found.weights
    assert weight.name == "1.weight"
    assert weight.ics == pytest.approx(np.linalg.norm(g - g_after), rel=1e3 * U / rate)
    assert weight.norm == pytest.approx(np.linalg.norm(g), rel=1e3 * U)
    assert weight.relative == pytest.approx(weight.ics / weight.norm)
    cosine = (g * g_after).sum() / np.linalg.norm(g) / np.linalg.norm(g_after)
    assert weight.cosine == pytest.approx(cosine, abs=1e3 * U)
    assert found.loss == pytest.approx((error**2).sum() / 2, rel=1e3 * U)


def network(norm: type = nn.BatchNorm1d) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 8), norm(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 8), norm(8), nn.ReLU(), nn.Linear(8, 3)
    ).double()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.001),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.001, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "groups": lambda p: torch.optim.RMSprop([{"params": [q], "lr": 0.01} for q in p]),
}


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, bn.BatchNorm1d])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_gradient_behind_the_step_is_that_of_a_twin_that_took_it(kind: str, norm: type):
    net = network(norm)
    optimizer = OPTIMIZERS[kind](net.parameters())
    batch = torch.randn(16, 6).double(), torch.randn(16, 3).double()
    for _ in range(3):
        optimizer.zero_grad()
        half_square(net(batch[0]), batch).backward()
        optimizer.step()
    # a deep copy of both together keeps the optimizer of the twin
    twin, twins = copy.deepcopy((net, optimizer))
    found = gradient_shift(net, batch, half_square, optimizer, layers=["4", "5.bias", "7"])

    state = torch.get_rng_state()
    names = [name for name, _ in twin.named_parameters()]
    before = [p.detach().clone() for p in twin.parameters()]
    twins.zero_grad()
    half_square(twin(batch[0]), batch).backward()
    old = [p.grad.clone() for p in twin.parameters()]
    twins.step()
    for weight in found.weights:
        i = names.index(weight.name)
        moved = copy.deepcopy(twin)
        for p, value in list(zip(moved.parameters(), before, strict=True))[i:]:
            p.data.copy_(value)
        torch.set_rng_state(state)
        (new,) = torch.autograd.grad(half_square(moved(batch[0]), batch), [list(moved.parameters())[i]])
        assert weight.ics == pytest.approx(float((new - old[i]).norm()), rel=1e-9)
        assert weight.cosine == pytest.approx(float((new * old[i]).sum() / new.norm() / old[i].norm()), rel=1e-9)
    assert found.floor == 0


def test_five_weights_with_parameters_before_them_are_chosen_evenly():
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(12)))
    net[0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    found = gradient_shift(net, torch.randn(8, 4), lambda y, _: y.pow(2).mean(), optimizer)
    assert [w.name for w in found.weights] == ["1.weight", "3.weight", "6.weight", "9.weight", "11.weight"]
    assert "relative" in str(found)


def test_a_step_of_length_0_and_a_first_parameter_shift_nothing():
    net = network()
    batch = torch.randn(16, 6).double(), torch.randn(16, 3).double()
    still = gradient_shift(net, batch, half_square, torch.optim.SGD(net.parameters(), lr=0.0))
    assert all(w.ics == 0 and w.relative == 0 and w.cosine == pytest.approx(1) for w in still.weights)
    moving = torch.optim.SGD(net.parameters(), lr=1.0)
    assert gradient_shift(net, batch, half_square, moving, layers=["0.weight"]).weights[0].ics == 0


def test_parameters_that_the_optimizer_does_not_hold_stay_in_place():
    net = network()
    batch = torch.randn(16, 6).double(), torch.randn(16, 3).double()
    last = torch.optim.SGD(net[7].parameters(), lr=1.0)
    assert all(w.ics == 0 for w in gradient_shift(net, batch, half_square, last).weights)


def same_state(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same_state(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("training", [True, False])
def test_model_and_optimizer_are_left_as_they_were(training: bool):
    net = trained_net()
    net = net if training else net.eval()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    optimizer.step()
    calls: list[object] = []
    optimizer.register_step_post_hook(lambda *_: calls.append("own"))
    optimizer.register_step_pre_hook(lambda *_: calls.append("own"))
    handle = register_optimizer_step_post_hook(lambda *_: calls.append("global"))
    state, before = copy.deepcopy(optimizer.state_dict()), fingerprint(net)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    gradient_shift(net, x, lambda y, _: y.pow(2).mean(), optimizer)
    handle.remove()
    assert fingerprint(net) == before
    assert same_state(optimizer.state_dict(), state)
    assert optimizer.param_groups[0]["params"][0] is next(net.parameters())
    assert calls == []


@pytest.mark.parametrize("at", [1, 2, 3])
def test_model_and_optimizer_are_left_as_they_were_when_loss_or_forward_raises(at: int):
    net = trained_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    optimizer.step()
    evaluations = iter(range(1, 100))
    state = copy.deepcopy(optimizer.state_dict())
    net.last.register_forward_hook(lambda *_: 1 / 0 if next(evaluations) == at else None)
    before = fingerprint(net)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ZeroDivisionError):
        gradient_shift(net, x, lambda y, _: y.pow(2).mean(), optimizer)
    assert fingerprint(net) == before
    with pytest.raises(KeyError):
        gradient_shift(net, x, lambda y, _: {}["no loss"], optimizer)
    assert fingerprint(net) == before
    assert same_state(optimizer.state_dict(), state)


def test_a_graph_that_was_recorded_before_stays_valid():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(8, 3)
    loss = net(x).pow(2).mean()
    gradient_shift(net, x, lambda y, _: y.pow(2).mean(), torch.optim.SGD(net.parameters(), lr=0.1))
    loss.backward()


class Homemade:
    pass


def errors() -> list[tuple]:
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    x, mean, sgd = torch.randn(4, 3), lambda y, _: y.mean(), torch.optim.SGD(net.parameters(), lr=0.1)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    single = nn.Linear(3, 2)
    return [
        (net, x, mean, Homemade(), None, TypeError, "needs a torch.optim.Optimizer, got Homemade"),
        (net, x, mean, torch.optim.LBFGS(net.parameters()), None, TypeError, "without a closure, got LBFGS"),
        (net, x, mean, other, None, ValueError, "optimizer of the model's parameters, got one with 2 other parameters"),
        (net, x, mean, sgd, ["4"], ValueError, "names of trained parameters, or of modules .* got '4'"),
        (
            single,
            x,
            mean,
            torch.optim.SGD(single.parameters(), lr=1),
            None,
            ValueError,
            "not the model's first parameter, got none",
        ),
        (net, x, lambda y, _: y, sgd, None, ValueError, "needs a loss of one number"),
        (net, x, lambda y, _: y.mean() * math.nan, sgd, None, ValueError, "needs a finite loss, got nan"),
        (net, x, lambda y, _: 1.0, sgd, None, TypeError, "returns a tensor, got float"),
        (net, x, lambda y, _: y.detach().mean(), sgd, None, ValueError, "needs a loss with a gradient"),
        (net, x[:1], mean, sgd, None, ValueError, "2 or more values per channel in train mode"),
        (3, x, mean, sgd, None, TypeError, "must be an nn.Module, got int"),
    ]


@pytest.mark.parametrize("case", range(11))
def test_errors_say_what_to_do(case: int):
    *arguments, kind, message = errors()[case]
    with pytest.raises(kind, match=message):
        gradient_shift(*arguments)
