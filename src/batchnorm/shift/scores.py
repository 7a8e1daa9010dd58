"""Scores: numbers that say how strange one observation is to a layer; larger is stranger.

Observations can be strange in several ways, so each layer has several scores. a_c is a channel's mean z_c and b_c the
logarithm of the channel's energy, both standardized: as signed distances from their centers, in units of their mean
absolute deviations. w are the principal components of neighbouring channels (``principal_components``), standardized in
the same way. Q is the layer's energy:

    mean             max |a_c|,  mean of a_c,  mean of -a_c
    energy up        Q,          mean of b_c
    energy down      -Q,         mean of -b_c
    channel energy   max b_c,    max -b_c
    components       max |w|,    mean of log(1 + w^2)
    component means  w_1, ..., w_16 of the means of the first sixteen channels, -w_1, ..., -w_16

Centers, deviations and directions are estimated from some of the calibration observations; the other observations are
in the bag for p-values. Bad estimates cost power, never validity. Mean absolute deviations and logarithms stay
meaningful if a few observations are very large.

A value that varies by less than 2 % of a stored sd on clean data may vary by rounding only, which depends on batch size
and machine: there may be only a few distinct clean inputs, or a difference of channels may always be 0. So the mean
absolute deviations of channels and components count as at least 0.02, those of scores as at least 0.1, and those of the
scores "component means", which are 1 by definition, as at least 1. Then rounding by 4e-5 sd moves a score "component
means" by at most half a cell (see ``conformal``), and rounding by 4e-6 sd moves any score by at most half a cell.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.shift import by_layer, conformal
from batchnorm.shift.principal_components import TOGETHER, Components

# the kind of each score, in order
KIND_OF = (
    "mean", "mean", "mean", "energy up", "energy up", "energy down", "energy down",
    "channel energy", "channel energy", "components", "components", *["component means"] * (2 * TOGETHER),
)  # fmt: skip
_FLOOR = 1e-3  # smallest relative energy of a channel in the logarithm
_SPREAD = 0.02  # smallest mean absolute deviation of channels and components
_WIDTH = 0.1  # smallest mean absolute deviation of scores
_LARGEST_VALUE = 1e12  # largest mean, in stored sd, and largest energy; larger values are clipped


@final
@dataclass(frozen=True, eq=False)
class Scores:
    """The estimates that define the scores.

    Args:
        components: Components of neighbouring channels; only their directions are used here.
        center: Median of each channel's z, (channels,).
        spread: Mean absolute deviation of each channel's z, (channels,).
        power: Median of each channel's energy, or its mean if the median is 0, (channels,).
        power_center: Median of the logarithm of each channel's relative energy, (channels,).
        power_spread: Mean absolute deviation of that logarithm, (channels,).
        turned_center: Median of each component, (2 * channels,).
        turned_spread: Mean absolute deviation of each component, (2 * channels,).
        middle: Median of each score, (scores,).
        width: Mean absolute deviation of each score, (scores,).
    """

    components: Components
    center: Tensor
    spread: Tensor
    power: Tensor
    power_center: Tensor
    power_spread: Tensor
    turned_center: Tensor
    turned_spread: Tensor
    middle: Tensor
    width: Tensor

    @classmethod
    def learned(cls, components: Components, power: Tensor, z: Tensor, q: Tensor) -> Scores:
        """Estimate from observations: ``z`` channel means in stored sd, ``q`` channel energies, (n, channels) each."""
        turned = _middle(components.of(_single(z), _single(q / power)).double(), _SPREAD)
        scores = len(KIND_OF) * len(components.sizes)
        unknown = torch.zeros(scores, dtype=torch.float64), torch.ones(scores, dtype=torch.float64)
        power_middle = _middle(_log(q / power), _SPREAD)
        raw_scores = cls(components, *_middle(z, _SPREAD), power, *power_middle, *turned, *unknown)
        middle, width = _middle(raw_scores.of(z, q).double(), _WIDTH)
        along = torch.tensor([kind == "component means" for kind in KIND_OF]).repeat_interleave(len(components.sizes))
        return replace(raw_scores, middle=middle, width=torch.where(along, width.clamp_min(1), width))

    def of(self, z: Tensor, q: Tensor) -> Tensor:
        """Scores of observations, (n, scores), float32: the first score of all layers, then the second, and so on."""
        sizes, n = self.components.sizes, len(z)
        z, relative, q = _single(z), _single(q / self.power), _single(q)
        usual, far = z.new_empty(2, 4, n, z.shape[1])  # reduced by mean, and by maximum
        a, _, b, odd = usual
        self._standard("mean", z, out=a)
        self._standard("power", _log(relative), out=b)
        usual[1] = q
        w = self._standard("turned", self.components.of(z, relative))
        w = w.unflatten(1, (2, -1))  # (n, 2, channels): of means, of energies
        along = by_layer.reduced(w[:, 0], sizes, _first).flatten(1)  # (n, 16 * layers)
        square = w.square_()
        torch.amax(square, 1, out=far[3])
        torch.prod(square.add_(1), 1, out=odd)
        odd.log_()
        torch.abs(a, out=far[0])
        far[1] = b
        torch.neg(b, out=far[2])
        mean, energy, power, odd = by_layer.mean(usual, sizes)
        alone, most, least, furthest = by_layer.largest(far, sizes)
        return torch.cat(
            [
                *(alone, mean, -mean, energy, power, -energy, -power),
                *(most, least, furthest.sqrt(), odd / 2, along, -along),
            ],
            1,
        )

    def _standard(self, name: str, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Distances from the center in units of the spread."""
        shift, scale = self._lines[name]
        return torch.addcmul(shift, x, scale, out=out)

    @cached_property
    def _lines(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Shift and scale of each kind of value x: (x - center) / spread = shift + scale x."""
        kinds = {
            "mean": (self.center, self.spread),
            "power": (self.power_center, self.power_spread),
            "turned": (self.turned_center, self.turned_spread),
        }
        return {name: ((-center / spread).float(), (1 / spread).float()) for name, (center, spread) in kinds.items()}

    def cells(self, z: Tensor, q: Tensor) -> Tensor:
        """Cells of the scores of observations, (n, scores)."""
        return conformal.cells_of(self.of(z, q), self.middle, self.width)


def powers(q: Tensor) -> Tensor:
    """Median of each channel's energy, or its mean if the median is 0: q (n, channels) -> (channels,)."""
    middle = q.median(0).values
    return torch.where(middle > 0, middle, q.mean(0)).clamp_min(torch.finfo(torch.float32).eps)


def _first(x: Tensor) -> Tensor:
    """The first sixteen channels of each layer, padded with 0: x (n, layers, channels) -> (n, 16, layers)."""
    return F.pad(x[..., :TOGETHER], (0, max(0, TOGETHER - x.shape[-1]))).mT


def _single(x: Tensor) -> Tensor:
    """The values in float32, at half the cost, and at most 1e12 in size; scores of clean observations use it too."""
    return x.float().clamp_(-_LARGEST_VALUE, _LARGEST_VALUE)


def _log(relative: Tensor) -> Tensor:
    return (relative + _FLOOR).log_()


def _middle(x: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Median (the lower middle value if n is even), and mean absolute deviation from it: x (n, k) -> (k,) each.

    A deviation counts as at least ``least``.
    """
    middle = x.median(0).values
    return middle, (x - middle).abs().mean(0).clamp_min(least)
