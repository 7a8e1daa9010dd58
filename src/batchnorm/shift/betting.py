"""Betting: factors that grow when observations contradict the null, with proofs that their expectation is at most 1.

An e-process is the wealth of a gambler who bets against a null hypothesis at fair or worse odds. Under the null its
expectation never exceeds 1, so the probability that it ever reaches 1 / alpha is at most alpha (Ville 1939).

An observation is one example, or the mean of several examples (``observation_units``). Let z be the mean of a channel
in one observation, minus the stored mean, divided by the stored standard deviation (sd). Let Q be a layer's energy in
it: the mean square of the layer's standardized inputs. F is the past, and l the stake of a bet. The null hypothesis is

    |E[z | F]| <= delta,     Var(z | F) <= kappa,     |E[Q | F] - 1| <= d,     Var(Q | F) <= v,     Q >= 0.

``mean_shift``, ``energy_up`` and ``energy_down`` return logarithms of factors, summed over observations, for each
stake (and each side of a mean). The proofs that the expectation of a factor, given F, is at most 1:

``mean_shift`` (Catoni's bet, Wang and Ramdas 2023): let y = l (s z - delta) with s = +1 or -1, and phi(y) =
log(1 + y + y^2 / 2) for y >= 0, otherwise -log(1 - y + y^2 / 2); exp phi(y) <= 1 + y + y^2 / 2. Let m = delta - E[s z],
which lies in [0, 2 delta]. Then E exp phi(y) <= 1 - l m + l^2 (kappa + m^2) / 2 <= exp(l^2 kappa / 2) if l m <= 2. As
m <= 2 delta, l <= 1 / delta is enough. z need not be bounded or have a certain distribution: only the bounds on its
mean and variance are assumed.

``energy_up``: 1 + l (Q - (1 + d)) is at least 1 - l (1 + d) > 0 for l < 1 / (1 + d), and its expectation is at most 1.
Only Q >= 0 and the upper bound on E[Q] are assumed.

``energy_down`` (Bennett 1962): let x = 1 - d - Q <= 1, m = -E[x] in [0, 2 d], psi(l) = exp(l) - l - 1. As
(exp(l x) - l x - 1) / x^2 grows with x, E exp(l x) <= 1 - l m + (v + m^2) psi(l) <= exp(v psi(l)) if m psi(l) <= l. As
m <= 2 d, 2 d <= l / psi(l) is enough.
"""

from __future__ import annotations

import torch
from torch import Tensor

# stakes that suit shifts of about 1, 1/2, 1/4 and 1/8 of a standard deviation of the observations
_STAKES = (1.0, 0.5, 0.25, 0.125)
STAKES, SIDES = len(_STAKES), 2  # number of stakes; number of sides of a mean, higher and lower
# lost shares of the energy; for each there is a stake of ``energy_down`` that suits it
_LOSSES = (0.75, 0.5, 0.25, 0.1)
_OBSERVATIONS_PER_LOG = 8  # observations whose factors are multiplied before the logarithm
_LARGEST_GAIN = 1e16  # stored sd: a mean that moved further in the direction of a bet counts as this far


def mean_stakes(kappa: Tensor, delta: Tensor) -> Tensor:
    """Stakes l for means, (stakes, channels): 1, 1/2, 1/4 and 1/8 divided by sqrt(kappa), at most 1 / delta."""
    stakes = torch.tensor(_STAKES, dtype=torch.float64)[:, None] / kappa.sqrt()
    return torch.minimum(stakes, 1 / delta)


def mean_shift(z: Tensor, kappa: Tensor, delta: Tensor, stakes: Tensor) -> Tensor:
    """Log factors for a higher and a lower mean, summed over observations: z (n, channels) -> (2, stakes, channels)."""
    cost = len(z) * stakes.square() * kappa / 2
    sides = [_phi(stakes, sign * z - delta) - cost for sign in (1.0, -1.0)]
    return torch.stack(sides)


def _phi(stakes: Tensor, moved: Tensor) -> Tensor:
    """phi(stakes * moved), summed over observations: stakes (stakes, channels), moved (n, channels).

    The result has the shape of ``stakes``. exp phi(y) is 1 + |y| + y^2 / 2 = ((1 + |y|)^2 + 1) / 2 for y >= 0, and one
    divided by this for y < 0. The factors of eight observations are multiplied before one logarithm is computed. The
    product of gains does not overflow, because a gain of more than 1e16 counts as 1e16. The product of losses may: then
    the factor is 0 and its logarithm -inf. Every bet stays fair.
    """
    total = torch.zeros_like(stakes)
    for rows in moved.split(_OBSERVATIONS_PER_LOG):
        above, below = rows.clamp(0, _LARGEST_GAIN), rows.clamp(max=0)
        for at, stake in enumerate(stakes):
            gain, loss = (above * stake).add_(1).square_().add_(1), (below * stake).sub_(1).square_().add_(1)
            total[at] += gain.prod(0).div_(loss.prod(0)).log_()
    return total


def up_stakes(d: Tensor) -> Tensor:
    """Stakes l for more energy, (stakes, layers): 0.8, 0.4, 0.2 and 0.1 of the largest possible stake, 1 / (1 + d)."""
    return 0.8 * torch.tensor(_STAKES, dtype=torch.float64)[:, None] / (1 + d)


def energy_up(q: Tensor, d: Tensor, stakes: Tensor) -> Tensor:
    """Log factors for more energy than 1 + d, summed over observations: q (n, layers) -> (stakes, layers)."""
    return torch.log1p(stakes * (q - (1 + d))[:, None, :]).sum(0)


def down_stakes(d: Tensor, v: Tensor) -> Tensor:
    """Stakes l for less energy, (stakes, layers): the best if 3/4, 1/2, 1/4 or 1/10 of the energy is lost and d = 0.

    A stake is halved until 2 d <= l / psi(l), as the proof requires.
    """
    stakes = torch.log1p(torch.tensor(_LOSSES, dtype=torch.float64)[:, None] / v)
    for _ in range(64):
        stakes = torch.where(2 * d * psi(stakes) > stakes, stakes / 2, stakes)
    return stakes


def energy_down(q: Tensor, d: Tensor, v: Tensor, stakes: Tensor) -> Tensor:
    """Log factors for less energy than 1 - d, summed over observations: q (n, layers) -> (stakes, layers)."""
    return stakes * (1 - d - q).sum(0) - len(q) * v * psi(stakes)


def psi(stakes: Tensor) -> Tensor:
    """exp(l) - l - 1, without cancellation near 0."""
    return torch.where(stakes < 1e-4, stakes.square() / 2, torch.expm1(stakes) - stakes)
