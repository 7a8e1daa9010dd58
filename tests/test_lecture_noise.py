"""Claim "noise": the noise of a batch against theory, groups against separate batches, and the contract."""

import math
from functools import partial

import pytest
import torch
from lecture_runs import EPS32, QUICK, one_network, quick
from torch.func import functional_call
from torch.nn import functional as F

from batchnorm.experiment.claim import Result
from batchnorm.experiment.judgement import Status
from batchnorm.instruments.batch_noise import dropout_rate
from batchnorm.layers import BatchNorm1d
from batchnorm.lecture import data_sets
from batchnorm.lecture.claims import mini_batch_noise
from batchnorm.lecture.claims.mini_batch_noise import SIZES, Arm, gaussian, judge_effect, noise_of_batches
from batchnorm.lecture.networks import Ensemble, fully_connected
from batchnorm.lecture.rate_sweep import digits
from batchnorm.lecture.renormalized import GhostNorm, with_population
from batchnorm.population import recalibrate


@pytest.fixture(scope="module")
def result() -> Result:
    return quick("noise").result


def test_an_arm_that_has_not_learned_makes_the_effect_invalid_whatever_its_test_loss() -> None:
    ensemble = Ensemble.of(lambda: fully_connected(SIZES), [0, 1])
    learned, loss = torch.tensor([1.0, 0.96]), torch.tensor([0.3, 0.4])
    arms = {size: Arm(ensemble, learned, loss / size, learned) for size in (16, 512)}
    assert judge_effect(arms).status is not Status.INVALID
    arms[16] = Arm(ensemble, torch.tensor([1.0, 0.949]), loss / 16, learned)
    effect = judge_effect(arms)
    assert effect.status is Status.INVALID
    assert effect.failed_guard == "groups of 16 ended at 94.9% training accuracy"


@pytest.mark.parametrize(
    ("losses", "said"),
    [([0.1, 0.2, 0.3], "the smaller the groups, the lower the loss"), ([0.2, 0.1, 0.3], "not monotone: lowest with")],
)
def test_the_sentence_says_whether_the_effect_is_monotone(losses: list[float], said: str) -> None:
    ensemble = Ensemble.of(lambda: fully_connected(SIZES), [0, 1])
    one = torch.ones(2)
    arms = {size: Arm(ensemble, one, loss * one, one) for size, loss in zip((4, 16, 512), losses, strict=True)}
    assert said in judge_effect(arms).sentence


# -- noise of a batch -----------------------------------------------------------------------------------------


def normal_population(channels: int) -> torch.Tensor:
    z = torch.randn(4096, channels, generator=torch.Generator().manual_seed(0))
    return (z - z.mean(0)) / z.std(0, correction=0)


@pytest.mark.parametrize("size", [2, 4, 16, 128])
def test_noise_power_of_normal_values_is_the_exact_formula_within_five_standard_errors(size: int) -> None:
    power, mean = noise_of_batches(normal_population(200), size, torch.Generator().manual_seed(size))
    # two values can be so close that the layer's eps outweighs their variance: with v = ((a - b) / 2)^2 and the
    # density 1 / sqrt(pi) of (a - b) / 2 at 0, E[eps / (v + eps)] = sqrt(pi eps) is missing from the squared output
    missing = math.sqrt(math.pi * 1e-5) if size == 2 else 0.0
    # channels share the drawn rows but are independent, so their spread gives the standard error
    for found, expected in ((power, gaussian(size) - missing), (mean, 1 / size)):
        assert abs(float(found.mean()) - expected) < 5 * float(found.std()) / math.sqrt(len(found))


def test_noise_power_is_what_separate_layers_do_to_the_drawn_batches() -> None:
    z, size = normal_population(3), 64
    power, mean = noise_of_batches(z, size, torch.Generator().manual_seed(1))
    batches = max(mini_batch_noise.ROWS // size, mini_batch_noise.AT_LEAST)
    drawn = z[torch.randint(len(z), (size, batches), generator=torch.Generator().manual_seed(1))]
    layer = BatchNorm1d(3, affine=False)
    normalized = torch.stack([layer(drawn[:, b]) for b in range(batches)], 1)
    # sums of some thousand terms of one size, in another order: below sqrt(count) roundings
    bound = {"rtol": 64 * EPS32, "atol": 0.0}
    torch.testing.assert_close(power.float(), (normalized - drawn).square().mean((0, 1)), **bound)
    torch.testing.assert_close(mean.float(), drawn.mean(0).square().mean(0), **bound)


def test_noise_power_is_twice_what_the_mean_standard_deviation_of_a_batch_lacks_of_one() -> None:
    z, size = normal_population(50), 4
    power, _ = noise_of_batches(z, size, torch.Generator().manual_seed(2))
    batches = max(mini_batch_noise.ROWS // size, mini_batch_noise.AT_LEAST)
    drawn = z[torch.randint(len(z), (size, batches), generator=torch.Generator().manual_seed(2))].double()
    # E[(z^ - z)^2] = E[z^^2] - 2 E[z^ z] + E[z^2] with E[z^ z] = E[s], apart from the layer's eps
    expected = 1 - 2 * drawn.std(0, correction=0).mean() + drawn.square().mean()
    assert float(power.double().mean()) == pytest.approx(float(expected), abs=5e-5)  # eps = 1e-5 within the root


@pytest.mark.parametrize("size", mini_batch_noise.MEASURED)
def test_the_exact_formula_meets_the_first_order_one_with_an_error_of_7_over_16_m_squared(size: int) -> None:
    # E[s] = 1 - 3 / (4 M) - 7 / (32 M^2) - O(M^-3), from Stirling's series for the gamma function
    assert abs(gaussian(size) - mini_batch_noise.theory(3.0, size) - 7 / (16 * size**2)) < 1 / size**3


def test_theory_of_values_without_spread_in_size_leaves_the_noise_of_the_mean_alone() -> None:
    signs = torch.tensor([[-1.0], [1.0]])
    assert mini_batch_noise.kurtosis(signs).tolist() == [1.0]
    assert mini_batch_noise.theory(float(mini_batch_noise.kurtosis(signs)), 64) == 1 / 64
    power, mean = noise_of_batches(signs, 64, torch.Generator().manual_seed(3))
    assert float(power) == pytest.approx(float(mean), rel=0.1)  # next order in 1 / M


def test_kurtosis_of_equally_spaced_values_is_nine_fifths() -> None:
    z = torch.linspace(-1, 1, 10_001).double()[:, None]
    z = z / z.std(0, correction=0)
    assert float(mini_batch_noise.kurtosis(z)) == pytest.approx(1.8, rel=1e-3)


def test_dropout_of_the_equivalent_rate_has_the_same_noise_power() -> None:
    for power in (0.001, 0.2, 1.0):
        p = dropout_rate(power)
        assert p / (1 - p) == pytest.approx(power, rel=1e-12)


def test_the_slope_of_one_over_m_is_minus_one_and_of_its_root_minus_one_half() -> None:
    exact = 1 / torch.tensor(mini_batch_noise.MEASURED, dtype=torch.float64)
    measured = mini_batch_noise.Noise(torch.stack([exact, exact.sqrt()], 1), exact[:, None], torch.tensor([3.0]))
    assert measured.slopes().tolist() == pytest.approx([-1.0, -0.5], abs=1e-12)


def test_pre_activations_are_what_a_hook_sees_before_each_batch_norm_layer() -> None:
    ensemble = Ensemble.of(lambda: fully_connected(SIZES), [5])
    x = digits().x[:100]
    torch.manual_seed(5)
    net = fully_connected(SIZES).eval()
    seen: list[torch.Tensor] = []
    for name in ("norm1", "norm2"):
        net.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    net(x)
    found = mini_batch_noise.pre_activations(ensemble, x)
    assert len(found) == 2
    for z, received in zip(found, seen, strict=True):
        expected = (received - received.mean(0)) / received.std(0, correction=0)
        # sums over 64 inputs in another order, in units of the channel's standard deviation
        torch.testing.assert_close(z[0], expected, rtol=0, atol=64 * 8 * EPS32)


# -- groups ---------------------------------------------------------------------------------------------------


def test_groups_are_normalized_and_differentiated_like_separate_batches() -> None:
    ghost, plain = GhostNorm(5, size=4), BatchNorm1d(5)
    with torch.no_grad():
        for layer in (ghost, plain):
            layer.weight.copy_(torch.linspace(0.5, 2, 5))
            layer.bias.copy_(torch.linspace(-1, 1, 5))
    x = torch.randn(12, 5, requires_grad=True)
    pull = torch.randn(12, 5)
    together, apart = ghost(x), torch.cat([plain(group) for group in x.split(4)])
    torch.testing.assert_close(together, apart, rtol=4 * EPS32, atol=4 * EPS32)
    found = torch.autograd.grad((together * pull).sum(), [x, ghost.weight, ghost.bias])
    expected = torch.autograd.grad((apart * pull).sum(), [x, plain.weight, plain.bias])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=32 * EPS32, atol=32 * EPS32)


def test_groups_store_nothing_in_train_mode_and_use_what_is_stored_in_eval_mode() -> None:
    layer, x = GhostNorm(3, size=2), torch.randn(6, 3) + 5
    layer(x)
    assert layer.running_mean is not None
    assert layer.running_mean.tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(layer.eval()(x), x / math.sqrt(1 + layer.eps), rtol=4 * EPS32, atol=0.0)


def test_one_group_of_everything_is_plain_batch_norm_for_an_ensemble_too() -> None:
    x = digits().x[:64].expand(2, -1, -1)
    outputs = [
        Ensemble.of(lambda norm=norm: fully_connected(SIZES, norm=norm), [0, 1])(x, train=True)
        for norm in (partial(GhostNorm, size=64), BatchNorm1d)
    ]
    torch.testing.assert_close(*outputs, rtol=0, atol=64 * 8 * EPS32)


def test_population_statistics_are_those_that_recalibrate_stores() -> None:
    ensemble = Ensemble.of(lambda: fully_connected(SIZES), [0, 1])
    x = torch.stack([digits().x[:200], digits().x[200:400]])
    exact = with_population(ensemble, SIZES, x)
    for index in range(2):
        net = one_network(ensemble, index, SIZES)
        recalibrate(net, list(x[index].split(64)))
        for name, buffer in net.named_buffers():
            if "running" in name:
                # moments are float64; products of 64 terms in another order come before them, two layers deep, and
                # a mean near 0 keeps the error of values of size 1
                torch.testing.assert_close(exact.buffers[name][index], buffer, rtol=128 * EPS32, atol=128 * EPS32)


@pytest.mark.slow
def test_the_effect_is_the_difference_of_test_losses_of_networks_taken_one_by_one(result: Result) -> None:
    def test_loss(size: int, index: int) -> float:
        net = one_network(mini_batch_noise.train_arm(QUICK, partial(GhostNorm, size=size)).ensemble, index, SIZES)
        train, test = (digits()[part] for part in data_sets.split(len(digits()), mini_batch_noise.TRAIN, index))
        recalibrate(net, [train.x])
        with torch.no_grad():
            return float(F.cross_entropy(net.eval()(test.x), test.y))

    estimate = result.verdicts[1].estimate
    assert estimate is not None
    for index in range(2):
        # losses of size 1 in float32
        assert estimate.values[index] == pytest.approx(test_loss(512, index) - test_loss(16, index), abs=1e-5)


def test_all_arms_start_from_one_network_and_differ_only_by_their_groups() -> None:
    plain, ghost = (
        Ensemble.of(lambda norm=norm: fully_connected(SIZES, norm=norm), [3])
        for norm in (BatchNorm1d, partial(GhostNorm, size=4))
    )
    assert plain.parameters.keys() == ghost.parameters.keys()
    assert all(torch.equal(plain.parameters[name], ghost.parameters[name]) for name in plain.parameters)


def test_outputs_of_population_networks_are_those_of_the_template_run_alone() -> None:
    arm = mini_batch_noise.train_arm(QUICK, partial(GhostNorm, size=512))
    state = {k: v[1] for k, v in {**arm.ensemble.parameters, **arm.ensemble.buffers}.items()}
    alone = functional_call(arm.ensemble.template.eval(), state, (digits().x[:50],))
    torch.testing.assert_close(arm.ensemble(digits().x[:50])[1], alone, rtol=1e-5, atol=1e-4)
