"""What is computed from moments: forgetting, moving averages, distances, and how they print and are stored."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import scipy.integrate
import scipy.stats
import torch
from torch import nn

from batchnorm.moments import Moments

U = 2.0**-53  # unit roundoff of float64


def gaussian(mean: float, std: float, count: float = 100) -> Moments:
    return Moments(count, mean, std**2 * count)


# --- scaled, from_var -------------------------------------------------------------------------------------


def test_scaling_changes_the_weight_and_neither_mean_nor_variance():
    found = Moments.of(torch.randn(8, 3))
    half = found.scaled(0.5)
    assert half.count == 4
    assert torch.equal(half.mean, found.mean)
    assert torch.equal(half.var, found.var)


def test_scaling_by_zero_leaves_no_values():
    found = Moments.of(torch.randn(8, 3))
    gone = found.scaled(0)
    assert gone.count == 0
    assert gone.mean.isnan().all()
    assert torch.equal((gone + found).m2, found.m2)


def test_each_channel_can_be_scaled_by_its_own_factor():
    found = Moments.of(torch.randn(8, 2)).scaled(torch.tensor([0.0, 2.0]))
    assert found.count.tolist() == [0, 16]
    assert found.mean.isnan().tolist() == [True, False]


def test_moments_from_a_variance_give_that_variance_back():
    mean, var = torch.randn(3), torch.rand(3)
    assert torch.equal(Moments.from_var(8, mean, var).var, var.double())
    torch.testing.assert_close(
        Moments.from_var(5, mean, var, correction=1).unbiased_var, var.double(), rtol=4 * U, atol=0
    )


@pytest.mark.parametrize("correction", [0, 1])
def test_a_variance_of_no_values_counts_for_nothing(correction):
    nothing = Moments.from_var(0, torch.zeros(2), torch.ones(2), correction=correction)
    assert nothing.mean.isnan().all()
    assert not nothing.m2.any()
    found = Moments.of(torch.randn(4, 2))
    assert torch.equal((nothing + found).m2, found.m2)


def test_moments_do_not_follow_a_buffer_that_is_updated_in_place():
    running = torch.zeros(2, dtype=torch.float64)
    for made in (Moments, Moments.from_var):
        found = made(5, running, running)
        running += 1
        assert not found.mean.any()
        assert not found.var.any()
        running -= 1


# --- ema --------------------------------------------------------------------------------------------------


def test_ema_follows_the_running_statistics_of_torch():
    layer = nn.BatchNorm1d(3, momentum=0.3, dtype=torch.float64)
    batches = [2 + 3 * torch.randn(n, 3, dtype=torch.float64) for n in (5, 9, 2, 7)]
    average = Moments.of(batches[0])
    layer.running_mean.copy_(average.mean)
    layer.running_var.copy_(average.unbiased_var)
    for batch in batches[1:]:
        layer(batch)
        average = average.ema(Moments.of(batch), 0.3)
        # some 20 roundings a step
        torch.testing.assert_close(average.mean, layer.running_mean, rtol=100 * U, atol=100 * U)
        torch.testing.assert_close(average.unbiased_var, layer.running_var, rtol=100 * U, atol=0)


def test_the_count_of_an_ema_settles_at_its_effective_number_of_values():
    momentum, n = 0.1, 16
    average = Moments.of(torch.randn(n, 1))
    for _ in range(200):
        average = average.ema(Moments.of(torch.randn(n, 1)), momentum)
    # what is left of the start is (1 - momentum)^(2 * 200) = 5e-19
    assert average.count.item() == pytest.approx(n * (2 - momentum) / momentum, rel=200 * U)


def test_the_count_of_an_ema_is_the_one_whose_standard_error_the_average_has():
    a, b = gaussian(0, 1, 10), gaussian(1, 1, 40)
    average = a.ema(b, 0.25)
    assert 1 / average.count.item() == pytest.approx(0.75**2 / 10 + 0.25**2 / 40, rel=8 * U)


def test_momentum_zero_keeps_the_old_and_one_takes_the_new():
    a, b = Moments.of(torch.randn(5, 2)), Moments.of(torch.randn(9, 2))
    for found, expected in ((a.ema(b, 0), a), (a.ema(b, 1), b)):
        assert found.count.item() == pytest.approx(expected.count.item(), rel=4 * U)
        assert torch.equal(found.mean, expected.mean)
        torch.testing.assert_close(found.var, expected.var, rtol=8 * U, atol=0)


def test_an_empty_side_of_an_ema_leaves_the_other_as_it_is():
    found, nothing = Moments.of(torch.randn(5, 2)), Moments.empty((2,))
    for average in (found.ema(nothing, 0.1), nothing.ema(found, 0.1), Moments.empty().ema(found, 0.1)):
        assert torch.equal(average.mean, found.mean)
        assert torch.equal(average.m2, found.m2)
        assert average.count.eq(found.count).all()


def test_a_single_value_gives_an_ema_without_variance():
    average = Moments.of(torch.randn(5, 2)).ema(Moments.of(torch.randn(1, 2)), 0.1)
    assert average.mean.isfinite().all()
    assert average.var.isnan().all()


# --- distances --------------------------------------------------------------------------------------------

PAIRS = [((0.0, 1.0), (0.5, 2.0)), ((3.0, 0.2), (3.1, 0.25)), ((-1.0, 1.0), (-1.0, 1.0))]


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_w2_is_the_distance_of_the_quantile_functions(a, b):
    law_a, law_b = scipy.stats.norm(*a), scipy.stats.norm(*b)
    squared, error = scipy.integrate.quad(lambda p: (law_a.ppf(p) - law_b.ppf(p)) ** 2, 0, 1)
    found = gaussian(*a).w2(gaussian(*b)).item()
    assert found**2 == pytest.approx(squared, abs=error + 16 * U)


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_symmetric_kl_is_the_integral_of_its_definition(a, b):
    p, q = scipy.stats.norm(*a), scipy.stats.norm(*b)
    low, high = min(a[0] - 20 * a[1], b[0] - 20 * b[1]), max(a[0] + 20 * a[1], b[0] + 20 * b[1])
    expected, error = scipy.integrate.quad(
        lambda x: (p.pdf(x) - q.pdf(x)) * (p.logpdf(x) - q.logpdf(x)), low, high, points=[a[0], b[0]], limit=200
    )
    found = gaussian(*a).symmetric_kl(gaussian(*b)).item()
    # what the tails beyond 20 standard deviations hold is below exp(-200)
    assert found == pytest.approx(expected, abs=error + 64 * U * max(1, expected))


def test_symmetric_kl_of_close_laws_keeps_its_digits():
    # to second order, KL(a||b) + KL(b||a) of N(0, 1) and N(0, 1 + h) is h^2 / 2; the next term is relatively h
    h = 2.0**-30
    assert Moments(1, 0, 1).symmetric_kl(Moments(1, 0, 1 + h)).item() == pytest.approx(h**2 / 2, rel=2 * h)


def test_distances_agree_with_their_closed_forms():
    a, b = gaussian(1, 2), gaussian(4, 6)
    assert a.w2(b).item() == pytest.approx(5, rel=8 * U)  # hypot(3, 4)
    # KL(a||b) = ln(6/2) + (4 + 9) / 72 - 1/2 and KL(b||a) = ln(2/6) + (36 + 9) / 8 - 1/2
    assert a.symmetric_kl(b).item() == pytest.approx(13 / 72 + 45 / 8 - 1, rel=16 * U)
    assert a.standardized_mean_difference(b).item() == pytest.approx(1.5, rel=8 * U)
    assert b.standardized_mean_difference(a).item() == pytest.approx(-0.5, rel=8 * U)


def test_distances_are_symmetric_zero_to_itself_and_channel_by_channel():
    a, b = Moments.of(torch.randn(9, 4)), Moments.of(torch.randn(5, 4))
    for distance in (Moments.w2, Moments.symmetric_kl):
        assert distance(a, b).shape == (4,)
        torch.testing.assert_close(distance(a, b), distance(b, a), rtol=16 * U, atol=0)
        assert not distance(a, a).any()


def test_constants_are_infinitely_far_in_kl_from_what_varies():
    constant, other = gaussian(0, 0), gaussian(0, 1)
    assert constant.symmetric_kl(other).item() == math.inf
    assert other.symmetric_kl(constant).item() == math.inf
    assert constant.symmetric_kl(gaussian(1, 0)).item() == math.inf
    assert constant.symmetric_kl(constant) == 0
    assert constant.w2(other) == 1


# --- a value ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (Moments.of(torch.tensor([[1.0], [2.0], [6.0]])), "Moments(count=3, mean=[3], std=[2.16])"),
        (Moments.of(torch.zeros(2, 6)), "Moments(count=2, mean=[0, 0, 0, 0, ...], std=[0, 0, 0, 0, ...])"),
        (Moments.empty(), "Moments(count=0, mean=nan, std=nan)"),
        (Moments.empty((1,)), "Moments(count=0, mean=[nan], std=[nan])"),
        (gaussian(0.123456, 1e-3, 5000), "Moments(count=5e+03, mean=0.123, std=0.001)"),
    ],
    ids=["channel", "many", "empty", "empty channel", "scalar"],
)
def test_moments_print_as_count_mean_and_std(found, text):
    assert repr(found) == text


def test_moments_cannot_be_changed():
    found = Moments.of(torch.randn(3, 2))
    with pytest.raises(AttributeError, match="cannot assign to field 'mean'"):
        found.mean = torch.zeros(2)


@pytest.mark.parametrize("remade", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.to("cpu")])
def test_copies_hold_the_same_values(remade):
    found = Moments.of(torch.randn(3, 2))
    other = remade(found)
    assert torch.equal(other.count, found.count)
    assert torch.equal(other.mean, found.mean)
    assert torch.equal(other.m2, found.m2)
