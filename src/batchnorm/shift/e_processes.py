"""E-processes: evidence that detects a shift as fast after a million clean observations as at the start.

A bet's wealth is a product of factors (``betting``). It shrinks while nothing happens, and this loss delays detection
later. So half of the initial wealth goes into the product P, which begins at the start. The other half is spread over
products, one of which begins in each round t; S is their sum. With the factor e of round t,

    E = (P + S + rest) / 2,      P' = P e,      S' = (S + w_t) e,      rest = 1 - w_1 - ... - w_t,

with weights w_t = 1 / log2(t + 1) - 1 / log2(t + 2), which sum to 1. Each product is an e-process from its start on, so
E is an e-process. A late start costs log(1 / w_t), about log t + 2 log log t, instead of the whole loss of P.

For a given average run length each weight is the number of new observations, and rest is 0. Then S minus the number of
observations so far cannot grow in expectation, so the expected number of observations until S reaches ``arl`` is at
least ``arl`` (e-SR: Shin, Ramdas and Rinaldo 2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True, slots=True, eq=False)
class EProcesses:
    """Logarithms of many e-processes after ``updates`` rounds of observations.

    Args:
        product: log P, any shape.
        restarted: log S, the same shape.
        updates: Number of rounds; their sizes may differ.
        rest: Sum of the weights of products that have not begun yet; 0 for e-SR.
        is_spread: Whether half of the wealth is spread over later starts; False for e-SR.
    """

    product: Tensor
    restarted: Tensor
    updates: int = 0
    rest: float = 1.0
    is_spread: bool = True

    @classmethod
    def start(cls, shape: tuple[int, ...], *, is_spread: bool) -> EProcesses:
        """Wealth 1, or 0 for e-SR, before any observation."""
        zeros = torch.zeros(shape, dtype=torch.float64)
        return cls(zeros, torch.full_like(zeros, -torch.inf), 0, 1.0 if is_spread else 0.0, is_spread)

    def bet(self, log_factor: Tensor, observations: int) -> EProcesses:
        """The e-processes after one more round; ``log_factor`` covers ``observations`` observations."""
        at = self.updates + 1
        weight = 1 / math.log2(at + 1) - 1 / math.log2(at + 2) if self.is_spread else float(observations)
        started = torch.logaddexp(self.restarted, torch.full_like(self.restarted, math.log(weight)))
        rest = 1 / math.log2(at + 2) if self.is_spread else 0.0
        return EProcesses(self.product + log_factor, started + log_factor, at, rest, self.is_spread)

    @property
    def log(self) -> Tensor:
        """Log of each process: E, or S for e-SR."""
        if not self.is_spread:
            return self.restarted
        rest = torch.full_like(self.product, math.log(self.rest))
        parts = torch.stack([self.product, self.restarted, rest])
        return parts.logsumexp(0) - math.log(2)

    @property
    def log_mean(self) -> Tensor:
        """Log of the mean over the processes of each place: shape (..., places) -> (places,)."""
        parts = [self.product, self.restarted] if self.is_spread else [self.restarted]
        wealth = torch.cat([part.flatten(0, -2) for part in parts])
        total = wealth.logsumexp(0) - math.log(len(wealth))
        if not self.is_spread:
            return total
        # the total is the mean of (P + S) / 2; rest / 2 is still missing
        return torch.logaddexp(total, torch.full_like(total, math.log(self.rest / 2)))


# -- several streams, for ``fleet``, which has the conditions and proofs -------------------------------------------


def weighted_sum(streams: Sequence[EProcesses], log_weight: float) -> EProcesses:
    """The sum of several streams' processes, each with the same weight; the log of every result is linear in them."""
    product, restarted = (_stacked(streams, part).logsumexp(0) + log_weight for part in ("product", "restarted"))
    rest = math.exp(log_weight) * sum(wealth.rest for wealth in streams)
    return EProcesses(product, restarted, _updates(streams), rest, streams[0].is_spread)


def multiplied(streams: Sequence[EProcesses], fleet: int) -> EProcesses:
    """The products from the start, multiplied; the sums of later products, averaged over ``fleet`` streams.

    Streams of the fleet that are not among ``streams`` count as streams without observations. Not for e-SR.
    """
    product = _stacked(streams, "product").sum(0)
    restarted = _stacked(streams, "restarted").logsumexp(0) - math.log(fleet)
    rest = (sum(wealth.rest for wealth in streams) + fleet - len(streams)) / fleet
    return EProcesses(product, restarted, _updates(streams), rest, is_spread=True)


def highest(streams: Sequence[EProcesses], log_weight: float) -> EProcesses:
    """For each place the processes of the stream with the largest mean in this place, times the weight."""
    best = torch.stack([wealth.log_mean for wealth in streams]).argmax(0)  # (places,)
    place = torch.arange(len(best))
    product, restarted = (
        _stacked(streams, part)[best, ..., place].movedim(0, -1) + log_weight for part in ("product", "restarted")
    )
    rest = math.exp(log_weight) * min(wealth.rest for wealth in streams)
    return EProcesses(product, restarted, _updates(streams), rest, streams[0].is_spread)


def _stacked(streams: Sequence[EProcesses], part: str) -> Tensor:
    return torch.stack([getattr(wealth, part) for wealth in streams])


def _updates(streams: Sequence[EProcesses]) -> int:
    return sum(wealth.updates for wealth in streams)
