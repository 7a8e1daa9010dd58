"""Conditional conformal test martingales of the benchmark: the published bets, and what their validity hangs on."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "shift"


@pytest.fixture(scope="module")
def conditional():
    sys.path.insert(0, str(FOLDER))
    try:
        import conditional
    finally:
        sys.path.remove(str(FOLDER))
    return conditional


@pytest.mark.parametrize("eta", [-0.5, -0.1, 0.0, 0.3, 0.5])
@pytest.mark.parametrize("n", [200, 1000])
def test_a_bet_is_fair_for_every_distribution_in_the_band(conditional, eta, n):
    """F(X) = U - e and U + e are the furthest: U is uniform, |e| the half-width of the band."""
    eps = conditional.band(n, 0.01)
    uniform = (np.arange(10_000) + 0.5) / 10_000
    for off in (-eps, 0.0, eps):
        assert conditional.factor(uniform + off, np.full(1, eta), eps).mean() <= 1 + 1e-12


def test_without_the_band_a_reference_that_is_off_wins(conditional):
    uniform = (np.arange(10_000) + 0.5) / 10_000
    assert conditional.factor(uniform + 0.05, np.full(1, 0.5), 0.0).mean() > 1.02


def test_ties_break_the_promise_and_random_ones_keep_it(conditional):
    """A constant score: F(x) is 1 for all, or uniform if ties are broken at random."""
    constant = np.zeros((2000, 1))
    tied = conditional.walked(conditional.placed(constant, constant)[:, None], 2000, 0.1)
    broken = conditional.placed(constant, constant, np.random.default_rng(0))
    assert tied.max() > math.log(100)
    assert conditional.walked(broken[:, None], 2000, 0.1).max() < math.log(100)


def test_walks_of_many_scores_are_those_of_a_loop(conditional):
    """Float64, one score and one example after another; errors add up over 60 of them: 60 x 10 ulps."""
    random = np.random.default_rng(3)
    reference, stream = random.normal(size=(50, 3)), random.normal(1, 1, size=(60, 3))
    found = conditional.walked(conditional.placed(reference, stream)[:, None], 50, 0.1)[:, 0]
    wealth = [one_score(reference[:, j], stream[:, j], math.sqrt(math.log(2 * 3 / 0.1) / 100)) for j in range(3)]
    assert found == pytest.approx(np.log(np.mean(wealth, 0)), abs=1e-12)
    assert found[conditional.WARMUP] == 0 != found[conditional.WARMUP + 1]


def one_score(reference, stream, eps, k=1e-6):
    eta, steps, wealth, all_ = 0.0, 1.0, 1.0, []
    for i, x in enumerate(stream):
        u = sum(r <= x for r in reference) / len(reference)
        scale = 0.5 + math.sqrt(1 + k * k) * eps
        bet = 0.0 if abs(eta) < 0.05 else eta
        if i > 10:
            wealth *= 1 + (bet * (u - 0.5) - math.sqrt(bet * bet + k * k) * eps) / scale
        worth = 1 + (eta * (u - 0.5) - math.sqrt(eta * eta + k * k) * eps) / scale
        gradient = (u - 0.5 - eta * eps / math.sqrt(eta * eta + k * k)) / scale / worth
        steps += gradient * gradient
        eta = max(-0.5, min(0.5, eta + 2 / (2 - math.log(3)) * gradient / steps))
        all_.append(wealth)
    return all_
