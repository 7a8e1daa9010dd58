"""Bets: whether stored statistics can be those of the examples at hand, whatever the law of the examples.

With stored m and s^2 (eps included), u the mean of one example's values in a channel and w their mean square deviation
from m, an example has three bounded scores,

    c = clip((u - m) / s, -B, B),     -c,     q = min(w / s^2, B_q).

If m and s^2 are exact, E[(u - m) / s] = 0 and E[((u - m) / s)^2] <= E[w / s^2] <= 1. As |z| exceeds B by at most
z^2 / (4 B), |E c| <= 1 / (4 B) =: tau, and E q <= 1: no higher moment is bounded, and rare examples may be as large as
they like. There are two B: with a small one bets may be high, which few examples need, and with a large one tau is
small, which small shifts need. For a score y whose expectation is t at most, and stakes l with l (t - y) < 1,

    E_l = prod over examples of (1 + l (y - t))

is positive and has an expectation of 1 at most, if examples are independent. So has the mean of E_l over fixed stakes
and over all scores: the evidence of a channel, which reaches 1 / p by chance with probability p at most. Two
things make examples and statistics less than that.

- A running average of n_s examples is off by its noise. If that of E y is sub-Gaussian with variance V / n_s, V that of
  the score, the expectation of E_l^h is exp(h^2 l^2 n^2 V / (2 n_s)) at most for any h up to 1 (Jensen), and E_l^h
  divided by that is taken for it, h = min(1, 4 n_s / n). V is estimated by the examples' own, and scores are bounded:
  this holds for averages of many examples.
- Of examples that come in groups of g, however dependent within, the g-th root of E_l has an expectation of 1 at most
  (Hölder). The g taken is the variance of batch means over that of a random order (``Clustering.excess``).

Less energy is no evidence: examples too rare to be among n may carry what is missing, and nothing stored says that none
do. Channels are named by e-BH, so that under the null any is named with probability ``CHANCE`` at most, however
dependent channels are (Waudby-Smith and Ramdas 2024, on betting; Wang and Ramdas 2022, on e-BH).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from batchnorm.moments import Moments
from batchnorm.shift.alarm import discovered

if TYPE_CHECKING:
    from collections.abc import Iterator

CHANCE = 0.01  # that any channel of a layer is named whose statistics are exact, at most; a tail of Markov's inequality
# B, and stakes for it, below 1 / (B + tau): each is right for a shift of about its own size, in units of the variance
_OF_MEANS = {2.5: (0.35, 0.175), 8.0: (0.12, 0.06, 0.03, 0.015)}
# energies of single normal values reach 25 once in a million; stakes below 1
_MOST_ENERGY, _OF_ENERGY = 25.0, (0.5, 0.15, 0.05, 0.015)


# more examples than four times those of the average teach little, and stakes that are fixed would be too high for them
_MOST_BY_AVERAGE = 4.0


@dataclass
class Score:
    """Bets that the mean of one bounded score of examples is above a limit, for each channel.

    Args:
        clip: B, or the most energy.
        sign: 1 or -1 of a mean, 0 for the energy.
        limit: Of the score's expectation, under the null.
        stakes: l.
    """

    clip: float
    sign: int
    limit: float
    stakes: tuple[float, ...]
    sums: Tensor | None = None  # log E_l: (stakes, C)
    moments: Moments = field(default_factory=Moments.empty)

    def add(self, y: Tensor, mask: Tensor) -> None:
        """Count scores (N, C) where the mask is true."""
        new = torch.stack([torch.log1p(stake * (y - self.limit)).where(mask, 0.0).sum(0) for stake in self.stakes])
        self.sums = new if self.sums is None else self.sums + new
        self.moments += Moments.of(y, mask=mask)

    def logs(self, averaged: float, excess: float) -> Tensor:
        """log E_l, less what the noise of the average and groups of examples explain: (stakes, C)."""
        if self.sums is None:
            return torch.empty(0)
        n = self.moments.count
        share = (_MOST_BY_AVERAGE * averaged / n).clamp(max=1.0)
        stakes = share * torch.tensor(self.stakes, dtype=torch.float64, device=n.device)[:, None]
        return (share * self.sums - (stakes * n).square() * self.moments.var / (2 * averaged)) / excess


@dataclass
class Bets:
    """What a layer's examples say against its stored mean and variance, (C,) in float64; NaN says nothing."""

    mean: Tensor
    var: Tensor  # eps included
    scores: list[Score] = field(default_factory=lambda: [*_scores()])

    def add(self, mean: Tensor, var: Tensor, mask: Tensor | None) -> None:
        """Count examples by the mean and the biased variance of their values, (N, C) in float64."""
        z = (mean - self.mean) * self.var.rsqrt()
        q = (var + (mean - self.mean).square()) / self.var
        known = z.isfinite() & q.isfinite() if mask is None else z.isfinite() & q.isfinite() & mask
        for score in self.scores:
            y = (score.sign * z).clamp(-score.clip, score.clip) if score.sign else q.clamp(max=score.clip)
            score.add(y.where(known, 0.0), known)

    def shown(self, averaged: float, excess: float) -> tuple[int, ...]:
        """Channels whose stored statistics are not those of the examples.

        Args:
            averaged: Examples that the stored statistics are an average of; infinite if they are exact.
            excess: Variance of batch means over that of a random order, 1 at least.
        """
        logs = torch.cat([score.logs(averaged, excess) for score in self.scores])
        return named(logs.logsumexp(0) - math.log(len(logs))) if logs.numel() else ()


def _scores() -> Iterator[Score]:
    for clip, stakes in _OF_MEANS.items():
        yield from (Score(clip, sign, 1 / (4 * clip), stakes) for sign in (1, -1))
    yield Score(_MOST_ENERGY, 0, 1.0, _OF_ENERGY)


def named(log_e: Tensor) -> tuple[int, ...]:
    """Channels by e-BH at ``CHANCE``, in order; NaN names none."""
    return tuple(sorted(discovered(log_e.nan_to_num(nan=-math.inf), CHANCE)))
