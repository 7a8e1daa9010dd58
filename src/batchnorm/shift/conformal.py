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

The size of a batch and the machine change how activations of the same input are rounded. Where many clean inputs are
the same (silence, rows of few kinds), rounding may move all of them over the edge of a cell. So an observation counts
those in the cell below its own as not less strange: as long as rounding moves a score by less than half a cell, p is at
least what it would be without rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

CELLS = 512
EDGE = 1  # cells below its own that an observation counts as not less strange
_LATER = 64  # observations that are counted together, since counting costs as much for one as for many
_POWERS = (0.1, 0.25, 0.5, 0.75)
_SLOPES = (0.5, 0.9)
_FAR = 1e15  # spreads from the middle: what is further, or infinite, is in the last cell
BETS = len(_POWERS) + len(_SLOPES)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Bag:
    """How many clean observations had a score in a cell or in a higher one.

    Args:
        above: Those counts, (scores, cells), int32; the first column is the number of all that are counted.
        later: Cells of observations that are in the bag and not counted yet, (fewer than 64, scores), int16.
    """

    above: Tensor
    later: Tensor

    @classmethod
    def of(cls, cells: Tensor) -> Bag:
        """A bag of observations by the cells of their scores, (n, scores)."""
        return cls.counted(_counted(torch.zeros(cells.shape[1], CELLS, dtype=torch.int32), cells))

    @classmethod
    def counted(cls, above: Tensor) -> Bag:
        """A bag all of whose observations are counted."""
        return cls(above, torch.zeros(0, len(above), dtype=torch.int16))

    @property
    def counts(self) -> Tensor:
        """``above`` with all observations counted."""
        return _counted(self.above, self.later) if len(self.later) else self.above

    @property
    def observations(self) -> int:
        """How many there are."""
        return int(self.above[0, 0]) + len(self.later)

    @property
    def is_whole(self) -> bool:
        """Whether observations can have made these counts: each column has no more than the one before it."""
        counts = self.counts
        whole = bool((counts[:, :1] == counts[:1, :1]).all()) and int(counts[0, 0]) > 0
        falls = bool((counts.diff(dim=1) <= 0).all()) and bool((counts >= 0).all())
        return counts.dtype == torch.int32 and whole and falls

    def with_(self, cells: Tensor) -> Bag:
        """The bag with more observations, (n, scores)."""
        later = torch.cat([self.later, cells.to(torch.int16)])
        if len(later) < _LATER:
            return Bag(self.above, later)
        return Bag.counted(_counted(self.above, later))

    def p_values(self, cells: Tensor) -> Tensor:
        """P-values of more observations one after the other, (n, scores), float64: each among all those before it."""
        bag, found = self, []
        for some in cells.split(_LATER):
            found.append(bag._p_values(some))
            bag = bag.with_(some)
        return torch.cat(found)

    def _p_values(self, cells: Tensor) -> Tensor:
        n = len(cells)
        low = lowest(cells)
        rank = self.above.gather(1, low.T.contiguous()).T  # (n, scores)
        new, low = cells.to(torch.int16), low.to(torch.int16)
        before = self.observations + torch.arange(1, n + 1, dtype=torch.int32)[:, None]  # and itself
        rank += before - int(self.above[0, 0])
        rank -= _negative(self.later[:, None] - low)
        is_past = torch.ones(n, n, dtype=torch.int16).triu()[:, :, None]
        rank -= _negative((new[:, None] - low).mul_(is_past))
        return rank / before.double()


def lowest(cells: Tensor) -> Tensor:
    """The lowest cells whose observations count as no less strange than those in ``cells``."""
    return (cells - EDGE).clamp_min(0)


def _negative(x: Tensor) -> Tensor:
    """How many of the first dimension are below 0, int16: their sign bits, since comparisons of int16 are slow."""
    return x.bitwise_right_shift_(15).sum(0, dtype=torch.int16).neg_()


def _counted(above: Tensor, cells: Tensor) -> Tensor:
    counts = torch.zeros_like(above)
    cells = cells.T.long().contiguous()
    counts.scatter_add_(1, cells, torch.ones_like(cells, dtype=torch.int32))
    below = counts.cumsum(1, dtype=torch.int32).sub_(counts)
    return (above + cells.shape[1]).sub_(below)


def factors(p: Tensor) -> Tensor:
    """Log factors of all bets, summed over observations: p-values (n, scores) -> (bets, scores)."""
    log = _log_product(p)
    powers = [len(p) * math.log(k) + (k - 1) * log for k in _POWERS]
    slopes = [_log_product((1 + slope) - 2 * slope * p) for slope in _SLOPES]
    return torch.stack(powers + slopes)


def _log_product(x: Tensor) -> Tensor:
    """Logarithm of the product over the first dimension: of sixteen values above 1e-15 at once, which cannot vanish."""
    return torch.stack([some.prod(0) for some in x.split(16)]).log_().sum(0)


def cells_of(scores: Tensor, middle: Tensor, spread: Tensor) -> Tensor:
    """The cells that scores are in: u / (1 + |u|) for u = (score - middle) / spread, cut into equal parts.

    Args:
        scores: Any shape (..., scores).
        middle: About the middle of clean scores, (scores,).
        spread: About their distance from it, (scores,).
    """
    u = ((scores - middle) / spread).clamp_(-_FAR, _FAR)
    return u.div_(u.abs().add_(1)).add_(1).mul_(CELLS / 2).long().clamp_(0, CELLS - 1)
