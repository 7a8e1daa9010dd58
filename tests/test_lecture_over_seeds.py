"""Values of several seeds told as one, and when an arm arrives."""

import math

import pytest
import torch

from batchnorm.lecture import over_seeds
from batchnorm.lecture.ensemble_training import Arrival, first_step
from batchnorm.lecture.verdict import judge, minus


def test_a_ratio_and_its_inverse_give_inverse_factors() -> None:
    ratios = torch.tensor([2.0, 8.0])
    assert over_seeds.factor(ratios) == 4
    assert over_seeds.factor(1 / ratios) == 0.25


def test_a_curve_has_the_middle_and_the_range_over_seeds() -> None:
    values = torch.tensor([[1.0, 2.0, 6.0]])
    point = {"x": 5, "y": 2.0, "low": 1.0, "high": 6.0, "series": "a"}
    assert over_seeds.curve([5], values, series="a") == [point]
    assert over_seeds.curve([5], values, middle=torch.mean, series="a") == [{**point, "y": 3.0}]


def test_a_point_that_one_seed_does_not_have_is_left_out_and_on_a_log_scale_what_is_not_positive() -> None:
    values = torch.tensor([[1.0, math.inf], [1.0, math.nan], [1.0, 0.0], [1.0, 2.0]])
    assert [row["x"] for row in over_seeds.curve(range(4), values)] == [2, 3]
    assert [row["x"] for row in over_seeds.curve(range(4), values, positive=True)] == [3]


def test_figures_are_significant_ones_and_zero_has_no_sign() -> None:
    assert over_seeds.figures(0.0123456) == 0.01235
    assert math.copysign(1, over_seeds.figures(-0.0)) == 1


def test_a_mean_that_does_not_exist_is_none() -> None:
    assert over_seeds.mean(torch.tensor([1.0, 2.0])) == 1.5
    assert over_seeds.mean(torch.tensor([1.0, math.inf])) is None
    assert over_seeds.mean(torch.tensor([1.0, math.nan])) is None


def test_an_interval_holds_its_mean_and_is_wider_at_a_higher_level() -> None:
    values = torch.tensor([1.0, 2.0, 3.0])
    narrow, wide = (over_seeds.interval(values, "y", level) for level in (0.5, 0.95))
    assert narrow["y"] == wide["y"] == 2
    # Student's t with two degrees of freedom: 4.3027 at 97.5%, standard error 1 / sqrt(3)
    assert wide["high"] == pytest.approx(2 + 4.3027 / math.sqrt(3), rel=1e-3)
    assert wide["low"] < narrow["low"] < 2 < narrow["high"] < wide["high"]


def test_the_first_step_is_the_first_and_infinity_where_there_is_none() -> None:
    reached = torch.tensor([[False, False], [True, False], [False, False]])
    assert first_step(reached, torch.tensor([0, 5, 10])).tolist() == [5, math.inf]


@pytest.mark.parametrize(
    ("first", "steps", "said"),
    [
        ([10, 20, 30], [10, 20, 30], "20"),
        ([10, 20, math.inf], [10, 20, 50], "20 (1 of 3 seeds never)"),
        ([10, math.inf, math.inf], [10, 50, 50], "more than 50"),
    ],
)
def test_an_arrival_says_more_than_only_of_a_median_that_never_came(
    first: list[float], steps: list[float], said: str
) -> None:
    arrival = Arrival(torch.tensor(first), 50)
    assert arrival.steps.tolist() == steps
    assert str(arrival) == said


def test_negative_numbers_have_a_minus_sign_and_hyphens_stay() -> None:
    assert (
        minus("beta-hat of -1.5 (theory: -1), 2e-06 from W1-2, -.5")
        == "beta-hat of −1.5 (theory: −1), 2e-06 from W1-2, −.5"
    )
    assert judge("noise-slope", [-1.0, -1.0], "slope -1").sentence == "Slope −1"
