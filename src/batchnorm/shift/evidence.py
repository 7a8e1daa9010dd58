"""Evidence: combines all bets against one reference, for the model, its layers and its channels.

From a checkpoint alone there are bets on a higher and on a lower mean of every channel, and on more energy of every
layer, with four stakes each. Bets on less energy are added only if a kurtosis is declared. Against a calibrated
reference there are bets on small p-values of every score of every layer (``scores``, ``conformal``). To name channels,
there are also bets that a channel's mean is beyond its marks (``channel_marks``).

Testing many places costs the logarithm of their number. From a checkpoint all bets are fair given the same past, and an
average of e-processes of one past is an e-process however dependent they are (Vovk and Wang 2021): the evidence is the
average over stakes, signs and channels of a layer, over kinds of bets, and over layers.

Bets on ranks of one score are fair given this score's past only. Other scores may carry more information, and an
average of such e-processes need not be one (Choe and Ramdas 2024). Let E_j be the e-process of score j, and w_j weights
that sum to 1: equal for layers, for the kinds of a layer and for the scores of a kind. The evidence is the largest
w_j E_j. Each w_j E_j reaches 1 / alpha with probability at most alpha w_j (Ville 1939), so the probability that any of
them reaches it is at most alpha. Little evidence is lost, because one term usually dominates the sum.

For an average run length let S_j be the process of score j (``e_processes``). S_j - t cannot grow in expectation, so
S_j reaches c within t observations with probability at most t / c, and the largest w_j S_j reaches 2 arl with
probability at most t / (2 arl). The expected number of observations until then is at least the sum of 1 - t / (2 arl)
over t < 2 arl, which is arl. So the evidence is half of the largest w_j S_j.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from batchnorm.shift import betting, by_layer, channel_marks, conformal
from batchnorm.shift.alarm_reference import Reference
from batchnorm.shift.conformal import Bag
from batchnorm.shift.e_processes import EProcesses
from batchnorm.shift.scores import KIND_OF

KINDS = ("mean", "energy up", "energy down", "channel energy", "components", "component means")
BETS = ("mean", "up", "down", "ranks", "marks")  # the fields of ShiftEvidence that hold bets


@final
@dataclass(frozen=True, eq=False)
class ShiftEvidence:
    """E-processes of every channel and layer after ``observations`` observations.

    Args:
        reference: The bounds of clean data that the bets are against.
        mean: Bets on higher and lower means, (2, stakes, channels); mean, up and down are None if calibrated.
        up: Bets on more energy, (stakes, layers).
        down: Bets on less energy, (stakes, layers); None also if no kurtosis was declared.
        ranks: Bets on small p-values, (bets, scores); ranks, marks and bag are None from a checkpoint alone.
        marks: Bets on higher and lower means, to name channels, (2, bets, channels).
        bag: The clean observations for p-values.
        stakes: Stakes of mean, up and down.
        observations: Number of observations.
    """

    reference: Reference
    mean: EProcesses | None
    up: EProcesses | None
    down: EProcesses | None
    ranks: EProcesses | None
    marks: EProcesses | None
    bag: Bag | None
    stakes: tuple[Tensor, ...]
    observations: int = 0

    @classmethod
    def start(cls, reference: Reference, *, is_spread: bool = True) -> ShiftEvidence:
        """The evidence before any observation; ``is_spread`` is False for e-SR."""
        bets: dict[str, Any] = dict.fromkeys(BETS)
        bets |= {name: EProcesses.start(shape, is_spread=is_spread) for name, shape in shapes(reference).items()}
        bag = None if reference.clean is None else reference.clean.bag
        return cls(reference, **bets, bag=bag, stakes=stakes_for(reference))

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

    @cached_property
    def log_channels(self) -> Tensor:
        """Log e-value of every channel's mean, (channels,)."""
        wealth = self.mean or self.marks
        assert wealth is not None  # noqa: S101 - one of them exists
        return wealth.log_mean

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of bets in use."""
        return KINDS if self.ranks is not None else KINDS[: 2 + (self.down is not None)]

    @cached_property
    def log_kinds(self) -> Tensor:
        """Log e-value of every layer by each kind of bet, (kinds, layers), in the order of ``kinds``."""
        if self.ranks is not None:
            return self._log_kinds_of_ranks(self.ranks)
        energies = [wealth.log_mean for wealth in (self.up, self.down) if wealth is not None]
        return torch.stack([by_layer.log_mean_exp(self.log_channels, self.reference.sizes), *energies])

    def _log_kinds_of_ranks(self, ranks: EProcesses) -> Tensor:
        of_scores = ranks.log_mean - (0.0 if ranks.is_spread else math.log(2))
        parts = of_scores.reshape(len(KIND_OF), -1).split([KIND_OF.count(kind) for kind in KINDS])
        return torch.stack([part.amax(0) - math.log(len(part)) for part in parts])  # (kinds, layers)

    @cached_property
    def log_layers(self) -> Tensor:
        """Log e-value of every layer, (layers,)."""
        return self._joined(self.log_kinds)

    @cached_property
    def log(self) -> float:
        """Log of the evidence that any layer moved."""
        return float(self._joined(self.log_layers))

    def _joined(self, logs: Tensor) -> Tensor:
        """Combined evidence over several places: logs (places, ...) -> (...)."""
        combined = logs.logsumexp(0) if self.ranks is None else logs.amax(0)
        return combined - math.log(len(logs))

    def merged(self, others: list[ShiftEvidence]) -> ShiftEvidence:
        """Combined evidence of several replicas of one model; see ``EProcesses.merged`` and ``highest``.

        Raises:
            ValueError: If the replicas' references differ in the model's digest or in their source.
        """
        if any(
            other.reference.digest != self.reference.digest or other.reference.source != self.reference.source
            for other in others
        ):
            raise ValueError(
                "merging needs monitors of one model and one reference, got different ones. Calibrate once, and give "
                "every monitor that reference."
            )
        merged = {}
        for name in BETS:
            if (own := getattr(self, name)) is not None:
                theirs = [getattr(other, name) for other in others]
                merged[name] = own.highest(theirs) if name == "ranks" else own.merged(theirs)
        count = self.observations + sum(other.observations for other in others)
        return replace(self, **merged, observations=count)


def shapes(reference: Reference) -> dict[str, tuple[int, ...]]:
    """Shapes of the bets against a reference, by their names in ``ShiftEvidence``."""
    channels, layers = sum(reference.sizes), len(reference.sizes)
    if reference.clean is not None:
        return {"ranks": (conformal.BETS, len(KIND_OF) * layers), "marks": (2, channel_marks.BETS, channels)}
    energies = ("up",) if reference.v is None else ("up", "down")
    return {"mean": (betting.SIDES, betting.STAKES, channels), **dict.fromkeys(energies, (betting.STAKES, layers))}


def stakes_for(reference: Reference) -> tuple[Tensor, ...]:
    """Stakes for means, for more energy and, if its variance has a bound, for less energy; () if calibrated."""
    if reference.clean is not None:
        return ()
    stakes = betting.mean_stakes(reference.kappa, reference.delta), betting.up_stakes(reference.d)
    return stakes if reference.v is None else (*stakes, betting.down_stakes(reference.d, reference.v))


def _bet(wealth: EProcesses | None, factors: Tensor, observations: int) -> EProcesses:
    assert wealth is not None  # noqa: S101 - the reference has this kind of bets
    return wealth.bet(factors, observations)
