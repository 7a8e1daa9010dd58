"""Clustering: whether batches differ from each other by more than chance, by an analysis of variance.

With B batches of N examples in all, e the mean of an example's values in a channel, and sums of squares of e:

    F = (between / (B - 1)) / (within / (N - B))        n0 = (N - sum N_b^2 / N) / (B - 1)

n0 is the size of a batch, N_b may differ (Snedecor and Cochran 1989, chapters 12 and 13). Batches drawn at random
have F near 1. Sorted or correlated ones have more, and their means scatter as those of fewer examples would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch

from batchnorm.moments import Moments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# three degrees of freedom: with fewer, the scatter of batches says nothing
MIN_BATCHES = 4
_TINY = 1e-300
_STEPS = 1000  # of the continued fraction: O(sqrt(d1 + d2)) are needed


@final
@dataclass(frozen=True, slots=True, eq=False)
class Clustering:
    """How one figure of each example scatters, over examples and over batches."""

    size: float  # n0, examples in a batch
    var: Tensor  # of examples, unbiased, one for each channel
    excess: float  # variance of batch means over what n0 random examples have, mean of the channels
    p: float  # probability of the largest F of all channels by chance, times the number of channels

    @property
    def effective(self) -> float:
        """Random examples whose mean scatters as a batch's; infinite if all batches have one mean."""
        return self.size / self.excess if self.excess else math.inf


def clustering(parts: Sequence[Moments]) -> Clustering | None:
    """The clustering of figures whose moments within each batch are ``parts``; None where it cannot be told.

    Constant channels are left out.
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
    # deviations that rounding makes of a constant
    varies = total.m2 > count * (torch.finfo(torch.float32).eps * total.mean).square()
    if not bool(varies.any()):
        return None
    ratio = between / (within / (count - batches))
    most, spare = float(ratio[varies].max()), float((count - batches).min())
    p = f_tail(most, batches - 1, spare) * int(varies.sum())
    return Clustering(float(size.mean()), var, float((between / var)[varies].mean()), min(1.0, p))


def f_tail(f: float, d1: float, d2: float) -> float:
    """Probability that an F with ``d1`` and ``d2`` degrees of freedom is ``f`` or more."""
    if not f > 0:
        return 1.0
    return 0.0 if math.isinf(f) else _beta(d2 / (d2 + d1 * f), d2 / 2, d1 / 2)


def _beta(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function (DLMF 8.17.22, evaluated by Lentz's method)."""
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side only
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
