"""Observations that are compared are made of as many examples, however batches are cut and whatever is left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.shift import Reference
from batchnorm.shift.assumptions import check
from batchnorm.shift.observation_units import Grouping
from batchnorm.shift.verdict import judge

RANDOM = torch.Generator()


def batches(count: int, size: int, *, by: float = 0.0) -> list[Tensor]:
    return [torch.randn(size, 8, generator=RANDOM) + by for _ in range(count)]


@pytest.fixture
def net() -> nn.Module:
    RANDOM.manual_seed(0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 16), nn.BatchNorm1d(16))
    bn.recalibrate(net, batches(40, 64))
    return net.eval()


@pytest.mark.slow
@pytest.mark.parametrize("examples", [4, None])
@pytest.mark.parametrize(("calibrated", "served"), [(64, 64), (64, 8), (8, 64), (64, 1), (5, 7)])
def test_clean_batches_of_another_size_raise_no_alarm(
    net: nn.Module, calibrated: int, served: int, examples: int | None
) -> None:
    monitor = bn.ShiftMonitor(net, unit="batch", examples=examples, budget=None)
    monitor.calibrate(batches(250, calibrated))
    data = batches(6400 // served, served)
    with monitor, torch.no_grad():
        for x in data:
            net(x)
    assert monitor.alarm is None
    assert monitor.reference.examples == (examples or calibrated)
    assert monitor.stream.evidence.observations >= 80
    assert judge(monitor, data).rang is None
    assert not [c for c in check(monitor, data).conditions if c.state == "broken"]


@pytest.mark.slow
def test_a_change_of_batches_is_found(net: nn.Module) -> None:
    monitor = bn.ShiftMonitor(net, unit="batch", budget=None)
    monitor.calibrate(batches(250, 64))
    with monitor, torch.no_grad():
        for x in batches(100, 3, by=1.0):
            net(x)
    assert monitor.alarm is not None


@pytest.mark.slow
def test_a_reference_knows_how_many_examples_make_an_observation(net: nn.Module, tmp_path: Path) -> None:
    first = bn.ShiftMonitor(net, unit="batch", examples=16, budget=None)
    first.calibrate(batches(220, 64)).save(tmp_path / "a.bncal.safetensors")
    again = bn.ShiftMonitor(net, unit="batch", reference=tmp_path / "a.bncal.safetensors", budget=None)
    with again, torch.no_grad():
        for x in batches(100, 64):
            net(x)
    assert again.reference.examples == 16
    assert again.stream.looked == 1600
    assert again.alarm is None


def test_batches_that_are_too_small_are_put_together() -> None:
    z = torch.arange(10.0, dtype=torch.float64)[:, None]
    grouping = Grouping("batch", 4)
    found = [grouping.of(part, part, None)[0] for part in (z[:3], z[3:5], z[5:6], z[6:10])]
    assert [part.flatten().tolist() for part in found] == [[], [1.5], [], [7.5]]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 7, 64])
def test_clean_runs_of_keys_raise_no_alarm_in_batches_of_any_size(net: nn.Module, size: int) -> None:
    def keys(x: Tensor) -> list[float]:
        return x[:, -1].tolist()

    def runs(count: int) -> Tensor:
        """Runs of 5 to 15 examples, told apart by their last number."""
        lengths = torch.randint(5, 16, (count,), generator=RANDOM)
        x = torch.randn(int(lengths.sum()), 8, generator=RANDOM)
        x[:, -1] = torch.randn(count, generator=RANDOM).repeat_interleave(lengths)
        return x

    monitor = bn.ShiftMonitor(net, unit=keys, budget=None)
    monitor.calibrate(list(runs(300).split(64)))
    with monitor, torch.no_grad():
        for x in runs(300).split(size):
            net(x)
    assert monitor.alarm is None
    assert monitor.stream.evidence.observations in {298, 299}  # whole runs but the last; two keys may be one


def test_no_budget_leaves_out_a_part_of_runs_that_are_compared(net: nn.Module) -> None:
    def keys(x: Tensor) -> list[int]:
        return list(range(len(x)))

    looked = []
    for calibrates in (False, True):
        monitor = bn.ShiftMonitor(net, unit=keys, budget=1e-9)
        if calibrates:
            monitor.calibrate(batches(10, 64))
        with monitor, torch.no_grad():
            for x in batches(12, 64):
                net(x)
        looked.append(monitor.stream.looked)
    assert looked[0] < looked[1] == 12 * 64


def test_runs_of_which_a_part_was_missed_are_no_observations() -> None:
    z = torch.arange(8.0, dtype=torch.float64)[:, None]

    def observed(*, is_strict: bool) -> list[float]:
        grouping = Grouping(lambda keys: keys, is_strict=is_strict)
        first = grouping.of(z[:3], z[:3], ["a", "a", "b"])[0]
        grouping.missed()
        return torch.cat([first, grouping.of(z[3:], z[3:], ["c", "d", "d", "e", "f"])[0]]).flatten().tolist()

    assert observed(is_strict=True) == [0.5, 4.5, 6.0]  # neither b nor c
    assert observed(is_strict=False) == [0.5, 2.0, 3.0, 4.5, 6.0]


def test_an_open_run_and_what_was_missed_are_in_the_state(net: nn.Module, tmp_path: Path) -> None:
    def keys(x: Tensor) -> list[int]:
        return (x[:, 0] // 1).int().tolist()

    reference = bn.ShiftMonitor(net, unit=keys, budget=None).calibrate(batches(20, 64))
    whole = bn.ShiftMonitor(net, unit=keys, reference=reference, budget=None)
    with whole, torch.no_grad():
        net(torch.zeros(3, 8))
    whole.stream.missed()
    whole.save(tmp_path / "a.bnshift.safetensors")
    again = bn.ShiftMonitor(net, unit=keys, reference=reference, budget=None).load(tmp_path / "a.bnshift.safetensors")
    for monitor in (whole, again):
        with monitor, torch.no_grad():
            net(torch.tensor([1.0, 2.0, 3.0])[:, None].expand(3, 8))
    waiting = [torch.cat([z for z, _ in m.stream._waiting]) if m.stream._waiting else None for m in (whole, again)]
    assert whole.stream.evidence.observations == again.stream.evidence.observations == 1  # of 2 alone
    assert waiting == [None, None]


@pytest.mark.slow
def test_an_old_reference_of_batches_is_refused(net: nn.Module, tmp_path: Path) -> None:
    monitor = bn.ShiftMonitor(net, unit="batch", budget=None)
    reference = monitor.calibrate(batches(220, 64))
    object.__setattr__(reference, "examples", 0)
    reference.save(tmp_path / "a.bncal.safetensors")
    with pytest.raises(ValueError, match="Calibrate again"):
        Reference.load(tmp_path / "a.bncal.safetensors")
