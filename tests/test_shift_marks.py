"""Marks: their bounds against exact tails, fair bets at them, and how many of the channels they name are wrong."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from batchnorm.shift import channel_marks
from batchnorm.shift.alarm import e_bh
from batchnorm.shift.channel_marks import Marks
from batchnorm.shift.e_processes import EProcesses

DOUBLE = torch.float64


@pytest.mark.parametrize("n", [200, 1000, 5000])
@pytest.mark.parametrize("channels", [1, 64, 4800])
def test_shares_are_those_of_clopper_and_pearson(n: int, channels: int) -> None:
    made = Marks.of(torch.randn(n, 2, dtype=DOUBLE))
    error = 0.01 / (2 * 3 * channels)
    for part, known in zip((0.0, 0.05, 0.25), made.shares.tolist(), strict=True):
        rank = max(1, math.floor(part * n))
        found = channel_marks._most(n, rank, error)
        # bisection to 2^-60, and tails by sums of up to 1,250 logarithms
        assert found == pytest.approx(float(stats.beta.ppf(1 - error, rank, n - rank + 1)), rel=1e-7)
        assert stats.binom.cdf(rank - 1, n, found) == pytest.approx(error, rel=1e-5)
        assert known <= found or channels <= 2


def test_bets_are_fair_at_the_bound_and_less_below_it() -> None:
    made = Marks.of(torch.randn(200, 1, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)))
    for mark, share in enumerate(made.shares.tolist()):
        between = float(made.lower[mark, 0] + made.upper[mark, 0]) / 2
        beyond = float(made.upper[mark, 0]) + 1
        won = [made.factors(torch.full((1, 1), z, dtype=DOUBLE))[0, mark::3, 0].exp() for z in (beyond, between)]
        for part in (1.0, 0.5, 0.0):  # of the largest share there can be
            expected = part * share * won[0] + (1 - part * share) * won[1]
            torch.testing.assert_close(expected.clamp_min(1), torch.ones_like(expected), atol=1e-12, rtol=0)
        more = share * 1.5 * won[0] + (1 - share * 1.5) * won[1]
        assert bool((more > 1).all())


def test_factors_of_several_observations_are_products_of_those_of_each() -> None:
    made = Marks.of(torch.randn(200, 5, dtype=DOUBLE))
    z = torch.randn(7, 5, dtype=DOUBLE)
    torch.testing.assert_close(made.factors(z), torch.stack([made.factors(row[None]) for row in z]).sum(0))
    assert made.factors(z).shape == (2, channel_marks.BETS, 5)


LAWS = {
    "normal": lambda shape, random: torch.randn(shape, generator=random, dtype=DOUBLE),
    "heavy tails": lambda shape, random: (
        torch.randn(shape, generator=random, dtype=DOUBLE) / torch.rand(shape, generator=random, dtype=DOUBLE)
    ),
    "rare": lambda shape, random: (torch.rand(shape, generator=random, dtype=DOUBLE) < 0.003).double() * 100,
    "constant": lambda shape, random: torch.zeros(shape, dtype=DOUBLE),
}


def named(law: str, moved: int, random: torch.Generator) -> tuple[int, ...]:
    """Channels named at a rate of 5 % of 50, of which the first move by what nine in ten values are within."""
    clean: Tensor = LAWS[law]((300, 50), random)
    known, wealth = Marks.of(clean), EProcesses.start((2, channel_marks.BETS, 50), is_spread=True)
    by = float(clean.abs().flatten().quantile(0.9)) + 0.5
    for _ in range(25):
        z = LAWS[law]((8, 50), random)
        z[:, :moved] += by
        wealth = wealth.bet(known.factors(z), 8)
    log = wealth.log.flatten(0, 1)
    return e_bh(log.logsumexp(0) - math.log(len(log)), 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_of_the_channels_named_few_did_not_move(law: str) -> None:
    random, false, all_ = torch.Generator().manual_seed(1), 0.0, 0
    for _ in range(30):
        assert named(law, 0, random) == ()
        found = named(law, 5, random)
        all_ += len(set(found) & set(range(5)))
        false += sum(c >= 5 for c in found) / max(1, len(found))
    assert false / 30 <= 0.05
    assert all_ >= 0.9 * 5 * 30
