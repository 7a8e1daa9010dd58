"""Components of neighbouring channels: their algebra, what they see, and that they keep the promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from batchnorm.shift import Reference
from batchnorm.shift.evidence import ShiftEvidence
from batchnorm.shift.layer_evidence import KINDS
from batchnorm.shift.principal_components import TOGETHER, Components, axes_shape, halves

SIZES = st.lists(st.integers(1, 20), min_size=1, max_size=4).map(tuple)


def bounds(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.mean(0), torch.full((x.shape[1],), 0.02, dtype=torch.float64), x.var(0)


def observed(n: int, channels: int, seed: int) -> tuple[Tensor, Tensor]:
    """Correlated observations of several scales."""
    random = torch.Generator().manual_seed(seed)
    z, q = torch.randn(2, n, channels, generator=random, dtype=torch.float64)
    mix = torch.randn(channels, channels, generator=random, dtype=torch.float64)
    return z @ mix, (0.1 * q @ mix + 1).abs()


@given(SIZES)
@settings(max_examples=40, deadline=None)
def test_components_are_projections_of_sixteen_channels_of_one_layer_on_unit_vectors(sizes: tuple[int, ...]) -> None:
    z, q = observed(50, sum(sizes), seed=1)
    made = Components.measured(sizes, z, q, bounds)
    assert made.axes.shape == axes_shape(sizes)
    found, start, block = made.of(z, q).numpy(), 0, 0
    for size in sizes:
        for first in range(0, size, TOGETHER):
            width = min(TOGETHER, size - first)
            part = slice(start + first, start + first + width)
            for which, x, at in ((0, z, 0), (1, q, sum(sizes))):
                axes = made.axes[which, block, :width, :width].double().numpy()
                # float32 axes: each entry is off by 2^-24 of itself at most
                np.testing.assert_allclose(axes.T @ axes, np.eye(width), atol=TOGETHER * 2.0**-23)
                columns = slice(at + part.start, at + part.stop)
                expected = x.numpy()[:, part] @ axes
                np.testing.assert_allclose(found[:, columns], expected, atol=1e-12 * (1 + float(x.abs().max())))
                assert not made.axes[which, block, width:].any()
                assert not made.axes[which, block, :, width:].any()
            block += 1
        start += size


def test_components_do_not_vary_together_on_the_observations_that_chose_them() -> None:
    z, q = observed(400, 16, seed=2)
    made = Components.measured((16,), z, q, bounds)
    half, _ = halves(400)
    chosen = made.of(z[half], q[half])
    covariance = torch.cov(chosen.T)
    of_block = covariance[:8, :8]
    sd = of_block.diagonal().sqrt()
    # axes in float32 mix components by about 2^-23 of the largest sd
    assert float((of_block - of_block.diagonal().diag()).abs().max() / (sd.max() ** 2)) < 2.0**-20
    assert bool((sd.diff() >= 0).all())


def test_bounds_are_measured_on_other_observations_than_directions() -> None:
    z, q = observed(200, 8, seed=3)
    made = Components.measured((8,), z, q, bounds)
    _, rest = halves(200)
    other = made.of(z[rest], q[rest])
    torch.testing.assert_close(other.mean(0), made.center, atol=1e-9, rtol=0)
    torch.testing.assert_close(made.kappa, other.var(0))


@pytest.mark.parametrize("channels", [1, 8, 9])
def test_constant_channels_have_components(channels: int) -> None:
    z, q = torch.zeros(200, channels).double(), torch.ones(200, channels).double()
    made = Components.measured((channels,), z, q, bounds)
    assert bool(made.axes.isfinite().all())
    assert not made.of(z, q)[:, :channels].any()
    assert not made.of(z, q).var(0).gt(1e-20).any()


def reference(channels: int = 8) -> Reference:
    """Of a layer that knows nothing yet."""
    ones, layer = torch.ones(channels, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    return Reference(
        ("bn",), (channels,), 0 * ones, ones, ones, ones, layer, None, None, "example", 0, "none",
    )  # fmt: skip


def alike(n: int, seed: int, difference: float = 0.0) -> tuple[Tensor, Tensor]:
    """Eight channels that follow one value; two of them move apart by ``difference`` of their sd."""
    random = torch.Generator().manual_seed(seed)
    common = torch.randn(n, 1, generator=random, dtype=torch.float64)
    z = common + 0.1 * torch.randn(n, 8, generator=random, dtype=torch.float64)
    z[:, 0] += difference
    z[:, 1] -= difference
    return z, torch.ones_like(z)


def test_a_difference_between_channels_that_no_channel_shows_is_seen() -> None:
    known = reference().calibrated(*alike(1000, seed=4))
    evidence = ShiftEvidence.start(known)
    for step in range(5):
        evidence = evidence.after(*alike(8, seed=10 + step, difference=0.2))
    kinds = evidence.log_kinds[:, 0]
    assert KINDS[int(kinds.argmax())] in {"components", "component means"}
    assert evidence.log > -math.log(0.01)
    # 40 observations of a move of a fifth of their sd: all that bets on channels could win is 40 * 0.2^2 / 2
    assert float(kinds[KINDS.index("mean")]) < 40 * 0.2**2 / 2


def test_calibration_examples_may_come_in_turns() -> None:
    """Two groups whose channels differ, one after the other and back; then in any order, as clean as before."""
    random = torch.Generator().manual_seed(6)

    def drawn(group: Tensor) -> tuple[Tensor, Tensor]:
        z = 0.4 * torch.randn(len(group), 8, generator=random, dtype=torch.float64)
        z[:, ::2] += 0.8 * group[:, None]
        return z, torch.ones_like(z)

    evidence = ShiftEvidence.start(reference().calibrated(*drawn(torch.arange(1000) % 2)))
    for _ in range(50):
        evidence = evidence.after(*drawn(torch.randint(2, (8,), generator=random)))
        assert evidence.log < -math.log(0.01)


@pytest.mark.slow
def test_many_channels_keep_the_promise_with_200_observations() -> None:
    """Of 3,000 channels with exact bounds of three standard errors each, some would be outside of theirs."""
    channels, random = 3000, torch.Generator().manual_seed(7)

    def drawn(n: int) -> tuple[Tensor, Tensor]:
        z = torch.randn(n, channels, generator=random, dtype=torch.float64)
        return z, z.square()

    for _ in range(2):
        evidence = ShiftEvidence.start(reference(channels).calibrated(*drawn(200)))
        for _ in range(40):
            evidence = evidence.after(*drawn(100))
        assert evidence.log < -math.log(0.01)


@pytest.mark.slow
def test_false_alarms_stay_rarer_than_alpha_with_as_few_observations_as_calibration_takes() -> None:
    """Heavy tails, correlated channels, a new calibration on 200 observations for each stream."""
    streams, rang, alpha = 60, 0, 0.05
    mix = torch.randn(16, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for stream in range(streams):
        random = torch.Generator().manual_seed(100 + stream)

        def drawn(n: int, random: torch.Generator = random) -> tuple[Tensor, Tensor]:
            z = (-torch.rand(n, 16, generator=random, dtype=torch.float64).log() - 1) @ mix
            return z, z.square()

        evidence = ShiftEvidence.start(reference(16).calibrated(*drawn(200)))
        for _ in range(100):
            evidence = evidence.after(*drawn(8))
            if evidence.log >= -math.log(alpha):
                rang += 1
                break
    # Binomial(60, .05): at most 8 with 99.5 %
    assert rang <= 8
