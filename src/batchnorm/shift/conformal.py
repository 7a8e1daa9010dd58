"""Conformal p-values: how strange an observation is among all clean ones before it, without a word about their law.

Let s_1, ..., s_n be the scores of calibration observations and s_(n+1), s_(n+2), ... those of the stream. If all of
them are exchangeable, then

    p_t = (number of i <= t with s_i >= s_t) / t,      t = n + 1, n + 2, ...,

is at most u with probability u at most, given all later ones, and so given all earlier ones: given the scores up to t
without their order, each is equally likely to be the last, and p_1, ..., p_(t-1) say nothing about which one is (Vovk,
Gammerman and Shafer 2005, section 8.2; with ties p_t is larger than that of a coin toss, and the bets below never gain
by that). No moment, no tail and no independence of scores of one observation is assumed.

A bet on small p-values is a decreasing function f with an integral of 1: the average of f over 1/t, 2/t, ..., 1 is no
more than its integral. So the product of f(p_t) is an e-process, whatever the law of clean data is. The bets:

    f(p) = k p^(k - 1)          for k = 0.1, 0.25, 0.5 and 0.75: a few very strange observations,
    f(p) = 1 + l (1 - 2 p)      for l = 0.5 and 0.9: many that are strange a little.

Scores are kept as counts over a grid of 512 cells, finest where calibration observations are: cells are scores too, so
a grid costs no validity. A clean stream makes the counts grow, and p-values finer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

CELLS = 512
_POWERS = (0.1, 0.25, 0.5, 0.75)
_SLOPES = (0.5, 0.9)
BETS = len(_POWERS) + len(_SLOPES)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Bag:
    """How many clean observations had a score in a cell or in a higher one.

    Args:
        above: Those counts, (scores, cells), int32; the first column is the number of all.
    """

    above: Tensor

    @classmethod
    def of(cls, cells: Tensor) -> Bag:
        """A bag of observations by the cells of their scores, (n, scores)."""
        return cls(torch.zeros(cells.shape[1], CELLS, dtype=torch.int32)).with_(cells)

    @property
    def observations(self) -> int:
        """How many there are."""
        return int(self.above[0, 0])

    @property
    def is_whole(self) -> bool:
        """Whether observations can have made these counts: each column has no more than the one before it."""
        whole = bool((self.above[:, :1] == self.above[:1, :1]).all()) and int(self.above[0, 0]) > 0
        falls = bool((self.above.diff(dim=1) <= 0).all()) and bool((self.above >= 0).all())
        return self.above.dtype == torch.int32 and whole and falls

    def with_(self, cells: Tensor) -> Bag:
        """The bag with more observations, (n, scores)."""
        counts = torch.zeros_like(self.above)
        counts.scatter_add_(1, cells.T.contiguous(), torch.ones_like(cells.T, dtype=torch.int32))
        return Bag(self.above + counts.flip(1).cumsum(1, dtype=torch.int32).flip(1))

    def p_values(self, cells: Tensor) -> Tensor:
        """P-values of more observations one after the other, (n, scores), float64: each among all those before it."""
        above = self.above.gather(1, cells.T.contiguous()).T  # (n, scores)
        n = len(cells)
        # of the observations that came with this one, those before it and itself
        among = (cells[None] >= cells[:, None]) & torch.ones(n, n, dtype=torch.bool).tril()[:, :, None]
        rank = above + among.sum(1)
        total = self.observations + torch.arange(1, n + 1, dtype=torch.float64)
        return rank / total[:, None]


def factors(p: Tensor) -> Tensor:
    """Log factors of all bets, summed over observations: p-values (n, scores) -> (bets, scores)."""
    log = p.log().sum(0)
    powers = [len(p) * torch.tensor(k, dtype=torch.float64).log() + (k - 1) * log for k in _POWERS]
    slopes = [torch.log1p(slope * (1 - 2 * p)).sum(0) for slope in _SLOPES]
    return torch.stack(powers + slopes)


def cells_of(scores: Tensor, middle: Tensor, spread: Tensor) -> Tensor:
    """The cells that scores are in: u / (1 + |u|) for u = (score - middle) / spread, cut into equal parts.

    Args:
        scores: Any shape (..., scores).
        middle: About the middle of clean scores, (scores,).
        spread: About their distance from it, (scores,).
    """
    u = (scores - middle) / spread
    return ((u / (1 + u.abs()) + 1) * (CELLS / 2)).long().clamp_(0, CELLS - 1)
