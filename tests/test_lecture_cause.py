"""Claim "cause": the intervention does what it says and nothing else, the gradient's shift, and the contract."""

import math

import pytest
import torch
from lecture_runs import EPS32, quick
from torch import Tensor
from torch.nn import functional as F

from batchnorm.experiment.claim import Result
from batchnorm.experiment.judgement import Status
from batchnorm.layers import BatchNorm1d
from batchnorm.lecture import rate_sweep
from batchnorm.lecture.claims import shift_as_cause
from batchnorm.lecture.claims.shift_as_cause import CALLED, SCALE, SHIFT, ArmAtBestRate, Noisy, gradient_shift
from batchnorm.lecture.data_sets import Examples
from batchnorm.lecture.ensemble_training import losses
from batchnorm.lecture.networks import Ensemble, fully_connected
from batchnorm.lecture.rate_sweep import Sweep


@pytest.fixture(scope="module")
def result() -> Result:
    return quick("cause").result


def test_noise_changes_nothing_in_eval_mode() -> None:
    noisy, norm = Noisy(4).eval(), BatchNorm1d(4).eval()
    x = torch.randn(8, 4)
    assert torch.equal(noisy(x), norm(x))
    state = torch.get_rng_state()
    noisy(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_leaves_the_stored_statistics_as_batch_norm_would() -> None:
    noisy, norm = Noisy(4), BatchNorm1d(4)
    x = torch.randn(8, 4)
    noisy(x), norm(x)
    assert torch.equal(noisy.norm.running_mean, norm.running_mean)
    assert torch.equal(noisy.norm.running_var, norm.running_var)


def test_in_train_mode_every_unit_is_shifted_and_scaled_as_a_whole_and_anew_each_time() -> None:
    noisy, norm = Noisy(64), BatchNorm1d(64)
    x = torch.randn(32, 64)
    y = norm(x)
    seen = []
    for _ in range(2):
        moved = noisy(x)
        scale = moved.std(0) / y.std(0)
        shift = moved.mean(0) - scale * y.mean(0)
        torch.testing.assert_close(moved, scale * y + shift, rtol=0, atol=32 * 4 * EPS32)  # sums of 32 values up to 4
        assert bool((shift.abs() <= SHIFT + 1e-5).all())
        assert bool(((scale > 1 / SCALE - 1e-5) & (scale < SCALE + 1e-5)).all())
        # 64 draws fill the interval but for a chance of 0.75 ** 64
        assert shift.max() > SHIFT / 2
        assert scale.max() > SCALE**0.5
        seen.append(shift)
    assert not torch.equal(*seen)


def test_half_the_noise_moves_half_as_far() -> None:
    x = torch.randn(32, 64)
    moved = Noisy(64, strength=0.5)(x)
    assert moved.mean(0).abs().max() <= SHIFT / 2 + 1e-5
    assert moved.std(0, correction=0).max() <= SCALE**0.5 + 1e-5


def _two_layers_before() -> tuple[Ensemble, dict[str, Tensor], Examples]:
    net = Ensemble.of(lambda: fully_connected((3, 4, 4, 2)), range(2))
    before = {name: value.detach().clone() for name, value in net.parameters.items()}
    return net, before, Examples(torch.randn(2, 16, 3), torch.randint(2, (2, 16)))


def test_a_step_of_layer_3_alone_does_not_shift_its_gradient() -> None:
    net, before, batch = _two_layers_before()
    with torch.no_grad():
        net.parameters["w3.weight"].add_(1.0)
    relative, cosine = gradient_shift(net, before, batch, seed=0)
    assert bool((relative == 0).all())
    torch.testing.assert_close(cosine.float(), torch.ones(2), rtol=4 * EPS32, atol=0)


def test_a_step_of_the_layers_before_shifts_it_as_computed_on_one_network() -> None:
    net, before, batch = _two_layers_before()
    with torch.no_grad():
        for name in ("w1.weight", "norm2.bias", "w3.weight"):
            net.parameters[name].add_(torch.randn_like(net.parameters[name]))
    relative, cosine = gradient_shift(net, before, batch, seed=0)
    for r in range(2):
        gradients = []
        for moved in (False, True):
            one = fully_connected((3, 4, 4, 2))
            state = {
                k: (net.parameters[k] if moved and not k.startswith("w3") else v)[r].detach() for k, v in before.items()
            }
            one.load_state_dict(state, strict=False)
            F.cross_entropy(one(batch.x[r]), batch.y[r]).backward()
            gradients.append(one.w3.weight.grad.flatten())
        first, second = gradients
        # the same sums over 16 examples in another order, and a difference of two of them
        assert float(relative[r]) == pytest.approx(float((first - second).norm() / first.norm()), rel=256 * EPS32)
        assert float(cosine[r]) == pytest.approx(float(F.cosine_similarity(first, second, dim=0)), rel=256 * EPS32)


def test_both_gradients_see_the_same_noise() -> None:
    net = Ensemble.of(lambda: fully_connected((3, 4, 4, 2), norm=Noisy), range(2))
    before = {name: value.detach().clone() for name, value in net.parameters.items()}
    batch = Examples(torch.randn(2, 16, 3), torch.randint(2, (2, 16)))
    relative, _ = gradient_shift(net, before, batch, seed=3)
    assert bool((relative == 0).all())
    with torch.no_grad():
        noise = [losses(net(batch.x, train=True, keep_statistics=True), batch.y) for _ in range(2)]
    assert not torch.equal(*noise)


def _sweep(*steps: float) -> Sweep:
    """An arm with one rate whose seeds reach the target at ``steps``; readings at 0, 10, .. 80."""
    at = torch.arange(0, 90, 10)
    accuracy = (at[:, None, None] >= torch.tensor(steps)[None, :, None]).float()
    return Sweep((0.1,), at, accuracy, 1 - accuracy)


def _watched(moved: float) -> ArmAtBestRate:
    each = torch.full((3,), moved)
    return ArmAtBestRate(0.1, each, each, each, each, each)


def _judged(without: Sweep, noisy: Sweep, moved: float = 2.0) -> shift_as_cause.Verdict:
    arms = {"without": without, "with": _sweep(10, 10, 10), "noisy": noisy, "half": _sweep(10, 10, 10)}
    drifts = {"without": 1.0, "with": 0.1, "noisy": moved, "half": 0.5}
    return shift_as_cause._judge(arms, {arm: _watched(drift) for arm, drift in drifts.items()})


def test_noise_that_costs_all_of_the_speed_up_supports_the_claim() -> None:
    verdict = _judged(_sweep(80, 80, 80), _sweep(80, 80, 80))
    assert verdict.status is Status.SUPPORTED
    assert verdict.estimate is not None
    assert verdict.estimate.mean == pytest.approx(1)


def test_noise_that_costs_nothing_contradicts_the_claim() -> None:
    verdict = _judged(_sweep(80, 80, 80), _sweep(10, 10, 10))
    assert verdict.status is Status.OPPOSITE
    assert "10 steps to 95% with batch norm, 10 with batch norm and noise, 80 without" in verdict.sentence


def test_a_third_of_the_log_speed_up_decides_nothing() -> None:
    verdict = _judged(_sweep(80, 80, 80), _sweep(20, 20, 20))
    assert verdict.status is Status.NOT_SUPPORTED
    assert verdict.estimate is not None
    assert verdict.estimate.mean == pytest.approx(1 / 3, rel=16 * EPS32)


def test_noise_that_does_not_bring_the_drift_back_tests_nothing() -> None:
    verdict = _judged(_sweep(80, 80, 80), _sweep(10, 10, 10), moved=0.9)
    assert verdict.status is Status.INVALID
    assert verdict.failed_guard == "the drift is 0.9 with the noise, below 1 without batch norm"


def test_without_a_known_speed_up_there_is_no_share_of_it() -> None:
    cut = _judged(_sweep(80, math.inf, 80), _sweep(10, 10, 10))
    assert cut.status is Status.INVALID
    assert cut.failed_guard == "not every seed reached 95% in 80 steps with and without batch norm"
    level = _judged(_sweep(80, 10, 80), _sweep(10, 10, 10))
    assert level.status is Status.INVALID
    assert level.failed_guard == "batch norm gave no speed-up in at least one seed"
    assert "an unknown share" in level.sentence


def test_only_the_arm_with_noise_is_labelled_with_noise() -> None:
    arms = {"without": _sweep(80, 80, 80), "with": _sweep(10, 10, 10), "noisy": _sweep(20, 20, 20)}
    numbers = shift_as_cause._numbers(arms, {arm: _watched(20.0) for arm in arms})
    labels = [label for label in numbers if label.startswith("steps to")]
    assert labels == [f"steps to 95% accuracy in train mode, {CALLED[arm]}" for arm in ("with", "noisy")]
    assert [label for label in numbers if "noise on" in label] == []


@pytest.mark.slow
def test_the_criterion_is_judged(result: Result) -> None:
    assert [verdict.criterion.key for verdict in result.verdicts] == ["cause-drift"]


@pytest.mark.slow
def test_both_charts_show_every_arm(result: Result) -> None:
    assert [chart.kind for chart in result.charts] == ["lines", "dots"]
    assert all({row["series"] for row in chart.rows} == set(CALLED.values()) for chart in result.charts)


@pytest.mark.slow
def test_the_noise_moves_what_layer_3_receives_and_half_of_it_less(result: Result) -> None:
    full, half, none = (
        next(row["value"] for row in result.charts[1].rows if row["label"] == CALLED[arm])
        for arm in ("noisy", "half", "with")
    )
    assert none < half < full


def test_the_noise_is_the_only_thing_that_an_arm_adds() -> None:
    assert shift_as_cause.ARMS["with"] is BatchNorm1d
    assert shift_as_cause.ARMS["without"] is None
    assert shift_as_cause.ARMS["half"](4).strength == 0.5
    assert set(rate_sweep.BOTH) == {"without", "with"}
