"""Statistics of one column: for every feature count, mean, sum of squares, extremes, and numbers of missing values."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, final

import numpy as np

if TYPE_CHECKING:
    from batchnorm.datasets.blocks import Column


@final
@dataclass(frozen=True, slots=True, eq=False)
class ColumnStatistics:
    """Exact statistics of every feature of a column, float64; ``+`` gives those of the values of both sides.

    Args:
        count: Number of finite values, int64, of the shape of the features.
        mean: Their mean; NaN at count 0.
        m2: Sum of squared deviations from the mean.
        minimum: Smallest finite value; NaN at count 0.
        maximum: Largest finite value; NaN at count 0.
        nan: Number of NaN, int64.
        infinite: Number of infinities of both signs, int64.
        null: Number of missing values, int64.
    """

    count: np.ndarray
    mean: np.ndarray
    m2: np.ndarray
    minimum: np.ndarray
    maximum: np.ndarray
    nan: np.ndarray
    infinite: np.ndarray
    null: np.ndarray

    @staticmethod
    def of(column: Column) -> ColumnStatistics:
        """Statistics of the values of a column in a block."""
        values = np.asarray(column.values, dtype=np.float64)
        shape = values.shape[1:]
        absent = 0 if column.present is None else len(values) - int(column.present.sum())
        values = values if column.present is None else values[column.present]
        finite = np.isfinite(values)
        count = finite.sum(0)
        mean = np.divide(np.where(finite, values, 0).sum(0), count, out=np.full(shape, np.nan), where=count > 0)
        m2 = np.where(finite, values - mean, 0)
        low, high = (np.where(finite, values, sign * np.inf) for sign in (1, -1))
        return ColumnStatistics(
            count=np.asarray(count, dtype=np.int64),
            mean=mean,
            m2=(m2**2).sum(0),
            minimum=np.where(count > 0, low.min(0, initial=np.inf), np.nan),
            maximum=np.where(count > 0, high.max(0, initial=-np.inf), np.nan),
            nan=np.isnan(values).sum(0),
            infinite=np.isinf(values).sum(0),
            null=np.full(shape, absent, dtype=np.int64),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the features; () for a column of numbers."""
        return self.mean.shape

    def __add__(self, other: ColumnStatistics) -> ColumnStatistics:
        """Statistics of the values of both sides."""
        count = self.count + other.count
        delta = other.mean - self.mean
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = self.mean + delta * (other.count / count)
            m2 = self.m2 + other.m2 + delta**2 * (self.count * (other.count / count))
        mean = np.where(other.count == 0, self.mean, np.where(self.count == 0, other.mean, mean))
        m2 = np.where(other.count == 0, self.m2, np.where(self.count == 0, other.m2, m2))
        low, high = np.fmin(self.minimum, other.minimum), np.fmax(self.maximum, other.maximum)
        counted = (getattr(self, each.name) + getattr(other, each.name) for each in fields(self)[5:])
        return ColumnStatistics(count, mean, m2, low, high, *counted)
