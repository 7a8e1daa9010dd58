"""Evidence: all bets against one reference together, and what they say about layers and channels.

Every channel of every layer bets on a higher and a lower mean, every layer on more and on less energy, each with four
stakes. Against a calibrated reference each channel bets on its energy as well, and each component of neighbouring
channels on its mean. An average of e-processes is an e-process whatever their dependence (Vovk and Wang 2021), so the
evidence is the average over stakes, signs and channels of a layer, over kinds of bets, and over layers. Looking in many
places costs the logarithm of their number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

import torch

from batchnorm.shift import betting
from batchnorm.shift.wealth import Wealth

if TYPE_CHECKING:
    from torch import Tensor

    from batchnorm.shift.reference import Reference

KINDS = ("mean", "energy up", "energy down", "channel energy", "components")
BETS = ("mean", "up", "down", "power", "components")  # the fields of Evidence that they are made with


@final
@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """E-processes of every channel and layer after ``observations`` observations.

    Args:
        reference: What they bet against.
        mean: (2, stakes, channels): higher and lower mean.
        up: (stakes, layers): more energy.
        down: (stakes, layers): less energy.
        power: (2, stakes, channels): more and less energy of a channel; None from a checkpoint alone.
        components: (2, stakes, 2 * channels): higher and lower components; None from a checkpoint alone.
        stakes: Of each kind.
        observations: How many were made.
    """

    reference: Reference
    mean: Wealth
    up: Wealth
    down: Wealth
    power: Wealth | None
    components: Wealth | None
    stakes: tuple[Tensor, ...]
    observations: int = 0

    @classmethod
    def start(cls, reference: Reference, *, is_spread: bool = True) -> Evidence:
        """No evidence yet; ``is_spread`` is False for e-SR."""
        channels, layers = sum(reference.sizes), len(reference.sizes)
        mean = Wealth.start((2, 4, channels), is_spread=is_spread)
        up, down = (Wealth.start((4, layers), is_spread=is_spread) for _ in range(2))
        power = components = None
        if reference.components is not None:
            power = Wealth.start((2, 4, channels), is_spread=is_spread)
            components = Wealth.start((2, 4, 2 * channels), is_spread=is_spread)
        return cls(reference, mean, up, down, power, components, stakes_for(reference))

    def after(self, z: Tensor, q: Tensor) -> Evidence:
        """With one more round of observations.

        Args:
            z: Channel means in stored sd, (n, channels), float64 on the CPU.
            q: Energies of channels, likewise.
        """
        known, n = self.reference, len(z)
        mean = betting.mean_shift(z - known.center, known.kappa, known.delta, self.stakes[0])
        up, down = _energy_factors(known, known.of_layers(q) / known.energy, *self.stakes[1:3])
        bets: dict[str, Wealth | None] = {
            "mean": self.mean.bet(mean, n),
            "up": self.up.bet(up, n),
            "down": self.down.bet(down, n),
        }
        if known.components is not None and self.power is not None and self.components is not None:
            of, relative = known.components, q / known.power
            power = betting.mean_shift(relative - 1, known.power_v, known.power_d, self.stakes[3])
            components = betting.mean_shift(of.of(z, relative), of.kappa, of.delta, self.stakes[4])
            bets |= {"power": self.power.bet(power, n), "components": self.components.bet(components, n)}
        return replace(self, **bets, observations=self.observations + n)

    @property
    def log_channels(self) -> Tensor:
        """Log e-value of every channel, (channels,): of its mean, and of its energy if that bets."""
        kinds = [wealth.log.flatten(0, 1).logsumexp(0) - math.log(8) for wealth in (self.mean, self.power) if wealth]
        return torch.stack(kinds).logsumexp(0) - math.log(len(kinds))

    @property
    def log_kinds(self) -> Tensor:
        """Log e-value of every layer by each kind of bet, (kinds, layers), in the order of KINDS."""
        energies = [wealth.log.logsumexp(0) - math.log(4) for wealth in (self.up, self.down)]
        measured = [self._by_layer(wealth) for wealth in (self.power, self.components) if wealth is not None]
        return torch.stack([self._by_layer(self.mean), *energies, *measured])

    def _by_layer(self, wealth: Wealth) -> Tensor:
        """Log of the mean over the bets of each layer's channels: (2, stakes, k * channels) -> (layers,)."""
        sizes = list(self.reference.sizes)
        bets = wealth.log.unflatten(2, (-1, sum(sizes))).flatten(0, 2)  # of each channel
        sums = torch.stack([part.logsumexp(0) for part in bets.logsumexp(0).split(sizes)])
        return sums - torch.tensor(sizes, dtype=torch.float64).log() - math.log(len(bets))

    @property
    def log_layers(self) -> Tensor:
        """Log e-value of every layer, (layers,)."""
        kinds = self.log_kinds
        return kinds.logsumexp(0) - math.log(len(kinds))

    @property
    def log(self) -> float:
        """Log of the evidence that anything moved."""
        return float(self.log_layers.logsumexp(0)) - math.log(len(self.reference.sizes))

    def merged(self, others: list[Evidence]) -> Evidence:
        """Evidence of several replicas of one model together; see ``Wealth.merged``.

        Raises:
            ValueError: If they bet against different references.
        """
        if any(
            other.reference.digest != self.reference.digest or other.reference.source != self.reference.source
            for other in others
        ):
            raise ValueError(
                "monitors of one model and one reference are merged, got different ones. Calibrate once, and copy."
            )
        merged = {
            name: own.merged([getattr(other, name) for other in others])
            for name in BETS
            if (own := getattr(self, name)) is not None
        }
        count = self.observations + sum(other.observations for other in others)
        return replace(self, **merged, observations=count)


def stakes_for(known: Reference) -> tuple[Tensor, ...]:
    """Stakes for means, for more and for less energy, and, calibrated, for channels' energies and for components."""
    mean = betting.mean_stakes(known.kappa, known.delta)
    if known.components is not None:
        of_layers, power = betting.mean_stakes(known.v, known.d), betting.mean_stakes(known.power_v, known.power_d)
        components = betting.mean_stakes(known.components.kappa, known.components.delta)
        return mean, of_layers, of_layers, power, components
    return mean, betting.up_stakes(known.d), betting.down_stakes(known.d, known.v)


def _energy_factors(known: Reference, q: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Log factors for more and for less energy: the bets on a mean win sooner, but need to know a variance."""
    if known.components is not None:
        more, less = betting.mean_shift(q - 1, known.v, known.d, up)
        return more, less
    return betting.energy_up(q, known.d, up), betting.energy_down(q, known.d, known.v, down)
