"""Claim "scale": the arithmetic against oracles, and the contract of its result."""

import itertools
import math

import numpy as np
import pytest
import torch
from lecture_runs import EPS32, QUICK, quick

from batchnorm.experiment.claim import Result
from batchnorm.experiment.judgement import Status
from batchnorm.experiment.run_settings import RunSettings
from batchnorm.inputs import InputNorm
from batchnorm.lecture import data_sets
from batchnorm.lecture.claims import feature_ranges
from batchnorm.lecture.claims.feature_ranges import (
    CENTRED,
    NORMALIZED,
    RATES,
    RAW,
    TABLES,
    TARGET,
    Descent,
    condition_number,
    descend,
)


@pytest.fixture(scope="module")
def result() -> Result:
    return quick("scale").result


def test_other_seeds_give_other_numbers(result: Result) -> None:
    other = feature_ranges.run(RunSettings(seed=7, seeds=2, effort=0.1), lambda _: None)
    assert other.to_dict() != result.to_dict()


def test_too_few_steps_make_the_control_invalid_not_a_crash(result: Result) -> None:
    control = result.verdicts[2]
    assert control.status is Status.INVALID
    assert f"not every seed reached {TARGET} nats in 20 steps" in control.failed_guard


# -- gradient descent -----------------------------------------------------------------------------------------


def numpy_losses(x: np.ndarray, y: np.ndarray, classes: int, rate: float, steps: int) -> list[float]:
    """Softmax regression by gradient descent from zero, in float64, as it stands in a textbook."""
    weights, bias = np.zeros((x.shape[1], classes)), np.zeros(classes)
    onehot, found = np.eye(classes)[y], []
    for _ in range(steps + 1):
        logits = x @ weights + bias
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        found.append(float(-np.log(p[np.arange(len(y)), y]).mean()))
        weights -= rate * x.T @ (p - onehot) / len(y)
        bias -= rate * (p - onehot).mean(0)
    return found


def test_descent_matches_gradient_descent_in_float64_at_each_rate_and_seed() -> None:
    x, y = torch.randn(2, 30, 4), torch.randint(3, (2, 30))
    y[:, :3] = torch.arange(3)  # every class occurs
    found = descend(x, y, 20).losses
    assert found.shape == (21, 2, len(RATES))
    for seed, rate in itertools.product(range(2), (0, 8, RATES.index(1.0))):
        expected = numpy_losses(x[seed].double().numpy(), y[seed].numpy(), 3, RATES[rate], 20)
        # rate 1 is below 2 / (largest curvature), so a rounding error does not grow from step to step: each of 20
        # steps adds a few ulp of values of size 10 at most
        np.testing.assert_allclose(found[:, seed, rate], expected, rtol=0, atol=20 * 10 * 4 * EPS32)


def test_every_form_starts_at_the_loss_of_chance() -> None:
    for name, classes in (("wine", 3), ("cancer", 2), ("digits", 10)):
        inputs, y = feature_ranges.arms(name, QUICK)
        for x in inputs.values():
            start = descend(x, y, 1).losses[0]
            torch.testing.assert_close(start, torch.full_like(start, math.log(classes)))


def test_steps_are_counted_to_the_first_loss_at_the_target_and_infinite_where_there_is_none() -> None:
    losses = torch.full((4, 1, 3), 1.0)
    losses[2:, 0, 1] = TARGET
    losses[3, 0, 2] = torch.nan
    descent = Descent(losses)
    assert descent.steps_to_target().tolist() == [[math.inf, 2.0, math.inf]]
    assert descent.best_rate() == 1
    assert descent.best().steps.tolist() == [2.0]


def test_an_arm_that_never_arrives_counts_with_the_last_step_at_its_lowest_finite_loss() -> None:
    losses = torch.tensor([[[2.0, 2.0, 2.0]], [[1.0, 0.5, torch.nan]]])
    descent = Descent(losses)
    assert descent.best_rate() == 1
    best = descent.best()
    assert (best.steps.tolist(), best.late, str(best)) == ([1.0], 1, "more than 1")


def test_normalized_features_learn_alike_whatever_unit_they_were_recorded_in() -> None:
    x, y = torch.randn(40, 3), torch.randint(2, (1, 40))
    y[0, :2] = torch.arange(2)
    units = torch.tensor([2.0**-10, 1.0, 2.0**10])  # powers of two, so that the bits stay
    curves = [descend(InputNorm.fit(form)(form)[None], y, 10).losses for form in (x, x * units)]
    assert torch.equal(*curves)


# -- condition number -----------------------------------------------------------------------------------------


def test_condition_number_of_orthogonal_features_is_the_ratio_of_their_mean_squares() -> None:
    design = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)))  # E[x~ x~^T] is the identity
    scaled = design * torch.tensor([1e-3, 1.0, 1e2])
    # 8 rows: a singular value is exact to some eps times the largest, 1e2 / 1e-3 = 1e5 times the smallest
    assert condition_number(scaled) == pytest.approx(1e10, rel=2 * 1e5 * 10 * np.finfo(float).eps + 2 * EPS32)
    assert condition_number(design) == pytest.approx(1, rel=1e-14)


def test_a_mean_that_is_not_zero_makes_the_condition_number_worse_though_the_range_is_one() -> None:
    design = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)))
    # x = m + s with E s^2 = 1: the eigenvalues of [[1 + m^2, m], [m, 1]] have product 1 and sum 2 + m^2
    mean = 3.0
    largest = ((2 + mean**2) + math.sqrt((2 + mean**2) ** 2 - 4)) / 2
    assert condition_number(design[:, :1] + mean) == pytest.approx(largest**2, rel=1e-12)


def test_a_constant_feature_adds_an_empty_direction_and_no_infinity() -> None:
    x = torch.randn(50, 2)
    with_constant = torch.cat([x, torch.full((50, 1), 4.0)], 1)
    assert math.isfinite(condition_number(with_constant))
    assert condition_number(torch.cat([x, torch.zeros(50, 1)], 1)) == pytest.approx(condition_number(x), rel=1e-9)


def test_wine_has_the_published_spread_of_features_and_normalization_lowers_its_condition_number() -> None:
    x = data_sets.table("wine").x
    assert (float(x.min()), float(x.max())) == (pytest.approx(0.13), 1680)
    assert condition_number(InputNorm.fit(x)(x)) < 1e-5 * condition_number(x)


# -- the whole ------------------------------------------------------------------------------------------------


def test_arms_hold_the_same_examples_in_three_forms() -> None:
    inputs, y = feature_ranges.arms("digits", QUICK)
    assert y.shape == (2, TABLES["digits"].train)
    assert inputs[RAW].max() == 1
    means = inputs[CENTRED].mean(1)
    # a mean of 500 values of size 1 rounds to some eps
    assert means.abs().max() < 8 * EPS32
    normalized = inputs[NORMALIZED]
    varying = inputs[RAW].std(1) > 0
    assert torch.allclose(normalized.std(1, correction=0)[varying], torch.ones(()), atol=1e-4)


def test_the_verdict_on_wine_is_the_log_of_steps_counted_by_hand(result: Result) -> None:
    inputs, y = feature_ranges.arms("wine", QUICK)
    cap = QUICK.steps(TABLES["wine"].steps)
    best = {arm: descend(x, y, cap).best_rate() for arm, x in inputs.items()}

    def by_hand(arm: str, seed: int) -> int:
        losses = numpy_losses(inputs[arm][seed].double().numpy(), y[seed].numpy(), 3, RATES[best[arm]], cap)
        return next((step for step, loss in enumerate(losses) if loss <= TARGET), cap)

    estimate = result.verdicts[0].estimate
    assert estimate is not None
    expected = [math.log10(by_hand(RAW, s) / by_hand(NORMALIZED, s)) for s in range(2)]
    assert estimate.values == pytest.approx(expected, rel=1e-6)
    assert f"more than {cap} steps as recorded" in result.verdicts[0].sentence


def test_the_control_says_what_of_its_ratio_is_left_once_features_are_centred() -> None:
    def reaching(first: int) -> Descent:
        return Descent(torch.where(torch.arange(41) < first, 1.0, 0.0)[:, None, None].expand(-1, 3, 1))

    verdict = feature_ranges._judge("digits", {RAW: reaching(40), CENTRED: reaching(10), NORMALIZED: reaching(5)})
    assert verdict.sentence == (
        "Digits: 5 steps with normalized features, 40 steps as pixels / 16 (8 times as many), 10 steps "
        "if only centred. "
        "Normalizing also centres, and the control includes this effect: features that are only centred take 2 times "
        "as many steps as normalized features."
    )
