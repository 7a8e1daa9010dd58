"""Bets: a test whether stored statistics can be those of the given examples, for any distribution of examples.

Let m and s^2 be the stored mean and variance of a channel (eps included), u the mean of one example's values in the
channel, and w their mean square deviation from m. An example has three bounded scores,

    c = clip((u - m) / s, -B, B),     -c,     q = min(w / s^2, B_q).

If m and s^2 are exact, E[(u - m) / s] = 0 and E[((u - m) / s)^2] <= E[w / s^2] <= 1. With z = (u - m) / s, |z| exceeds
B by at most z^2 / (4 B). So |E c| <= 1 / (4 B) =: tau, and E q <= 1. No higher moment is bounded, so rare examples may
be arbitrarily large. For a score y with an expectation of at most t, and a positive number l (the stake of the bet)
with l (t - y) < 1,

    E_l = prod over examples of (1 + l (y - t))

is positive and has an expectation of at most 1, if examples are independent. The same is true of the mean of E_l over
fixed stakes and all scores, the evidence of a channel. If the stored statistics are exact (the null), the evidence
exceeds 1 / p with probability at most p. There are two values of B: with a small B, stakes may be high, and few
examples are enough; with a large B, tau is small, and small shifts are found. Two effects weaken the evidence:

- A running average of n_s examples is noisy. Let V be the variance of the score. If the average's noise in E y is
  sub-Gaussian with variance V / n_s, the expectation of E_l^h is at most exp(h^2 l^2 n^2 V / (2 n_s)) for any h up to 1
  (Jensen). The evidence is E_l^h divided by this bound, with h = min(1, 4 n_s / n) for n examples. V is estimated from
  the examples. Since scores are bounded, the noise is nearly sub-Gaussian for averages of many examples.
- If examples come in groups of g that depend on each other in any way, the g-th root of E_l has an expectation of at
  most 1 (Hölder). g is estimated by the variance of batch means, divided by that in random order
  (``Clustering.excess``).

Too small an energy q is no evidence: the missing part may be in examples too rare to be among the n. Channels are
selected by e-BH: under the null, one or more are selected with probability at most ``CHANCE``, however channels depend
on each other (Waudby-Smith and Ramdas 2024, on betting; Wang and Ramdas 2022, on e-BH).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from batchnorm.moments import Moments
from batchnorm.shift.alarm import e_bh

CHANCE = 0.01  # largest probability of a selected channel in a layer with exact statistics
# B: its stakes, below 1 / (B + tau). A stake is best for shifts of about its own size (in sd)
_OF_MEANS = {2.5: (0.35, 0.175), 8.0: (0.12, 0.06, 0.03, 0.015)}
# B_q: a normal value has an energy of 25 or more once in a million; and the stakes, below 1
_MOST_ENERGY, _OF_ENERGY = 25.0, (0.5, 0.15, 0.05, 0.015)


# examples beyond four times n_s add little evidence, and fixed stakes would be too high for them
_MOST_BY_AVERAGE = 4.0


@dataclass
class Score:
    """Bets that the expectation of one bounded score exceeds a limit, for each channel.

    Args:
        clip: B for a mean, B_q for the energy.
        sign: 1 or -1 for a mean, 0 for the energy.
        limit: Largest expectation of the score under the null.
        stakes: The values of l.
    """

    clip: float
    sign: int
    limit: float
    stakes: tuple[float, ...]
    sums: Tensor | None = None  # log E_l, (stakes, C)
    moments: Moments = field(default_factory=Moments.empty)

    def add(self, y: Tensor, mask: Tensor) -> None:
        """Count the scores ``y`` of N examples, shape (N, C), where ``mask`` is True."""
        new = torch.stack([torch.log1p(stake * (y - self.limit)).where(mask, 0.0).sum(0) for stake in self.stakes])
        self.sums = new if self.sums is None else self.sums + new
        self.moments += Moments.of(y, mask=mask)

    def logs(self, averaged: float, excess: float) -> Tensor:
        """log E_l, corrected for the noise of the average and for dependent examples: (stakes, C)."""
        if self.sums is None:
            return torch.empty(0)
        n = self.moments.count
        share = (_MOST_BY_AVERAGE * averaged / n).clamp(max=1.0)
        stakes = share * torch.tensor(self.stakes, dtype=torch.float64, device=n.device)[:, None]
        return (share * self.sums - (stakes * n).square() * self.moments.var / (2 * averaged)) / excess


@dataclass
class Bets:
    """Evidence of examples against a layer's stored mean and variance, tensors (C,) of float64. NaN gives none."""

    mean: Tensor
    var: Tensor  # eps included
    scores: list[Score] = field(default_factory=lambda: [*_scores()])

    def add(self, mean: Tensor, var: Tensor, mask: Tensor | None) -> None:
        """Count N examples.

        ``mean`` and ``var`` are those of each example's values in each channel, shape (N, C), float64; ``var`` is
        biased. Where ``mask`` is False, or a value is not finite, nothing is counted.
        """
        z = (mean - self.mean) * self.var.rsqrt()
        q = (var + (mean - self.mean).square()) / self.var
        finite = z.isfinite() & q.isfinite() if mask is None else z.isfinite() & q.isfinite() & mask
        for score in self.scores:
            y = (score.sign * z).clamp(-score.clip, score.clip) if score.sign else q.clamp(max=score.clip)
            score.add(y.where(finite, 0.0), finite)

    def shown(self, averaged: float, excess: float) -> tuple[int, ...]:
        """Channels whose stored statistics are not those of the examples.

        Args:
            averaged: n_s, number of examples in the running average; infinite if the statistics are exact.
            excess: Variance of batch means, divided by that in random order; at least 1.
        """
        logs = torch.cat([score.logs(averaged, excess) for score in self.scores])
        return selected_channels(logs.logsumexp(0) - math.log(len(logs))) if logs.numel() else ()


def _scores() -> Iterator[Score]:
    for clip, stakes in _OF_MEANS.items():
        yield from (Score(clip, sign, 1 / (4 * clip), stakes) for sign in (1, -1))
    yield Score(_MOST_ENERGY, 0, 1.0, _OF_ENERGY)


def selected_channels(log_e: Tensor) -> tuple[int, ...]:
    """Channels selected by e-BH at ``CHANCE``, in order; NaN selects none."""
    return tuple(sorted(e_bh(log_e.nan_to_num(nan=-math.inf), CHANCE)))
