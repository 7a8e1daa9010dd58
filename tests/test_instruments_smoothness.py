"""The landscape along an update against a quadratic, NumPy, and laws of scale."""

import copy
import math

import numpy as np
import pytest
import torch
from fingerprint import fingerprint, trained_net
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.instruments.loss_landscape import FRACTIONS, landscape

U = 2.0**-53


class Bowl(nn.Module):
    """L = sum c w^2 / 2, whose Hessian is diag(c)."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w.double())

    def forward(self, curvature: Tensor) -> Tensor:
        return (curvature * self.w.square()).sum() / 2


def itself(y: Tensor, _: object) -> Tensor:
    return y


def test_a_quadratic_has_its_curvature_along_an_axis():
    c = torch.tensor([3.0, 7.0]).double()
    found = landscape(Bowl(torch.tensor([0.0, 2.0])), c, itself, lr=0.1)
    assert found.beta == pytest.approx(7, rel=1e3 * U)
    assert found.eta == pytest.approx(0.1, rel=1e3 * U)
    assert found.eta_beta == pytest.approx(0.7, rel=1e3 * U)
    assert found.loss == pytest.approx(14)
    # w = 2 (1 - 0.7 f), loss 3.5 w^2
    expected = [3.5 * (2 * (1 - 0.7 * f)) ** 2 for f in FRACTIONS]
    assert found.losses == pytest.approx(expected, rel=1e3 * U)
    assert found.loss_range == pytest.approx(max(expected) - min(expected), rel=1e3 * U)
    assert found.gradient_change == pytest.approx(7 * 4 * 0.1 * 14, rel=1e3 * U)
    assert found.cosine == pytest.approx(-1)  # the gradient has turned round from 1 / 0.7 updates on
    assert found.floor == 0


def test_the_edge_of_stability_is_2_where_gradient_descent_neither_grows_nor_shrinks():
    found = landscape(Bowl(torch.tensor([1.0])), torch.tensor([5.0]).double(), itself, lr=2 / 5)
    assert found.eta_beta == pytest.approx(2, rel=1e3 * U)
    assert found.losses[FRACTIONS.index(1.0)] == pytest.approx(found.loss, rel=1e3 * U)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_any_quadratic_agrees_with_numpy_along_the_update_of_an_optimizer(momentum: float):
    torch.manual_seed(0)
    c, w = torch.rand(6).double() * 4, torch.randn(6).double()
    net, rate, fractions = Bowl(w), 0.2, (0.25, 1.0, 3.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=momentum, weight_decay=0.3)
    buffer = np.zeros(6)
    for _ in range(3):
        optimizer.zero_grad()
        net(c).backward()
        buffer = momentum * buffer + net.w.grad.numpy() + 0.3 * net.w.detach().numpy()
        optimizer.step()
    found = landscape(net, c, itself, optimizer, fractions)

    curvature, here = c.numpy(), net.w.detach().numpy()
    g = curvature * here
    u = -rate * (momentum * buffer + g + 0.3 * here)
    changes = [np.linalg.norm(curvature * f * u) for f in fractions]
    losses = [(curvature * (here + f * u) ** 2).sum() / 2 for f in fractions]
    cosines = [(t := curvature * (here + f * u)) @ g / np.linalg.norm(t) / np.linalg.norm(g) for f in fractions]
    near = {"rel": 1e4 * U}
    assert found.losses == pytest.approx(losses, **near)
    assert found.gradient_change == pytest.approx(max(changes), **near)
    assert found.beta == pytest.approx(np.linalg.norm(curvature * u) / np.linalg.norm(u), **near)
    assert found.eta == pytest.approx(np.linalg.norm(u) / np.linalg.norm(g), **near)
    assert found.eta_beta == pytest.approx(found.eta * found.beta, **near)
    assert found.cosine == pytest.approx(min(cosines), **near)


def test_the_update_of_any_optimizer_ends_where_a_real_step_ends():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.1)
    x = torch.randn(16, 4).double()

    def loss(y: Tensor, _: object) -> Tensor:
        return y.pow(2).mean()

    found = landscape(net, x, loss, optimizer)
    loss(net(x), x).backward()
    optimizer.step()
    assert found.losses[FRACTIONS.index(1.0)] == pytest.approx(float(loss(net(x), x).detach()), rel=1e-12)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, bn.BatchNorm1d])
def test_doubling_weights_before_batch_norm_quarters_beta_and_nothing_else_that_a_step_of_equal_angle_meets(norm: type):
    net = nn.Sequential(nn.Linear(4, 6, bias=False), norm(6, eps=1e-14), nn.Tanh(), nn.Linear(6, 2)).double()
    x = torch.randn(16, 4).double()

    def seen(rate: float):
        optimizer = torch.optim.SGD(net[0].parameters(), lr=rate)
        return landscape(net, x, lambda y, _: y.pow(2).mean(), optimizer)

    small = seen(0.01)
    net[0].weight.data.mul_(2)
    same, double = seen(0.04), seen(0.01)
    # eps = 1e-14 beside variances near 0.3, and two differences of gradients, each times 1e3 roundings
    near = {"rel": 1e-8}
    assert same.beta == pytest.approx(small.beta / 4, **near)
    assert same.losses == pytest.approx(small.losses, **near)
    assert same.eta_beta == pytest.approx(small.eta_beta, **near)
    assert same.cosine == pytest.approx(small.cosine, **near)
    assert double.eta_beta < small.eta_beta  # at an equal rate the doubled weights turn less
    assert "eta x beta" in str(same)


def test_a_loss_that_is_not_finite_further_on_is_told_and_is_no_error():
    # w = 1 goes to -3 with half an update, where 1 - w^2 / 2 is negative
    found = landscape(Bowl(torch.tensor([1.0])), torch.tensor([1.0]), lambda y, _: -(1 - y).log(), lr=4.0)
    assert all(map(math.isnan, found.losses))
    assert found.loss_range == math.inf
    assert "range inf" in str(found)


@pytest.mark.parametrize("training", [True, False])
def test_model_and_optimizer_are_left_as_they_were(training: bool):
    net = trained_net()
    net = net if training else net.eval()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    optimizer.step()
    buffers = [copy.deepcopy(optimizer.state[p]) for p in net.parameters()]
    before = fingerprint(net)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    first = landscape(net, x, lambda y, _: y.pow(2).mean(), optimizer)
    assert fingerprint(net) == before
    assert first == landscape(net, x, lambda y, _: y.pow(2).mean(), optimizer)
    for p, state in zip(net.parameters(), buffers, strict=True):
        assert all(torch.equal(optimizer.state[p][key], state[key]) for key in state if state[key] is not None)


@pytest.mark.parametrize("where", ["forward", "loss"])
@pytest.mark.parametrize("at", range(1, 7))
def test_the_model_is_left_as_it_was_when_loss_or_forward_raises(at: int, where: str):
    net, evaluations = trained_net(), iter(range(1, 100))

    def fail(*_: object) -> None:
        return 1 / 0 if next(evaluations) == at else None

    if where == "forward":
        net.last.register_forward_hook(fail)
    before = fingerprint(net)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ZeroDivisionError):
        landscape(net, x, lambda y, _: (where == "loss" and fail()) or y.pow(2).mean(), lr=0.1)
    assert fingerprint(net) == before


def errors() -> list[tuple]:
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    x, mean = torch.randn(4, 3), lambda y, _: y.pow(3).mean()
    sgd, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (net, nn.Linear(2, 2)))
    still = torch.optim.SGD(net.parameters(), lr=0.0)
    return [
        (x, mean, {}, ValueError, "either an optimizer or lr, got none"),
        (x, mean, {"optimizer": sgd, "lr": 0.1}, ValueError, "either an optimizer or lr, got both"),
        (x, mean, {"lr": -1.0}, ValueError, "needs a positive lr, got -1"),
        (
            x,
            mean,
            {"lr": 0.1, "fractions": (1.0,)},
            ValueError,
            r"two or more different positive fractions, got \(1.0,\)",
        ),
        (x, mean, {"lr": 0.1, "fractions": (1.0, -2.0)}, ValueError, "two or more different positive fractions"),
        (x, mean, {"optimizer": other}, ValueError, "optimizer of the model's parameters"),
        (x, mean, {"optimizer": "sgd"}, TypeError, "needs a torch.optim.Optimizer, got str"),
        (x, mean, {"optimizer": still}, ValueError, "an update and a gradient that are not 0, got lengths 0 and"),
        (x, lambda y, _: y, {"lr": 0.1}, ValueError, "needs a loss of one number"),
        (x, lambda y, _: y.mean() / 0, {"lr": 0.1}, ValueError, "needs a finite loss"),
        (x, lambda y, _: None, {"lr": 0.1}, TypeError, "returns a tensor, got NoneType"),
        (x, lambda y, _: y.detach().mean(), {"lr": 0.1}, ValueError, "needs a loss with a gradient"),
        (x[:1], mean, {"lr": 0.1}, ValueError, "2 or more values per channel in train mode"),
    ], net


@pytest.mark.parametrize("case", range(13))
def test_errors_say_what_to_do(case: int):
    cases, net = errors()
    x, loss, options, kind, message = cases[case]
    with pytest.raises(kind, match=message):
        landscape(net, x, loss, **options)
