"""Tails: whether a few examples carry so much of a layer's energy that stored variances may be far off.

The energy Q of a layer is the mean square of its standardized inputs in one observation. From a checkpoint alone its
expectation is assumed to be at most 1 + d, where d is three standard errors of a stored variance for values of kurtosis
k (``alarm_reference``). Let m be the observed E[Q^2] / E[Q]^2. The standard error of Q's mean grows with the square
root of m - 1, which is k - 1 if all values of an example have one size, and less otherwise. If

    m > 1 + (k - 1) (3 / 2)^2,

d covers fewer than two standard errors, and the condition is doubtful; k is 3, or a larger declared value. With 3 the
bound is 5.5. One normal channel alone has m = 3. Nothing is judged before 512 observations; then m of a normal
channel has a standard error of at most sqrt(24 / 512) = 0.22, so 5.5 is more than ten standard errors away. More
channels or positions make m smaller.

Observations after an alarm do not count: they are shifted, and carry no information about clean data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from batchnorm.shift.alarm_reference import NORMAL, Reference
from batchnorm.shift.stream_state import StreamState

LEAST = 512  # least number of observations
_LARGEST_COUNT = 64  # number of largest energies stored per layer, to report their share
_ERROR_RATIO = 1.5  # the 3 assumed standard errors, divided by the 2 that must remain


@final
@dataclass(frozen=True, slots=True)
class Tail:
    """A heavy tail: the largest ``count`` of ``observations`` carry ``part`` of the energy of ``layer``.

    Args:
        layer: Name of the layer with the heaviest tail.
        count: Number of the largest observations that carry half of the energy, at most a tenth of all and at most 64.
        observations: Number of observations.
        part: Share of the energy, from 0 to 1.
        ratio: E[Q^2] / E[Q]^2, the smallest kurtosis that could be declared.
    """

    layer: str
    count: int
    observations: int
    part: float
    ratio: float

    def __str__(self) -> str:
        """The tail in one sentence, without the remedy."""
        share = f"{100 * self.count / self.observations:.2g} %"
        return (
            f"the largest {share} of observations carry {100 * self.part:.0f} % of the energy of layer {self.layer!r}"
        )

    @property
    def remedy(self) -> str:
        """The remedy, one sentence."""
        return (
            "Calibrate (monitor.calibrate(loader)), or recalibrate the stored statistics on many clean examples "
            f"(batchnorm.recalibrate) and declare ShiftMonitor(kurtosis={_rounded_up(self.ratio)}) or more."
        )


@final
class Tails:
    """Sums of the layers' energies and of their squares, and the largest energies.

    Args:
        reference: The reference of the layers.
    """

    def __init__(self, reference: Reference) -> None:
        layers = len(reference.sizes)
        self.count = 0  # number of observations
        self._names, self._limit = reference.layers, limits(reference)
        self._sums = torch.zeros(2, layers, dtype=torch.float64)  # of energies and of their squares
        self._largest = torch.zeros(_LARGEST_COUNT, layers, dtype=torch.float64)  # in falling order

    def add(self, energy: Tensor) -> None:
        """Add observed energies of the layers, (n, layers)."""
        self.count += len(energy)
        self._sums += torch.stack([energy.sum(0), energy.square().sum(0)])
        self._largest = torch.cat([self._largest, energy]).topk(_LARGEST_COUNT, dim=0).values

    @property
    def ratios(self) -> Tensor:
        """E[Q^2] / E[Q]^2 of each layer, (layers,); 0 for a layer without energy."""
        mean, square = self._sums / max(1, self.count)
        return torch.where(mean > 0, square / mean.square(), 0.0)

    @property
    def heavy(self) -> Tail | None:
        """The tail of the layer furthest above its limit; None if no layer is, or before 512 observations."""
        above = self.ratios / self._limit
        if self.count < LEAST or not bool((above > 1).any()):
            return None
        at = int(above.argmax())
        return tail_of(self._names[at], self._largest[:, at], float(self._sums[0, at]), self.count, self.ratios[at])

    def state(self) -> StreamState:
        """The sums, as part of a state."""
        return StreamState({"tails.sums": self._sums.clone(), "tails.largest": self._largest}, {"tails": self.count})

    def put(self, state: StreamState) -> None:
        """Continue from a state."""
        self.count = state.about["tails"]
        self._sums, self._largest = state.tensors["tails.sums"].clone(), state.tensors["tails.largest"].clone()


def limits(reference: Reference) -> Tensor:
    """The largest E[Q^2] / E[Q]^2 at which d still covers two standard errors, (layers,)."""
    declared = (
        reference.d.new_zeros(()) if reference.v is None else reference.v + (1 - reference.d).clamp_min(0).square()
    )
    return 1 + (declared.expand_as(reference.d).clamp_min(NORMAL) - 1) * _ERROR_RATIO**2


def tail_of(layer: str, largest: Tensor, total: float, observations: int, ratio: Tensor) -> Tail:
    """The tail that a layer's largest energies show; ``largest`` is in falling order."""
    shares = largest[: max(1, observations // 10)].cumsum(0) / total
    half = int((shares < 0.5).sum())  # number of energies that carry less than half
    count = min(half + 1, len(shares))
    return Tail(layer, count, observations, float(shares[count - 1]), float(ratio))


def _rounded_up(ratio: float) -> int:
    step = 10 ** max(0, math.floor(math.log10(ratio)) - 1)
    return math.ceil(ratio / step) * step
