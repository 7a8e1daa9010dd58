"""Marks: thresholds that few clean observations of a channel exceed, to name the channels that moved.

Of n clean observations of a channel's mean, the k largest are at or above a mark. The share s of all clean observations
beyond the mark is unknown, but has a bound for any distribution: the probability that s exceeds S is at most the
probability that fewer than k of n draws are beyond a mark with share S (Clopper and Pearson 1934). S is chosen so that
with 99 % confidence no mark of any channel has a larger share beyond it. A bet on a share r > S gains log(r / S) from
an observation beyond the mark, and loses log((1 - S) / (1 - r)) from any other observation. On clean data the
expectation of its factor is at most 1.

Marks only name channels. The alarm uses evidence from scores (``conformal``), which needs no such bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor

# shares of the clean observations at or beyond a mark: only the largest observation, 5 % and 25 %
_PARTS = (0.0, 0.05, 0.25)
# the bets' shares: r = S + this fraction of 1 - S
_HOPES = (0.2, 0.6)
_CONFIDENCE = 0.99
_ROUNDING = 1e-4  # stored sd: batch size and machine may change a mean by this much
MARKS = len(_PARTS)
BETS = MARKS * len(_HOPES)


@final
@dataclass(frozen=True, eq=False)
class Marks:
    """Marks of every channel.

    Args:
        upper: Upper marks, (marks, channels); larger observations are beyond them.
        lower: Lower marks, (marks, channels); smaller observations are beyond them.
        shares: Upper bound S of the share of clean observations beyond each mark, (marks,).
    """

    upper: Tensor
    lower: Tensor
    shares: Tensor

    @classmethod
    def of(cls, z: Tensor) -> Marks:
        """Marks from the channel means of clean observations, (n, channels)."""
        n, channels = z.shape
        ranks = [max(1, math.floor(part * n)) for part in _PARTS]
        ordered = z.sort(0).values
        error = (1 - _CONFIDENCE) / (2 * len(ranks) * channels)
        shares = torch.tensor([_most(n, k, error) for k in ranks], dtype=torch.float64)
        return cls(torch.stack([ordered[n - k] for k in ranks]), torch.stack([ordered[k - 1] for k in ranks]), shares)

    def factors(self, z: Tensor) -> Tensor:
        """Log factors of the bets, summed over observations: z (n, channels) -> (2, bets, channels)."""
        beyond, share = torch.zeros(2, *self.upper.shape, dtype=torch.float64), self.shares[:, None]
        upper, lower = self._outer
        for rows in z.float().split(255):  # a byte counts to 255
            beyond += torch.stack([_how_many(rows[:, None] > upper), _how_many(rows[:, None] < lower)])
        r = share + torch.tensor(_HOPES, dtype=torch.float64)[:, None, None] * (1 - share)  # (hopes, marks, 1)
        won, lost = (r / share).log(), ((1 - r) / (1 - share)).log()
        return (beyond[:, None] * (won - lost)).add_(len(z) * lost).flatten(1, 2)

    @cached_property
    def _outer(self) -> tuple[Tensor, Tensor]:
        """The marks in float32, moved outwards, because rounding may move a mean."""
        return (self.upper + _ROUNDING).float(), (self.lower - _ROUNDING).float()


def _how_many(is_so: Tensor) -> Tensor:
    """Number of True values along the first dimension, at most 255: uint8."""
    return is_so.view(torch.uint8).sum(0, dtype=torch.uint8)


def _most(n: int, k: int, error: float) -> float:
    """The share S beyond a mark for which fewer than k of n draws are beyond the mark with probability ``error``."""
    counts = torch.arange(k, dtype=torch.float64)
    ways = math.lgamma(n + 1) - torch.lgamma(counts + 1) - torch.lgamma(n - counts + 1)
    low, high = 0.0, 1.0
    for _ in range(60):
        share = (low + high) / 2
        fewer = (ways + counts * math.log(share) + (n - counts) * math.log1p(-share)).logsumexp(0)
        low, high = (share, high) if fewer > math.log(error) else (low, share)
    return high
