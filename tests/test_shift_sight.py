"""Sight: what so many observations could have shown."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from batchnorm.shift import Reference, ShiftMonitor
from batchnorm.shift.least_visible_shift import least_visible_shift
from batchnorm.shift.stream import Stream

CHANNELS = 24


def normal(n: int, random: torch.Generator, by: float = 0.0) -> tuple[Tensor, Tensor]:
    z = torch.randn(n, CHANNELS, generator=random, dtype=torch.float64)
    z[:, 5] += by
    return z, z.square()


def reference(calibration: int, random: torch.Generator) -> Reference:
    known = ShiftMonitor(nn.BatchNorm1d(CHANNELS).eval()).reference
    return known.calibrated(*normal(calibration, random)) if calibration else known


def stream_of(n: int, random: torch.Generator, known: Reference, by: float = 0.0) -> Stream:
    stream = Stream(known, "example", alpha=0.01, arl=None)
    for _ in range(n // 8):
        stream.observe(*normal(8, random, by))
    return stream


@pytest.mark.slow
@pytest.mark.parametrize("calibration", [0, 600])
def test_it_falls_with_the_number_of_observations_and_is_finite(calibration: int) -> None:
    random = torch.Generator().manual_seed(0)
    known = reference(calibration, random)
    found = [least_visible_shift(stream_of(n, random, known).evidence, 0.01) for n in (32, 128, 512, 2048)]
    assert all(map(math.isfinite, found))
    assert found == sorted(found, reverse=True)
    assert found[-1] < found[0]


@pytest.mark.slow
@pytest.mark.parametrize("calibration", [0, 600])
def test_a_stream_that_moved_by_half_as_much_again_rings_in_most_cases(
    calibration: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("CRITICAL")
    random = torch.Generator().manual_seed(1)
    least = least_visible_shift(stream_of(256, random, reference(calibration, random)).evidence, 0.01)
    rang = [stream_of(256, random, reference(calibration, random), 1.5 * least).alarm is not None for _ in range(20)]
    assert sum(rang) > 15


def test_nothing_could_be_seen_in_one_observation() -> None:
    random = torch.Generator().manual_seed(2)
    stream = stream_of(0, random, reference(600, random))
    stream.observe(*normal(1, random))
    stream.update()
    assert least_visible_shift(stream.evidence, 0.01) == math.inf
