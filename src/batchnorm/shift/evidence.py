"""Evidence: bets against one reference, placed on every observation of one stream.

From a checkpoint alone there are bets on a higher and on a lower mean of every channel, and on more energy of every
layer, with four stakes each. Bets on less energy are added only if a kurtosis is declared. Against a calibrated
reference there are bets on small p-values of every score of every layer (``scores``, ``conformal``). To name channels,
there are also bets that a channel's mean is beyond its marks (``channel_marks``). ``layer_evidence`` combines the bets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

from torch import Tensor

from batchnorm.shift import betting, conformal
from batchnorm.shift.alarm_reference import Reference
from batchnorm.shift.conformal import Bag
from batchnorm.shift.e_processes import EProcesses
from batchnorm.shift.layer_evidence import LayerEvidence, bet_shapes


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class ShiftEvidence(LayerEvidence):
    """Evidence of one stream, to which observations can be added.

    Args:
        reference: The bounds of clean data that the bets are against.
        bag: The clean observations for p-values; None from a checkpoint alone.
        stakes: Stakes of mean, up and down.
    """

    reference: Reference
    bag: Bag | None
    stakes: tuple[Tensor, ...]

    @classmethod
    def start(cls, reference: Reference, *, is_spread: bool = True) -> ShiftEvidence:
        """No evidence yet; ``is_spread`` is False for an average run length."""
        bets = {name: EProcesses.start(shape, is_spread=is_spread) for name, shape in shapes(reference).items()}
        return cls.of_bets(reference, bets, None if reference.clean is None else reference.clean.bag)

    @classmethod
    def of_bets(
        cls, reference: Reference, bets: dict[str, EProcesses], bag: Bag | None, observations: int = 0
    ) -> ShiftEvidence:
        """The evidence of bets that were made on so many observations, by their names."""
        places: dict[str, Any] = {"layers": reference.layers, "sizes": reference.sizes, **bets}
        return cls(**places, observations=observations, reference=reference, bag=bag, stakes=stakes_for(reference))

    def after(self, z: Tensor, q: Tensor, *, learns: bool = True) -> ShiftEvidence:
        """The evidence after one more round of observations.

        Args:
            z: Channel means in stored sd, (n, channels), float64 on the CPU.
            q: Energies of channels, (n, channels), float64 on the CPU.
            learns: Whether the observations join the clean ones for later comparison; False after an alarm.
        """
        if self.ranks is not None:
            return self._after_ranks(z, q, learns=learns)
        bounds, n = self.reference, len(z)
        energy = bounds.of_layers(q)
        bets = {
            "mean": _bet(self.mean, betting.mean_shift(z, bounds.kappa, bounds.delta, self.stakes[0]), n),
            "up": _bet(self.up, betting.energy_up(energy, bounds.d, self.stakes[1]), n),
        }
        if self.down is not None and bounds.v is not None:
            bets["down"] = _bet(self.down, betting.energy_down(energy, bounds.d, bounds.v, self.stakes[2]), n)
        return replace(self, **bets, observations=self.observations + n)

    def _after_ranks(self, z: Tensor, q: Tensor, *, learns: bool) -> ShiftEvidence:
        clean, bag = self.reference.clean, self.bag
        if clean is None or bag is None:
            raise AssertionError("a calibrated reference has a bag")
        cells, n = clean.scores.cells(z, q), len(z)
        ranks = _bet(self.ranks, conformal.factors(bag.p_values(cells)), n)
        marks = _bet(self.marks, clean.marks.factors(z), n)
        new_bag = bag.with_(cells) if learns else bag
        return replace(self, ranks=ranks, marks=marks, bag=new_bag, observations=self.observations + n)


def shapes(reference: Reference) -> dict[str, tuple[int, ...]]:
    """Shapes of the bets against a reference, by their names in ``LayerEvidence``."""
    names = (
        ("ranks", "marks")
        if reference.clean is not None
        else ("mean", "up", *(() if reference.v is None else ("down",)))
    )
    return bet_shapes(reference.sizes, names)


def stakes_for(reference: Reference) -> tuple[Tensor, ...]:
    """Stakes for means, for more energy and, if its variance has a bound, for less energy; () if calibrated."""
    if reference.clean is not None:
        return ()
    stakes = betting.mean_stakes(reference.kappa, reference.delta), betting.up_stakes(reference.d)
    return stakes if reference.v is None else (*stakes, betting.down_stakes(reference.d, reference.v))


def _bet(wealth: EProcesses | None, factors: Tensor, observations: int) -> EProcesses:
    assert wealth is not None  # noqa: S101 - the reference has this kind of bets
    return wealth.bet(factors, observations)
