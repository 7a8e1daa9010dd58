"""Two ways to normalize the same values, and how far apart their results are."""

from __future__ import annotations

from torch import Tensor


def difference(mean: Tensor, var: Tensor, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """Mean square of (x - mean_a) r_a - (x - mean_b) r_b over values x of this mean and biased variance.

    Args:
        mean: Of the values.
        var: Of the values.
        a: The mean to subtract and the factor r_a to multiply by.
        b: The same for the other normalization.
    """
    return var * (a[1] - b[1]).square() + ((mean - a[0]) * a[1] - (mean - b[0]) * b[1]).square()
