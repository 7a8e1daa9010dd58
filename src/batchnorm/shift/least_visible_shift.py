"""The least visible shift: the smallest move of a channel's mean that would raise an alarm in a given stream.

The move s is measured in stored standard deviations. From a checkpoint a bet with stake l gains phi(l (s - delta)) -
l^2 kappa / 2 per observation of a channel whose mean moved by s (see ``betting``). For an alarm the bet must gain
log(K / alpha) in n observations. The evidence is an average over K bets: over stakes, signs, channels, kinds of bets,
layers and starts. The smallest s solves, for the best stake, n (phi(l (s - delta)) - l^2 kappa / 2) = log(K / alpha).

If calibrated, the bets on the largest distance among a layer's channels gain log f(p) per observation (see
``conformal``). p is computed for a moved channel with a normal mean; the other channels are assumed not to move.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

from batchnorm.shift import betting, conformal
from batchnorm.shift.evidence import ShiftEvidence
from batchnorm.shift.scores import KIND_OF

_STARTS = 2  # the evidence is the average of two parts: one start at the beginning, and all later starts
_SD = math.sqrt(math.pi / 2)  # sd of a normal variable, in mean absolute deviations
_FURTHEST, _STEPS, _NORMAL = 40.0, 161, 63  # largest move, in mean absolute deviations; moves tried; normal quantiles


def least_visible_shift(evidence: ShiftEvidence, alpha: float) -> float:
    """The smallest move of a channel's mean, in stored sd, that would have raised an alarm: median over channels.

    For an even number of channels the median is the lower middle value. With a calibrated reference it is infinite if
    for most channels no move of up to 40 mean absolute deviations would have raised an alarm in so few observations.
    """
    moves = _by_bets(evidence, alpha) if evidence.bag is None else _by_ranks(evidence, alpha)
    return float(moves.median())


def _by_bets(evidence: ShiftEvidence, alpha: float) -> Tensor:
    reference, n = evidence.reference, evidence.observations
    sizes = torch.tensor(reference.sizes)
    places = betting.SIDES * betting.STAKES * _STARTS * len(evidence.kinds) * len(sizes) * sizes.double()
    cost = (places / alpha).log().repeat_interleave(sizes)
    stakes = evidence.stakes[0]
    needed = cost / n + stakes.square() * reference.kappa / 2  # value of phi
    moves = ((2 * needed.exp() - 1).sqrt() - 1) / stakes  # phi(y) = log(1 + y + y^2 / 2), inverted
    return reference.delta + moves.amin(0)


def _by_ranks(evidence: ShiftEvidence, alpha: float) -> Tensor:
    reference, clean, bag = evidence.reference, evidence.reference.clean, evidence.bag
    assert clean is not None and bag is not None  # noqa: S101, PT018 - the caller has checked
    layers, counts = len(reference.sizes), bag.counts
    places = conformal.BETS * KIND_OF.count("mean") * len(evidence.kinds) * layers * _STARTS
    needed = math.log(places / alpha) / evidence.observations
    moves = torch.linspace(0, _FURTHEST, _STEPS, dtype=torch.float64)
    normal = [NormalDist().inv_cdf((i + 0.5) / _NORMAL) for i in range(_NORMAL)]
    score = (moves[:, None] + _SD * torch.tensor(normal, dtype=torch.float64)).abs()  # (moves, values)
    least = []
    for layer in range(layers):  # uses the first score of each layer, max |a_c|
        cells = conformal.cells_of(score, clean.scores.middle[layer], clean.scores.width[layer])
        p = (counts[layer][conformal.lowest(cells)] + 1) / (bag.observations + 1)  # (moves, values)
        gain = conformal.factors(p.T.double()) / _NORMAL  # (bets, moves)
        enough = gain.amax(0) >= needed
        least.append(moves[enough][0] if bool(enough.any()) else torch.tensor(math.inf, dtype=torch.float64))
    return torch.stack(least).repeat_interleave(torch.tensor(reference.sizes)) * clean.scores.spread
