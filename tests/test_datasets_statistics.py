"""Statistics of columns: values against exact arithmetic, every type and layout, missing values, merges."""

from __future__ import annotations

import math
import os
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pyarrow import feather

from batchnorm.datasets import feature_sums
from batchnorm.datasets.blocks import Block, Column, Selection
from batchnorm.datasets.column_statistics import ColumnStatistics, RunningStatistics
from batchnorm.datasets.data_statistics import DataStatistics, Partial, Source, union
from batchnorm.datasets.feature_sums import COUNTS
from batchnorm.datasets.measurement import data_statistics
from batchnorm.datasets.measuring import measure

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

U = 2.0**-53  # unit roundoff of float64
TYPES = ["f8", "f4", "f2", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", ">f8", ">i4", "g"]
instruction_sets = feature_sums._native.instruction_sets() if feature_sums._native else []


@pytest.fixture(params=[*instruction_sets, "numpy"])
def computed_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each instruction set in turn, then NumPy alone."""
    if request.param == "numpy":
        monkeypatch.setattr(feature_sums, "_native", None)
        yield "numpy"
    else:
        feature_sums._native.use(request.param)
        yield request.param
        feature_sums._native.use(instruction_sets[0])


def exact(values: Sequence[Any]) -> dict[str, float]:
    """The numbers of one feature in exact arithmetic, rounded once."""
    finite = [Fraction(float(v)) for v in values if math.isfinite(float(v))]
    if not finite:
        return {"count": 0, "mean": math.nan, "m2": 0, "m3": 0, "m4": 0, "minimum": math.nan, "maximum": math.nan}
    mean = sum(finite) / len(finite)
    powers = {f"m{k}": float(sum((v - mean) ** k for v in finite)) for k in (2, 3, 4)}
    return {
        "count": len(finite),
        "mean": float(mean),
        **powers,
        "minimum": float(min(finite)),
        "maximum": float(max(finite)),
    }


def require_exact(found: ColumnStatistics, values: np.ndarray, merges: int = 0) -> None:
    """Compare with exact arithmetic, feature by feature.

    A sum of n rounded terms is off by at most (n + 8) u times the sum of their absolute values (Higham 2002, section
    4.2; the terms have up to 8 roundings); merges add 20 roundings each. Odd powers cancel, so the bound of m3 is
    relative to sum |d|^3 <= sqrt(m2 m4), and those of all powers grow by that of the deviations.
    """
    flat = values.reshape(len(values), -1)
    last = flat.shape[1] - 1
    for f in sorted({0, last // 2, last}) if flat.size > 2000 else range(last + 1):
        right, column = exact(flat[:, f]), flat[:, f]
        bound = (len(column) + 20 + 20 * merges) * U
        scale = {"m2": right["m2"], "m3": math.sqrt(right["m2"]) * math.sqrt(right["m4"]), "m4": right["m4"]}
        got = {name: getattr(found, name).reshape(-1)[f] for name in right}
        for name in ("count", "minimum", "maximum"):
            np.testing.assert_equal(got[name], right[name])
        # the mean and its low part together are right to the digits of the deviations; rounded, to one unit
        np.testing.assert_allclose(got["mean"], right["mean"], rtol=2 * U, atol=bound * math.sqrt(right["m2"] or 0))
        for name, size in scale.items():
            assert abs(got[name] - right[name]) <= 4 * bound * size, (name, got[name], right[name], f)


def numbers(kind: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Values of a type over much of its range; of floats also far from zero."""
    random, dtype = np.random.default_rng(seed), np.dtype(kind)
    if dtype.kind == "b":
        return random.random(shape) < 0.3
    if dtype.kind == "f":
        return (random.normal(size=shape) * 3 + 40).astype(dtype)
    limits = np.iinfo(dtype)
    least, most = max(limits.min, -(2**53)), min(limits.max, 2**53)
    return random.integers(least, most, size=shape, dtype=np.int64, endpoint=True).astype(dtype)


@pytest.mark.parametrize(
    "shape", [(1,), (31,), (4133,), (257, 3), (1000, 5), (700, 63), (600, 64), (530, 97), (9, 2, 3)]
)
@pytest.mark.parametrize("kind", TYPES)
def test_every_type_and_shape_is_exact(computed_by: str, kind: str, shape: tuple[int, ...]) -> None:
    if kind not in {"f8", "f4", "u1"}:
        shape = (min(shape[0], 150), *shape[1:])  # the arithmetic is the same from the widened vector on
    values = numbers(kind, shape)
    require_exact(ColumnStatistics.of(Column(values)), values, merges=math.ceil(len(values) / 512))


LAYOUTS = {
    "reversed": lambda x: x[::-1],
    "every second row": lambda x: x[::2],
    "every second feature": lambda x: x[:, ::2],
    "columns are contiguous": np.asfortranarray,
    "features reversed": lambda x: x[:, ::-1],
    "one row repeated": lambda x: np.broadcast_to(x[:1], x.shape),
    "a window of wider rows": lambda x: np.concatenate([x, x], 1)[:, 3 : 3 + x.shape[1]],
    "not aligned": lambda x: np.frombuffer(b"\0" + x.tobytes(), dtype=np.uint8)[1:].view(x.dtype).reshape(x.shape),
    "fields of records": lambda x: np.array([(0, row) for row in x], dtype=[("a", "u1"), ("x", x.dtype, x.shape[1:])])[
        "x"
    ],
}


@pytest.mark.parametrize("features", [6, 70])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["f8", "f4", "u1"])
def test_every_layout_gives_the_same(computed_by: str, kind: str, layout: str, features: int) -> None:
    values = LAYOUTS[layout](numbers(kind, (300, features)))
    assert values.base is not None or layout in {"columns are contiguous", "one row repeated"}
    require_exact(ColumnStatistics.of(Column(values)), values)


@pytest.mark.parametrize("kind", ["f8", "f4", "f2"])
@pytest.mark.parametrize("features", [1, 3, 64])
def test_nan_and_infinities_are_counted_and_left_out_wherever_they_are(
    computed_by: str, kind: str, features: int
) -> None:
    values, random = numbers(kind, (2000, features)), np.random.default_rng(1)
    for what in (np.nan, np.inf, -np.inf):
        values[random.random(values.shape) < 0.01] = what
    values[[0, -1], 0] = np.nan, np.inf
    found = ColumnStatistics.of(Column(values))
    require_exact(found, values)
    np.testing.assert_array_equal(found.nan, np.isnan(values).sum(0))
    np.testing.assert_array_equal(found.infinite, np.isinf(values).sum(0))
    np.testing.assert_array_equal(found.values, len(values))


@pytest.mark.parametrize("kind", ["f8", "i2"])
@pytest.mark.parametrize("each", [False, True], ids=["rows", "values"])
@pytest.mark.parametrize("shape", [(5000,), (1500, 3), (600, 65)])
def test_null_values_are_left_out_and_counted(computed_by: str, shape: tuple[int, ...], each: bool, kind: str) -> None:
    random = np.random.default_rng(2)
    values = numbers(kind, shape)
    present = random.random(shape if each else shape[:1]) < 0.7
    present[: len(present) // 2] = True  # chunks without and with nulls
    wide = np.broadcast_to(present.reshape(len(present), -1), values.reshape(len(values), -1).shape)
    kept = np.where(wide, values.reshape(wide.shape).astype(float), np.nan)
    found = ColumnStatistics.of(Column(values, present))
    require_exact(found, kept)
    np.testing.assert_array_equal(found.null.reshape(-1), (~wide).sum(0))
    np.testing.assert_array_equal(found.nan, 0)


@pytest.mark.parametrize("parts", [1, 1000], ids=["at once", "in 1000 parts"])
@pytest.mark.parametrize(("mean", "std"), [(1e6, 1e-2), (1e9, 0.1), (-1e12, 1.0)])
def test_the_variance_of_a_million_values_far_from_zero_has_twelve_digits(
    computed_by: str, mean: float, std: float, parts: int
) -> None:
    """The bound: (v + 20 p) u for parts of v values that are merged in p steps, here 12 digits at least."""
    values = np.random.default_rng(0).normal(mean, std, 200_000 if computed_by == "numpy" else 1_000_000)
    wide = values.astype(np.longdouble)
    right = ((wide - wide.mean()) ** 2).mean()
    found = union([one(part) for part in np.array_split(values, parts)]).columns["x"]
    assert abs(float(found.var / right - 1)) <= 1e-12
    assert abs(float((found.mean.astype(np.longdouble) + found.mean_low) / wide.mean() - 1)) <= 1e-18


def one(values: np.ndarray, rows: int | None = None, sources: tuple[Source, ...] = ()) -> DataStatistics:
    total = Partial(len(values) if rows is None else rows, {"x": ColumnStatistics.of(Column(values))})
    return DataStatistics(total, sources=sources)


@pytest.mark.parametrize("features", [1, 3, 64, 100])
def test_a_constant_feature_has_exactly_no_spread(computed_by: str, features: int) -> None:
    values = np.full((10_000, features), 0.1)
    found = ColumnStatistics.of(Column(values)) + ColumnStatistics.of(Column(values[:77]))
    for name, value in {"mean": 0.1, "mean_low": 0, "m2": 0, "m3": 0, "m4": 0, "std": 0}.items():
        np.testing.assert_array_equal(getattr(found, name), value)


def test_values_whose_squares_are_too_large_have_their_mean_and_an_infinite_m2(computed_by: str) -> None:
    values = np.array([1e300, -1e300, 3e300] * 50)
    for parts in (1, 2, 7):
        found = union([one(part) for part in np.array_split(values, parts)]).columns["x"]
        assert (found.count, found.m2, found.m4) == (150, np.inf, np.inf)
        assert np.isnan(found.m3)
        np.testing.assert_allclose(found.mean, 1e300, rtol=1e-14)


@pytest.mark.parametrize("features", [1, 64])
def test_the_mean_of_the_largest_numbers_is_no_overflow(computed_by: str, features: int) -> None:
    values = np.full((100, features), 1.7e308)
    values[::2] *= 0.5
    found = ColumnStatistics.of(Column(values)) + ColumnStatistics.of(Column(-values))
    np.testing.assert_allclose(ColumnStatistics.of(Column(values)).mean, 1.7e308 * 0.75, rtol=1e-12)
    np.testing.assert_allclose(found.mean, 0, atol=1e300)
    np.testing.assert_array_equal(found.m2, np.inf)


def test_tiny_numbers_keep_their_moments_as_far_as_float64_reaches(computed_by: str) -> None:
    values = np.array([5e-324, 1e-320, 0.0, 2e-310] * 30)
    found = ColumnStatistics.of(Column(values))
    assert 0 < found.mean < 1e-310
    assert (found.minimum, found.maximum, found.m2) == (0, 2e-310, 0)


def test_no_values_at_all(computed_by: str) -> None:
    for shape in [(0,), (0, 3), (0, 2, 2), (4, 0)]:
        found = ColumnStatistics.of(Column(np.zeros(shape)))
        assert found.shape == shape[1:]
        np.testing.assert_array_equal(found.count, 0)
        for name in ("mean", "var", "unbiased_var", "std", "minimum", "maximum", "skewness", "kurtosis", "nan_share"):
            np.testing.assert_array_equal(getattr(found, name), np.nan)


def test_one_value(computed_by: str) -> None:
    found = ColumnStatistics.of(Column(np.array([7.0])))
    assert (found.count, found.mean, found.var, found.std) == (1, 7, 0, 0)
    for name in ("unbiased_var", "standard_error", "standard_error_of_var", "skewness", "kurtosis"):
        assert np.isnan(getattr(found, name))


@pytest.mark.parametrize("kind", ["u1", "i2", "u4", "i4"])
def test_sums_of_integers_are_exact(computed_by: str, kind: str) -> None:
    """Deviations of n integers below 2^32 have errors of u 2^32, and their sum one of n^2 u 2^32 < 0.5 at most."""
    values = np.random.default_rng(0).integers(np.iinfo(kind).min, np.iinfo(kind).max, 1000, dtype=kind, endpoint=True)
    found = ColumnStatistics.of(Column(values))
    total = Fraction(float(found.mean)) + Fraction(float(found.mean_low))
    assert round(total * 1000) == sum(values.tolist())


def test_integers_are_read_exactly_up_to_two_to_the_53_and_rounded_beyond(computed_by: str) -> None:
    values = np.array([2**53, -(2**53), 2**53 - 1, 1, 2**40 + 1] * 100, dtype=np.int64)
    found = ColumnStatistics.of(Column(values))
    require_exact(found, values)
    assert (found.minimum, found.maximum) == (-(2**53), 2**53)
    assert ColumnStatistics.of(Column(np.array([2**53 + 1]))).mean == 2**53
    assert ColumnStatistics.of(Column(np.array([2**64 - 1], dtype=np.uint64))).maximum == 2.0**64


def test_moments_of_higher_order_match_their_definitions(computed_by: str) -> None:
    values = np.random.default_rng(3).gamma(2.0, size=20_000)
    found, z = ColumnStatistics.of(Column(values)), (values - values.mean()) / values.std()
    # z has rounding errors of a few u, and its powers are means of 20,000 rounded numbers
    np.testing.assert_allclose(found.skewness, (z**3).mean(), rtol=20_000 * U)
    np.testing.assert_allclose(found.kurtosis, (z**4).mean(), rtol=20_000 * U)
    n, var = len(values), values.var()
    error = math.sqrt((((values - values.mean()) ** 4).mean() - var**2 * (n - 3) / (n - 1)) / n)
    np.testing.assert_allclose(found.standard_error_of_var, error, rtol=1e-10)
    np.testing.assert_allclose(found.standard_error, values.std(ddof=1) / math.sqrt(n), rtol=1e-12)


def test_the_standard_error_of_the_variance_is_that_of_repeated_samples() -> None:
    """The spread of 4,000 variances has a standard error of about 2 % (kurtosis below 10)."""
    samples = np.random.default_rng(4).exponential(size=(4000, 200))
    of_each = ColumnStatistics.of(Column(samples.T)).standard_error_of_var
    measured = samples.var(axis=1, ddof=1).std()
    assert abs(np.sqrt((of_each**2).mean()) / measured - 1) < 0.1


FLOATS = st.floats(-1e6, 1e6, allow_subnormal=False) | st.sampled_from([np.nan, np.inf, -np.inf])
COLUMNS = st.integers(0, 40).flatmap(lambda n: arrays(np.float64, n, elements=FLOATS))


@settings(max_examples=60, deadline=None)
@given(COLUMNS, COLUMNS, COLUMNS)
def test_addition_is_associative_and_commutative_to_rounding(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
    first, second, third = (ColumnStatistics.of(Column(each)) for each in (a, b, c))
    whole = np.concatenate([a, b, c])
    for found in ((first + second) + third, first + (second + third), (third + first) + second):
        require_near(found, whole)


def require_near(found: ColumnStatistics, values: np.ndarray) -> None:
    """Equal to exact arithmetic within 120 roundings of the sum of absolute terms, whatever the order was."""
    right = exact(values)
    np.testing.assert_array_equal([found.nan, found.infinite], [np.isnan(values).sum(), np.isinf(values).sum()])
    assert found.count == right["count"]
    for name in ("m2", "m3", "m4"):
        size = math.sqrt(right["m2"]) * math.sqrt(right["m4"]) if name == "m3" else right[name]
        # powers of deviations below 1e-75 underflow
        assert abs(getattr(found, name) - right[name]) <= 500 * U * size + 1e-290, name


@settings(max_examples=40, deadline=None)
@given(arrays(np.float64, 60, elements=FLOATS), st.lists(st.integers(0, 60), max_size=6), st.randoms())
def test_splits_and_permutations_change_rounding_only(values: np.ndarray, cuts: list[int], random: Any) -> None:
    parts = np.split(values, sorted(cuts))
    random.shuffle(parts)
    require_near(union([one(part) for part in parts]).columns["x"] if len(values) else None, values)


def test_blocks_that_are_added_in_turn_are_their_union(computed_by: str) -> None:
    values = numbers("f8", (3000, 4))
    running = RunningStatistics(Column(values[:1]))
    for part in np.array_split(values, 7):
        running.add(Column(part))
    require_exact(running.statistics, values, merges=8)
    before = running.statistics
    running.add(Column(values))
    assert before == before.mapped(np.copy)
    assert before.count[0] == 3000  # a result does not change with later blocks


def test_the_unit_divides_the_statistics_and_not_the_values(computed_by: str) -> None:
    values = numbers("u1", (5000, 3))
    found = ColumnStatistics.of(Column(values, unit=255.0))
    wide = values.astype(np.longdouble) / 255
    mean = found.mean.astype(np.longdouble) + found.mean_low
    # d = x - center is rounded by u |d| at most, and so is each partial sum of a chunk: 20 u std are far more
    np.testing.assert_allclose(mean, wide.mean(0), rtol=0, atol=20 * U * found.std.max())
    np.testing.assert_allclose(found.var, wide.var(0).astype(float), rtol=(len(values) + 20) * U)
    np.testing.assert_allclose(found.m3, ((wide - wide.mean(0)) ** 3).sum(0).astype(float), rtol=1e-9)
    np.testing.assert_array_equal(found.maximum, values.max(0) / 255)


NO_NUMBERS = [["a"], [1j], [None], np.zeros(2, "M8[s]"), np.zeros(2, "m8[s]"), np.zeros(2, "V3")]


@pytest.mark.parametrize("values", NO_NUMBERS, ids=[str(np.asarray(values).dtype) for values in NO_NUMBERS])
def test_values_that_are_no_real_numbers_are_refused(values: Any) -> None:
    with pytest.raises(TypeError, match="expected real numbers, got an array of"):
        ColumnStatistics.of(Column(np.asarray(values)))


@pytest.mark.parametrize("present", [np.ones(2, bool), np.ones((3, 2), bool), np.ones(3)])
def test_flags_of_another_shape_or_type_are_refused(present: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected booleans of shape"):
        ColumnStatistics.of(Column(np.zeros((3, 4)), present))


def test_columns_of_other_shapes_or_units_are_refused() -> None:
    a = ColumnStatistics.of(Column(np.zeros((3, 4))))
    with pytest.raises(ValueError, match=r"features of one shape, got \(4,\) and \(5,\)"):
        a + ColumnStatistics.of(Column(np.zeros((3, 5))))
    with pytest.raises(ValueError, match="in units of 255"):
        RunningStatistics(Column(np.zeros(3), unit=255.0)).add(Column(np.zeros(3)))


# ---- data


class Rows:
    """A piece with given blocks."""

    file, key, size = "rows", "rows", 1

    def __init__(self, *blocks: Block) -> None:
        self.given = blocks

    def blocks(self, selection: Selection) -> Iterator[Block]:
        return iter(self.given)


def test_a_piece_without_blocks_has_no_rows_and_adds_nothing() -> None:
    nothing, something = measure(Rows(), Selection()), one(np.arange(5.0))
    assert nothing == DataStatistics(Partial(0, {}))
    assert nothing + something == something == something + nothing
    assert union([]) == nothing


def test_wide_tables_have_blocks_with_some_of_the_columns() -> None:
    x = np.arange(6.0)
    blocks = [
        Block(3, {"x": Column(x[:3])}),
        Block(0, {"y": Column(-x[:3])}),
        Block(3, {"x": Column(x[3:])}),
        Block(0, {"y": Column(-x[3:])}),
    ]
    found = measure(Rows(*blocks), Selection())
    assert found.rows == 6
    assert found.columns["y"].mean == -found.columns["x"].mean == -2.5


def test_groups_are_measured_apart_and_their_union_is_the_total() -> None:
    random = np.random.default_rng(5)
    x, v, key = random.normal(size=900), random.normal(size=(900, 3)), random.choice(["b", "a", "(null)"], 900)
    present = random.random(900) < 0.9
    labels = ("never", "a", "b", "(null)")
    index = np.array([labels.index(k) for k in key])
    columns = {"x": Column(x, present), "v": Column(v)}
    for block in (Block(900, columns, key), Block(900, columns, index, labels)):
        found = measure(Rows(block), Selection(by="k"))
        assert list(found.groups) == ["(null)", "a", "b"]
        assert found.by == "k"
        for name, group in found.groups.items():
            assert group.rows == (key == name).sum()
            require_exact(group.columns["v"], v[key == name])
            require_exact(group.columns["x"], x[(key == name) & present])
            assert group.columns["x"].null == ((key == name) & ~present).sum()
        require_exact(found.columns["v"], v, merges=3)
        assert found.columns["x"].null == (~present).sum()
        assert found.rows == 900


def test_a_block_with_one_group_and_groups_over_several_blocks() -> None:
    found = measure(
        Rows(Block(2, {"x": Column(np.array([1.0, 2.0]))}, "cat"), Block(1, {"x": Column(np.array([5.0]))}, "dog"),
             Block(1, {"x": Column(np.array([3.0]))}, "cat")), Selection(by="folder"),
    )  # fmt: skip
    assert {name: (part.rows, float(part.columns["x"].mean)) for name, part in found.groups.items()} == {
        "cat": (3, 2),
        "dog": (1, 5),
    }


def test_too_few_groups_for_the_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="a group for each of 3 rows, got 2"):
        measure(Rows(Block(3, {"x": Column(np.zeros(3))}, np.array(["a", "b"]))), Selection(by="k"))


def test_groups_are_merged_by_name() -> None:
    def data(**groups: float) -> DataStatistics:
        parts = {name: one(np.array([value])).total for name, value in groups.items()}
        return DataStatistics(union([DataStatistics(part) for part in parts.values()]).total, "k", parts)

    both = data(a=1, b=2) + data(b=4, c=8)
    assert {name: float(part.columns["x"].mean) for name, part in both.groups.items()} == {"a": 1, "b": 3, "c": 8}
    assert both.rows == 4
    with pytest.raises(ValueError, match="by one column of groups"):
        both + one(np.zeros(2))


def test_a_union_has_the_same_bits_at_every_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [one(part) for part in np.array_split(numbers("f8", (5003,)), 37)]
    whole = union(parts)
    monkeypatch.setattr("batchnorm.datasets.partial_statistics._STACKED", 3)
    assert union(parts) == whole
    neighbours = parts
    while len(neighbours) > 1:
        even = len(neighbours) - len(neighbours) % 2
        neighbours = [a + b for a, b in zip(neighbours[0:even:2], neighbours[1:even:2], strict=True)] + neighbours[
            even:
        ]
    assert neighbours[0] == whole


def test_the_union_of_ten_thousand_parts_keeps_the_digits_of_one() -> None:
    values = np.random.default_rng(6).normal(1e9, 0.1, 50_000)
    found, wide = (
        union([one(part) for part in np.array_split(values, 10_000)]).columns["x"],
        values.astype(np.longdouble),
    )
    assert abs(float(found.var / wide.var() - 1)) < 1e-13


def test_columns_in_another_order_are_merged_by_name() -> None:
    x, y = (ColumnStatistics.of(Column(np.array([value]))) for value in (1.0, 2.0))
    both = Partial(1, {"x": x, "y": y}) + Partial(1, {"y": y, "x": x})
    assert list(both.columns) == ["x", "y"]
    assert (both.columns["x"].mean, both.columns["y"].mean) == (1, 2)


def test_what_differs_is_named() -> None:
    x, v = (ColumnStatistics.of(Column(np.zeros(shape))) for shape in (2, (2, 3)))
    with pytest.raises(ValueError, match=r"only one side has \['y'\]; only one side has \['z'\]"):
        Partial(2, {"x": x, "y": x}) + Partial(2, {"x": x, "z": x})
    with pytest.raises(ValueError, match=r"one shape in column 'x', got \(\) and \(3,\)"):
        Partial(2, {"x": x}) + Partial(2, {"x": v})


def test_a_file_that_is_counted_twice_is_refused_by_name() -> None:
    def data(file: str, fingerprint: str = "10-20") -> DataStatistics:
        return one(np.zeros(2), sources=(Source(file, fingerprint, 10, 2),))

    assert len((data("a/1.csv") + data("a/2.csv")).sources) == 2
    assert (data("a/1.csv") + data("a/1.csv", "10-21")).rows == 4  # the file has new content
    for other in ("a/1.csv", "b/1.csv"):
        with pytest.raises(ValueError, match=r"counted once, got 1\.csv twice"):
            data("a/1.csv") + data(other)


def test_features_have_names_in_the_order_of_columns() -> None:
    columns = {"a": np.arange(4.0), "v": np.arange(8.0).reshape(4, 2), "m": np.arange(16.0).reshape(4, 2, 2)}
    data = DataStatistics(Partial(4, {name: ColumnStatistics.of(Column(x)) for name, x in columns.items()}))
    names, found = data.features()
    assert names == ["a", "v[0]", "v[1]", "m[0,0]", "m[0,1]", "m[1,0]", "m[1,1]"]
    np.testing.assert_array_equal(found.mean, [1.5, 3, 4, 6, 7, 8, 9])
    assert data.features(["m", "a"])[0] == ["m[0,0]", "m[0,1]", "m[1,0]", "m[1,1]", "a"]
    np.testing.assert_array_equal(data.moments(["v"]).mean, [3, 4])
    np.testing.assert_array_equal(data.moments().var, found.var)
    with pytest.raises(ValueError, match="expected names of columns, got 'w'"):
        data.moments(["w"])
    with pytest.raises(ValueError, match="at least one column"):
        DataStatistics(Partial(0, {})).features()


def test_equality_sees_every_number() -> None:
    a = one(np.arange(5.0))
    assert a == one(np.arange(5.0))
    for name in (*COUNTS, "mean_low", "m4"):
        changed = a.columns["x"].mapped(np.copy)
        getattr(changed, name)[...] += 1
        assert a != DataStatistics(Partial(5, {"x": changed}))
    assert a != one(np.arange(5.0), rows=4)
    assert a != "something else"


@pytest.mark.parametrize("shape", [(0,), (0, 3)])
def test_numpy_adds_a_block_without_rows_whose_nulls_are_known(shape, monkeypatch) -> None:
    monkeypatch.setattr(feature_sums, "_native", None)
    sums = feature_sums.FeatureSums.empty((3,)).add(np.zeros((0, 3)), np.zeros(shape, dtype=bool))
    assert not sums.counts.any()


def test_groups_of_an_arrow_file_are_the_values_of_its_column(tmp_path) -> None:
    table = pa.table({"x": [1.0, 2.0, 4.0], "g": ["a", None, "a"]})
    feather.write_feather(table, str(tmp_path / "t.arrow"))
    found = data_statistics(tmp_path / "t.arrow", by="g")
    assert {name: group.rows for name, group in found.groups.items()} == {"(null)": 1, "a": 2}


def test_files_of_one_name_size_and_time_in_two_folders_can_be_merged_with_others(tmp_path) -> None:
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        name = "new.npy" if folder == "c" else "part.npy"
        np.save(tmp_path / folder / name, np.full(4, ord(folder) - 96.0))
        os.utime(tmp_path / folder / name, (1e9, 1e9))
    old = data_statistics([tmp_path / "a", tmp_path / "b"])
    both = old + data_statistics(tmp_path / "c")
    assert (both.rows, float(both.columns["values"].mean)) == (12, 2.0)
    with pytest.raises(ValueError, match=r"counted once, got part\.npy twice"):
        old + data_statistics(tmp_path / "b")
