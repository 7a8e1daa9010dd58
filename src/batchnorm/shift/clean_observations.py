"""Clean observations: the result of calibration, which has scores, a bag to compare with, marks, and components.

Half of the observations (at most 1,000) define how scores are computed. The others fill the bag. So the scores do not
depend on the observations in the bag, and the p-values are valid. Marks use all observations; the bounds of components
use the observations in the bag.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from statistics import NormalDist
from typing import Any, final

import torch
from torch import Tensor

from batchnorm.shift import conformal
from batchnorm.shift.channel_marks import MARKS, Marks
from batchnorm.shift.conformal import Bag
from batchnorm.shift.principal_components import Components, axes_shape, halves
from batchnorm.shift.scores import KIND_OF, Scores, powers

_CONFIDENCE = 0.95  # probability that every component's mean is within its error, if observations are normal
# assumed standard error of a variance, as a multiple of that for normal values: it is 1.5 for a kurtosis of 5.5
_VARIANCE_ERROR = 1.5


@final
@dataclass(frozen=True, slots=True, eq=False)
class CleanObservations:
    """The result of calibration.

    Args:
        scores: The scores, which measure how strange an observation is.
        bag: Clean observations to compare with.
        marks: Thresholds that few clean observations exceed.
    """

    scores: Scores
    bag: Bag
    marks: Marks

    @classmethod
    def of(cls, sizes: tuple[int, ...], z: Tensor, q: Tensor, *, tolerance: float) -> CleanObservations:
        """The result of calibration on clean observations.

        Args:
            sizes: Number of channels of each layer.
            z: Channel means in stored sd, (n, channels).
            q: Energies of channels, (n, channels).
            tolerance: Movement of a component's mean, in sd, that does not count.
        """
        first, second = halves(len(z))
        power = powers(q[first])
        bounds = _Bounds(tolerance, _errors(2 * z.shape[1]))
        components = Components.measured(sizes, z, q / power, bounds)
        scores = Scores.learned(components, power, z[first], q[first])
        return cls(scores, Bag.of(scores.cells(z[second], q[second])), Marks.of(z))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by their names in a file."""
        parts = {"components": self.scores.components, "scores": self.scores, "marks": self.marks}
        return {"bag.above": self.bag.counts} | {
            f"{name}.{field.name}": value
            for name, part in parts.items()
            for field in fields(part)
            if isinstance(value := getattr(part, field.name), Tensor)
        }

    @classmethod
    def of_tensors(cls, sizes: tuple[int, ...], tensors: Mapping[str, Tensor]) -> CleanObservations:
        """The result of calibration from the dict that ``tensors`` returns.

        Raises:
            KeyError: If a tensor is missing.
        """

        def part(name: str, kind: type, **more: Any) -> Any:
            names = [field.name for field in fields(kind) if field.name not in more]
            return kind(**more, **{key: tensors[f"{name}.{key}"] for key in names})

        components = part("components", Components, sizes=sizes)
        return cls(
            part("scores", Scores, components=components), Bag.counted(tensors["bag.above"]), part("marks", Marks)
        )


def shapes(sizes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors for layers of these sizes, by name."""
    channels, scores, marks = sum(sizes), len(KIND_OF) * len(sizes), MARKS
    expected: dict[str, tuple[int, ...]] = {
        f"components.{name}": (2 * channels,) for name in ("center", "delta", "kappa")
    }
    of_channels = ("center", "spread", "power", "power_center", "power_spread")
    expected |= {f"scores.{name}": (channels,) for name in of_channels}
    expected |= {f"scores.{name}": (2 * channels,) for name in ("turned_center", "turned_spread")}
    expected |= {f"scores.{name}": (scores,) for name in ("middle", "width")}
    expected |= {f"marks.{name}": (marks, channels) for name in ("upper", "lower")}
    expected |= {"components.axes": axes_shape(sizes), "bag.above": (scores, conformal.CELLS), "marks.shares": (marks,)}
    return expected


# tensors whose values may be negative or 0
SIGNED = frozenset(
    {"components.center", "components.axes", "scores.center", "scores.power_center", "scores.turned_center"}
    | {"scores.middle", "marks.upper", "marks.lower", "bag.above"}
)


@final
@dataclass(frozen=True, slots=True)
class _Bounds:
    """Center, error and largest variance of observations, which are assumed to be normal; for hints, not for alarms.

    Args:
        tolerance: Added to the errors of means.
        errors: Number of standard errors.
    """

    tolerance: float
    errors: float

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, its tolerance and the largest variance of observations x: (n, k) -> (k,) each."""
        var, n = x.var(0), len(x)
        widened = var * (1 + self.errors * _VARIANCE_ERROR * (2 / n) ** 0.5)
        least = torch.finfo(torch.float32).eps
        return x.mean(0), self.tolerance + self.errors * (var / n).sqrt(), widened.clamp_min(least)


def _errors(bounds: int) -> float:
    """Number of standard errors within which all of ``bounds`` normal means lie at once, with 95 %."""
    return NormalDist().inv_cdf(1 - (1 - _CONFIDENCE) / (2 * bounds))
