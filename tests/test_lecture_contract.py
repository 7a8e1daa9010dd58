"""What every claim owes the report and the command line, whatever it measures."""

import json

import pytest
import torch
from lecture_runs import QUICK, SETTINGS, quick

from batchnorm import lecture
from batchnorm.experiment.claim import Result
from batchnorm.experiment.judgement import Status
from batchnorm.lecture.claim_criteria import CRITERIA
from batchnorm.lecture.claims import black_cats, hidden_units
from batchnorm.lecture.rate_sweep import sweep

FIELDS = {"x": "x", "y": "y", "low": "y", "high": "y"}


@pytest.fixture(scope="module", params=lecture.NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def result(name) -> Result:
    return quick(name).result


def test_every_criterion_is_judged_in_the_order_of_the_table(name, result):
    assert [verdict.criterion for verdict in result.verdicts] == CRITERIA.of(name)
    assert CRITERIA.of(name)


def test_no_criterion_is_without_a_claim():
    assert sum(len(CRITERIA.of(name)) for name in lecture.NAMES) == len(CRITERIA)


def test_medians_over_an_even_number_of_seeds_are_the_mean_of_the_two_in_the_middle():
    values = torch.tensor([0.1, 0.2, 0.4, 0.8])
    assert hidden_units._largest(values) == "0.3"
    assert black_cats._pictures(100 * values) == 30
    assert black_cats._pictures(torch.tensor([1.0, 2.0, torch.inf, torch.inf])) is None


def test_a_verdict_says_what_it_is_based_on(result):
    for verdict in result.verdicts:
        assert verdict.sentence.endswith(".")
        assert verdict.sentence[0] == verdict.sentence[0].upper()
        assert (verdict.failed_guard != "") == (verdict.status is Status.INVALID)
        if verdict.estimate is not None:
            assert len(verdict.estimate.values) == QUICK.seeds


def test_texts_are_there(name):
    claim = lecture.load(name)
    assert claim.name == name
    for text in (claim.title, claim.sentence, claim.arms, claim.how_to_read, claim.not_shown, *claim.sources):
        assert text.strip()
    assert claim.sources


def test_charts_hold_numbers_that_json_takes_of_declared_series(result):
    assert result.charts
    for chart in result.charts:
        assert 0 < len(chart.rows) <= 600
        assert chart.title
        assert chart.alt
        assert {row["series"] for row in chart.rows if "series" in row} == set(chart.series)
        assert set(chart.dashed) <= set(chart.series)
        assert all(("series" in row) == bool(chart.series) for row in chart.rows)
        json.dumps(chart.rows, allow_nan=False)
    json.dumps(dict(result.numbers), allow_nan=False)


def test_a_logarithmic_axis_has_positive_values(result):
    for chart in result.charts:
        for field, axis in FIELDS.items():
            scale = getattr(chart, axis)
            if scale is not None and scale.log:
                assert all(row[field] > 0 for row in chart.rows if field in row)


def test_progress_rises_to_one(name):
    progress = quick(name).progress
    assert list(progress) == sorted(progress)
    assert progress[-1] == 1


@pytest.mark.slow
def test_a_second_run_gives_the_same_numbers_and_leaves_the_random_state_alone(name, result):
    sweep.cache_clear()
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    again = lecture.run(name, SETTINGS.get(name, QUICK)).result
    assert torch.equal(torch.get_rng_state(), before)
    assert again.to_dict() == result.to_dict()


def test_one_false_verdict_in_twenty_runs_of_all_claims_at_most():
    """The level of each interval shares 5 % among the claims (Bonferroni)."""
    assert CRITERIA.level == 1 - 0.05 / len(lecture.NAMES)
