"""The moments of two sets of values together, from the moments of each: one formula for torch's tensors and arrays.

With count n, mean m and central sums m2, m3 and m4, where mk = sum (x - m)^k, and with the shares p = n_a / n and
q = n_b / n of the two sets, the union has (Chan, Golub and LeVeque 1979, eq. 2.1; Pébay 2008, "Formulas for robust,
one-pass parallel computation of covariances and arbitrary-order statistical moments", eq. 1.6)

    n = n_a + n_b        d = m_b - m_a        m = m_a + d q
    m2 = m2_a + m2_b + d^2 n_a q
    m3 = m3_a + m3_b + d^3 n_a q (p - q) + 3 d (p m2_b - q m2_a)
    m4 = m4_a + m4_b + d^4 n_a q (p^2 - p q + q^2) + 6 d^2 (p^2 m2_b + q^2 m2_a) + 4 d (p m3_b - q m3_a)

Counts are floating-point numbers: a product of two int64 counts may overflow. ``where`` is torch.where or numpy.where.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# a tensor of torch or an array of NumPy: both have the operators that the formulas need
Values = Any


def merged(a: tuple[Values, ...], b: tuple[Values, ...], where: Callable[..., Values]) -> tuple[Values, Values, Values]:
    """Count, mean and m2 of the values of ``a`` and ``b`` together, from count, mean and m2 of each.

    A side with count 0 leaves the other side's mean and m2 as they are, bit for bit, also if its own are NaN. Means may
    be complex: m2 is then the sum of |x - mean|^2.
    """
    (count_a, mean_a, m2_a), (count_b, mean_b, m2_b) = a, b
    count, step, between = between_means(count_a, count_b, mean_b - mean_a, where)
    return (
        count,
        either(count_a, count_b, mean_a, mean_b, mean_a + step, where),
        either(count_a, count_b, m2_a, m2_b, m2_a + m2_b + between, where),
    )


def between_means(
    count_a: Values, count_b: Values, delta: Values, where: Callable[..., Values]
) -> tuple[Values, Values, Values]:
    """The count of both sides, the step from a's mean to the mean of both, and the part of m2 between the means.

    Args:
        count_a: Count of a.
        count_b: Count of b.
        delta: Mean of b minus mean of a.
        where: torch.where or numpy.where.
    """
    count = count_a + count_b
    divisor = where(count == 0, 1, count)
    return count, delta * (count_b / divisor), _squared(delta) * (count_a * count_b / divisor)


def higher(
    a: tuple[Values, ...], b: tuple[Values, ...], delta: Values, where: Callable[..., Values]
) -> tuple[Values, Values]:
    """m3 and m4 of the values of ``a`` and ``b`` together, from count, m2, m3 and m4 of each.

    A side with count 0 leaves the other side's values as they are, bit for bit.
    """
    (count_a, a2, a3, a4), (count_b, b2, b3, b4) = a, b
    count = count_a + count_b
    divisor = where(count == 0, 1, count)
    p, q = count_a / divisor, count_b / divisor
    third = 3 * delta * (p * b2 - q * a2) + delta * delta * delta * (count_a * q * (p - q))
    fourth = 4 * delta * (p * b3 - q * a3) + 6 * delta * delta * (p * p * b2 + q * q * a2)
    fourth = fourth + delta * delta * (delta * delta) * (count_a * q * (p * p - p * q + q * q))
    return (
        either(count_a, count_b, a3, b3, a3 + b3 + third, where),
        either(count_a, count_b, a4, b4, a4 + b4 + fourth, where),
    )


def either(
    count_a: Values, count_b: Values, of_a: Values, of_b: Values, of_both: Values, where: Callable[..., Values]
) -> Values:
    """``of_both``; where a side has count 0, the other side's value."""
    return where(count_b == 0, of_a, where(count_a == 0, of_b, of_both))


def _squared(delta: Values) -> Values:
    """|delta|^2, real."""
    return (delta * delta.conj()).real
