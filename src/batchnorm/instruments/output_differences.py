"""How far apart the outputs of two normalizations of the same values are."""

from __future__ import annotations

from torch import Tensor


def difference(mean: Tensor, var: Tensor, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """Mean square of (x - mean_a) r_a - (x - mean_b) r_b over values x of this mean and biased variance.

    Args:
        mean: Mean of the values x.
        var: Biased variance of the values x.
        a: mean_a and r_a: the mean to subtract and the factor to multiply by.
        b: mean_b and r_b.
    """
    return var * (a[1] - b[1]).square() + ((mean - a[0]) * a[1] - (mean - b[0]) * b[1]).square()
