"""Values of several seeds in one: a number for a sentence, a point with its spread for a chart, steps to a target."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.experiment.judgement import estimate
from batchnorm.reporting.charts.chart_data import Rows


def figures(value: Tensor | float, count: int = 4) -> float:
    """A value to ``count`` significant figures; -0 becomes 0."""
    return float(f"{float(value):.{count}g}") + 0.0


def mean(values: Tensor) -> float | None:
    """Mean over seeds to three significant figures; None if it is NaN or infinite."""
    average = figures(values.mean(), 3)
    return average if abs(average) < float("inf") else None


def median(values: Tensor, axis: int = -1) -> Tensor:
    """Median along an axis; for an even number of values the mean of the two in the middle.

    It is infinite if one of these two is infinite. torch.median would return the lower of the two.
    """
    ordered = values.sort(axis).values
    count = values.shape[axis]
    lower, upper = (ordered.select(axis, index) for index in ((count - 1) // 2, count // 2))
    return torch.where(lower == upper, lower, (lower + upper) / 2)


def factor(ratios: Tensor) -> float:
    """Geometric mean of ratios; the geometric mean of the inverse ratios is its inverse."""
    return float(ratios.log2().mean().exp2())


def evenly(count: int, most: int) -> Tensor:
    """At most ``most`` of the indices 0 to ``count`` - 1, evenly spaced, with the first and the last."""
    return torch.linspace(0, max(count - 1, 0), min(most, count)).round().long().unique()


def curve(
    x: Iterable[float],
    values: Tensor,
    *,
    middle: Callable[[Tensor], Tensor] = median,
    positive: bool = False,
    **same: str,
) -> Rows:
    """Chart rows with the middle and the range over seeds; a point is left out if a seed's value is not finite.

    Args:
        x: X positions on the chart's x axis.
        values: The values at each position, (X, seeds).
        middle: Computes the value of a point from the values of its seeds.
        positive: For a log scale: leave out a point also if a seed's value is not above 0.
        same: Further fields of every row: series, panel, row.
    """
    return [
        {"x": at, "y": figures(middle(v)), "low": figures(v.amin()), "high": figures(v.amax()), **same}
        for at, v in zip(x, values, strict=True)
        if bool(v.isfinite().all()) and not (positive and bool((v <= 0).any()))
    ]


def interval(values: Tensor, level: float, name: str = "value") -> dict[str, float]:
    """Mean over seeds as ``name``, and its confidence interval as "low" and "high"."""
    measured = estimate(values.tolist(), level)
    return {name: figures(measured.mean), "low": figures(measured.low), "high": figures(measured.high)}


def first_step(reached: Tensor, steps: Tensor) -> Tensor:
    """The first of ``steps``, (T,), at which ``reached``, (T, ...), is True: (...); infinity if it never is."""
    return torch.where(reached.any(0), steps[reached.float().argmax(0)].float(), torch.inf)


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """The steps that the seeds of one experiment arm took to reach a target.

    Args:
        first: Steps of each seed to the target, (seeds,); infinity for a seed that never reached it.
        last: The last step of the run.
    """

    first: Tensor
    last: int

    @property
    def steps(self) -> Tensor:
        """Steps of each seed, (seeds,); ``last`` for a seed that never arrived, so that ratios are bounds."""
        return self.first.clamp_max(self.last)

    @property
    def late(self) -> int:
        """Number of seeds that never arrived."""
        return int(self.first.isinf().sum())

    def __str__(self) -> str:
        """The median in words, such as "80", "more than 300" or "80 (1 of 5 seeds never)"."""
        middle = median(self.first)
        if middle.isinf():
            return f"more than {self.last}"
        return f"{middle:g}" + (f" ({self.late} of {len(self.first)} seeds never)" if self.late else "")
