"""Comparison of data sets: what is found, what chance finds, constants and few values, and the report."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from batchnorm.cli import stats_command
from batchnorm.datasets.blocks import Column
from batchnorm.datasets.column_statistics import ColumnStatistics
from batchnorm.datasets.comparison import EFFECTS, LIMIT, Comparison, FeatureDifferences, compare
from batchnorm.datasets.comparison_report import report as report_of
from batchnorm.datasets.data_statistics import DataStatistics, Partial, union
from batchnorm.reporting.formats import FORMATS


def data(**columns: Any) -> DataStatistics:
    found = {name: ColumnStatistics.of(Column(np.asarray(values))) for name, values in columns.items()}
    return DataStatistics(Partial(max(len(values) for values in columns.values()), found))


def found(a: Any, b: Any, **settings: Any) -> set[str]:
    """The effects of one column that differ."""
    part = compare(data(x=a), data(x=b), **settings).all_data
    return {kind for kind in EFFECTS if part.effects[kind].differs[0]}


def normal(n: int, mean: float = 0, std: float = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, std, n)


def test_effects_and_errors_are_those_of_the_definition() -> None:
    a, b = normal(4000, 5, 2), normal(1000, 6, 3, 1)
    a[:3], b[:10] = np.nan, np.inf
    part = compare(data(x=a), data(x=b)).all_data
    x, y = a[3:], b[10:]
    d = (y.mean() - x.mean()) / x.std()
    kurtosis = max(float((((v - v.mean()) / v.std()) ** 4).mean()) for v in (x, y)) * (1 + 20 / len(x))
    skewness = float((((x - x.mean()) / x.std()) ** 3).mean())
    log_errors = [math.sqrt((kurtosis - (len(v) - 3) / (len(v) - 1)) / len(v)) / 2 for v in (x, y)]
    error = math.sqrt(
        1 / len(x) + max(1, y.var() / x.var()) / len(y) + d * skewness / len(x) + d**2 * log_errors[0] ** 2
    )
    expected = {
        "mean": (d, error),
        "spread": (math.log(y.std() / x.std()), math.hypot(*log_errors)),
        "nan": (-3 / 4000, math.sqrt(4 * 3998 / 4002**3 + 1001 / 1002**3)),
        "infinite": (10 / 1000, math.sqrt(4001 / 4002**3 + 11 * 991 / 1002**3)),
        "null": (0, math.sqrt(4001 / 4002**3 + 1001 / 1002**3)),
    }
    for kind, numbers in expected.items():
        effect = part.effects[kind]
        np.testing.assert_allclose([effect.size[0], effect.error[0]], numbers, rtol=1e-9, atol=1e-15, err_msg=kind)
    assert {kind for kind in EFFECTS if part.effects[kind].differs[0]} == {"mean", "spread", "infinite"}
    assert part.above[0] == max(0, y.max() - x.max())
    assert part.below[0] == max(0, x.min() - y.min())


def test_the_errors_are_the_spread_of_repeated_samples() -> None:
    """2,000 pairs of samples; the standard deviation of their effects has an error of 1.6 %, more for skewed values."""
    random = np.random.default_rng(7)
    a, b = random.gamma(2, size=(600, 2000)), 0.3 + random.gamma(2, size=(300, 2000))
    effects = compare(data(x=a), data(x=b)).all_data.effects
    for kind in ("mean", "spread"):
        ratio = np.sqrt((effects[kind].error ** 2).mean()) / effects[kind].size.std()
        # the larger variance and kurtosis of both sides are used: errors are not too small, and up to a third too large
        assert 0.95 < ratio < 1.35, (kind, ratio)


KINDS = {
    "normal": lambda random, n: random.normal(size=n),
    "heavy tails": lambda random, n: random.standard_t(5, size=n),
    "skewed": lambda random, n: random.exponential(size=n),
    "rare ones": lambda random, n: (random.random(n) < 0.02).astype(float),
    "whole numbers": lambda random, n: random.integers(0, 3, n).astype(float),
}


@pytest.mark.parametrize("limit", [0.0, 0.1])
@pytest.mark.parametrize(("n_a", "n_b"), [(2, 2), (3, 50), (50, 3), (10, 10), (2000, 5), (500, 500)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_data_seldom_differ(kind: str, n_a: int, n_b: int, limit: float) -> None:
    """At alpha 0.01, 300 comparisons have 3 wrong ones on average; more than 10 have a probability below 0.0003.

    Each has 20 features, whose z is 4.1: there the approximations are tested where they are used.
    """
    random = np.random.default_rng(n_a + n_b)
    wrong = 0
    for _ in range(300):
        a, b = (np.reshape(KINDS[kind](random, 20 * n), (n, 20)) for n in (n_a, n_b))
        wrong += compare(data(x=a), data(x=b), limit=limit).beyond
    assert wrong <= 10


def test_missing_values_of_the_same_share_seldom_differ() -> None:
    random, wrong = np.random.default_rng(8), 0
    for n_a, n_b, share in [(5, 5, 0.5), (200, 20, 0.02), (1000, 1000, 0.001), (20, 400, 0.9)] * 75:
        a, b = (np.where(random.random((n, 20)) < share, np.nan, 1.0) for n in (n_a, n_b))
        effect = compare(data(x=a), data(x=b), limit=0).all_data.effects["nan"]
        wrong += effect.differs.any()
    assert wrong <= 10


def test_differences_below_the_limit_are_none_however_sure_they_are() -> None:
    a = normal(1_000_000)
    assert found(a, a + 0.09) == set()
    assert found(a, a + 0.11) == {"mean"}
    assert found(a, a * math.exp(0.09)) == set()
    assert found(a, a * math.exp(-0.12)) == {"spread"}
    assert found(a, a + 0.02, limit=0.01) == {"mean"}


def test_differences_beyond_the_limit_need_enough_values() -> None:
    a = normal(1000)
    assert found(a, a[:4] + 0.5) == set()
    assert "mean" not in found(a, 1 + a[:4] / 1000)  # four values that are alike do not tell how they vary
    assert found(a, a + 0.5) == {"mean"}
    assert found(a, a[:6] + 10) == {"mean"}
    assert found(a, normal(50, 0, 10, 1)) == {"spread"}


def test_a_kind_of_missing_value_that_a_does_not_have_counts_from_the_first_share_on() -> None:
    a, b = np.zeros(100_000), np.zeros(1000)
    b[:3] = np.nan
    assert found(a, b) == {"nan"}  # 3 of 1,000 if 0 of 100,000: probability (1/101)^3
    a[:300] = np.nan
    assert found(a, b) == set()
    b[:30] = np.nan
    assert found(a, b) == set()  # from 0.3 % to 3 %: below 0.4 limit
    b[:100] = np.nan
    assert found(a, b) == {"nan"}


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([5.0] * 50, [5.0] * 50, set()),
        ([0.1] * 50, [0.1] * 7, set()),
        ([5.0] * 50, [6.0] * 50, {"mean"}),
        ([5.0] * 2, [6.0] * 2, set()),  # two values each: chance cannot be excluded
        ([5.0] * 50, list(range(50)), {"spread"}),
        (list(range(50)), [5.0] * 50, {"mean", "spread"}),
        ([5.0] * 3, list(range(50)), set()),
        ([0.0] * 99 + [1.0], [0.0] * 50, set()),  # a rare value that is not among 50
        ([0.0] * 50, [0.0] * 99 + [1.0], set()),
    ],
)
def test_constant_features(a: list[float], b: list[float], expected: set[str]) -> None:
    assert found(a, b) == expected


@pytest.mark.parametrize("values", [[], [3.0], [np.nan] * 3, [np.inf, 2.0]])
def test_too_few_values_are_not_judged_and_never_said_to_be_alike(values: list[float]) -> None:
    for a, b in ((data(x=values, y=np.arange(9.0)), data(x=normal(9), y=np.arange(9.0))),) * 2:
        for first, second in ((a, b), (b, a)):
            part = compare(first, second).all_data
            assert part.unjudged.tolist() == [True, False]
            assert not part.effects["mean"].differs[0]
            report = report_of(compare(first, second), "a", "b")
            assert "1 feature with too few values" in report.headline
            assert [row.rule for row in report.rows if row.place == "x"][-1] == "too-few-values"


def test_all_values_missing_differs_by_missing_values() -> None:
    assert found(normal(100), [np.nan] * 100) == {"nan"}


def test_values_too_large_to_square_are_not_judged() -> None:
    part = compare(data(x=normal(9) * 1e300), data(x=normal(9))).all_data
    assert part.unjudged[0]
    assert not part.differs[0]


def test_features_of_one_side_are_named_and_count_as_a_difference() -> None:
    a, b = data(x=normal(99), v=np.ones((99, 3))), data(v=np.ones((99, 2)), z=normal(99))
    both = compare(a, b)
    assert (both.only_a, both.only_b, both.beyond) == (("x", "v[2]"), ("z",), True)
    assert both.all_data.names == ("v[0]", "v[1]")
    chosen = compare(data(x=normal(99), y=normal(99)), data(x=normal(99)), columns=["x"])
    assert not chosen.beyond


def test_groups_are_compared_if_both_have_them_by_the_same_column() -> None:
    def grouped(by: str = "k", **means: float) -> DataStatistics:
        parts = {name: data(x=normal(500, mean)).total for name, mean in means.items()}
        return DataStatistics(union([DataStatistics(part) for part in parts.values()]).total, by, parts)

    # the groups change places, so that all data together stay as they are
    both = compare(grouped(u=0, v=5, w=0), grouped(u=5, v=0, z=0))
    assert [(part.group, bool(part.differs[0])) for part in both.parts] == [(None, False), ("u", True), ("v", True)]
    assert (both.groups_only_a, both.groups_only_b, both.beyond) == (("w",), ("z",), True)
    assert compare(grouped(u=0), grouped("other", u=0)).groups == ()
    more = compare(grouped(u=0, v=0), grouped(u=0, v=0))
    assert more.z > compare(data(x=normal(9)), data(x=normal(9))).z


def test_the_order_of_columns_does_not_matter() -> None:
    x, y = normal(100), normal(100, 50)
    part = compare(data(x=x, y=y), data(y=y, x=x)).all_data
    assert part.names == ("x", "y")
    assert not part.differs.any()


def test_wrong_arguments_are_refused() -> None:
    a = data(x=[1.0, 2.0])
    with pytest.raises(TypeError, match="compare needs DataStatistics as b, got str"):
        compare(a, "b")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected data with examples, got none in a"):
        compare(DataStatistics(Partial(0, {})), a)
    with pytest.raises(ValueError, match="limit of 0 or more, got -1"):
        compare(a, a, limit=-1)
    with pytest.raises(ValueError, match="limit of 0 or more, got nan"):
        compare(a, a, limit=math.nan)
    with pytest.raises(TypeError, match="limit must be a number"):
        compare(a, a, limit="1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alpha between 0 and 1, got 1"):
        compare(a, a, alpha=1)
    with pytest.raises(ValueError, match="expected names of columns, got 'z'"):
        compare(a, a, columns=["z"])
    with pytest.raises(ValueError, match="a feature in common, got none"):
        compare(a, data(y=[1.0, 2.0]))


def example() -> Comparison:
    a = data(x=normal(500), y=normal(500), c=np.ones(500), only=[1.0], **{"line\nbreak": normal(500)})
    b = data(x=normal(500) + 1, y=np.where(normal(500, seed=2) > 1, np.nan, normal(500)), c=np.full(500, 2.0),
             **{"line\nbreak": normal(500) * 9})  # fmt: skip
    return compare(a, b)


def test_the_report_names_each_difference_in_a_sentence() -> None:
    report = report_of(example(), "train", "serving")
    words = {(row.rule, row.place): row.words for row in report.rows}
    assert "x: mean moved by 0.987 (error 0.07" in words["mean-differs", "x"]
    assert "y: share of NaN values changed from 0 % to" in words["missing-values-differ", "y"]
    assert "c: mean moved by inf standard deviations of A, from 1.000 to 2.000" in words["mean-differs", "c"]
    assert "standard deviation changed from" in words["spread-differs", "line\nbreak"]
    assert words["feature-missing", "only"] == "only: only A has this feature"
    assert report.headline == "4 of 4 features differ; 1 feature on one side only"


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_shows_the_differences(name: str) -> None:
    text = FORMATS[name].make(report_of(example(), "train", "serving"))
    assert "mean moved" in text or "line" in text
    assert "line\nbreak" not in text


def test_the_json_has_every_feature_and_its_numbers() -> None:
    told = json.loads(report_of(example(), "train", "serving").json())
    assert (told["a"], told["beyond"], told["only_a"], told["limit"]) == ("train", True, ["only"], LIMIT)
    x = next(each for each in told["features"] if each["feature"] == "x")
    assert x["mean"]["differs"]
    assert x["a"]["count"] == 500
    np.testing.assert_allclose(x["mean"]["size"], 1 / x["a"]["std"], rtol=1e-12)


def test_the_command_has_the_limit_of_the_function() -> None:
    assert stats_command._LIMIT == LIMIT


def test_parts_have_arrays_of_one_shape() -> None:
    part: FeatureDifferences = example().all_data
    for effect in part.effects.values():
        assert effect.size.shape == effect.error.shape == effect.differs.shape == effect.judged.shape == (4,)
