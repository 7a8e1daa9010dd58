"""Scores: numbers that say how strange one observation is to a layer, the larger the stranger.

Ways of being strange differ, so each layer has several scores. With a_c the distance of a channel's mean z_c from its
center and b_c that of the logarithm of its energy, both in units of their mean absolute deviations, and w the
principal components of neighbouring channels (``components``), likewise:

    mean             max |a_c|,  mean of a_c,  mean of -a_c
    energy up        Q,          mean of b_c
    energy down      -Q,         mean of -b_c
    channel energy   max b_c,    max -b_c
    components       max |w|,    mean of log(1 + w^2)
    component means  w_1, ..., w_16 of the means of the first sixteen channels, -w_1, ..., -w_16

Centers, deviations and directions are learned from some of the calibration observations; the bag that p-values are
taken from holds the others. What is learned badly costs power, never validity. Mean absolute deviations and logarithms
keep their sense where a few observations are very large.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.shift import conformal
from batchnorm.shift.components import TOGETHER, Components

# the kind of each score, in their order
KIND_OF = (
    "mean", "mean", "mean", "energy up", "energy up", "energy down", "energy down",
    "channel energy", "channel energy", "components", "components", *["component means"] * (2 * TOGETHER),
)  # fmt: skip
_FLOOR = 1e-3  # of a channel's energy, below which its logarithm no longer falls
_LEAST = torch.finfo(torch.float32).eps


@final
@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """What scores are measured by.

    Args:
        components: Of neighbouring channels; their directions are used here.
        center: Middle of each channel's z, (channels,).
        spread: Its mean absolute deviation, likewise.
        power: Middle of each channel's energy, likewise.
        power_center: Middle of the logarithm of its relative energy, likewise.
        power_spread: Mean absolute deviation of that, likewise.
        turned_center: Middle of each component, (2 * channels,).
        turned_spread: Its mean absolute deviation, likewise.
        middle: Of the scores themselves, (scores,).
        width: Their mean absolute deviation, likewise.
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
        """Scores for observations like these: channel means in stored sd and energies, (n, channels) each."""
        turned = _middle(components.of(z, q / power))
        scores = len(KIND_OF) * len(components.sizes)
        unknown = torch.zeros(scores, dtype=torch.float64), torch.ones(scores, dtype=torch.float64)
        known = cls(components, *_middle(z), power, *_middle(_log(q / power)), *turned, *unknown)
        middle, width = _middle(known.of(z, q))
        return replace(known, middle=middle, width=width)

    def of(self, z: Tensor, q: Tensor) -> Tensor:
        """Scores of observations, (n, scores): of all layers the first, of all layers the second, and so on."""
        relative, sizes = q / self.power, list(self.components.sizes)
        a = (z - self.center) / self.spread
        b = (_log(relative) - self.power_center) / self.power_spread
        w = (self.components.of(z, relative) - self.turned_center) / self.turned_spread
        w = w.unflatten(1, (2, -1))  # (n, 2, channels): of means, of energies
        first = [F.pad(part[:, :TOGETHER], (0, max(0, TOGETHER - part.shape[1]))) for part in w[:, 0].split(sizes, 1)]
        along = torch.stack(first, 2).flatten(1)  # (n, 16 * layers)
        far = _each(torch.stack([a.abs(), b, -b, w.abs().amax(1)]), sizes, torch.amax)
        a, b, q, odd = _each(torch.stack([a, b, q, torch.log1p(w.square()).mean(1)]), sizes, torch.mean)
        return torch.cat([far[0], a, -a, q, b, -q, -b, far[1], far[2], far[3], odd, along, -along], 1)

    def cells(self, z: Tensor, q: Tensor) -> Tensor:
        """Cells of the scores of observations, (n, scores)."""
        return conformal.cells_of(self.of(z, q), self.middle, self.width)


def powers(q: Tensor) -> Tensor:
    """Middle of each channel's energy, (n, channels) -> (channels,); the mean where most of it is 0."""
    middle = q.median(0).values
    return torch.where(middle > 0, middle, q.mean(0)).clamp_min(_LEAST)


def _each(x: Tensor, sizes: list[int], reduce: Callable[..., Tensor]) -> Tensor:
    """Reduce each layer's channels: (..., channels) -> (..., layers)."""
    return torch.stack([reduce(part, dim=-1) for part in x.split(sizes, -1)], -1)


def _log(relative: Tensor) -> Tensor:
    return (relative + _FLOOR).log()


def _middle(x: Tensor) -> tuple[Tensor, Tensor]:
    """Median and mean absolute deviation from it: (n, k) -> (k,) each."""
    middle = x.median(0).values
    return middle, (x - middle).abs().mean(0).clamp_min(_LEAST)
