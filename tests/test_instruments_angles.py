"""Angles of filters against simulations, exact rotations, and a network with batch norm."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn
from batchnorm.instruments.angles import Angles

U32 = 2.0**-24


def simulate(make, norm_squared: float, *, entries: int = 1000, filters: int = 8, steps: int = 700, last: int = 500):
    """The angle of weights whose gradients are random, orthogonal to them, and 1 / ||w|| large, from equilibrium on."""
    net = nn.Linear(entries, filters, bias=False).double()
    weight = net.weight
    weight.data.copy_(math.sqrt(norm_squared) * F.normalize(torch.randn_like(weight), dim=1))
    optimizer = make([weight])
    with Angles(net, optimizer) as angles:
        for _ in range(steps):
            direction = F.normalize(weight.detach(), dim=1)
            g = torch.randn_like(weight)
            g -= (g * direction).sum(1, keepdim=True) * direction
            weight.grad = g / weight.detach().norm(dim=1, keepdim=True)
            optimizer.step()
    return angles.report(last).weights[0]


# 500 steps of 8 filters of 1000 entries: the length of a random update is known to 1 / sqrt(2 * 500 * 8 * 1000) and
# the slow length of the weight, which averages 1 / (4 eta lambda) = 50 steps, to sqrt(2 / 1000) / sqrt(8) / 4 = 0.4 %.
# The theory leaves out terms of the relative size eta lambda = 0.5 %, times 1 / (1 - alpha) for how long they last:
SAMPLING, STRENGTH = 4 * 0.004, 0.005


@pytest.mark.slow
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov", "expected"),
    [(0.0, 0.0, False, 0.1), (0.9, 0.0, False, 0.07255), (0.9, 0.5, False, 0.0513), (0.9, 0.0, True, 0.08404)],
)
def test_random_gradients_and_weight_decay_of_sgd_hold_the_angle_of_equilibrium(
    momentum, dampening, nesterov, expected
):
    rate, decay = 0.05, 0.1
    start = math.sqrt(rate * (1 - dampening) * 1000 / (2 * decay * (1 - momentum)))
    found = simulate(
        lambda p: torch.optim.SGD(
            p, lr=rate, weight_decay=decay, momentum=momentum, dampening=dampening, nesterov=nesterov
        ),
        start,
    )
    assert found.equilibrium == pytest.approx(expected, rel=1e-3)
    assert found.angle == pytest.approx(expected, rel=SAMPLING + STRENGTH / (1 - momentum) / 2)
    assert found.ratio == pytest.approx(found.angle / found.equilibrium)
    assert found.time_constant == pytest.approx((1 - momentum) / (4 * STRENGTH * (1 - dampening)))
    assert found.invariant
    assert found.effective_rate == pytest.approx(rate / start, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_random_gradients_and_adamw_hold_the_angle_of_equilibrium(beta: float):
    rate, decay = 0.005, 1.0
    found = simulate(
        lambda p: torch.optim.AdamW(p, lr=rate, weight_decay=decay, betas=(beta, 0.99)), rate * 1000 / (2 * decay)
    )
    assert found.equilibrium == pytest.approx(math.sqrt(2 * rate * decay * (1 - beta) / (1 + beta)))
    # g^2 / v averages 1 + (1 - beta2): an average over 100 steps is a noisy divisor
    assert found.angle == pytest.approx(found.equilibrium, rel=SAMPLING + STRENGTH + 0.01)
    assert found.time_constant == pytest.approx(1 / (2 * rate * decay))


@pytest.mark.slow
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, bn.BatchNorm1d])
def test_a_network_with_batch_norm_comes_within_5_percent_of_equilibrium(norm: type):
    net = nn.Sequential(
        nn.Linear(32, 64, bias=False), norm(64), nn.ReLU(), nn.Linear(64, 64, bias=False), norm(64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip
    x, noise = torch.randn(4096, 32), torch.randn(4096, 10)
    y = (x @ torch.randn(32, 10) / 32**0.5 + noise).argmax(1)
    # eta lambda = 0.004, a time constant of 62.5 steps: 8 of them have passed before the angles count
    optimizer = torch.optim.SGD(net.parameters(), lr=0.4, weight_decay=0.01)
    with Angles(net, optimizer) as angles:
        for _ in range(1000):
            rows = torch.randint(0, len(x), (64,))
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    first, second, last = angles.report(500).weights
    assert first.invariant
    assert second.invariant
    assert first.ratio == pytest.approx(1, abs=0.05)
    assert second.ratio == pytest.approx(1, abs=0.05)
    assert not last.invariant
    assert last.ratio is None
    assert last.equilibrium is None
    assert (first.filters, last.filters) == (64, 10)
    assert "of equilibrium" in str(angles.report())


def turned(weight: nn.Parameter, by: torch.Tensor, model: nn.Module):
    """What Angles says of one step that adds ``by``."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with Angles(model, optimizer) as angles:
        weight.grad = -by
        optimizer.step()
    return next(w for w in angles.report().weights if model.get_parameter(w.name) is weight)


@pytest.mark.parametrize("angle", [1e-9, 1e-4, 1.0, 3.0, math.pi])
def test_angles_of_any_size_are_exact(angle: float):
    net = nn.Linear(2, 1, bias=False).double()
    net.weight.data.copy_(torch.tensor([[2.0, 0.0]]))
    by = torch.tensor([[math.cos(angle) - 1, math.sin(angle)]]).double() * 2
    if angle < 1e-6:
        by[0, 0] = -2 * math.sin(angle / 2) ** 2 * 2  # cos - 1 without cancellation
    # half the chord is stored to 2^-53 and near pi the arcsine takes its square root
    assert turned(net.weight, by, net).angle == pytest.approx(angle, rel=1e-6 if angle < 1e-6 else 1e-7)


def test_storing_again_turns_a_weight_by_a_fifth_of_eps():
    net = nn.Linear(4096, 16, bias=False)
    nn.init.normal_(net.weight)
    # a change of the order of a rounding: the angle is that of rounding, of a size that depends on mantissas
    by = torch.randn_like(net.weight) * 1e-9
    assert turned(net.weight, by, net).angle < 0.3 * 2 * U32


@pytest.mark.parametrize("groups", [1, 2])
def test_a_filter_of_a_transposed_convolution_is_what_makes_one_output_channel(groups: int):
    net = nn.ConvTranspose2d(4, 6, 3, groups=groups, bias=False).double()
    x = torch.randn(8, 4, 5, 5).double()
    # scale one output channel by 3, which turns nothing if rows are those of outputs
    by = torch.zeros_like(net.weight)
    per = 6 // groups
    for channel in range(6):
        group, column = divmod(channel, per)
        rows = slice(group * 4 // groups, (group + 1) * 4 // groups)
        by[rows, column] = net.weight.detach()[rows, column] * (channel + 1)
    y = net(x).detach()
    found = turned(net.weight, by, net)
    assert found.filters == 6
    assert found.angle < 1e-15
    factors = (torch.arange(6) + 2).double().view(6, 1, 1)
    torch.testing.assert_close(net(x).detach(), y * factors)


def test_training_is_the_same_with_and_without():
    def train(measured: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(24, 2))
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        angles = Angles(net, optimizer, every=2)
        if measured:
            angles.__enter__()
        for _ in range(5):
            optimizer.zero_grad()
            net(torch.randn(4, 3, 8)).pow(2).mean().backward()
            optimizer.step()
        angles.__exit__()
        if measured:
            assert angles.report().steps == 3
            assert angles.report(1).steps == 1
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
        return [*net.state_dict().values(), torch.get_rng_state()]

    assert all(torch.equal(a, b) for a, b in zip(train(True), train(False), strict=True))


def test_hooks_are_gone_when_the_training_raises():
    net = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ZeroDivisionError), Angles(net, optimizer):
        1 / 0  # noqa: B018
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_no_theory_is_claimed_where_there_is_none():
    def equilibrium(make):
        net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8))
        optimizer = make(net.parameters())
        with Angles(net, optimizer) as angles:
            net(torch.randn(64, 8)).pow(3).sum().backward()
            optimizer.step()
        assert angles.report().weights[0].invariant
        return angles.report().weights[0].equilibrium

    o = torch.optim
    assert equilibrium(lambda p: o.SGD(p, lr=0.1, weight_decay=0.1)) is not None
    assert equilibrium(lambda p: o.SGD(p, lr=0.1)) is None
    assert equilibrium(lambda p: o.Adam(p, lr=0.1, weight_decay=0.1)) is None
    assert equilibrium(lambda p: o.Adam(p, lr=0.1, weight_decay=0.1, decoupled_weight_decay=True)) is not None
    assert equilibrium(lambda p: o.AdamW(p, lr=0.1, weight_decay=0.1, amsgrad=True)) is None
    assert equilibrium(lambda p: o.RMSprop(p, lr=0.1, weight_decay=0.1)) is None


def test_batch_norm_in_eval_mode_makes_nothing_invariant():
    net = nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16)).eval()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1)
    with Angles(net, optimizer) as angles:
        net(torch.randn(64, 8)).pow(2).sum().backward()
        optimizer.step()
    assert not angles.report().weights[0].invariant


def test_weights_without_gradient_and_filters_of_zeros_are_left_out():
    net = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(4, 2, bias=False))
    net[0].weight.data[0] = 0
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with Angles(net, optimizer) as angles:
        net[0](torch.randn(3, 4)).sum().backward()
        optimizer.step()
    first, second = angles.report().weights
    assert first.angle > 0
    assert second.angle == 0
    assert math.isnan(second.invariance)
    assert not second.invariant


def errors() -> list[tuple]:
    net = nn.Linear(3, 2)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    bias = torch.optim.SGD([net.bias], lr=0.1)
    return [
        (lambda: Angles(net, "sgd"), TypeError, "needs a torch.optim.Optimizer, got str"),
        (lambda: Angles(net, bias), ValueError, "Angles needs an optimizer of the model's parameters, got one with 1"),
        (lambda: Angles(net, torch.optim.LBFGS(net.parameters())), TypeError, "without a closure"),
        (lambda: Angles(nn.BatchNorm1d(3), sgd), ValueError, "trained weights of two axes or more, got none"),
        (lambda: Angles(net, sgd, every=0), ValueError, "every of 1 or more, got 0"),
        (lambda: Angles(net, sgd, keep=0), ValueError, "keep of 1 or more, got 0"),
        (lambda: Angles(net, sgd).report(), RuntimeError, "measured no step. Call optimizer.step"),
        (lambda: Angles(net, sgd).report(0), ValueError, "last of 1 or more, got 0"),
        (lambda: Angles(1, sgd), TypeError, "must be an nn.Module, got int"),
    ]


@pytest.mark.parametrize("case", range(9))
def test_errors_say_what_to_do(case: int):
    do, kind, message = errors()[case]
    with pytest.raises(kind, match=message):
        do()
