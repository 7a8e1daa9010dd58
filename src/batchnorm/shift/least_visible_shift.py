"""The least visible shift: the smallest move of a channel's mean that would raise an alarm in a given stream.

In stored standard deviations. From a checkpoint a bet with stake l gains phi(l (s - delta)) - l^2 kappa / 2 per
observation of a channel whose mean moved by s. It needs log(K / alpha) in total; K is the cost of averaging over
stakes, signs, channels, kinds of bets, layers and starts. With phi from ``betting``, the smallest s solves, for the
best stake, n (phi(l (s - delta)) - l^2 kappa / 2) = log(K / alpha).

If calibrated, the bets on the largest distance among a layer's channels gain log f(p) per observation. The moved
channel's mean is assumed to be normal, which gives p-values among the clean observations; other channels stay still.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

from batchnorm.shift import betting, conformal
from batchnorm.shift.evidence import ShiftEvidence
from batchnorm.shift.scores import KIND_OF

_STARTS = 2  # starts that the evidence averages over
_SD = math.sqrt(math.pi / 2)  # sd of a normal variable, in mean absolute deviations
_FURTHEST, _STEPS, _NORMAL = 40.0, 161, 63  # largest move, in mean absolute deviations; moves tried; normal quantiles


def least_visible_shift(evidence: ShiftEvidence, alpha: float) -> float:
    """The smallest move of a channel's mean, in stored sd, that would have raised an alarm: median over channels.

    Infinite if no move could have done so in so few observations.
    """
    found = _by_bets(evidence, alpha) if evidence.bag is None else _by_ranks(evidence, alpha)
    return float(found.median())


def _by_bets(evidence: ShiftEvidence, alpha: float) -> Tensor:
    known, n = evidence.reference, evidence.observations
    sizes = torch.tensor(known.sizes)
    places = betting.SIDES * betting.STAKES * _STARTS * len(evidence.kinds) * len(sizes) * sizes.double()
    cost = (places / alpha).log().repeat_interleave(sizes)
    stakes = evidence.stakes[0]
    won = cost / n + stakes.square() * known.kappa / 2  # needed value of phi
    moves = ((2 * won.exp() - 1).sqrt() - 1) / stakes  # phi(y) = log(1 + y + y^2 / 2), inverted
    return known.delta + moves.amin(0)


def _by_ranks(evidence: ShiftEvidence, alpha: float) -> Tensor:
    known, clean, bag = evidence.reference, evidence.reference.clean, evidence.bag
    assert clean is not None and bag is not None  # noqa: S101, PT018 - the caller has checked
    layers, counts = len(known.sizes), bag.counts
    places = conformal.BETS * KIND_OF.count("mean") * len(evidence.kinds) * layers * _STARTS
    needed = math.log(places / alpha) / evidence.observations
    moves = torch.linspace(0, _FURTHEST, _STEPS, dtype=torch.float64)
    normal = [NormalDist().inv_cdf((i + 0.5) / _NORMAL) for i in range(_NORMAL)]
    score = (moves[:, None] + _SD * torch.tensor(normal, dtype=torch.float64)).abs()  # (moves, values)
    least = []
    for layer in range(layers):  # the first score of each
        cells = conformal.cells_of(score, clean.scores.middle[layer], clean.scores.width[layer])
        p = (counts[layer][conformal.lowest(cells)] + 1) / (bag.observations + 1)  # (moves, values)
        won = conformal.factors(p.T.double()) / _NORMAL  # (bets, moves)
        enough = won.amax(0) >= needed
        least.append(moves[enough][0] if bool(enough.any()) else torch.tensor(math.inf, dtype=torch.float64))
    return torch.stack(least).repeat_interleave(torch.tensor(known.sizes)) * clean.scores.spread
