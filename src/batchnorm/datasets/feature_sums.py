"""Sums of features: counts, mean and central sums of values, as two arrays that a block of values is added to.

The native kernel adds a block in place, in one pass over memory and without the GIL. NumPy's code, which computes the
same, is used where the package was built without a compiler.

The mean is the sum of two float64 numbers, ``mean`` and ``mean_low``. One number would not do: the mean of a part of
the data then has an error of up to u |mean| with u = 1.1e-16, which enters the distance d between the means of two
parts. For N(1e9, 0.1) in parts of 1,000 values, d is 3e-3 and its error 1e-7. With two numbers the relative error of
the variance is at most about (v + 10 p) u for parts of v values, p of which are merged one after the other, whatever
the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, final

import numpy as np

from batchnorm.moments_union import between_means, either, higher

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

NUMBERS = ("mean", "mean_low", "m2", "m3", "m4", "minimum", "maximum")
COUNTS = ("count", "nan", "infinite", "null")
# numbers of types, as in the enum Kind of arithmetic.hpp
_KINDS = {np.dtype(kind): i for i, kind in enumerate(["f8", "f4", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"])}
_KINDS[np.dtype("?")] = _KINDS[np.dtype("u1")]
_HALF = np.dtype("f2")
_UNIT = 2.0**-60  # keeps the sum of up to 2^60 values finite


def _built() -> Any:
    """The native module; None if the package was built without a compiler, or before the module had this kernel."""
    try:
        native = import_module("batchnorm._native")
    except ImportError:
        return None
    return native if hasattr(native, "add_columns") else None


_native = _built()


@final
@dataclass(frozen=True, slots=True, eq=False)
class FeatureSums:
    """Sums of the values of features; ``+`` gives those of the values of both sides.

    Args:
        numbers: One row for each of ``NUMBERS``, float64 (7, *features).
        counts: One row for each of ``COUNTS``, int64 (4, *features).
    """

    numbers: np.ndarray
    counts: np.ndarray

    @staticmethod
    def empty(shape: tuple[int, ...]) -> FeatureSums:
        """The sums of no values."""
        numbers = np.zeros((len(NUMBERS), *shape))
        numbers[[0, 5, 6]] = np.nan
        return FeatureSums(numbers, np.zeros((len(COUNTS), *shape), dtype=np.int64))

    @staticmethod
    def joined(parts: Sequence[FeatureSums]) -> FeatureSums:
        """The features of all parts side by side."""
        return FeatureSums(*(np.concatenate(rows, axis=-1) for rows in _each(parts)))

    @staticmethod
    def stacked(parts: Sequence[FeatureSums]) -> FeatureSums:
        """Sums of the same features on a new axis in front of the features."""
        return FeatureSums(*(np.stack(rows, axis=1) for rows in _each(parts)))

    def mapped(self, function: Callable[[np.ndarray], np.ndarray]) -> FeatureSums:
        """The sums with ``function`` applied to both arrays."""
        return FeatureSums(function(self.numbers), function(self.counts))

    def add(self, values: np.ndarray, present: np.ndarray | None) -> FeatureSums:
        """The sums with a block of values (n, features) added, which changes these sums in place if it can.

        Args:
            values: Array of a real type. Types that the native kernel does not read are converted: half precision to
                float32, others to float64.
            present: Boolean array (n,) or (n, features); None if no value is null.
        """
        if _native is None:
            return self + _by_numpy(np.asarray(values, dtype=np.float64), present)
        if values.dtype not in _KINDS:
            values = values.astype(np.float32 if values.dtype == _HALF else np.float64)
        flags = (0, 0, 0) if present is None else (_address(present), *(*present.strides, 0)[:2])
        _native.add_columns(
            _KINDS[values.dtype], _address(values), *values.shape, *values.strides,
            *flags, _address(self.numbers), _address(self.counts),
        )  # fmt: skip
        return self

    def __add__(self, other: FeatureSums) -> FeatureSums:
        a, b = self, other
        with np.errstate(all="ignore"):
            numbers = _central(a, b)
            numbers += [np.fmin(a.numbers[5], b.numbers[5]), np.fmax(a.numbers[6], b.numbers[6])]
        return FeatureSums(np.stack(numbers), a.counts + b.counts)


def _each(parts: Sequence[FeatureSums]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return [part.numbers for part in parts], [part.counts for part in parts]


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _central(a: FeatureSums, b: FeatureSums) -> list[np.ndarray]:
    """Mean, its low part, m2, m3 and m4 of both sides together."""
    (mean_a, low_a, a2, a3, a4), (mean_b, low_b, b2, b3, b4) = a.numbers[:5], b.numbers[:5]
    count_a, count_b = (each.counts[0].astype(np.float64) for each in (a, b))
    delta = (mean_b - mean_a) + (low_b - low_a)
    count, step, between = between_means(count_a, count_b, delta, np.where)
    mean, low = _two_sum(mean_a, low_a + step)
    # means of both signs whose distance is too large for float64
    mean = np.where(np.isfinite(delta), mean, count_a / count * mean_a + count_b / count * mean_b)
    third, fourth = higher((count_a, a2, a3, a4), (count_b, b2, b3, b4), delta, np.where)
    both = [(mean_a, mean_b, mean), (low_a, low_b, low), (a2, b2, a2 + b2 + between)]
    return _bounded([*(either(count_a, count_b, *values, np.where) for values in both), third, fourth])


def _two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a + b, rounded, and what the rounding took; 0 if a + b is not finite (Knuth 1969, "Seminumerical algorithms")."""
    total = a + b
    part = total - a
    rest = (a - (total - part)) + (b - part)
    return total, np.where(np.isfinite(rest), rest, 0.0)


def _bounded(numbers: list[np.ndarray]) -> list[np.ndarray]:
    """The numbers with one form for sums that float64 cannot hold: m2 and m4 infinite, m3 NaN."""
    mean, low, m2, m3, m4 = numbers
    m2 = np.where(np.isfinite(m2), m2, np.inf)
    m3 = np.where(np.isfinite(m3) & np.isfinite(m2), m3, np.nan)
    return [mean, low, m2, m3, np.where(np.isfinite(m4) & np.isfinite(m2), m4, np.inf)]


def _by_numpy(values: np.ndarray, present: np.ndarray | None) -> FeatureSums:
    """The sums of a block of float64 values (n, features), by the formulas of columns.hpp."""
    here = np.ones(values.shape, dtype=bool) if present is None else _as_wide(present, values)
    finite = here & np.isfinite(values)
    counts = np.stack(
        [finite.sum(0), (here & np.isnan(values)).sum(0), (here & np.isinf(values)).sum(0), (~here).sum(0)]
    )
    with np.errstate(all="ignore"):
        numbers = _of_finite(values, finite, counts[0].astype(np.float64))
    return FeatureSums(numbers, counts.astype(np.int64))


def _as_wide(present: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.broadcast_to(present[:, None] if present.ndim == 1 else present, values.shape)


def _of_finite(values: np.ndarray, finite: np.ndarray, n: np.ndarray) -> np.ndarray:
    x = np.where(finite, values, 0.0)
    least, most = (np.where(finite, values, sign * np.inf) for sign in (1, -1))
    least, most = least.min(0, initial=np.inf), most.max(0, initial=-np.inf)
    center = x.sum(0) / n
    center = np.where(np.isfinite(center), center, (x * _UNIT).sum(0) / n / _UNIT)
    d = np.where(finite, x - center, 0.0)
    s1, s2, s3, s4 = (_power(d, k).sum(0) for k in range(1, 5))
    e = s1 / n
    m2, m3 = np.maximum(s2 - s1 * e, 0), s3 - 3 * e * s2 + 2 * n * e**3
    m4 = np.maximum(s4 - 4 * e * s3 + 6 * e**2 * s2 - 3 * n * e**4, 0)
    mean, low = _two_sum(center, np.where(np.isfinite(e), e, 0.0))  # sums of the largest deviations may be too large
    numbers = np.stack([*_bounded([mean, low, m2, m3, m4]), least, most])
    none, constant = np.zeros_like(numbers), np.zeros_like(numbers)
    none[[0, 5, 6]] = np.nan
    constant[[0, 5, 6]] = least
    return np.where(n == 0, none, np.where(least == most, constant, numbers))


def _power(d: np.ndarray, k: int) -> np.ndarray:
    square = d * d
    return (d, square, square * d, square * square)[k - 1]
