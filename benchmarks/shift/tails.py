"""Clean worlds with tails: rare large examples, bursts, counts, laws without a fourth moment.

A network of two layers with random weights has exact statistics of each, from 200,000 examples. Streams, calibrations
and statistics are of one distribution, so that any alarm is a false one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from worlds import Sampler, World

_FEATURES = 16
Draw = Callable[[int, torch.Generator], Tensor]


def _normal(n: int, random: torch.Generator) -> Tensor:
    return torch.randn(n, _FEATURES, generator=random)


def _spikes(share: float, factor: float) -> Draw:
    """Normal examples, of which a share is multiplied."""

    def draw(n: int, random: torch.Generator) -> Tensor:
        rare = torch.rand(n, 1, generator=random) < share
        return _normal(n, random) * torch.where(rare, factor, 1.0)

    return draw


def _counts(n: int, random: torch.Generator) -> Tensor:
    counts = torch.poisson(torch.full((n, _FEATURES), 0.05), generator=random)
    return counts * torch.randn(n, 1, generator=random).exp()


def _bursts(n: int, random: torch.Generator) -> Tensor:
    return torch.where(torch.rand(n, 1, generator=random) < 0.1, 1.0, 0.05) * _normal(n, random)


def _student(n: int, random: torch.Generator) -> Tensor:
    """Student's t with 2.5 degrees of freedom: a chi-square is twice a gamma."""
    shape = torch.full((n, 1), 1.25)
    return _normal(n, random) / (2 * torch._standard_gamma(shape, generator=random) / 2.5).sqrt()


def _lognormal(n: int, random: torch.Generator) -> Tensor:
    return (1.2 * _normal(n, random)).exp()


def _pareto(n: int, random: torch.Generator) -> Tensor:
    return torch.rand(n, _FEATURES, generator=random).clamp_min(1e-7) ** (-1 / 2.2)


def _rare_class(n: int, random: torch.Generator) -> Tensor:
    """Two classes far apart, one of 500 examples in one of them."""
    rare = torch.rand(n, 1, generator=random) < 1 / 500
    return _normal(n, random) + torch.where(rare, 8.0, 0.0)


def _regimes(n: int, random: torch.Generator) -> Tensor:
    """A sensor's readings: each example is one regime's, whose level and noise are its own."""
    level, noise = torch.randn(n, 1, generator=random), torch.rand(n, 1, generator=random)
    return level + (0.05 + noise**4) * _normal(n, random)


def _net() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs in (_FEATURES, 32):
        layers += [nn.Linear(inputs, 32), nn.BatchNorm1d(32), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(32, 3))


def exact(draw: Draw, net: Callable[[], nn.Module] = _net) -> World:
    """A world without shifts, whose network has random weights and exact statistics."""

    def sample(n: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        return draw(n, random), torch.zeros(n, dtype=torch.long)

    clean: Sampler = sample
    return World(clean, {}, net, is_trained=False)


TAILS = {
    "1-in-1000-x-100": exact(_spikes(0.001, 100)),
    "3-in-1000-x-30": exact(_spikes(0.003, 30)),
    "1-in-100-x-30": exact(_spikes(0.01, 30)),
    "zero-inflated-counts": exact(_counts),
    "bursts": exact(_bursts),
    "student-2.5": exact(_student),
    "lognormal-1.2": exact(_lognormal),
    "pareto-2.2": exact(_pareto),
    "class-1-in-500": exact(_rare_class),
    "regimes": exact(_regimes),
}
