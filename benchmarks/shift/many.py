"""Evidence of thousands of long streams: the formulas of the product, one score after another, in compiled loops.

A score's wealth does not depend on other scores, and a channel's not on other channels, so each goes through a whole
stream by itself. Wealth is kept as numbers, not as logarithms, since a stream ends when it is large, and what is below
1e-300 counts as nothing. ``checked`` compares it with ``batchnorm.shift.evidence`` on the same observations.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from batchnorm.shift.conformal import CELLS, EDGE
from batchnorm.shift.evidence import ShiftEvidence, stakes_for
from batchnorm.shift.layer_evidence import KINDS
from batchnorm.shift.scores import KIND_OF

if TYPE_CHECKING:
    from batchnorm.shift import Reference

ROUND = 8
_LARGEST, _LEAST = 1e300, 1e-300
Numbers = NDArray[np.float64]


def cells_of_pool(reference: Reference, pool: tuple[torch.Tensor, torch.Tensor]) -> NDArray[np.int16]:
    """Cells of the scores of all observations of a pool, (observations, scores)."""
    assert reference.clean is not None
    scores = reference.clean.scores
    parts = [scores.cells(*some).to(torch.int16) for some in zip(*(x.split(500) for x in pool), strict=True)]
    return torch.cat(parts).numpy()


def by_ranks(reference: Reference, cells: NDArray[np.int16], *, is_spread: bool = True) -> Numbers:
    """Log evidence after each round of a calibrated stream: cells (observations, scores) -> (rounds,)."""
    assert reference.clean is not None
    bag = reference.clean.bag
    above = bag.counts.numpy().astype(np.int32)
    inside = above - np.concatenate([above[:, 1:], np.zeros_like(above[:, :1])], 1)
    layers = len(reference.sizes)
    weight = np.repeat([1 / (KIND_OF.count(kind) * len(KINDS) * layers) for kind in KIND_OF], layers)
    weight *= 1.0 if is_spread else 0.5
    started, rest = _starts(len(cells) // ROUND, is_spread=is_spread)
    return np.log(_ranks(np.ascontiguousarray(cells.T), inside, bag.observations, weight, started, rest, is_spread))


def from_checkpoint(reference: Reference, z: Numbers, energy: Numbers, *, is_spread: bool = True) -> Numbers:
    """Log evidence after each round of a stream: (observations, channels), (observations, layers) -> (rounds,)."""
    assert reference.clean is None
    assert reference.v is None
    started, rest = _starts(len(z) // ROUND, is_spread=is_spread)
    of_mean, of_energy = (stake.numpy() for stake in stakes_for(reference))
    layer = np.repeat(np.arange(len(reference.sizes)), reference.sizes)
    share = 1 / np.repeat(reference.sizes, reference.sizes) / len(reference.sizes) / 2
    delta, kappa, d = (x.numpy() for x in (reference.delta, reference.kappa, reference.d))
    total = _means(np.ascontiguousarray(z.T), of_mean, delta, kappa, share, started, rest, is_spread)
    total += _energies(np.ascontiguousarray(energy.T), of_energy, d, 0.5 / (layer[-1] + 1), started, rest, is_spread)
    return np.log(total)


def checked(reference: Reference, z: torch.Tensor, q: torch.Tensor, logs: Numbers, *, is_spread: bool = True) -> None:
    """Compare with the product's evidence.

    Raises:
        AssertionError: If they differ by more than rounding.
    """
    evidence = ShiftEvidence.start(reference, is_spread=is_spread)
    for at, log in enumerate(logs):
        evidence = evidence.after(z[ROUND * at : ROUND * (at + 1)], q[ROUND * at : ROUND * (at + 1)])
        assert math.isclose(evidence.log, log, rel_tol=1e-6, abs_tol=1e-6) or evidence.log > 600, (
            at,
            evidence.log,
            log,
        )


def _starts(rounds: int, *, is_spread: bool) -> tuple[Numbers, Numbers]:
    """What starts in each round, and what has not started after it; see ``batchnorm.shift.e_processes``."""
    at = np.arange(1, rounds + 1)
    if not is_spread:
        return np.full(rounds, float(ROUND)), np.zeros(rounds)
    return 1 / np.log2(at + 1) - 1 / np.log2(at + 2), 1 / np.log2(at + 2)


@numba.njit(cache=True)
def _ranks(cells, inside, before, weight, started, rest, is_spread):  # type: ignore[no-untyped-def]
    scores, observations = cells.shape
    numbers = np.arange(before + observations + 1)
    quarter, tenth = np.ones(len(numbers)), np.ones(len(numbers))
    quarter[1:], tenth[1:] = numbers[1:] ** -0.25, numbers[1:] ** -0.9
    fourth, grown = 1 / quarter, 1 / tenth
    best = np.zeros(len(started))
    for score in range(scores):
        tree = np.zeros(CELLS + 1, np.int32)  # a Fenwick tree over cells from the last to the first
        for cell in range(CELLS):
            at = CELLS - cell
            while at <= CELLS:
                tree[at] += inside[score, cell]
                at += at & -at
        product, restarted, f = np.ones(6), np.zeros(6), np.empty(6)
        for turn in range(len(started)):
            p10, p25, s5, s9 = 0.1**ROUND, 1.0, 1.0, 1.0  # products over the round
            for i in range(ROUND * turn, ROUND * (turn + 1)):
                at = CELLS - cells[score, i]
                while at <= CELLS:
                    tree[at] += 1
                    at += at & -at
                at, rank = CELLS - max(cells[score, i] - EDGE, 0), 0
                while at > 0:
                    rank += tree[at]
                    at -= at & -at
                total = before + i + 1
                p = rank / total
                p10 *= tenth[rank] * grown[total]
                p25 *= quarter[rank] * fourth[total]
                s5 *= 1.5 - p
                s9 *= 1.9 - 1.8 * p
            f[0], f[1], f[2], f[3] = p10, 0.25**ROUND * p25**3, 0.5**ROUND * p25**2, 0.75**ROUND * p25
            f[4], f[5] = s5, s9
            wealth = _bet(product, restarted, f, started[turn])
            evidence = weight[score] * (wealth / 12 + rest[turn] / 2 if is_spread else restarted.sum() / 6)
            best[turn] = max(best[turn], evidence)
    return best


@numba.njit(cache=True)
def _means(z, stakes, delta, kappa, share, started, rest, is_spread):  # type: ignore[no-untyped-def]
    total = np.zeros(len(started))
    for channel in range(len(z)):
        product, restarted, f, lost = np.ones(8), np.zeros(8), np.ones(8), np.ones(8)
        stake = np.concatenate((stakes[:, channel], stakes[:, channel]))
        cost = np.exp(-ROUND * stake**2 * kappa[channel] / 2)
        for turn in range(len(started)):
            f[:], lost[:] = cost, 1.0
            for i in range(ROUND * turn, ROUND * (turn + 1)):
                for bet in range(4):
                    y = stake[bet] * (z[channel, i] - delta[channel])
                    up, down = 1 + max(y, 0.0), 1 - min(y, 0.0)
                    f[bet] *= up * up + 1
                    lost[bet] *= down * down + 1
                for bet in range(4, 8):
                    y = stake[bet] * (-z[channel, i] - delta[channel])
                    up, down = 1 + max(y, 0.0), 1 - min(y, 0.0)
                    f[bet] *= up * up + 1
                    lost[bet] *= down * down + 1
            f /= lost
            wealth = _bet(product, restarted, f, started[turn])
            total[turn] += share[channel] * (wealth / 16 + rest[turn] / 2 if is_spread else restarted.sum() / 8)
    return total


@numba.njit(cache=True)
def _energies(q, stakes, d, share, started, rest, is_spread):  # type: ignore[no-untyped-def]
    total = np.zeros(len(started))
    for layer in range(len(q)):
        product, restarted, f = np.ones(4), np.zeros(4), np.ones(4)
        for turn in range(len(started)):
            f[:] = 1.0
            for i in range(ROUND * turn, ROUND * (turn + 1)):
                for bet in range(4):
                    f[bet] *= 1 + stakes[bet, layer] * (q[layer, i] - (1 + d[layer]))
            wealth = _bet(product, restarted, f, started[turn])
            total[turn] += share * (wealth / 8 + rest[turn] / 2 if is_spread else restarted.sum() / 4)
    return total


@numba.njit(cache=True)
def _bet(product, restarted, f, start):  # type: ignore[no-untyped-def]
    """Multiply both by the factors; their sum."""
    total = 0.0
    for bet in range(len(f)):
        product[bet] = min(product[bet] * f[bet], _LARGEST)
        restarted[bet] = min((restarted[bet] + start) * f[bet], _LARGEST)
        if product[bet] < _LEAST:
            product[bet] = 0.0
        if restarted[bet] < _LEAST:
            restarted[bet] = 0.0
        total += product[bet] + restarted[bet]
    return total
