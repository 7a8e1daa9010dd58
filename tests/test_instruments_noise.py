"""The free tier: batch statistics read back from running averages, and what a window of them says."""

import math

import numpy as np
import pytest
import torch
from scipy.special import polygamma
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.instruments.free_tier import StepWindow, shift, shift_floor
from batchnorm.instruments.gamma_and_beta import census
from batchnorm.instruments.snapshots import Layers, Snapshot, updates

CHANNELS = 4096
WINDOW = 8
# A second difference has relative variance 2; six of them, correlated by -4/6 and 1/6, average to 0.593, so a pooled
# variance has a relative error of 0.77 / sqrt(channels). Five of these:
SAMPLING = 5 * 0.77 / math.sqrt(CHANNELS)
EPS32 = torch.finfo(torch.float32).eps


def window_of(
    layer: nn.Module, batches: list[list[Tensor]], warm_up: int = 60
) -> tuple[StepWindow, Layers, list[Snapshot]]:
    """A window of steps, each of one or more forward passes, after as many as the running averages need to settle."""
    layers = Layers({"bn": layer})
    layer.train()
    for passes in batches[:warm_up]:
        for x in passes:
            layer(x)
    snapshots = [Snapshot.of(layers)]
    for passes in batches[warm_up:]:
        for x in passes:
            layer(x)
        snapshots.append(Snapshot.of(layers))
    return StepWindow.of(snapshots, layers), layers, snapshots


def normal(size: int, steps: int = 60 + WINDOW, passes: int = 1) -> list[list[Tensor]]:
    return [[3 + 2 * torch.randn(size, CHANNELS) for _ in range(passes)] for _ in range(steps)]


def exact_noise(size: int) -> float:
    """1 / M + Var(log s^2) / 4 of normal samples, with the exact trigamma((M - 1) / 2) in place of 2 / M."""
    return 1 / size + float(polygamma(1, (size - 1) / 2)) / 4


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
@pytest.mark.parametrize("passes", [1, 3])
def test_a_batchs_own_statistics_are_read_back_from_the_running_averages(momentum: float | None, passes: int) -> None:
    layer = nn.BatchNorm1d(5, momentum=momentum).double().train()
    layers = Layers({"bn": layer})
    layer(torch.randn(16, 5).double())
    before = Snapshot.of(layers)
    xs = [torch.randn(16, 5).double() for _ in range(passes)]
    for x in xs:
        layer(x)
    seen = updates([before.cpu(), Snapshot.of(layers).cpu()], layers)
    a = momentum or 0.0
    weights = np.array([(1 - a) ** (passes - 1 - i) for i in range(passes)]) if momentum else np.ones(passes)
    weights /= weights.sum()
    means = np.stack([x.numpy().mean(0) for x in xs])
    variances = np.stack([x.numpy().var(0, ddof=1) for x in xs])
    np.testing.assert_allclose(seen.mean[0].numpy(), weights @ means, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(seen.var[0].numpy(), weights @ variances, rtol=1e-12)
    assert float(seen.share[0, 0]) == pytest.approx((weights**2).sum())
    assert float(seen.passes[0, 0]) == passes


@pytest.mark.parametrize("size", [8, 32, 512])
def test_noise_of_normal_values_is_what_the_formula_says(size: int) -> None:
    seen, _, _ = window_of(nn.BatchNorm1d(CHANNELS), normal(size, 8 + WINDOW), warm_up=8)
    # s^2 is estimated from W batches: E[1 / s^2] is above 1 by 2 / (W (M - 1))
    tolerance = SAMPLING + 2 / (WINDOW * (size - 1))
    assert float(seen.noise) == pytest.approx(exact_noise(size), rel=tolerance)
    assert float(seen.m_eff) == pytest.approx(size, rel=tolerance)
    assert float(seen.dropout) == pytest.approx(exact_noise(size) / (1 + exact_noise(size)), rel=tolerance)


def test_batches_of_32_are_as_noisy_as_dropout_of_4_and_a_half_percent() -> None:
    seen, _, _ = window_of(nn.BatchNorm1d(CHANNELS), normal(32, 8 + WINDOW), warm_up=8)
    assert float(seen.dropout) == pytest.approx(0.0448, abs=0.003)


def test_kurtosis_adds_noise_to_the_scale() -> None:
    laplace = torch.distributions.Laplace(0.0, 1.0)
    batches = [[laplace.sample((256, CHANNELS))] for _ in range(8 + WINDOW)]
    seen, _, _ = window_of(nn.BatchNorm1d(CHANNELS), batches, warm_up=8)
    # (kappa + 3) / (4 M) with kappa = 6; the next term of Var(log s^2) is a few percent at M = 256
    assert float(seen.noise) == pytest.approx(9 / (4 * 256), rel=SAMPLING + 0.04)


def test_positions_that_are_alike_do_not_count() -> None:
    def images(alike: bool) -> list[list[Tensor]]:
        shape = (16, 512, 1, 1) if alike else (16, 512, 4, 4)
        return [[torch.randn(shape).expand(16, 512, 4, 4).contiguous()] for _ in range(8 + WINDOW)]

    tolerance = 5 * 0.77 / math.sqrt(512) + 2 / (WINDOW * 15)
    alike, _, _ = window_of(nn.BatchNorm2d(512), images(True), warm_up=8)
    apart, _, _ = window_of(nn.BatchNorm2d(512), images(False), warm_up=8)
    assert float(alike.m_eff) == pytest.approx(16, rel=tolerance)
    assert float(apart.m_eff) == pytest.approx(256, rel=tolerance)


@pytest.mark.parametrize(("momentum", "passes"), [(0.1, 3), (None, 1), (0.9, 2)])
def test_noise_does_not_depend_on_how_averages_are_kept(momentum: float | None, passes: int) -> None:
    seen, _, _ = window_of(nn.BatchNorm1d(CHANNELS, momentum=momentum), normal(32, 8 + WINDOW, passes), warm_up=8)
    # the log of a mean of variances is a little less noisy than the mean of logs
    assert float(seen.noise) == pytest.approx(exact_noise(32), rel=SAMPLING + 0.05)


def test_an_even_drift_is_not_noise() -> None:
    batches = normal(32, 8 + WINDOW)
    for step, (x,) in enumerate(batches):
        x += step * 1.0  # half a standard deviation a step, three times the noise of a mean
    seen, _, _ = window_of(nn.BatchNorm1d(CHANNELS), batches, warm_up=8)
    assert float(seen.noise) == pytest.approx(exact_noise(32), rel=SAMPLING + 2 / (WINDOW * 31))


def test_settled_averages_are_one_standard_error_away_and_stale_ones_as_many_as_they_were_moved() -> None:
    layer = nn.BatchNorm1d(CHANNELS)
    seen, layers, _ = window_of(layer, normal(32))
    # the variance of a mean of W of them and of the average: both known to a relative error of sqrt(2 / channels)
    assert float(seen.staleness) == pytest.approx(1, rel=SAMPLING)
    assert float(seen.staleness_var) == pytest.approx(1, rel=2 * SAMPLING)
    with torch.no_grad():
        layer.running_mean += 6 * 2 / math.sqrt(32)  # standard deviations of a batch's mean
    moved = [Snapshot.of(layers)]
    for (x,) in normal(32, WINDOW):
        layer(x)
        moved.append(Snapshot.of(layers))
    expected = math.sqrt(1 + 36 / (0.1 / 1.9 + 1 / WINDOW))
    assert float(StepWindow.of(moved, layers).staleness) == pytest.approx(expected, rel=SAMPLING)


def test_gap_is_the_difference_of_train_and_eval_outputs() -> None:
    layer = bn.BatchNorm1d(64)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    layers, snapshots, squares, outputs = Layers({"bn": layer}), [], [], []
    snapshots.append(Snapshot.of(layers))
    for _ in range(3):
        x = 1 + torch.randn(4096, 64)
        evaluated = layer.eval()(x).detach()
        squares.append(float((layer.train()(x).detach() - evaluated).square().mean()))
        outputs.append(float(evaluated.var(0, correction=0).mean()))
        snapshots.append(Snapshot.of(layers))
    seen = StepWindow.of(snapshots, layers)
    # unbiased for biased variances: 1 / 4096; the read-back mean is rounded by EPS32 |mean| / momentum
    assert float(seen.gap) == pytest.approx(math.sqrt(sum(squares) / sum(outputs)), rel=1e-3)


def test_shift_is_in_standard_deviations_and_its_floor_is_what_noise_alone_does() -> None:
    layer = nn.BatchNorm1d(CHANNELS)
    seen, layers, snapshots = window_of(layer, normal(32, 120), warm_up=112)
    start = Snapshot(torch.zeros(CHANNELS), torch.full((CHANNELS,), 4.0), torch.tensor([0]))
    end = Snapshot(torch.full((CHANNELS,), 1.0), torch.full((CHANNELS,), 4.0), torch.tensor([10]))
    assert float(shift(start, end, layers)) == pytest.approx(0.5)
    far = snapshots[-1]
    for (x,) in normal(32, 50):
        layer(x)
    now = Snapshot.of(layers)
    # noise power counts the variance's part as Var(log s^2) / 4, which is that of the sd; both to within sampling
    assert float(shift(far, now, layers)) == pytest.approx(float(shift_floor(far, now, layers, seen.noise)), rel=0.08)


def test_what_is_not_updated_is_not_measured() -> None:
    moving, frozen, still = nn.BatchNorm1d(4), bn.freeze(nn.BatchNorm1d(4)), nn.BatchNorm1d(4, momentum=0.0)
    bare = nn.BatchNorm1d(4, track_running_stats=False)
    layers = Layers({"moving": moving, "frozen": frozen, "still": still, "bare": bare})
    snapshots = [Snapshot.of(layers)]
    for _ in range(WINDOW):
        for layer in (moving, frozen, still, bare):
            layer(torch.randn(16, 4))
        snapshots.append(Snapshot.of(layers))
    seen = StepWindow.of(snapshots, layers)
    for name in ("noise", "m_eff", "staleness", "gap"):
        assert getattr(seen, name).isnan().tolist() == [False, True, True, True]


def test_rounding_of_a_large_mean_is_not_taken_for_noise() -> None:
    layer = nn.BatchNorm1d(CHANNELS)
    # sd(mu_B) is 2 / sqrt(512) = 0.09; a stored mean of 1e6 is rounded to 0.06, which read-back multiplies by 10
    batches = [[x + 1e6 for x in step] for step in normal(512, 8 + WINDOW)]
    seen, _, _ = window_of(layer, batches, warm_up=8)
    assert seen.noise.isnan()


def test_a_window_of_two_steps_is_refused() -> None:
    layers = Layers({"bn": nn.BatchNorm1d(2)})
    with pytest.raises(ValueError, match=r"a window needs 4 snapshots or more, got 3\. Take more steps"):
        StepWindow.of([Snapshot.of(layers)] * 3, layers)


def test_census_counts_what_gamma_and_beta_say() -> None:
    layer, plain = nn.BatchNorm1d(4), nn.BatchNorm1d(3, affine=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, -2.0, 0.001, 0.5]))
        layer.bias.copy_(torch.tensor([0.0, 2.0, -1.0, -0.5]))
        layer.running_var[3] = 1e-10
    layers = Layers({"a": layer, "b": plain})
    found = census(layers, Snapshot.of(layers))
    assert float(found["gamma"][0]) == 0.5  # torch's median is the lower of two
    assert float(found["active"][0]) == pytest.approx((0.5 + 0.841345 + 0 + 0.158655) / 4, abs=1e-6)
    assert float(found["dead"][0]) == 0.5  # one by its gamma and beta, one by its variance
    assert [float(found[name][1]) for name in ("gamma", "beta", "active", "dead")] == [1, 0, 0.5, 0]
