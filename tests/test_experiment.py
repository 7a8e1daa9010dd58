"""What all experiments share: values of several seeds as one, criteria, verdicts and their sentences."""

import math

import pytest
import torch

from batchnorm.experiment import paired_seeds
from batchnorm.experiment.figures_in_words import in_words, minus
from batchnorm.experiment.judgement import Criteria, Criterion, Status
from batchnorm.experiment.paired_seeds import Arrival, first_step
from batchnorm.lecture.claim_criteria import judge


def test_a_ratio_and_its_inverse_give_inverse_factors() -> None:
    ratios = torch.tensor([2.0, 8.0])
    assert paired_seeds.factor(ratios) == 4
    assert paired_seeds.factor(1 / ratios) == 0.25


def test_a_curve_has_the_middle_and_the_range_over_seeds() -> None:
    values = torch.tensor([[1.0, 2.0, 6.0]])
    point = {"x": 5, "y": 2.0, "low": 1.0, "high": 6.0, "series": "a"}
    assert paired_seeds.curve([5], values, series="a") == [point]
    assert paired_seeds.curve([5], values, middle=torch.mean, series="a") == [{**point, "y": 3.0}]


def test_a_point_that_one_seed_does_not_have_is_left_out_and_on_a_log_scale_what_is_not_positive() -> None:
    values = torch.tensor([[1.0, math.inf], [1.0, math.nan], [1.0, 0.0], [1.0, 2.0]])
    assert [row["x"] for row in paired_seeds.curve(range(4), values)] == [2, 3]
    assert [row["x"] for row in paired_seeds.curve(range(4), values, positive=True)] == [3]


def test_figures_are_significant_ones_and_zero_has_no_sign() -> None:
    assert paired_seeds.figures(0.0123456) == 0.01235
    assert math.copysign(1, paired_seeds.figures(-0.0)) == 1


def test_a_mean_that_does_not_exist_is_none() -> None:
    assert paired_seeds.mean(torch.tensor([1.0, 2.0])) == 1.5
    assert paired_seeds.mean(torch.tensor([1.0, math.inf])) is None
    assert paired_seeds.mean(torch.tensor([1.0, math.nan])) is None


def test_an_interval_holds_its_mean_and_is_wider_at_a_higher_level() -> None:
    values = torch.tensor([1.0, 2.0, 3.0])
    narrow, wide = (paired_seeds.interval(values, level, "y") for level in (0.5, 0.95))
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


# -- verdicts ------------------------------------------------------------------------------------------------

ENTRY = {
    "question": "Faster?", "quantity": "steps to {target:.0%}", "log": 2, "compares": "without / with", "above": 1.5,
    "guard": "both learn",
}  # fmt: skip
RATIO = Criterion.read("speed-steps", ENTRY, {"target": 0.5})
TABLE = Criteria("3", 0.95, (RATIO, Criterion("speed-loss", "Lower?", "loss", (-math.inf, 0.1), (0.2, math.inf))))


def test_a_sentence_is_made_of_the_figures_of_its_verdict() -> None:
    words = "{fast} steps with, {slow} without ({bound}{ratio:times} times as many, {more:share}, {gone:known})."
    verdict = TABLE.judge(
        "speed-steps", [2.0, 2.0], words, {"fast": 20, "slow": "more than 80"}, bound="at least",
        ratio=torch.tensor(4.0), more=-0.25, gone=math.inf,
    )  # fmt: skip
    assert verdict.sentence == "20 steps with, more than 80 without (at least 4.0 times as many, −25.0%, not known)."
    assert verdict.heading == verdict.sentence[:-1]
    assert verdict.figures["ratio"] == 4.0
    assert verdict.bound == "at least"
    assert verdict.ratios == (4.0, 4.0, 4.0)
    assert verdict.status is Status.SUPPORTED


def test_a_figure_that_a_sentence_lacks_is_an_error() -> None:
    with pytest.raises(KeyError, match="slow"):
        in_words("{fast} against {slow}", fast=1)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [math.inf, math.inf]])
def test_without_a_finite_effect_in_every_seed_there_is_no_verdict_and_no_number_is_invented(values) -> None:
    verdict = TABLE.judge("speed-steps", values, "{ratio:times} times as many.", ratio=math.nan)
    assert (verdict.status, verdict.estimate) == (Status.INVALID, None)
    assert verdict.statement == "the effect is not a finite number in every seed"
    assert verdict.sentence == "The arms could not be compared."
    assert all(map(math.isnan, verdict.ratios))
    told = TABLE.judge("speed-steps", values, "{fast} steps with.", fast=20, failed_guard="the other never arrived")
    assert (told.sentence, told.statement) == ("20 steps with.", "the other never arrived")


def test_criteria_know_their_claims_and_say_what_they_compare() -> None:
    assert [criterion.key for criterion in TABLE.of("speed")] == list(TABLE)
    assert RATIO.effect == "log2 of steps to 50%, without / with"
    assert TABLE["speed-loss"].effect == "loss"
    assert (RATIO.natural(3), RATIO.natural(5000), TABLE["speed-loss"].natural(3)) == (8, math.inf, 3)
    assert {verdict.statement for verdict in TABLE.unjudged("speed", "it broke")} == {"it broke"}


def test_the_opposite_lies_on_the_other_side_of_0() -> None:
    assert RATIO.supported == (math.log2(1.5), math.inf)
    assert RATIO.opposite == (-math.inf, -math.log2(1.5))
    between = Criterion.read(
        "a-b", {"question": "?", "quantity": "q", "log": 2, "supported": [0, 4], "opposite": [8, math.inf]}, {}
    )
    assert (between.supported, between.opposite) == ((-math.inf, 2), (3, math.inf))
    assert [TABLE.judge("speed-loss", [v, v], "s").status for v in (0.0, 0.15, 0.3)] == [
        Status.SUPPORTED, Status.NOT_SUPPORTED, Status.OPPOSITE,
    ]  # fmt: skip


def test_a_verdict_as_data_has_the_sentence_and_no_template() -> None:
    data = TABLE.judge("speed-steps", [2.0, 2.0], "{fast} steps.", fast=20).to_dict()
    assert list(data) == ["criterion", "status", "estimate", "sentence", "failed_guard"]
    assert list(data["criterion"]) == ["key", "question", "effect", "supported", "opposite", "guard"]
    assert data["sentence"] == "20 steps."
