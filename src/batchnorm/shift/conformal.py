"""Conformal p-values: how strange an observation is among all earlier clean ones, whatever their distribution.

Let s_1, ..., s_n be the scores of calibration observations and s_(n+1), s_(n+2), ... those of the stream. If all of
them are exchangeable, then

    p_t = (number of i <= t with s_i >= s_t) / t,      t = n + 1, n + 2, ...,

is at most u with probability at most u, given all later p-values, and so given all earlier p-values. The reason: given
the scores up to t without their order, each score is equally likely to be the last one, and the distribution of p_1,
..., p_(t-1) does not depend on which score is the last (Vovk, Gammerman and Shafer 2005, section 8.2). Ties make p_t
larger than its randomized version, and the bets below never gain from that. Nothing is assumed about moments or tails
of the scores, or about the independence of an observation's scores.

A bet on small p-values is a decreasing function f with an integral of 1: the average of f over 1/t, 2/t, ..., 1 is at
most its integral. So the product of f(p_t) is an e-process, for any distribution of clean data. The bets:

    f(p) = k p^(k - 1)          for k = 0.1, 0.25, 0.5 and 0.75, against a few very strange observations,
    f(p) = 1 + l (1 - 2 p)      for l = 0.5 and 0.9, against many slightly strange observations.

Scores are stored as counts over a grid of 512 cells, which is finest where calibration observations are. A cell's
number is a score too, so the grid does not affect validity. A clean stream adds to the counts and makes p-values finer.

Batch size and machine change how activations of the same input are rounded. If many clean inputs are the same (silence,
a few distinct rows), rounding may move all of them into the next cell. So the observations in the cell below an
observation's own cell also count as at least as strange: if rounding moves a score by less than half a cell, p is at
least its value without rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

CELLS = 512
EDGE = 1  # cells below an observation's own that count as at least as strange
_LATER = 64  # observations that are counted together, since counting many costs as much as counting one
_POWERS = (0.1, 0.25, 0.5, 0.75)
_SLOPES = (0.5, 0.9)
_FAR = 1e15  # largest distance from the middle, in spreads; larger and infinite distances count as this
BETS = len(_POWERS) + len(_SLOPES)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Bag:
    """A bag: for each score and cell, the number of clean observations whose score is in this or in a higher cell.

    Args:
        above: These counts, (scores, cells), int32; the first column is the number of counted observations.
        later: Cells of observations in the bag that are not counted yet, (fewer than 64, scores), int16.
    """

    above: Tensor
    later: Tensor

    @classmethod
    def of(cls, cells: Tensor) -> Bag:
        """A bag of observations, from the cells of their scores, (n, scores)."""
        return cls.counted(_counted(torch.zeros(cells.shape[1], CELLS, dtype=torch.int32), cells))

    @classmethod
    def counted(cls, above: Tensor) -> Bag:
        """A bag with all observations counted."""
        return cls(above, torch.zeros(0, len(above), dtype=torch.int16))

    @property
    def counts(self) -> Tensor:
        """``above`` with all observations counted."""
        return _counted(self.above, self.later) if len(self.later) else self.above

    @property
    def observations(self) -> int:
        """Number of observations."""
        return int(self.above[0, 0]) + len(self.later)

    @property
    def is_whole(self) -> bool:
        """Whether observations can have produced these counts.

        Counts are int32, the first column is one positive number, and no column exceeds the column before it.
        """
        counts = self.counts
        whole = bool((counts[:, :1] == counts[:1, :1]).all()) and int(counts[0, 0]) > 0
        falls = bool((counts.diff(dim=1) <= 0).all()) and bool((counts >= 0).all())
        return counts.dtype == torch.int32 and whole and falls

    def with_(self, cells: Tensor) -> Bag:
        """The bag with more observations, given by their cells, (n, scores)."""
        later = torch.cat([self.later, cells.to(torch.int16)])
        if len(later) < _LATER:
            return Bag(self.above, later)
        return Bag.counted(_counted(self.above, later))

    def p_values(self, cells: Tensor) -> Tensor:
        """P-values of more observations in sequence, each among all earlier ones: cells (n, scores), result float64."""
        bag, parts = self, []
        for rows in cells.split(_LATER):
            parts.append(bag._p_values(rows))
            bag = bag.with_(rows)
        return torch.cat(parts)

    def _p_values(self, cells: Tensor) -> Tensor:
        n = len(cells)
        low = lowest(cells)
        rank = self.above.gather(1, low.T.contiguous()).T  # (n, scores)
        new, low = cells.to(torch.int16), low.to(torch.int16)
        before = self.observations + torch.arange(1, n + 1, dtype=torch.int32)[:, None]  # including itself
        rank += before - int(self.above[0, 0])
        rank -= _negative(self.later[:, None] - low)
        is_past = torch.ones(n, n, dtype=torch.int16).triu()[:, :, None]
        rank -= _negative((new[:, None] - low).mul_(is_past))
        return rank / before.double()


def lowest(cells: Tensor) -> Tensor:
    """The lowest cells that count as at least as strange as ``cells``."""
    return (cells - EDGE).clamp_min(0)


def _negative(x: Tensor) -> Tensor:
    """Number of values below 0 along the first dimension, int16, by sign bits: int16 comparisons are slow."""
    return x.bitwise_right_shift_(15).sum(0, dtype=torch.int16).neg_()


def _counted(above: Tensor, cells: Tensor) -> Tensor:
    counts = torch.zeros_like(above)
    cells = cells.T.long().contiguous()
    counts.scatter_add_(1, cells, torch.ones_like(cells, dtype=torch.int32))
    below = counts.cumsum(1, dtype=torch.int32).sub_(counts)
    return (above + cells.shape[1]).sub_(below)


def factors(p: Tensor) -> Tensor:
    """Log factors of all bets, summed over observations: p (n, scores) -> (bets, scores)."""
    log = _log_product(p)
    powers = [len(p) * math.log(k) + (k - 1) * log for k in _POWERS]
    slopes = [_log_product((1 + slope) - 2 * slope * p) for slope in _SLOPES]
    return torch.stack(powers + slopes)


def _log_product(x: Tensor) -> Tensor:
    """Logarithm of the product over the first dimension; 16 values above 1e-15 are multiplied without underflow."""
    return torch.stack([rows.prod(0) for rows in x.split(16)]).log_().sum(0)


def cells_of(scores: Tensor, middle: Tensor, spread: Tensor) -> Tensor:
    """The cells of scores: u / (1 + |u|) for u = (score - middle) / spread, cut into equal parts.

    Args:
        scores: Values of shape (..., scores).
        middle: Typical clean score, (scores,).
        spread: Typical distance of clean scores from ``middle``, (scores,).
    """
    u = ((scores - middle) / spread).clamp_(-_FAR, _FAR)
    return u.div_(u.abs().add_(1)).add_(1).mul_(CELLS / 2).long().clamp_(0, CELLS - 1)
