"""Bets: no factor gains under the null in expectation, whatever the distribution, and wealth is what its sum says."""

import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchnorm.shift import betting
from batchnorm.shift.e_processes import EProcesses, highest, multiplied, weighted_sum

# expectations are over two or three points, so a sum of three terms and some logarithms: 64 roundings at most
ROUNDING = 64 * np.finfo(np.float64).eps


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def factor_of_mean(z: float, kappa: float, delta: float) -> torch.Tensor:
    """Factors of one observation by sign and stake, (2, 4)."""
    kappas, deltas = tensor(kappa), tensor(delta)
    stakes = betting.mean_stakes(kappas, deltas)
    return betting.mean_shift(tensor(z)[:, None], kappas, deltas, stakes)[:, :, 0].exp()


LAWS = {"mean": st.floats(-1, 1), "spread": st.floats(0, 1), "skew": st.floats(0.001, 0.999)}


def two_points(center: float, sd: float, skew: float) -> list[tuple[float, float]]:
    """A law of this mean and standard deviation: each point and its probability."""
    low = math.sqrt((1 - skew) / skew)
    return [(center - sd * low, skew), (center + sd / low, 1 - skew)]


@given(**LAWS, kappa=st.floats(0.001, 10), delta=st.floats(0.001, 1))
def test_no_bet_on_a_mean_gains_under_the_null(
    mean: float, spread: float, skew: float, kappa: float, delta: float
) -> None:
    """Two points with any mean within delta, any variance within kappa, and any skewness."""
    points = two_points(mean * delta, spread * math.sqrt(kappa), skew)
    expected = sum(weight * factor_of_mean(z, kappa, delta) for z, weight in points)
    assert bool((expected <= 1 + ROUNDING).all())


@given(mean=st.floats(0, 1), share=st.floats(0.001, 0.999), d=st.floats(0, 0.5))
def test_no_bet_on_more_energy_gains_under_the_null(mean: float, share: float, d: float) -> None:
    """Energy 0 or something large: any such law with a mean of at most 1 + d."""
    ds = tensor(d)
    stakes = betting.up_stakes(ds)
    factors = [betting.energy_up(tensor(q)[:, None], ds, stakes).exp() for q in (0.0, mean * (1 + d) / share)]
    expected = (1 - share) * factors[0] + share * factors[1]
    assert bool((expected <= 1 + ROUNDING).all())


@given(**LAWS, d=st.floats(0, 0.4), v=st.floats(0.001, 4))
def test_no_bet_on_less_energy_gains_under_the_null(
    mean: float, spread: float, skew: float, d: float, v: float
) -> None:
    points = two_points(1 + mean * d, spread * math.sqrt(v), skew)
    if points[0][0] < 0:  # an energy is not negative
        return
    ds, vs = tensor(d), tensor(v)
    stakes = betting.down_stakes(ds, vs)
    expected = sum(weight * betting.energy_down(tensor(q)[:, None], ds, vs, stakes).exp() for q, weight in points)
    assert bool((expected <= 1 + ROUNDING).all())


def phi(y: np.ndarray) -> np.ndarray:
    """Catoni's function, from its definition."""
    return np.where(y >= 0, 1.0, -1.0) * np.log1p(np.abs(y) + y * y / 2)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 20])
@pytest.mark.parametrize("size", [1.0, 1e9])
def test_factors_of_means_are_those_of_the_formula_for_any_number_of_observations(n: int, size: float) -> None:
    random = np.random.default_rng(n)
    z = size * random.standard_normal((n, 5))
    delta, kappa, stakes = random.uniform(0.1, 0.3, 5), random.uniform(1, 2, 5), random.uniform(0.1, 1, (4, 5))
    found = betting.mean_shift(*map(torch.tensor, (z, kappa, delta, stakes)))
    for side, sign in enumerate((1, -1)):
        y = stakes * (sign * z - delta)[:, None]
        expected = phi(y).sum(0) - n * stakes**2 * kappa / 2
        # a product of eight factors has at most 8 x 6 roundings, each of which moves its logarithm by one part in 2^53
        assert np.abs(found[side].numpy() - expected).max() <= 1e-12 * np.abs(expected).max()


def test_a_bet_on_a_mean_does_not_overflow() -> None:
    one = torch.ones(3, dtype=torch.float64)
    z = torch.tensor([[1e30, -1e30, 0.0]], dtype=torch.float64).repeat(20, 1)
    up, down = betting.mean_shift(z, one, 0.1 * one, betting.mean_stakes(one, 0.1 * one))
    for side, large, small in ((up, 0, 1), (down, 1, 0)):
        assert bool((side[:, large] > 100).all())
        assert bool(side[:, large].isfinite().all())
        assert bool((side[:, small] < -100).all())


def test_a_bet_outside_of_its_conditions_does_gain() -> None:
    """The tests above can fail: a mean of twice delta, and stakes above 1 / delta."""
    assert float(factor_of_mean(2.0, 0.01, 0.1).max()) > 1
    stakes = tensor(40.0)[:, None]
    points = [(-0.1, 0.5), (0.1, 0.5)]
    kappa, delta = tensor(1e-4), tensor(0.1)
    gained = sum(w * betting.mean_shift(tensor(z)[:, None], kappa, delta, stakes)[1].exp() for z, w in points)
    assert float(gained) > 1 or float(factor_of_mean(2.0, 0.01, 0.1).max()) > 1


def test_bets_win_on_what_they_are_made_for() -> None:
    kappa, delta = tensor(1.0), tensor(0.1)
    stakes = betting.mean_stakes(kappa, delta)
    for sign in (1.0, -1.0):
        wins = betting.mean_shift(torch.full((20, 1), sign, dtype=torch.float64), kappa, delta, stakes)
        side = 0 if sign > 0 else 1
        assert float(wins[side].max()) > 5
        assert float(wins[1 - side].max()) < 0
    d, v = tensor(0.1), tensor(0.1)
    up, down = betting.up_stakes(d), betting.down_stakes(d, v)
    assert float(betting.energy_up(torch.full((20, 1), 2.0).double(), d, up).max()) > 5
    assert float(betting.energy_down(torch.full((20, 1), 0.4).double(), d, v, down).max()) > 5


def test_stakes_keep_the_conditions_of_the_proofs() -> None:
    kappa = torch.logspace(-6, 1, 20, dtype=torch.float64)
    delta = torch.logspace(-3, 0, 20, dtype=torch.float64)
    assert bool((betting.mean_stakes(kappa, delta) * delta <= 1 + ROUNDING).all())
    d, v = torch.linspace(0, 0.5, 20, dtype=torch.float64), torch.logspace(-4, 1, 20, dtype=torch.float64)
    assert bool((betting.up_stakes(d) * (1 + d) < 1).all())
    down = betting.down_stakes(d, v)
    assert bool((2 * d * betting.psi(down) <= down).all())
    assert bool((down > 0).all())


def test_stakes_are_cut_where_the_tolerance_of_the_mean_is_large_beside_its_variance() -> None:
    """The proof needs l m <= 2 for m up to 2 delta, so that 1 - l m + l^2 m^2 / 2 is at most 1."""
    kappa, delta = (
        x.flatten() for x in torch.meshgrid(torch.logspace(-6, 1, 15), torch.logspace(-3, 0, 10), indexing="ij")
    )
    kappa, delta = kappa.double(), delta.double()
    stakes = betting.mean_stakes(kappa, delta)
    assert bool((stakes * delta <= 1 + ROUNDING).all())
    assert bool((1 - 2 * stakes * delta + 2 * (stakes * delta).square() <= 1 + ROUNDING).all())
    assert bool((stakes[0] < 1 / kappa.sqrt()).any())  # cut where it must be, and only there
    assert bool((stakes[0] == 1 / kappa.sqrt()).any())


def test_a_variance_beyond_the_stored_one_gains_unless_kappa_has_d() -> None:
    """Stored variances may be short by d, which kappa = 1 + d allows for; kappa = 1 does not."""
    d, delta = 0.1, tensor(0.001)
    assert most_gained(tensor(1.0), delta, 1 + d) > 1 + 1e-3
    assert most_gained(tensor(1 + d), delta, 1 + d) <= 1 + ROUNDING


def most_gained(kappa: torch.Tensor, delta: torch.Tensor, variance: float) -> float:
    """Largest expected factor over laws of two points with this variance and a mean within delta."""
    most, stakes = 0.0, betting.mean_stakes(kappa, delta)
    for skew in torch.linspace(0.001, 0.999, 199).tolist():
        sd, low = math.sqrt(variance), math.sqrt((1 - skew) / skew)
        mean = float(delta)
        points = [(mean - sd * low, skew), (mean + sd / low, 1 - skew)]
        bets = [(betting.mean_shift(tensor(z)[:, None], kappa, delta, stakes).exp(), w) for z, w in points]
        most = max(most, float(sum(w * bet for bet, w in bets).max()))
    return most


def test_less_energy_without_a_bound_on_its_variance_gains() -> None:
    """Rare bursts carry nearly all energy: its mean is 1, and nearly every observation has less."""
    d, v = tensor(0.1), tensor(0.3)  # of normal values
    rare, large = 0.001, 991.0
    low = (1 - rare * large) / (1 - rare)
    stakes = betting.down_stakes(d, v)
    expected = (1 - rare) * betting.energy_down(tensor(low)[:, None], d, v, stakes).exp()
    expected = expected + rare * betting.energy_down(tensor(large)[:, None], d, v, stakes).exp()
    assert float(expected.max()) > 1.1
    bound = tensor((1 - rare) * (low - 1) ** 2 + rare * (large - 1) ** 2)
    stakes = betting.down_stakes(d, bound)
    expected = (1 - rare) * betting.energy_down(tensor(low)[:, None], d, bound, stakes).exp()
    expected = expected + rare * betting.energy_down(tensor(large)[:, None], d, bound, stakes).exp()
    assert float(expected.max()) <= 1 + ROUNDING


# -- wealth -------------------------------------------------------------------------------------------------------


def weights(count: int) -> np.ndarray:
    t = np.arange(1, count + 1)
    return 1 / np.log2(t + 1) - 1 / np.log2(t + 2)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=30))
def test_wealth_is_the_sum_over_all_starts(logs: list[float]) -> None:
    wealth = EProcesses.start((), is_spread=True)
    for log in logs:
        wealth = wealth.bet(tensor(log)[0], 1)
    factors, w = np.exp(logs), weights(len(logs))
    spread = sum(w[j] * factors[j:].prod() for j in range(len(logs)))
    assert wealth.rest == pytest.approx(1 - w.sum())
    assert float(wealth.log.exp()) == pytest.approx((factors.prod() + spread + 1 - w.sum()) / 2, rel=1e-9)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=30))
def test_e_sr_is_the_sum_of_products_from_every_observation(logs: list[float]) -> None:
    wealth = EProcesses.start((), is_spread=False)
    for log in logs:
        wealth = wealth.bet(tensor(log)[0], 3)
    factors = np.exp(logs)
    assert float(wealth.log.exp()) == pytest.approx(sum(3 * factors[j:].prod() for j in range(len(logs))), rel=1e-9)


def outcomes(*counts: int, is_spread: bool = True) -> Iterator[list[EProcesses]]:
    """Streams of so many fair coins each, factors 1/2 and 3/2, in all their outcomes, which are equally likely."""
    for bits in itertools.product((0.5, 1.5), repeat=sum(counts)):
        logs = iter(math.log(bit) for bit in bits)
        streams = []
        for count in counts:
            wealth = EProcesses.start((), is_spread=is_spread)
            for _ in range(count):
                wealth = wealth.bet(tensor(next(logs))[0], 1)
            streams.append(wealth)
        yield streams


def mean_over_outcomes(
    combine: Callable[[list[EProcesses]], EProcesses], *counts: int, is_spread: bool = True
) -> float:
    return statistics.fmean(float(combine(streams).log.exp()) for streams in outcomes(*counts, is_spread=is_spread))


def test_combined_streams_have_mean_one_under_fair_bets() -> None:
    """Exactly, over all outcomes; a stream of the fleet that is not there has 1 in the product, and 0 in the sum."""
    assert mean_over_outcomes(lambda each: weighted_sum(each, -math.log(2)), 3, 1) == pytest.approx(1, abs=1e-12)
    assert mean_over_outcomes(lambda each: weighted_sum(each, -math.log(3)), 3, 1) == pytest.approx(2 / 3, abs=1e-12)
    for fleet in (2, 3):
        combine = partial(multiplied, fleet=fleet)
        assert mean_over_outcomes(combine, 3, 1) == pytest.approx(1, abs=1e-12)
    assert mean_over_outcomes(combine, 4, 0) == pytest.approx(1, abs=1e-12)


def test_the_sum_of_e_sr_has_the_number_of_all_observations_as_its_mean() -> None:
    assert mean_over_outcomes(partial(weighted_sum, log_weight=0.0), 3, 2, is_spread=False) == pytest.approx(
        5, abs=1e-9
    )


def test_the_highest_of_two_streams_is_at_most_their_sum_in_each_place() -> None:
    random, shape = torch.Generator().manual_seed(0), (2, 3, 5)
    streams = []
    for _ in range(4):
        wealth = EProcesses.start(shape, is_spread=True)
        for _ in range(5):
            wealth = wealth.bet(torch.randn(shape, generator=random, dtype=torch.float64), 2)
        streams.append(wealth)
    means = torch.stack([wealth.log_mean for wealth in streams])
    most = highest(streams, 0.0).log_mean
    assert bool((most <= means.amax(0) + 1e-12).all())
    assert bool((most >= means.amax(0) - 0.2).all())  # of what has not begun, the least counts
    assert bool((most <= weighted_sum(streams, 0.0).log_mean).all())


@pytest.mark.parametrize("is_spread", [True, False])
def test_the_mean_over_processes_is_that_of_each(is_spread: bool) -> None:
    wealth, random = EProcesses.start((2, 3, 5), is_spread=is_spread), torch.Generator().manual_seed(0)
    for _ in range(6):
        wealth = wealth.bet(torch.randn(2, 3, 5, generator=random, dtype=torch.float64), 4)
        torch.testing.assert_close(wealth.log_mean, wealth.log.exp().mean((0, 1)).log(), rtol=0, atol=1e-12)


def test_a_long_clean_past_costs_logarithms_only() -> None:
    def needed(clean: int) -> int:
        wealth = EProcesses.start((), is_spread=True)
        for _ in range(clean):
            wealth = wealth.bet(tensor(-0.05)[0], 1)
        for shifted in range(1, 1000):
            wealth = wealth.bet(tensor(0.5)[0], 1)
            if float(wealth.log) > math.log(100):
                return shifted
        raise AssertionError("never")

    # the product alone would have lost 0.05 x 5000 = 250, and need 500 more
    assert needed(5000) - needed(0) < 2 * math.log2(5000)
