"""The same input is measured a little differently in a batch of another size: this alone raises no alarm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.shift import Reference, conformal, scores
from batchnorm.shift.conformal import CELLS, Bag, cells_of, factors
from batchnorm.shift.evidence import ShiftEvidence

LIMIT = 4.6  # log(100)


def at_an_edge() -> float:
    """Evidence of 200 equal observations that rounding moved over the edge of a cell, against 100 that it did not."""
    edge = torch.tensor([(300 / CELLS * 2 - 1) / (1 - (300 / CELLS * 2 - 1))], dtype=torch.float64)  # u of cell 300
    middle, spread = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    below, above = (cells_of((edge + moved).expand(n, 1), middle, spread) for moved, n in ((-1e-6, 100), (1e-6, 200)))
    assert (int(below[0]), int(above[0])) == (299, 300)
    return float(factors(Bag.of(below).p_values(above)).max())


def test_an_edge_between_equal_observations_is_no_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert at_an_edge() <= 0
    monkeypatch.setattr(conformal, "EDGE", 0)
    assert at_an_edge() > LIMIT


def of_few_kinds(seed: int, rounding: float) -> float:
    """Largest log evidence of a stream of six kinds of rows, against 1,000 clean ones without its rounding."""
    channels, random = 32, torch.Generator().manual_seed(seed)
    layer = nn.BatchNorm1d(channels).eval()
    kinds = torch.randn(6, channels, generator=random, dtype=torch.float64)

    def drawn(n: int) -> Tensor:
        return kinds[torch.randint(6, (n,), generator=random)]

    clean = drawn(1000)
    known = Reference.from_checkpoint(layer, {"": layer}, unit="example").calibrated(clean, clean.square())
    evidence, largest = ShiftEvidence.start(known), 0.0
    for _ in range(40):
        z = drawn(8) + rounding * torch.randn(1, channels, generator=random, dtype=torch.float64)
        evidence = evidence.after(z, z.square())
        largest = max(largest, evidence.log)
    return largest


@pytest.mark.slow
def test_inputs_of_few_kinds_may_be_rounded_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(of_few_kinds(seed, 1e-5) < LIMIT for seed in range(20))
    assert of_few_kinds(0, 0.5) > LIMIT  # what is more than rounding rings
    monkeypatch.setattr(scores, "_SPREAD", 1e-7)
    monkeypatch.setattr(scores, "_WIDTH", 1e-7)
    assert any(of_few_kinds(seed, 1e-5) > LIMIT for seed in range(20))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_network_that_is_calibrated_in_large_batches_may_serve_in_small_ones(size: int) -> None:
    torch.manual_seed(0)
    blocks = [(3, 64), (64, 64), (64, 128), (128, 128)]
    net = nn.Sequential(
        *(
            nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2))
            for i, o in blocks
        )
    )
    kinds = torch.randn(6, 3, 1, 1) + torch.randn(6, 3, 16, 16)
    bn.recalibrate(net, [kinds])
    monitor = bn.ShiftMonitor(net.eval(), examples=None, budget=None)
    monitor.calibrate([kinds[torch.randint(6, (64,))] for _ in range(8)])
    with monitor, torch.no_grad():
        for batch in kinds[torch.randint(6, (192,))].split(size):
            net(batch)
    assert monitor.alarm is None
