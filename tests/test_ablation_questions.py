"""Every question against a case whose answer is known, and the page that shows the answers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from math import inf

import pytest
import torch
from test_ablation import blobs, convolutional, images, small, subject
from torch import nn

from batchnorm import ablation, report
from batchnorm.ablation import model_as_it_is
from batchnorm.ablation.answers import Answers
from batchnorm.ablation.arm_training import train
from batchnorm.ablation.effort import plan
from batchnorm.ablation.facts import facts
from batchnorm.ablation.question_criteria import CRITERIA, judge
from batchnorm.ablation.questions import noise_of_layers, test_statistics
from batchnorm.ablation.questions.input_scales import spread
from batchnorm.experiment.claim import Claim, Result
from batchnorm.experiment.figures_in_words import times
from batchnorm.experiment.judgement import Status
from batchnorm.experiment.outcomes import ClaimOutcome
from batchnorm.experiment.run_settings import RunSettings
from batchnorm.instruments.batch_noise import log_slope
from batchnorm.instruments.condition_number import condition_number
from batchnorm.population import recalibrate
from batchnorm.reporting.formats import rendered
from batchnorm.reporting.markdown import cell

SEEDS = range(3)


def verdicts(result):
    return {verdict.criterion.key: verdict for verdict in result.verdicts}


def answers_of(about, **how):
    return ablation.train_and_ask(about, plan(about, **how), "batchnorm why net.py:make")


# -- criteria -------------------------------------------------------------------------------------------------


def test_every_criterion_has_regions_apart_and_a_question():
    for key, criterion in CRITERIA.items():
        assert criterion.key == key
        assert criterion.question.endswith("?")
        low, high = criterion.supported
        assert low < high
        if criterion.opposite is not None:
            assert criterion.opposite[1] <= low or high <= criterion.opposite[0]


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ([2.0, 2.1, 2.2], Status.SUPPORTED),
        ([-2.0, -2.1, -2.2], Status.OPPOSITE),
        ([0.1, 0.0, 0.2], Status.NOT_SUPPORTED),
        ([3.0, -3.0, 2.0], Status.NOT_SUPPORTED),
        ([inf, 2.0, 2.0], Status.INVALID),
        ([2.0], Status.INVALID),
    ],
)
def test_the_whole_interval_decides(values, status):
    verdict = judge("speed-steps", values, "so it is.")
    assert verdict.status is status
    assert (verdict.failed_guard != "") == (status is Status.INVALID)


def test_a_failed_guard_leaves_no_verdict():
    verdict = judge("speed-steps", [2.0, 2.0], "so it is.", failed_guard="nothing learned")
    assert verdict.status is Status.INVALID
    assert verdict.statement == "nothing learned"


@pytest.mark.parametrize(("ratio", "text"), [(4.712, "4.7"), (0.83, "0.83"), (1.0, "1.0"), (123.4, "123")])
def test_ratios_have_the_digits_that_count(ratio, text):
    assert times(ratio) == text


# -- scale ----------------------------------------------------------------------------------------------------


def test_spread_and_condition_of_planted_features():
    z = torch.randn(400, 3)
    result = spread(z * torch.tensor([100.0, 1.0, 0.1]), SEEDS)
    assert "deviations of the 3 features lie" in result.verdicts[0].sentence
    constant = spread(z * torch.tensor([100.0, 1.0, 0.0]), SEEDS).verdicts[0].sentence
    assert "deviations of the 2 features that vary lie" in constant
    assert verdicts(result)["scale-spread"].status is Status.SUPPORTED
    alike = spread(z, SEEDS)
    assert verdicts(alike)["scale-spread"].status is Status.OPPOSITE
    assert condition_number(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 1.0], [-1.0, -1.0]]).double()) < 10
    before, after = (result.numbers[f"condition number of features, {name}"] for name in ("as they are", "normalized"))
    assert before > 1e5
    assert after < 2


def linear():
    """Without batch norm a linear model of two features."""
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def skewed(count=128):
    """A target of two features, the one that matters 1000 times smaller than the other: neither arm can see it."""
    random = torch.Generator().manual_seed(0)
    z = torch.randn(count, 2, generator=random)
    x, y = z * torch.tensor([30.0, 0.03]), z[:, 1:] + 0.05 * z[:, :1]
    return [(x[i : i + 16], y[i : i + 16]) for i in range(0, count, 16)]


@pytest.fixture(scope="module")
def scaled() -> Answers:
    return answers_of(subject(linear, skewed()), seeds=2, steps=40, rates=(0.0003, 0.003, 0.03))


def test_where_the_scale_of_inputs_matters_it_is_found(scaled):
    found = scaled.by_key
    assert found["scale-inputs"].status is Status.SUPPORTED
    assert found["scale-instead"].status is Status.SUPPORTED
    assert found["scale-spread"].status is Status.SUPPORTED


def hidden():
    """A hidden layer whose values are far from 0 and large: what batch norm is for."""
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 2))
    with torch.no_grad():
        net[0].bias.fill_(60.0)
    return net


@pytest.fixture(scope="module")
def saturated() -> Answers:
    return answers_of(subject(hidden), seeds=4, steps=30, rates=(0.1, 0.3))


def test_what_batch_norm_gives_is_told_with_its_reason(saturated):
    assert saturated.by_key["speed-steps"].status is Status.SUPPORTED
    assert saturated.headline.startswith("Yes: ")
    assert "at least" in saturated.headline


# -- a model that does not learn ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def idle() -> Answers:
    return answers_of(subject(), seeds=2, steps=12, rates=(1e-9, 1e-8))


def test_arms_that_do_not_learn_give_no_verdict_about_learning(idle):
    for key in ("speed-steps", "speed-once", "rates-largest", "scale-inputs", "shift-drift", "smooth-equal"):
        assert idle.by_key[key].status is Status.INVALID, key
    assert idle.headline.startswith("No answer: ")
    assert "--steps" in idle.headline


@pytest.mark.slow
def test_arms_that_diverge_are_an_outcome():
    found = answers_of(subject(), seeds=2, steps=10, rates=(1e17, 1e18))
    assert found.by_key["speed-steps"].status is Status.INVALID
    json.dumps(found.to_dict(), allow_nan=False)
    report.render(found)


# -- noise ----------------------------------------------------------------------------------------------------


def test_the_noise_of_independent_normal_values_is_one_and_a_half_over_the_batch():
    parts = noise_of_layers._standardized(
        [noise_of_layers._parts(torch.randn(512, 64, generator=torch.Generator().manual_seed(1)))]
    )
    random = torch.Generator().manual_seed(0)
    for size in (16, 64):
        assert float(noise_of_layers.power(parts, size, random)) == pytest.approx(1.5 / size, rel=0.1)
    found = noise_of_layers.powers({"layer": parts}, (8, 16, 32, 64, 128), 0)["layer"]
    assert log_slope(found, (8, 16, 32, 64, 128)) == pytest.approx(-1, abs=0.1)


def test_the_noise_formula_is_what_normalizing_a_batch_does():
    x = torch.randn(40, 3, 5, generator=torch.Generator().manual_seed(2)).double()
    means, inside = noise_of_layers._standardized([noise_of_layers._parts(x)])
    z = (x - x.mean((0, 2), keepdim=True)) / x.std((0, 2), correction=0, keepdim=True)
    batch = z[:8]
    normal = (batch - batch.mean((0, 2), keepdim=True)) / batch.std((0, 2), correction=0, keepdim=True)
    d, second = means[:8].mean(0), (inside + means.square())[:8].mean(0)
    s = (second - d.square()).sqrt()
    torch.testing.assert_close(d.square() + (1 - s).square(), (normal - batch).square().mean((0, 2)))


def test_positions_of_an_example_count():
    model = nn.Sequential(nn.BatchNorm2d(2))
    batches = [(torch.randn(16, 2, 8, 8), torch.randn(16, 2, 8, 8)) for _ in range(10)]
    result = noise_of_layers.measure(subject(lambda: model, batches), [model], SEEDS)
    assert verdicts(result)["noise-slope"].status is Status.SUPPORTED
    at_4 = next(row["y"] for row in result.charts[0].rows if row["x"] == 4)
    assert at_4 == pytest.approx(1.5 / (4 * 64), rel=0.2)


# -- test time ------------------------------------------------------------------------------------------------


def settled():
    """A model whose running averages are its population statistics."""
    about = subject()
    model = train(about, "with", 0, 0.1, 30)[1]
    recalibrate(model, list(about.data.train))
    return about, model.eval()


def test_exact_statistics_are_found_to_be_exact_and_an_answer_its_own():
    about, model = settled()
    found = verdicts(test_statistics.measure(about, [model], SEEDS))
    assert found["test-time-stored"].status is Status.SUPPORTED
    assert found["test-time-stored"].estimate.mean == pytest.approx(0, abs=1e-5)
    assert found["test-time-alone"].status is Status.SUPPORTED


def test_stale_statistics_are_found():
    about, model = settled()
    model[1].running_mean += 100
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = verdicts(test_statistics.measure(about, [model], SEEDS))
    assert found["test-time-stored"].status is Status.OPPOSITE
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training


def test_layers_without_stored_statistics_have_nothing_for_test_time():
    about = subject(lambda: small(lambda n: nn.BatchNorm1d(n, track_running_stats=False)))
    found = verdicts(test_statistics.measure(about, [about.fresh(0)], SEEDS))
    assert {verdict.status for verdict in found.values()} == {Status.INVALID}


# -- a model as it is -----------------------------------------------------------------------------------------


def test_dead_channels_are_counted():
    model = small()
    with torch.no_grad():
        model[1].weight[:4] = 0
        model[1].bias[:4] = -1
    verdict = verdicts(model_as_it_is.measure_census(subject(), [model], SEEDS))["census-dead"]
    assert verdict.status is Status.OPPOSITE
    assert "50.0% of channels are dead" in verdict.sentence


def test_examples_that_have_become_alike_are_found():
    class Collapse(nn.Module):
        """Leaves of all features their mean over features, which is one direction."""

        def forward(self, x):
            return x.mean(1, keepdim=True).expand_as(x) + 3

    model = nn.Sequential(nn.BatchNorm1d(40), Collapse(), nn.BatchNorm1d(40), nn.Linear(40, 2))
    batches = [(torch.randn(64, 40), torch.zeros(64).long()) for _ in range(2)]
    result = model_as_it_is.measure_depth(subject(lambda: model, batches), [model], SEEDS)
    assert verdicts(result)["depth-rank"].status is Status.OPPOSITE
    assert result.charts[0].rows


def test_a_look_leaves_the_model_and_random_states_alone():
    about = subject(convolutional, images(160))
    model = about.fresh(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    answers = ablation.look(about, model, SEEDS, "batchnorm why")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert "was not asked" in answers.headline
    assert not any(key.startswith(("speed", "rates", "shift", "smooth")) for key in answers.by_key)


# -- answers --------------------------------------------------------------------------------------------------


def made(key="speed-steps", values=(2.0, 2.1, 2.2), sentence="20 steps.", failed="", bound=""):
    verdict = judge(key, values, sentence, failed_guard=failed, bound=bound)
    claim = Claim("speed", "Speed", "It is.", "Arms.", "Read.", "Not.", (), run=lambda _, __: Result([], []))
    return Answers(
        RunSettings(0, 3), [ClaimOutcome(claim, Result([verdict], []), 1.0)], "batchnorm why", model="m.py:make"
    )


@pytest.mark.parametrize(
    ("values", "start"),
    [
        ((2.0, 2.1, 2.2), "Yes: without batch norm the model takes 4.3× as many steps (95% interval"),
        ((0.0, 0.05, -0.05), "No: without batch norm the model learns as fast (1.0× as many steps"),
        ((-2.0, -2.1, -2.2), "No: with batch norm the model takes 4.3× as many steps as without"),
        ((0.1, 2.0, 0.3), "Not shown: without batch norm the model takes 1.7× as many steps"),
        ((-0.1, -2.0, -0.3), "No gain: without batch norm the model takes 0.57× as many steps"),
    ],
)
def test_the_headline_says_what_came_out_the_unwelcome_too(values, start):
    assert made(values=values).headline.startswith(start)


def test_an_arm_that_never_learned_is_told_where_the_steps_are_too_few_for_a_verdict():
    answers = replace(made(values=(0.1, 2.0, 0.3), bound="at least"), idle=("without",), steps=80)
    assert answers.headline.startswith(
        "Not shown in 80 steps: with batch norm the model learns, without batch norm it does not"
    )
    assert "at least 1.7×" in answers.headline
    shown = replace(made(bound="at least"), idle=("without",), steps=80)
    assert shown.headline.startswith(
        "Yes: with batch norm the model learns, without batch norm it does not learn in 80 steps"
    )


@pytest.mark.slow
def test_a_rate_at_the_end_of_the_grid_is_told(saturated):
    assert "The best learning rate is the grid's" in saturated.second


def test_a_bound_is_told_as_one():
    answers = made(bound="at least")
    assert "takes at least 4.3× as many" in answers.headline
    assert answers.cards[0].figure == "≥ 4.3×"


@pytest.mark.slow
def test_a_page_shows_everything_and_escapes_it(scaled):
    page = report.render(replace(scaled, model="<b>:make"))
    assert len(page.encode()) < 500_000
    assert "<title>Does batch norm help &lt;b&gt;:make, and why?</title>" in page
    assert "<b>" not in page
    text = re.sub(r"<[^>]+>", " ", page)
    for part in (scaled.headline.split(" (")[0], "Where a claim does not hold", "Not asked", "paired", "batchnorm why"):
        assert part in text
    assert page.count('class="cards"') == 1
    for outcome in scaled.outcomes:
        assert f'id="{outcome.claim.name}"' in page


@pytest.mark.slow
def test_the_same_seed_gives_the_same_data():
    first, second = (
        answers_of(subject(), seeds=2, steps=10, rates=(0.01, 0.1)).to_json() for _ in range(2)
    )  # fmt: skip
    assert first == second
    data = json.loads(first)
    assert data["level"] == CRITERIA.level
    assert data["measured"]["Seeds"].startswith("2, from 0 to 1.")


def test_weights_that_do_not_follow_the_seed_are_told():
    def seeded():
        torch.manual_seed(1)
        return small()

    found = facts(subject(seeded), plan(subject(seeded), steps=10), range(2))
    assert "The same for every seed" in found["First weights"]
    assert "First weights" not in facts(subject(), plan(subject(), steps=10), range(2))


def test_markdown_has_every_verdict(scaled):
    text = rendered(report.report(scaled), "md")
    assert text.startswith(f"**{cell(scaled.headline)}**")
    assert text.count("\n| ") == len(scaled.by_key) + 1


@pytest.mark.slow
def test_charts_hold_numbers_of_declared_series(scaled, idle):
    for answers in (scaled, idle):
        for outcome in answers.outcomes:
            for chart in outcome.result.charts:
                assert chart.rows
                assert {row["series"] for row in chart.rows} == set(chart.series), chart.title
                json.dumps(chart.rows, allow_nan=False)


@pytest.mark.slow
def test_the_users_data_are_left_as_they_were():
    batches = blobs()
    before = [(x.clone(), y.clone()) for x, y in batches]
    answers_of(subject(small, batches), seeds=2, steps=10, rates=(0.01, 0.1))
    for (x, y), (old_x, old_y) in zip(batches, before, strict=True):
        assert torch.equal(x, old_x)
        assert torch.equal(y, old_y)
