"""Clustering: whether batches differ from each other by more than chance, by an analysis of variance.

In one channel let e be the mean of an example's values. For B batches with N examples in all, of which N_b are in batch
b, let within and between be the sums of squares of e within and between batches. Then

    F = (between / (B - 1)) / (within / (N - B))        n0 = (N - sum N_b^2 / N) / (B - 1)

and n0 is the effective batch size if the sizes N_b differ (Snedecor and Cochran 1989, chapters 12 and 13). Batches
drawn at random have F near 1. Sorted or correlated batches have a larger F: their means vary as much as means of fewer
examples.

The probability of a large F assumes normal examples; one extreme example makes it wrong. So if F is large,
``order_p`` tests all layers together by an exact permutation test (Pitman 1937): if examples come in random order, all
orders of them are equally likely.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from batchnorm.moments import Moments

# 4 batches give three degrees of freedom; with fewer, the variance of batch means is hardly known
MIN_BATCHES = 4
# random orders; with the observed order there are 2,000, so the smallest p is 1 / 2,000: half of a finding's limit
_ORDERS = 1999
_ORDERS_AT_ONCE = 32
_FINE = 2**12  # parts of an sd: values in one part count as equal, because rounding depends on the batch size
_TINY = 1e-300
_STEPS = 1000  # most steps of the continued fraction in ``_beta``; it needs O(sqrt(d1 + d2)) steps


@final
@dataclass(frozen=True, slots=True, eq=False)
class Clustering:
    """The variance of one statistic of each example, over examples and over batches."""

    size: float  # n0, the effective batch size
    var: Tensor  # unbiased variance over examples, one for each channel
    excess: float  # variance of batch means / its expectation for random batches, mean over channels
    p: float  # probability of the largest F in random batches, times the number of channels; at most 1

    @property
    def effective(self) -> float:
        """Number of random examples whose mean varies like a batch's; infinite if all batches have one mean."""
        return self.size / self.excess if self.excess else math.inf


def clustering(parts: Sequence[Moments]) -> Clustering | None:
    """The clustering of a statistic of examples, from its moments in each batch. Constant channels are ignored.

    None with fewer than 4 batches, with fewer than 2 examples per batch on average, or if no channel varies.
    """
    total = sum(parts, Moments.empty())
    batches, count = len(parts), total.count
    if batches < MIN_BATCHES or not bool((count >= 2 * batches).all()):
        return None
    within = torch.stack([part.m2 for part in parts]).sum(0)
    between = (total.m2 - within).clamp_min(0) / (batches - 1)
    var = total.m2 / (count - 1)
    squares = torch.stack([part.count.expand(count.shape).square() for part in parts]).sum(0)
    size = (count - squares / count) / (batches - 1)
    # because of rounding a constant channel varies a little
    varies = total.m2 > count * (torch.finfo(torch.float32).eps * total.mean).square()
    if not bool(varies.any()):
        return None
    ratio = between / (within / (count - batches))
    largest, spare = float(ratio[varies].max()), float((count - batches).min())
    p = f_tail(largest, batches - 1, spare) * int(varies.sum())
    return Clustering(float(size.mean()), var, float((between / var)[varies].mean()), min(1.0, p))


def order_p(batches: Sequence[Tensor]) -> float:
    """p of a permutation test: share of random orders in which batches differ as much as observed, at least 1/2000.

    Uses the statistic (column) in which batches differ most, by its ranks: the sum over batches of size times squared
    distance of the batch's mean rank from the overall mean rank. The result is 1 if no statistic varies.

    Args:
        batches: One tensor for each batch, (N_b, K): K statistics of each example.
    """
    ranks = _ranks(torch.cat(list(batches)).double())
    if not ranks.numel():
        return 1.0
    ends = torch.tensor([len(batch) for batch in batches]).cumsum(0)
    random = torch.Generator().manual_seed(0)
    observed, at_least = _scatter(ranks[None], ends)[0], 0
    for first in range(0, _ORDERS, _ORDERS_AT_ONCE):
        count = min(_ORDERS_AT_ONCE, _ORDERS - first)
        orders = torch.rand(count, len(ranks), generator=random).argsort(1)
        # sums in another order differ by rounding
        at_least += int((_scatter(ranks[orders], ends) >= observed * (1 - 1e-9)).sum())
    return (1 + at_least) / (1 + _ORDERS)


def _ranks(x: Tensor) -> Tensor:
    """Ranks in each column of x (N, K) that varies, ties averaged, standardized to mean 0 and sd 1."""
    middle = x.mean(0)
    sd = (x - middle).square().mean(0).sqrt()
    varies = sd > torch.finfo(torch.float32).eps * middle.abs()
    x = ((x - middle) / sd * _FINE).round()[:, varies]
    columns = []
    for column in x.T:
        _, which, counts = column.unique(return_inverse=True, return_counts=True)
        columns.append((counts.cumsum(0) - (counts - 1) / 2.0)[which])
    if not columns:
        return x
    ranks = torch.stack(columns, 1).double()
    ranks = ranks - ranks.mean(0)
    return ranks / ranks.square().mean(0).sqrt().clamp_min(_TINY)


def _scatter(ranks: Tensor, ends: Tensor) -> Tensor:
    """For each order, the largest over columns of the sum over batches of (sum of ranks)^2 / size.

    ``ranks`` has shape (orders, N, K), the result (orders,). ``ends`` are the positions behind the last row of a batch.
    """
    sums = ranks.cumsum(1)[:, ends - 1].diff(dim=1, prepend=torch.zeros(1, 1, 1).expand(len(ranks), 1, ranks.shape[2]))
    sizes = ends.diff(prepend=torch.zeros(1, dtype=ends.dtype))
    return (sums.square() / sizes[:, None]).sum(1).amax(1)


def f_tail(f: float, d1: float, d2: float) -> float:
    """Probability that an F variable with ``d1`` and ``d2`` degrees of freedom is at least ``f``."""
    if not f > 0:
        return 1.0
    return 0.0 if math.isinf(f) else _beta(d2 / (d2 + d1 * f), d2 / 2, d1 / 2)


def _beta(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function (DLMF 8.17.22, evaluated by Lentz's method)."""
    if x > (a + 1) / (a + b + 2):  # the continued fraction converges fast for a small x only
        return 1 - _beta(1 - x, b, a)
    if x <= 0:
        return 0.0
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    fraction, c, d = 1.0, 1.0, 0.0
    for step in range(_STEPS):
        m = step // 2
        if step % 2:
            term = (m + 1) * (b - m - 1) * x / ((a + 2 * m + 1) * (a + 2 * m + 2))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / ((1 + term * d) or _TINY)
        c = (1 + term / c) or _TINY
        fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return math.exp(log_front) / (a * fraction)
