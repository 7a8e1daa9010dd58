"""Evidence: all bets against one reference together, and what they say about layers and channels.

Every channel of every layer bets on a higher and a lower mean, every layer on more and on less energy, each with four
stakes. An average of e-processes is an e-process whatever their dependence (Vovk and Wang 2021), so the evidence is
the average over stakes, signs and channels of a layer, over kinds of bets, and over layers. Looking in many places
costs the logarithm of their number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch

from batchnorm.shift import betting
from batchnorm.shift.wealth import Wealth

if TYPE_CHECKING:
    from torch import Tensor

    from batchnorm.shift.reference import Reference

KINDS = ("mean", "energy up", "energy down")


@final
@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """E-processes of every channel and layer after ``observations`` observations.

    Args:
        reference: What they bet against.
        mean: (2, stakes, channels): higher and lower mean.
        up: (stakes, layers): more energy.
        down: (stakes, layers): less energy.
        stakes: Of each kind.
        observations: How many were made.
    """

    reference: Reference
    mean: Wealth
    up: Wealth
    down: Wealth
    stakes: tuple[Tensor, Tensor, Tensor]
    observations: int = 0

    @classmethod
    def start(cls, reference: Reference, *, is_spread: bool = True) -> Evidence:
        """No evidence yet; ``is_spread`` is False for e-SR."""
        channels, layers = sum(reference.sizes), len(reference.sizes)
        mean = Wealth.start((2, 4, channels), is_spread=is_spread)
        up, down = (Wealth.start((4, layers), is_spread=is_spread) for _ in range(2))
        stakes = (
            betting.mean_stakes(reference.kappa, reference.delta),
            betting.up_stakes(reference.d),
            betting.down_stakes(reference.d, reference.v),
        )
        return cls(reference, mean, up, down, stakes)

    def after(self, z: Tensor, q: Tensor) -> Evidence:
        """With one more round of observations.

        Args:
            z: Channel means in stored sd, (n, channels), float64 on the CPU.
            q: Energies of channels, likewise.
        """
        known, n = self.reference, len(z)
        mean, up, down = self.stakes
        relative = known.of_layers(q) / known.energy
        return Evidence(
            known,
            self.mean.bet(betting.mean_shift(z - known.center, known.kappa, known.delta, mean), n),
            self.up.bet(betting.energy_up(relative, known.d, up), n),
            self.down.bet(betting.energy_down(relative, known.d, known.v, down), n),
            self.stakes,
            self.observations + n,
        )

    @property
    def log_channels(self) -> Tensor:
        """Log e-value of every channel's mean, (channels,)."""
        return self.mean.log.flatten(0, 1).logsumexp(0) - math.log(8)

    @property
    def log_kinds(self) -> Tensor:
        """Log e-value of every layer by each kind of bet, (3, layers)."""
        sizes = torch.tensor(self.reference.sizes)
        means = torch.stack([part.logsumexp(0) for part in self.log_channels.split(list(self.reference.sizes))])
        energies = [wealth.log.logsumexp(0) - math.log(4) for wealth in (self.up, self.down)]
        return torch.stack([means - sizes.double().log(), *energies])

    @property
    def log_layers(self) -> Tensor:
        """Log e-value of every layer, (layers,)."""
        return self.log_kinds.logsumexp(0) - math.log(len(KINDS))

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
        parts = {
            name: getattr(self, name).merged([getattr(other, name) for other in others])
            for name in ("mean", "up", "down")
        }
        return Evidence(
            self.reference,
            **parts,
            stakes=self.stakes,
            observations=self.observations + sum(o.observations for o in others),
        )
