"""Tails: clean streams with few large examples keep the promise, and from a checkpoint alone are told of."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.shift import ShiftMonitor
from batchnorm.shift.tails import LEAST, Tails

Draw = Callable[[int, torch.Generator], Tensor]


def spikes(share: float, factor: float) -> Draw:
    def draw(n: int, random: torch.Generator) -> Tensor:
        x = torch.randn(n, 16, generator=random)
        return torch.where(torch.rand(n, 1, generator=random) < share, factor * x, x)

    return draw


def counts(n: int, random: torch.Generator) -> Tensor:
    size = torch.exp(torch.randn(n, 1, generator=random))
    return torch.poisson(torch.full((n, 16), 0.05), generator=random) * size


def bursts(n: int, random: torch.Generator) -> Tensor:
    loud = torch.rand(n, 1, generator=random) < 0.1
    return torch.where(loud, 1.0, 0.05) * torch.randn(n, 16, generator=random)


def student(n: int, random: torch.Generator) -> Tensor:
    """t with 2 degrees of freedom, one scale for an example: normal over the root of an exponential variable."""
    scale = -torch.rand(n, 1, generator=random).clamp_min(1e-12).log()
    return torch.randn(n, 16, generator=random) / scale.sqrt()


def lognormal(n: int, random: torch.Generator) -> Tensor:
    return torch.randn(n, 16, generator=random) * torch.exp(1.2 * torch.randn(n, 1, generator=random))


WORLDS = {
    "1 in 1,000 times 100": spikes(0.001, 100.0),
    "3 in 1,000 times 30": spikes(0.003, 30.0),
    "1 in 100 times 30": spikes(0.01, 30.0),
    "counts": counts,
    "bursts": bursts,
    "lognormal": lognormal,
}


def normal(n: int, random: torch.Generator) -> Tensor:
    return torch.randn(n, 16, generator=random)


def network(draw: Draw) -> nn.Module:
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(),
        nn.Linear(32, 3),
    )  # fmt: skip
    bn.recalibrate(model, list(draw(100_000, random).split(2_000)))
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("calibration", [0, 200])
@pytest.mark.filterwarnings("ignore:ShiftMonitor. the largest:RuntimeWarning")
def test_no_clean_stream_with_tails_rings(world: str, calibration: int) -> None:
    """Twenty of 1,200: at a rate of 1 % one of them rings with 17 %, here none does."""
    draw, random, rang = WORLDS[world], torch.Generator().manual_seed(1), 0
    model = network(draw)
    for _ in range(20):
        monitor = ShiftMonitor(model, examples=None, budget=None)
        if calibration:
            monitor.calibrate(list(draw(calibration, random).split(100)))
        with torch.no_grad(), monitor:
            for _ in range(75):
                model(draw(16, random))
        rang += monitor.alarm is not None
    assert rang == 0


def streamed(model: nn.Module, draw: Draw, n: int, seed: int) -> ShiftMonitor:
    monitor, random = ShiftMonitor(model, examples=None, budget=None), torch.Generator().manual_seed(seed)
    with torch.no_grad(), monitor:
        for _ in range(n // 32):
            model(draw(32, random))
    return monitor


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_tails_are_told_of_once_with_what_to_do(world: str) -> None:
    model = network(WORLDS[world])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        monitor = streamed(model, WORLDS[world], 4096, 2)
    assert [str(w.message) for w in told if "of observations carry" in str(w.message)].__len__() == 1
    message = str(told[0].message)
    assert "of the energy of layer '" in message
    assert "Calibrate (monitor.calibrate(loader))" in message
    assert "kurtosis=" in message
    assert monitor.stream.tail is not None
    assert f"doubtful: {monitor.stream.tail}" in repr(monitor)


def test_a_calibrated_monitor_has_no_such_condition() -> None:
    model, random = network(bursts), torch.Generator().manual_seed(3)
    monitor = ShiftMonitor(model, examples=None, budget=None)
    monitor.calibrate(list(bursts(400, random).split(100)))
    with torch.no_grad(), monitor:
        for _ in range(40):
            model(bursts(32, random))
    assert monitor.stream.tail is None


@pytest.mark.parametrize("seed", range(5))
def test_normal_examples_are_not_told_of(seed: int) -> None:
    streamed(network(normal), normal, 2048, seed)  # a warning is an error here


@pytest.mark.slow
@pytest.mark.parametrize("world", ["shapes", "tones", "table"])
@pytest.mark.filterwarnings("ignore:ShiftMonitor. the largest:RuntimeWarning")
def test_of_the_benchmarks_worlds_the_one_with_exponentials_of_normal_columns_is_told_of(
    world: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of the table's columns are lognormal: E[Q^2] / E[Q]^2 of such a layer is 10 or 20."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks" / "shift"))
    worlds = __import__("worlds")
    made, random = worlds.WORLDS[world], torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = made.net()
    bn.recalibrate(model, [made.clean(256, random)[0] for _ in range(8)])
    monitor = streamed(model.eval(), lambda n, random: made.clean(n, random)[0], 1024, 4)
    assert (monitor.stream.tail is not None) == (world == "table")
    sys.modules.pop("worlds")


@pytest.mark.slow
def test_one_normal_channel_is_within_the_limit() -> None:
    """The heaviest of normal layers: m = E z^4 = 3."""
    layer = nn.BatchNorm1d(1).eval()
    for seed in range(20):
        streamed(layer, lambda n, random: torch.randn(n, 1, generator=random), 1024, seed)


def test_what_is_said_is_what_was_observed() -> None:
    known = ShiftMonitor(nn.BatchNorm1d(2).eval()).reference
    seen = Tails(known)
    energy = torch.ones(1000, 1, dtype=torch.float64)
    energy[::100] = 900.0  # ten of them carry 9,000 of 9,990
    seen.add(energy[: LEAST - 1])
    assert seen.heavy is None  # too few
    seen.add(energy[LEAST - 1 :])
    assert seen.heavy is not None
    assert float(seen.ratios[0]) == pytest.approx(1000 * (10 * 900**2 + 990) / 9990**2)
    assert seen.heavy.count == 6  # 5,400 are more than half of 9,990, and 4,500 are not
    assert seen.heavy.part == pytest.approx(5400 / 9990)
    assert "the largest 0.6 % of observations carry 54 % of the energy" in str(seen.heavy)
    assert "kurtosis=82" in seen.heavy.remedy


def test_a_declared_kurtosis_is_what_is_allowed() -> None:
    layer = nn.BatchNorm1d(2).eval()
    energy = torch.ones(1000, 1, dtype=torch.float64)
    energy[::100] = 900.0
    for kurtosis, is_told in ((2.0, True), (3.0, True), (82.0, False)):
        seen = Tails(ShiftMonitor(layer, kurtosis=kurtosis).reference)
        seen.add(energy)
        assert (seen.heavy is not None) == is_told


def test_shifted_examples_say_nothing_about_tails() -> None:
    """An alarm ends the watch: what comes after it is not clean."""
    model = network(normal)
    monitor, random = ShiftMonitor(model, examples=None, budget=None), torch.Generator().manual_seed(3)
    with torch.no_grad(), monitor:
        for i in range(40):
            model(normal(32, random) * (1 if i < 30 else 100))
    assert monitor.alarm is not None
    assert monitor.stream.tail is None


def test_tails_go_on_from_a_file(tmp_path: Path) -> None:
    model = network(normal)
    one = streamed(model, normal, 640, 1)
    one.save(tmp_path / "a.bnshift.safetensors")
    again = ShiftMonitor(model, examples=None, budget=None).load(tmp_path / "a.bnshift.safetensors")
    assert again.stream._tails.count == one.stream._tails.count == 640
    assert torch.equal(again.stream._tails.ratios, one.stream._tails.ratios)
    assert math.isfinite(float(again.stream._tails.ratios.max()))
