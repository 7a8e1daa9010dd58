"""Comparison of two data sets by their statistics alone, such as training data A with serving data B.

For each feature five effects are estimated, with their standard errors for independent examples. With std s, kurtosis
k, skewness g and count n of each side, and with e^2 = (k - (n - 3) / (n - 1)) / (4 n), the variance of log s,

    mean     d = (mean_b - mean_a) / s_a
             error^2 = 1 / n_a + max(s_a^2, s_b^2) / (s_a^2 n_b) + d g_a / n_a + d^2 e_a^2
    spread   r = log(s_b / s_a)                          error^2 = e_a^2 + e_b^2
    nan, infinite, null: the share in B minus that in A, with the error of Agresti and Caffo (2000), which has one case
             and one other value added to each side, so that it is not 0 for shares of 0 and 1

These are first-order errors (the delta method): s_a in d is an estimate too. k is the larger kurtosis of both sides,
times 1 + 20 / max(n_a, n_b), because a small sample of a distribution with heavy tails seldom has values in the tails.

An effect differs if it is beyond the limit and clearly beyond noise: |effect| - limit > z error. z is the same for all
effects of a comparison, so that the probability of any wrong difference is about alpha or less (Bonferroni). Ratios of
variances of few values are not normal: the spread is tested by the cube root of the ratio of variances (Paulson 1942,
"An approximate normalization of the analysis of variance distribution") with 1 / (2 e^2) degrees of freedom. If no
value of A is missing, or if a side is constant, the test is the root of the likelihood ratio of the share of other
values. Examples that depend on each other, such as frames of a video, have larger errors than these.

The limit is in standard deviations of A. For normal values, a mean that moves by L standard deviations, or a standard
deviation that changes by the factor exp(L), changes the distribution of about 0.4 L of the values; so the limit of
shares is 0.4 L. The default 0.1 is that below which groups in observational studies count as balanced (Austin 2009,
"Balance diagnostics for comparing the distribution of baseline covariates"): it is 4 % of the values. A kind of missing
value that A does not have at all has limit 0, because a network has not learned what to do with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import final

import numpy as np

from batchnorm.argument_types import require_number, require_type
from batchnorm.datasets.column_statistics import ColumnStatistics
from batchnorm.datasets.data_statistics import DataStatistics, Partial, feature_names

LIMIT = 0.1
ALPHA = 0.01
EFFECTS = ("mean", "spread", "nan", "infinite", "null")
# For exponential values (kurtosis 9) samples of 10 have kurtosis 3.2 on average, and samples of 30 have 5.2. With this
# factor at most 1 % of the comparisons of such samples find a wrong difference: see the test of "seldom".
_FEW = 20
_OF_VALUES = 0.4  # the density of the normal law at 0: see above


@final
@dataclass(frozen=True, slots=True, eq=False)
class Effect:
    """One effect of every feature; all arrays have the shape (features,).

    Args:
        size: The effect; infinite if A is constant and B is another constant, or only one side is constant.
        error: Its standard error; NaN if there are too few values to tell.
        differs: Whether it is beyond the limit and beyond noise.
        judged: Whether there were enough values to tell.
    """

    size: np.ndarray
    error: np.ndarray
    differs: np.ndarray
    judged: np.ndarray


@final
@dataclass(frozen=True, slots=True, eq=False)
class FeatureDifferences:
    """Differences of the features that both sides have, in all data or in one group.

    Args:
        group: Name of the group; None for all data.
        names: Names of the features.
        a: Statistics of A, of shape (features,).
        b: Statistics of B.
        effects: Each of ``EFFECTS``.
    """

    group: str | None
    names: Sequence[str]
    a: ColumnStatistics
    b: ColumnStatistics
    effects: Mapping[str, Effect]

    @property
    def differs(self) -> np.ndarray:
        """Whether a feature differs in any effect, (features,)."""
        return np.logical_or.reduce([effect.differs for effect in self.effects.values()])

    @property
    def unjudged(self) -> np.ndarray:
        """Whether mean or spread of a feature could not be judged, (features,): a side has fewer than 2 values."""
        return ~(self.effects["mean"].judged & self.effects["spread"].judged)

    @property
    def missing(self) -> np.ndarray:
        """The change of the share of all values that are no finite number, (features,); NaN if a side has no values."""
        return sum(self.effects[kind].size for kind in EFFECTS[2:])  # type: ignore[return-value] - arrays

    @property
    def below(self) -> np.ndarray:
        """By how much the smallest value of B is below that of A; 0 if it is not. It is no evidence of a difference."""
        return np.fmax(self.a.minimum - self.b.minimum, 0)

    @property
    def above(self) -> np.ndarray:
        """By how much the largest value of B is above that of A; 0 if it is not. It is no evidence of a difference."""
        return np.fmax(self.b.maximum - self.a.maximum, 0)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """The differences between two data sets.

    Args:
        all_data: Differences over all data.
        groups: Differences in each group that both sides have, if both were measured by the same column.
        only_a: Features that only A has.
        only_b: Features that only B has.
        groups_only_a: Groups that only A has; () without groups.
        groups_only_b: Groups that only B has.
        rows: Number of examples of A and B.
        limit: The limit, in standard deviations of A.
        alpha: Probability of any wrong difference.
        z: Number of standard errors that count as noise.
    """

    all_data: FeatureDifferences
    groups: tuple[FeatureDifferences, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    groups_only_a: tuple[str, ...]
    groups_only_b: tuple[str, ...]
    rows: tuple[int, int]
    limit: float
    alpha: float
    z: float

    @property
    def beyond(self) -> bool:
        """Whether any feature differs, in all data or in a group, or is only on one side."""
        return bool(self.only_a or self.only_b or any(part.differs.any() for part in self.parts))

    @property
    def parts(self) -> tuple[FeatureDifferences, ...]:
        """All data, then the groups."""
        return (self.all_data, *self.groups)


def compare(
    a: DataStatistics,
    b: DataStatistics,
    *,
    limit: float = LIMIT,
    columns: Sequence[str] | None = None,
    alpha: float = ALPHA,
) -> Comparison:
    """Which features of B differ from A by more than the limit and more than noise.

    A feature with fewer than two values on a side is not judged by mean and spread, only by its missing values. If both
    sides are constant, they differ if the constants do and both have enough values that chance is excluded.

    Args:
        a: Statistics of the reference, such as the training data.
        b: Statistics of the data to judge.
        limit: Largest difference that does not matter, in standard deviations of A, and as the logarithm of the ratio
            of standard deviations.
        columns: Names of the columns that are compared; None for all of both sides.
        alpha: Probability that any difference is reported if there is none.

    Raises:
        TypeError: If ``a`` or ``b`` is no DataStatistics, or a number is none.
        ValueError: If a side has no examples; if the limit is negative or alpha not between 0 and 1; if a named column
            is in neither data set; if both have no feature in common.
    """
    _require(a, b, limit, alpha)
    _require_known(a, b, columns)
    has_groups = bool(a.by) and a.by == b.by
    pairs = {None: (_Features.of(a.total, columns), _Features.of(b.total, columns))}
    if has_groups:
        pairs |= {
            name: (_Features.of(part, columns), _Features.of(b.groups[name], columns))
            for name, part in a.groups.items() if name in b.groups
        }  # fmt: skip
    names, only_a, only_b = _apart(pairs[None][0].places, pairs[None][1].places)
    if not names:
        raise ValueError(
            "expected data with a feature in common, got none. Compare data with the same columns, or name columns."
        )
    z = -NormalDist().inv_cdf(alpha / (2 * len(EFFECTS) * len(names) * len(pairs)))
    all_data, *groups = (_differences(name, *pair, limit, z) for name, pair in pairs.items())
    _, groups_a, groups_b = _apart(a.groups, b.groups) if has_groups else ((), (), ())
    rows = (a.rows, b.rows)
    return Comparison(all_data, tuple(groups), only_a, only_b, groups_a, groups_b, rows, limit, alpha, z)


def _require(a: object, b: object, limit: object, alpha: object) -> None:
    for name, value in (("a", a), ("b", b)):
        require_type(
            value, DataStatistics, f"compare needs DataStatistics as {name}", "Load a file: DataStatistics.load."
        )
        if not value.rows:  # type: ignore[attr-defined] - DataStatistics
            raise ValueError(f"expected data with examples, got none in {name}. Check its files.")
    require_number(limit, "limit", "It is a number of standard deviations, such as 0.1.")
    require_number(alpha, "alpha", "It is a probability, such as 0.01.")
    if not 0 <= limit < math.inf:  # type: ignore[operator] - a number
        raise ValueError(f"expected a limit of 0 or more, got {limit}. Give standard deviations, such as 0.1.")
    if not 0 < alpha < 1:  # type: ignore[operator] - a number
        raise ValueError(f"expected alpha between 0 and 1, got {alpha}. Give a probability, such as 0.01.")


def _require_known(a: DataStatistics, b: DataStatistics, columns: Sequence[str] | None) -> None:
    for name in columns or ():
        if name not in a.columns and name not in b.columns:
            known = sorted({*a.columns, *b.columns})
            raise ValueError(f"expected names of columns, got {name!r}. The columns are {known}.")


def _apart(a: Iterable[str], b: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The names that both have, only ``a`` and only ``b``, in their order."""
    in_a, in_b = dict.fromkeys(a), dict.fromkeys(b)
    both, only_a = ([name for name in in_a if (name in in_b) == wanted] for wanted in (True, False))
    return tuple(both), tuple(only_a), tuple(name for name in in_b if name not in in_a)


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Features:
    """The features of all columns side by side, and the place of each name."""

    statistics: ColumnStatistics
    places: Mapping[str, int]

    @staticmethod
    def of(part: Partial, columns: Sequence[str] | None) -> _Features:
        names = list(part.columns) if columns is None else [name for name in columns if name in part.columns]
        chosen = Partial(part.rows, {name: part.columns[name] for name in names})
        features = [feature for name, shape in chosen.shapes.items() for feature in feature_names(name, shape)]
        statistics = ColumnStatistics.of_sums(chosen.sums, (len(features),))
        return _Features(statistics, {feature: i for i, feature in enumerate(features)})

    def chosen(self, names: Sequence[str]) -> ColumnStatistics:
        return self.statistics.mapped(lambda values: values[[self.places[name] for name in names]])


def _differences(group: str | None, a: _Features, b: _Features, limit: float, z: float) -> FeatureDifferences:
    names, _, _ = _apart(a.places, b.places)
    of_a, of_b = a.chosen(names), b.chosen(names)
    effects = {"mean": _means(of_a, of_b, limit, z), "spread": _spreads(of_a, of_b, limit, z)}
    effects |= {kind: _shares(of_a, of_b, kind, limit, z) for kind in ("nan", "infinite", "null")}
    return FeatureDifferences(group, names, of_a, of_b, effects)


def _judged(size: np.ndarray, error: np.ndarray, limit: float | np.ndarray, z: float, known: np.ndarray) -> Effect:
    with np.errstate(all="ignore"):
        beyond = (np.abs(size) - limit > z * error) & known & ~np.isnan(error)
    return Effect(size, np.where(known, error, np.nan), beyond, known & ~np.isnan(error) & ~np.isnan(size))


def _means(a: ColumnStatistics, b: ColumnStatistics, limit: float, z: float) -> Effect:
    """The difference of the means in standard deviations of A; of two constants, whether they are different."""
    enough = _enough(a, b)
    with np.errstate(all="ignore"):
        distance = (b.mean - a.mean) + (b.mean_low - a.mean_low)
        size = np.where(distance == 0, 0.0, distance / a.std)
        of_a = np.nan_to_num(size * a.skewness) / a.count + size**2 * _log_error(a, _kurtosis(a, b)) ** 2
        error = np.sqrt(np.maximum(1 / a.count + of_a, 0) + np.fmax(1, b.var / a.var) / b.count)
    found = _judged(size, error, limit, z, enough & (a.std > 0))
    constants = (a.std == 0) & (b.std == 0) & (_root_of_constant(a, b) > z)
    return Effect(size, found.error, found.differs | (enough & constants), enough & (found.judged | (a.std == 0)))


def _enough(a: ColumnStatistics, b: ColumnStatistics) -> np.ndarray:
    """Whether both sides have two values or more, whose squares float64 can hold."""
    return (a.count > 1) & (b.count > 1) & np.isfinite(a.m2) & np.isfinite(b.m2)


def _spreads(a: ColumnStatistics, b: ColumnStatistics, limit: float, z: float) -> Effect:
    """The logarithm of the ratio of the standard deviations."""
    kurtosis = _kurtosis(a, b)
    errors = [_log_error(side, kurtosis) for side in (a, b)]
    with np.errstate(all="ignore"):
        size = np.where((a.std == 0) & (b.std == 0), 0.0, np.log(b.std) - np.log(a.std))
        wide = np.where(size > 0, errors[1], errors[0]), np.where(size > 0, errors[0], errors[1])
        root = np.where(np.isinf(size), _root_of_constant(a, b), _root_of_ratio(2 * (np.abs(size) - limit), *wide))
        beyond = (np.abs(size) > limit) & (root > z)
        error = np.where((a.std == 0) & (b.std == 0), 0.0, np.hypot(*errors))
    known = _enough(a, b) & np.isfinite(error) & ~np.isnan(size)
    return Effect(size, np.where(known, error, np.nan), beyond & known, known)


def _root_of_ratio(log_ratio: np.ndarray, wide: np.ndarray, narrow: np.ndarray) -> np.ndarray:
    """A normal number for a ratio of variances of 1 or more, by the errors of log std of the wide and narrow side."""
    p, q = 4 / 9 * wide**2, 4 / 9 * narrow**2  # 2 / (9 degrees of freedom) each
    root = np.exp(-log_ratio / 3)  # the cube root of the inverse ratio
    return ((1 - q) - (1 - p) * root) / np.sqrt(q + p * root**2)


def _root_of_constant(a: ColumnStatistics, b: ColumnStatistics) -> np.ndarray:
    """A normal number for the chance that one side is a constant c; 0 if no side is, or all values are c.

    By the inequality of Cauchy and Schwarz, at least n E[(x - c)^2]^2 / E[(x - c)^4] values of the other side differ.
    """
    roots = []
    for constant, other in ((a, b), (b, a)):
        delta = (other.mean - constant.mean) + (other.mean_low - constant.mean_low)
        with np.errstate(all="ignore"):
            square = other.var + delta**2
            fourth = (other.m4 + 4 * delta * other.m3) / other.count + 6 * delta**2 * other.var + delta**4
            cases = np.ceil(np.where(square > 0, other.count * square**2 / fourth, 0) * (1 - 1e-9))
        root = _root_of_none(constant.count, np.fmin(cases, other.count), other.count)
        roots.append(np.where(constant.std == 0, root, 0))
    return np.fmax(*roots)


def _kurtosis(a: ColumnStatistics, b: ColumnStatistics) -> np.ndarray:
    """The larger kurtosis, more for few values, of which the kurtosis is too small on average."""
    with np.errstate(all="ignore"):
        return np.fmax(a.kurtosis, b.kurtosis) * (1 + _FEW / np.fmax(a.count, b.count))


def _log_error(side: ColumnStatistics, kurtosis: np.ndarray) -> np.ndarray:
    """The standard error of log std, half that of the relative error of the variance."""
    n = side.count.astype(np.float64)
    with np.errstate(all="ignore"):
        return np.sqrt(np.maximum(kurtosis - (n - 3) / (n - 1), 0) / n) / 2


def _shares(a: ColumnStatistics, b: ColumnStatistics, kind: str, limit: float, z: float) -> Effect:
    """The change of the share of NaN, infinities or missing values."""
    sides = [(getattr(side, kind).astype(np.float64), side.values.astype(np.float64)) for side in (a, b)]
    with np.errstate(all="ignore"):
        size = sides[1][0] / sides[1][1] - sides[0][0] / sides[0][1]
    (p_a, error_a), (p_b, error_b) = (((x + 1) / (n + 2), (x + 1) * (n - x + 1) / (n + 2) ** 3) for x, n in sides)
    error, known = np.sqrt(error_a + error_b), ~np.isnan(size)
    some = np.abs(p_b - p_a) - _OF_VALUES * limit > z * error
    none = (sides[1][0] > 0) & (_root_of_none(sides[0][1], *sides[1]) > z)
    differs = known & np.where(sides[0][0] == 0, none, some)
    return Effect(size, np.where(known, error, np.nan), differs, known)


def _root_of_none(of_a: np.ndarray, in_b: np.ndarray, of_b: np.ndarray) -> np.ndarray:
    """The root of the likelihood ratio of one share for both sides, if A has no case: a normal number if it is."""
    with np.errstate(all="ignore"):
        other = of_b - in_b
        apart = _log_power(in_b, in_b / of_b) + _log_power(other, other / of_b)
        together = _log_power(in_b, in_b / (of_a + of_b)) + _log_power(other + of_a, (other + of_a) / (of_a + of_b))
        return np.sqrt(np.maximum(2 * (apart - together), 0))


def _log_power(n: np.ndarray, share: np.ndarray) -> np.ndarray:
    """n log(share); 0 for n = 0."""
    return np.where(n == 0, 0.0, n * np.log(share))
