"""Moments are an exact, commutative algebra over (count, mean, m2), and every method of theirs is checked."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchnorm import moments as module
from batchnorm.kernels.cpu import INSTRUCTION_SET
from batchnorm.moments import Moments

U = 2.0**-53  # unit roundoff of float64
CHANNELS = 2


# --- what is exact: rational arithmetic over the same values ---------------------------------------------


def exact(values: list[float]) -> tuple[Fraction, Fraction]:
    """Mean and m2 without any rounding."""
    rational = [Fraction(v) for v in values]
    mean = sum(rational) / len(rational)
    return mean, sum((v - mean) ** 2 for v in rational)


def bounds(values: list[float], m2: float, largest: float) -> tuple[float, float]:
    """How far rounding can move the mean and m2 of ``values`` in any order of two-pass sums, + and -.

    Each value takes part in at most n additions and, once a piece, in the 8 operations of a merge, so a mean
    is wrong by at most e = C u max|x| with C = 9 n + 9. A squared distance d^2 between means that are wrong
    by e is wrong by 2 d e + e^2; summed over n values, with Cauchy-Schwarz, that is 2 e sqrt(n m2) + n e^2.
    """
    n = len(values)
    e = (9 * n + 9) * U * largest
    return e, (9 * n + 9) * U * m2 + 2 * e * math.sqrt(n * m2) + n * e**2


def assert_moments_of(found: Moments, channels: list[list[float]]) -> None:
    for i, values in enumerate(channels):
        count, mean, m2 = (t.expand(CHANNELS)[i].item() for t in (found.count, found.mean, found.m2))
        assert count == len(values)
        if not values:
            assert math.isnan(mean)
            assert m2 == 0
            continue
        true_mean, true_m2 = exact(values)
        e, e2 = bounds(values, float(true_m2), max(map(abs, values)))
        assert abs(Fraction(mean) - true_mean) <= e
        assert abs(Fraction(m2) - true_m2) <= e2


def same_bits(a: Moments, b: Moments) -> bool:
    """Equal to the last bit, -0.0 and 0.0 apart; one NaN is as good as another."""
    return all(
        x.expand(y.shape).nan_to_num(0.5).numpy().tobytes() == y.nan_to_num(0.5).numpy().tobytes()
        for x, y in ((a.count, b.count), (a.mean, b.mean), (a.m2, b.m2))
    )


# --- laws -------------------------------------------------------------------------------------------------

# locations far from zero are where E[x^2] - E[x]^2 would lose everything
_location = st.sampled_from([0.0, 1.0, -1e3, 1e6, -1e8])
_value = st.floats(-1, 1, width=32)


@st.composite
def piece(draw: st.DrawFn) -> list[list[float]]:
    """Values of each channel, none and one included."""
    return [
        [location + v for v in draw(st.lists(_value, max_size=6))]
        for location in [draw(_location) for _ in range(CHANNELS)]
    ]


def measure(channels: list[list[float]]) -> Moments:
    """Moments of lists of different lengths, the shorter ones padded with NaN under a mask."""
    longest = max(map(len, channels))
    x = torch.full((longest, CHANNELS), torch.nan, dtype=torch.float64)
    for i, values in enumerate(channels):
        x[: len(values), i] = torch.tensor(values, dtype=torch.float64)
    return Moments.of(x, mask=~x.isnan())


def together(*pieces: list[list[float]]) -> list[list[float]]:
    return [[value for p in pieces for value in p[i]] for i in range(CHANNELS)]


@pytest.mark.slow
@given(piece())
def test_moments_equal_the_exact_result_within_the_bound_of_their_roundings(a):
    assert_moments_of(measure(a), a)


@pytest.mark.slow
@given(piece())
def test_adding_nothing_changes_no_bit(a):
    found = measure(a)
    for nothing in (Moments.empty(), Moments.empty((CHANNELS,)), measure([[], []])):
        assert same_bits(found + nothing, found)
        assert same_bits(nothing + found, found)
        assert same_bits(found - nothing, found)


@pytest.mark.slow
@given(piece(), piece())
def test_addition_gives_the_moments_of_both_parts_in_either_order(a, b):
    assert_moments_of(measure(a) + measure(b), together(a, b))
    assert_moments_of(measure(b) + measure(a), together(a, b))


@pytest.mark.slow
@given(piece(), piece(), piece())
def test_addition_may_be_grouped_in_any_way(a, b, c):
    x, y, z = measure(a), measure(b), measure(c)
    assert_moments_of((x + y) + z, together(a, b, c))
    assert_moments_of(x + (y + z), together(a, b, c))
    assert_moments_of((x + z) + y, together(a, b, c))


@pytest.mark.slow
@given(piece(), piece())
def test_subtraction_takes_out_what_addition_put_in(a, b):
    found = (measure(a) + measure(b)) - measure(b)
    whole = together(a, b)
    for i, values in enumerate(a):
        assert found.count.expand(CHANNELS)[i] == len(values)
        if not values:
            assert found.mean[i].isnan()
            assert found.m2[i] == 0
            continue
        mean, m2 = exact(values)
        _, whole_m2 = exact(whole[i])
        # the means of the whole and of b, each wrong by e, lie n / n_a times closer together than a and b do
        e, e2 = bounds(whole[i], float(whole_m2), max(map(abs, whole[i])))
        n = len(whole[i])
        assert abs(Fraction(found.mean[i].item()) - mean) <= 2 * n * e
        distance = math.sqrt(whole_m2)
        assert abs(Fraction(found.m2[i].item()) - m2) <= 2 * e2 + n**2 * (4 * distance * e + 4 * e**2)


@pytest.mark.slow
@given(piece())
def test_subtracting_all_of_it_leaves_nothing(a):
    found = measure(a)
    rest = found - found
    assert not rest.count.any()
    assert rest.mean.isnan().all()
    assert not rest.m2.any()


def test_subtracting_more_than_is_there_is_refused():
    a, b = Moments.of(torch.randn(3, 2)), Moments.of(torch.randn(4, 2))
    with pytest.raises(ValueError, match=r"needs b to be a part of a, got count 3 - 4\. Subtract only what was"):
        a - b


def test_only_moments_can_be_added_or_subtracted():
    a = Moments.of(torch.randn(3, 2))
    with pytest.raises(TypeError, match="unsupported operand"):
        a + 1
    with pytest.raises(TypeError, match="unsupported operand"):
        a - 1


def test_moments_of_different_channels_are_refused():
    a, b = Moments.of(torch.randn(3, 2)), Moments.of(torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"must have the same channels, got shapes \(2,\) and \(4,\)\. Measure both"):
        a + b
    with pytest.raises(ValueError, match="same channels"):
        a.w2(b)


# --- measuring --------------------------------------------------------------------------------------------


@pytest.fixture
def million() -> np.ndarray:
    """Values around 1e6 with a spread of 1e-3, whose variance float64 itself resolves to about ten digits."""
    return 1e6 + 1e-3 * np.random.default_rng(7).standard_normal((4000, 3))


def relative_error_of_var(found: Moments, values: np.ndarray) -> float:
    worst = 0.0
    for var, column in zip(found.var.tolist(), values.T, strict=True):
        true = exact(column.tolist())[1] / len(column)
        worst = max(worst, abs(float((Fraction(var) - true) / true)))
    return worst


def test_mean_a_million_and_std_a_thousandth_keep_six_digits_of_the_variance(million):
    x = torch.from_numpy(million)
    assert relative_error_of_var(Moments.of(x), million) < 1e-6


@pytest.mark.slow
def test_six_digits_survive_merging_many_uneven_pieces_in_any_order(million):
    x = torch.from_numpy(million)
    pieces = [Moments.of(part) for part in x.split([1, 2, 997, 500, 1, 1499, 1000])]
    for order in (pieces, pieces[::-1]):
        assert relative_error_of_var(sum(order, Moments.empty()), million) < 1e-6
    singles = sum((Moments.of(row[None]) for row in x[:500]), Moments.empty())
    assert relative_error_of_var(singles, million[:500]) < 1e-6


def test_six_digits_survive_taking_a_part_out_again(million):
    x = torch.from_numpy(million)
    rest = Moments.of(x) - Moments.of(x[1000:])
    assert relative_error_of_var(rest, million[:1000]) < 1e-6


@pytest.mark.parametrize("weight", [None, torch.ones(())], ids=["plain", "weighted"])
def test_the_rounding_of_the_mean_does_not_enter_the_variance(weight):
    """Values a few ulps apart: their mean is wrong by half an ulp, their deviations are exact."""
    ulp = 2.0**-12
    x = 2.0**40 + ulp * torch.randint(0, 4, (101, 5), dtype=torch.float64)
    found = Moments.of(x, weight=weight)
    for i, column in enumerate(x.T.tolist()):
        true = float(exact(column)[1])
        assert found.m2[i].item() == pytest.approx(true, rel=(101 + 8) * U)


@pytest.mark.skipif(INSTRUCTION_SET is None, reason="built without a compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("axis", [1, -2])
def test_the_native_kernel_measures_the_channels_of_usual_tensors(monkeypatch, dtype, axis):
    """It takes a twentieth of the time of the way for all others; both are the moments to rounding."""
    x = torch.randn(5, 3, 7).to(dtype)
    native = Moments.of(x, axis)
    monkeypatch.setattr(module, "_two_pass", None)  # the way for all others
    assert torch.equal(Moments.of(x, axis).mean, native.mean)
    monkeypatch.undo()
    monkeypatch.setattr(module, "_is_native", lambda _: False)
    other = Moments.of(x, axis)
    n = x.numel() / 3
    torch.testing.assert_close(native.mean, other.mean, rtol=0, atol=n * U * float(x.abs().max()))
    torch.testing.assert_close(native.m2, other.m2, rtol=9 * n * U, atol=0)


@pytest.mark.parametrize("shape", [(7, 3), (1, 3, 50), (2, 3, 5, 6)], ids=str)
@pytest.mark.parametrize("with_mask", [False, True], ids=["plain", "masked"])
def test_measuring_in_chunks_gives_the_same_as_at_once(monkeypatch, shape, with_mask):
    x = 1e3 + torch.randn(shape, dtype=torch.float64)
    mask = torch.rand(shape) < 0.7 if with_mask else None
    at_once, sizes = Moments.of(x, mask=mask), []
    two_pass = module._two_pass
    monkeypatch.setattr(module, "_CHUNK", 12)
    monkeypatch.setattr(module, "_is_native", lambda _: False)
    monkeypatch.setattr(module, "_two_pass", lambda part, *rest: sizes.append(part.numel()) or two_pass(part, *rest))
    chunked = Moments.of(x, mask=mask)
    assert len(sizes) > 1
    assert max(sizes) <= 12
    assert torch.equal(chunked.count, at_once.count)
    n = x.numel() / 3
    torch.testing.assert_close(chunked.mean, at_once.mean, rtol=9 * n * U, atol=0)
    # kappa^2 = mean^2 / var = 1e6 multiplies the square of the error of the mean (Chan et al. 1979, section 3)
    torch.testing.assert_close(chunked.m2, at_once.m2, rtol=9 * n * U * (1 + 2e3), atol=0)


@pytest.mark.parametrize(
    ("axis", "over"), [(1, (0, 2)), (-2, (0, 2)), (2, (0, 1)), (0, (1, 2)), ((1, 2), (0,)), ((-1, 0), (1,))], ids=str
)
def test_the_channel_axis_stays_and_all_others_are_measured_over(axis, over):
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    found = Moments.of(x, axis)
    mean, var = x.mean(over), x.var(over, correction=0)
    if axis == (-1, 0):  # channel axes keep the order in which they are named
        mean, var = mean.T, var.T
    assert found.count == x.numel() / mean.numel()
    torch.testing.assert_close(found.mean, mean, rtol=20 * U, atol=20 * U)
    torch.testing.assert_close(found.var, var, rtol=40 * U, atol=0)


def test_without_a_channel_axis_all_values_are_one_channel():
    x = torch.randn(4, 3, dtype=torch.float64)
    found = Moments.of(x, None)
    assert found.shape == ()
    assert found.count == 12
    torch.testing.assert_close(found.mean, x.mean(), rtol=12 * U, atol=12 * U)
    assert Moments.of(torch.tensor(5.0), None).mean == 5


def test_with_all_axes_as_channels_each_value_is_its_own_mean():
    x = torch.randn(2, 3)
    found = Moments.of(x, (0, 1))
    assert found.count == 1
    assert torch.equal(found.mean, x.double())
    assert not found.m2.any()


def test_nothing_measured_has_count_zero_and_no_mean():
    found = Moments.of(torch.empty(0, 2))
    assert found.count == 0
    assert found.mean.isnan().all()
    assert not found.m2.any()
    for undefined in (found.var, found.unbiased_var, found.std, found.standard_error):
        assert undefined.isnan().all()


def test_a_single_value_has_variance_zero_and_no_unbiased_variance():
    found = Moments.of(torch.tensor([[3.0, -1.0]]))
    assert found.mean.tolist() == [3, -1]
    assert found.var.tolist() == found.std.tolist() == [0, 0]
    assert found.unbiased_var.isnan().all()
    assert found.standard_error.isnan().all()


def test_variances_and_standard_error_follow_their_definitions():
    x = np.random.default_rng(1).normal(size=(9, 2))
    found = Moments.of(torch.from_numpy(x))
    for ours, theirs in (
        (found.var, x.var(0)),
        (found.unbiased_var, x.var(0, ddof=1)),
        (found.std, x.std(0)),
        (found.standard_error, scipy.stats.sem(x)),
    ):
        np.testing.assert_allclose(ours, theirs, rtol=40 * U)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8, torch.int16, torch.int64, torch.bool])
def test_narrow_values_are_widened_before_anything_is_added(dtype):
    x = torch.randint(0, 2 if dtype == torch.bool else 200, (500, 2)).to(dtype)
    found = Moments.of(x)
    assert found.mean.dtype == found.m2.dtype == found.count.dtype == torch.float64
    for i in range(2):
        mean, m2 = exact([float(v) for v in x[:, i].tolist()])
        assert found.mean[i].item() == pytest.approx(float(mean), rel=500 * U)
        assert found.m2[i].item() == pytest.approx(float(m2), rel=1500 * U)


def test_a_half_precision_sum_that_would_overflow_does_not():
    assert Moments.of(torch.full((1000, 1), 6e4, dtype=torch.float16)).mean == float(torch.tensor(6e4).half())


def test_integer_weights_count_as_copies():
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    weight = torch.tensor([0, 1, 2, 3, 1, 5])
    copies = Moments.of(x.repeat_interleave(weight, 0))
    found = Moments.of(x, weight=weight[:, None, None])
    assert torch.equal(found.count, copies.count.expand(2))
    torch.testing.assert_close(found.mean, copies.mean, rtol=40 * U, atol=40 * U)
    torch.testing.assert_close(found.m2, copies.m2, rtol=80 * U, atol=0)


def test_weights_and_masks_keep_channels_apart():
    x = torch.tensor([[1.0, 1.0], [3.0, 3.0], [5.0, 5.0]])
    found = Moments.of(x, weight=torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.0]]))
    assert found.count.tolist() == [2.5, 0]
    assert found.mean[0] == (1 + 3 + 2.5) / 2.5
    assert found.mean[1].isnan()
    assert found.m2[1] == 0


def test_what_a_mask_leaves_out_does_not_leak():
    x = torch.randn(8, 3, 4)
    mask = torch.ones(8, 1, 4, dtype=torch.bool)
    mask[2], mask[:, :, 1] = False, False
    poisoned = torch.where(mask, x, torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan]))
    found = Moments.of(poisoned, mask=mask)
    kept = x[[0, 1, 3, 4, 5, 6, 7]][:, :, [0, 2, 3]]
    assert found.count.tolist() == [21, 21, 21]
    torch.testing.assert_close(found.mean, Moments.of(kept).mean, rtol=0, atol=100 * U)
    torch.testing.assert_close(found.m2, Moments.of(kept).m2, rtol=100 * U, atol=0)


def test_a_mask_and_a_weight_work_together_and_a_masked_weight_may_be_anything():
    x = torch.tensor([[1.0], [2.0], [9.0]])
    weight = torch.tensor([[2.0], [4.0], [torch.nan]])
    found = Moments.of(x, weight=weight, mask=torch.tensor([[True], [True], [False]]))
    assert found.count.item() == 6
    assert found.mean.item() == pytest.approx(10 / 6, rel=4 * U)


def test_values_that_are_not_finite_are_measured_as_they_are():
    found = Moments.of(torch.tensor([[1.0, 1.0, 1.0], [torch.nan, torch.inf, 2.0]]))
    assert found.mean[0].isnan()
    assert not found.var[:2].isfinite().any()
    assert found.mean[2] == 1.5


def test_measuring_needs_no_gradient_and_leaves_none_behind():
    x = torch.randn(4, 2, requires_grad=True)
    assert not Moments.of(x, weight=torch.rand(4, 1, requires_grad=True)).m2.requires_grad
    assert not Moments(3.0, x[0], x[1].square()).mean.requires_grad


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, r"needs a real tensor, got torch\.complex64\. Measure x\.real", lambda x: Moments.of(x + 0j)),
        (ValueError, r"channel_axis inside a tensor of 2 dimensions, got 2\. Use", lambda x: Moments.of(x, 2)),
        (ValueError, r"channel_axis inside a tensor of 1 dimensions, got 1\.", lambda x: Moments.of(x[0])),
        (ValueError, r"each channel axis once, got \(1, -1\)\.", lambda x: Moments.of(x, (1, -1))),
        (ValueError, "finite and 0 or more, got a negative", lambda x: Moments.of(x, weight=-torch.ones(()))),
        (ValueError, "finite and 0 or more", lambda x: Moments.of(x, weight=torch.full((), torch.inf))),
        (TypeError, r"a boolean mask, got torch\.int64\. Use weight=", lambda x: Moments.of(x, mask=x.long())),
        (ValueError, r"broadcast to \(3, 2\), got \(\) and \(4, 1\)\. Give", lambda x: Moments.of(x, mask=MASK)),
        (ValueError, r"broadcast to \(3, 2\), got \(4, 1\) and \(\)\.", lambda x: Moments.of(x, weight=MASK)),
        (ValueError, r"mean and m2 of one shape.* got count \(\), mean \(2,\), m2 \(3,\)", lambda x: shapes(2, 3)),
        (ValueError, r"count a scalar or of that shape, got count \(4,\)", lambda x: shapes(2, 2, count=4)),
        (ValueError, r"a finite factor of 0 or more, got -1\.", lambda x: Moments.of(x).scaled(-1)),
        (ValueError, r"a finite factor of 0 or more, got nan\.", lambda x: Moments.of(x).scaled(math.nan)),
        (ValueError, r"momentum in 0\.\.1, got 1\.5\.", lambda x: Moments.of(x).ema(Moments.of(x), 1.5)),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_wrong_input_is_named_in_the_message(error, message, call):
    with pytest.raises(error, match=message):
        call(torch.randn(3, 2))


MASK = torch.ones(4, 1, dtype=torch.bool)


def shapes(mean: int, m2: int, *, count: int | None = None) -> Moments:
    return Moments(torch.ones(()) if count is None else torch.ones(count), torch.ones(mean), torch.ones(m2))


def test_sum_adds_moments_up():
    parts = [Moments.of(torch.randn(5, 2)) for _ in range(3)]
    total, expected = sum(parts), parts[0] + parts[1] + parts[2]
    assert torch.equal(total.mean, expected.mean)
    assert torch.equal(total.m2, expected.m2)
    with pytest.raises(TypeError):
        1 + parts[0]


@pytest.mark.parametrize(("count", "m2"), [(-1.0, 1.0), (3.0, -1e-9)])
def test_a_negative_count_or_spread_is_refused(count, m2):
    with pytest.raises(ValueError, match="needs count and m2 of 0 or more"):
        Moments(torch.tensor(count), torch.zeros(1), torch.tensor([m2]))


def test_what_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match=r"needs a tensor, got list. Convert it with torch.as_tensor"):
        Moments.of([1.0, 2.0], None)
