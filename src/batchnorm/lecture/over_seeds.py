"""Values of several seeds told as one: a number in a sentence, a point with its spread in a chart."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from batchnorm.lecture.criteria import LEVEL
from batchnorm.lecture.verdict import estimate


def figures(value: Tensor | float, count: int = 4) -> float:
    """A value to ``count`` significant figures; -0 becomes 0."""
    return float(f"{float(value):.{count}g}") + 0.0


def mean(values: Tensor) -> float | None:
    """Mean over seeds to three figures; None where it does not exist."""
    average = figures(values.mean(), 3)
    return average if abs(average) < float("inf") else None


def median(values: Tensor, axis: int = -1) -> Tensor:
    """Median along an axis, of an even number the mean of the two in the middle; infinite if one of these is.

    torch's own is the lower of the two.
    """
    ordered = values.sort(axis).values
    count = values.shape[axis]
    lower, upper = (ordered.select(axis, index) for index in ((count - 1) // 2, count // 2))
    return torch.where(lower == upper, lower, (lower + upper) / 2)


def factor(ratios: Tensor) -> float:
    """Geometric mean of ratios, the mean that reads the same in both directions."""
    return float(ratios.log2().mean().exp2())


def curve(
    x: Iterable[float],
    values: Tensor,
    *,
    middle: Callable[[Tensor], Tensor] = median,
    positive: bool = False,
    **same: str,
) -> list[dict[str, Any]]:
    """Rows with the middle and the range over seeds; a point that one seed does not have is left out.

    Args:
        x: Where the values belong, X of them.
        values: (X, seeds).
        middle: What the point itself shows.
        positive: Leave out what is not above 0 too, for a log scale.
        same: Further fields of every row: series, panel, row.
    """
    return [
        {"x": at, "y": figures(middle(v)), "low": figures(v.amin()), "high": figures(v.amax()), **same}
        for at, v in zip(x, values, strict=True)
        if bool(v.isfinite().all()) and not (positive and bool((v <= 0).any()))
    ]


def interval(values: Tensor, name: str = "value", level: float = LEVEL) -> dict[str, float]:
    """Mean over seeds as ``name``, and its confidence interval as "low" and "high"."""
    measured = estimate(values.tolist(), level)
    return {name: figures(measured.mean), "low": figures(measured.low), "high": figures(measured.high)}
