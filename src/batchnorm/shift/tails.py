"""Tails: whether a few examples carry so much of a layer's energy that stored variances may be far from right.

From a checkpoint alone a layer's energy is taken to be 1 + d at most, where d is three standard errors of a stored
variance for values of kurtosis k (``reference``). The standard error of a layer's energy Q grows with the square root
of E[Q^2] / E[Q]^2 - 1, which is k - 1 if all values of an example have one size, and less otherwise. Where the ratio
m = E[Q^2] / E[Q]^2 that is observed is above

    m > 1 + (k - 1) (3 / 2)^2,

d covers fewer than two standard errors, and the condition is doubtful; k is 3, or what is declared beyond. With 3 that
is 5.5. One normal channel alone has m = 3, and from 512 observations, before which nothing is judged, m has a standard
error of sqrt(24 / 512) = 0.22 at most: 5.5 is more than ten of them away. More channels or positions have a smaller m.

Observations after an alarm do not count: they are shifted, and say nothing about clean data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from batchnorm.shift.alarm_reference import NORMAL
from batchnorm.shift.stream_state import State

if TYPE_CHECKING:
    from batchnorm.shift.alarm_reference import Reference

LEAST = 512  # observations, before which it is not judged
_KEPT = 64  # largest energies of each layer, to say how much they carry
_FEWER = 1.5  # standard errors allowed for, by those that are left where it is doubtful


@final
@dataclass(frozen=True, slots=True)
class Tail:
    """What is doubtful: the largest ``count`` of ``observations`` carry ``part`` of the energy of ``layer``.

    Args:
        layer: Name; of all layers the one with the heaviest tail.
        count: Observations that carry half of it, if a tenth of all do, else a tenth of all; 64 at most.
        observations: How many were made.
        part: Of the energy, from 0 to 1.
        ratio: E[Q^2] / E[Q]^2, the least kurtosis that could be declared.
    """

    layer: str
    count: int
    observations: int
    part: float
    ratio: float

    def __str__(self) -> str:
        """One sentence, without what to do."""
        share = f"{100 * self.count / self.observations:.2g} %"
        return (
            f"the largest {share} of observations carry {100 * self.part:.0f} % of the energy of layer {self.layer!r}"
        )

    @property
    def remedy(self) -> str:
        """What to do, one sentence."""
        return (
            "Calibrate (monitor.calibrate(loader)), or recalibrate the stored statistics on many clean examples "
            f"(batchnorm.recalibrate) and declare ShiftMonitor(kurtosis={_rounded_up(self.ratio)}) or more."
        )


@final
class Tails:
    """Energies of layers, their squares, and the largest of them.

    Args:
        reference: Whose layers they are of.
    """

    def __init__(self, reference: Reference) -> None:
        layers = len(reference.sizes)
        self.count = 0  # observations
        self._names, self._limit = reference.layers, limits(reference)
        self._sums = torch.zeros(2, layers, dtype=torch.float64)  # of energies and of their squares
        self._largest = torch.zeros(_KEPT, layers, dtype=torch.float64)  # falling

    def add(self, energy: Tensor) -> None:
        """Take more observations of layers' energies, (n, layers)."""
        self.count += len(energy)
        self._sums += torch.stack([energy.sum(0), energy.square().sum(0)])
        self._largest = torch.cat([self._largest, energy]).topk(_KEPT, dim=0).values

    @property
    def ratios(self) -> Tensor:
        """E[Q^2] / E[Q]^2 of each layer, (layers,); 0 where there is no energy."""
        mean, square = self._sums / max(1, self.count)
        return torch.where(mean > 0, square / mean.square(), 0.0)

    @property
    def heavy(self) -> Tail | None:
        """The layer that is furthest above its limit, or None if none is, or fewer than 512 observations were made."""
        above = self.ratios / self._limit
        if self.count < LEAST or not bool((above > 1).any()):
            return None
        at = int(above.argmax())
        return tail_of(self._names[at], self._largest[:, at], float(self._sums[0, at]), self.count, self.ratios[at])

    def state(self) -> State:
        """All of it."""
        return State({"tails.sums": self._sums.clone(), "tails.largest": self._largest}, {"tails": self.count})

    def put(self, state: State) -> None:
        """Go on from a state."""
        self.count = state.about["tails"]
        self._sums, self._largest = state.tensors["tails.sums"].clone(), state.tensors["tails.largest"].clone()


def limits(reference: Reference) -> Tensor:
    """The largest E[Q^2] / E[Q]^2 at which d still covers two standard errors, (layers,)."""
    known = reference.d.new_zeros(()) if reference.v is None else reference.v + (1 - reference.d).clamp_min(0).square()
    return 1 + (known.expand_as(reference.d).clamp_min(NORMAL) - 1) * _FEWER**2


def tail_of(layer: str, largest: Tensor, total: float, observations: int, ratio: Tensor) -> Tail:
    """How much the largest energies, falling, carry of the total."""
    carried = largest[: max(1, observations // 10)].cumsum(0) / total
    half = int((carried < 0.5).sum())  # of them carry less
    count = min(half + 1, len(carried))
    return Tail(layer, count, observations, float(carried[count - 1]), float(ratio))


def _rounded_up(ratio: float) -> int:
    step = 10 ** max(0, math.floor(math.log10(ratio)) - 1)
    return math.ceil(ratio / step) * step
