"""Batches may be sorted: the few examples of each that are looked at are like all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.shift.layer_observer import random_rows

KINDS = 4
RANDOM = torch.Generator()


def of_kinds(kinds: Tensor) -> Tensor:
    """Examples of kinds that are three standard deviations apart."""
    return torch.randn(len(kinds), 8, generator=RANDOM) + 3 * kinds[:, None]


ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sorted by kind": lambda kinds: kinds.sort().values,
    "the strangest first": lambda kinds: kinds.sort(descending=True).values,
    "all of one kind, then all of the next": lambda kinds: torch.arange(KINDS).repeat_interleave(len(kinds) // KINDS),
    "in turns": lambda kinds: torch.arange(KINDS).repeat(len(kinds) // KINDS),
}


def batches(order: str, count: int) -> list[Tensor]:
    return [of_kinds(ORDERS[order](torch.randint(KINDS, (64,), generator=RANDOM))) for _ in range(count)]


@pytest.fixture
def net() -> nn.Module:
    RANDOM.manual_seed(0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 16), nn.BatchNorm1d(16))
    bn.recalibrate(net, batches("sorted by kind", 40))
    return net.eval()


@pytest.mark.parametrize("calibrates", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_clean_batches_in_an_order_raise_no_alarm(net: nn.Module, order: str, calibrates: bool) -> None:
    monitor = bn.ShiftMonitor(net, budget=None)
    if calibrates:
        monitor.calibrate(batches(order, 8))
    with monitor, torch.no_grad():
        for x in batches(order, 250):
            net(x)
    assert monitor.stream.looked == 1000
    assert monitor.alarm is None


@pytest.mark.slow
def test_a_compiled_model_shows_rows_from_everywhere(net: nn.Module) -> None:
    monitor = bn.ShiftMonitor(torch.compile(net, backend=lambda graph, _: graph.forward), budget=None)
    with monitor, torch.no_grad():
        for x in batches("the strangest first", 100):
            monitor.observed(x)
    assert monitor.stream.looked == 400
    assert monitor.alarm is None


def test_rows_are_drawn_once_each_all_alike_and_always_the_same() -> None:
    found = torch.zeros(10)
    for seed in range(4000):
        rows = random_rows(10, 3, seed)
        assert rows is not None
        assert rows == sorted(set(rows)) == random_rows(10, 3, seed)
        found[rows] += 1
    # each row is in 3 of 10 draws; five standard errors
    assert float((found / 4000 - 0.3).abs().max()) < 5 * (0.3 * 0.7 / 4000) ** 0.5
    assert random_rows(3, 3, 0) is random_rows(2, 4, 0) is None


def test_all_layers_show_the_same_rows() -> None:
    net = nn.Sequential(nn.BatchNorm1d(1), nn.Identity(), nn.BatchNorm1d(1)).eval()
    monitor = bn.ShiftMonitor(net, examples=3, budget=None)
    seen: list[Tensor] = []
    monitor.stream.observe = lambda z, q, inputs: seen.append(z)  # type: ignore[method-assign]
    with monitor:
        net(torch.arange(20.0)[:, None])
    (z,) = seen
    rows = z.round()
    assert rows[:, 0].tolist() == rows[:, 1].tolist() == sorted(set(rows[:, 0].tolist()))
    assert len(rows) == 3


def test_all_examples_with_keys_are_looked_at() -> None:
    monitor = bn.ShiftMonitor(nn.BatchNorm1d(1).eval(), unit=lambda x: (x[:, 0] // 50).tolist(), budget=None)
    with monitor:
        for x in torch.arange(1000.0)[:, None].split(20):
            monitor.observed(x)
    assert monitor.stream.looked == 1000
    assert monitor.stream.evidence.observations == 19  # runs of 50; one is open


def test_keys_of_examples_with_nan_are_left_out_with_them() -> None:
    net = nn.BatchNorm1d(1).eval()
    asked = ["a", "b", "b", "c", "c", "d"]
    monitor = bn.ShiftMonitor(net, unit=lambda _: asked, examples=None, budget=None)
    x = torch.tensor([[torch.nan], [1.0], [1.0], [2.0], [2.0], [3.0]])
    with monitor:
        with pytest.warns(RuntimeWarning, match="NaN"):
            net(x)
        assert torch.cat([z for z, _ in monitor.stream._waiting]).round().flatten().tolist() == [1.0, 2.0]
