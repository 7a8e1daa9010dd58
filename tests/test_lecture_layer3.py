"""Claim "layer3": the measure of drift against closed forms, what layer 3 receives, and the contract of a claim."""

import math
import re

import pytest
import torch
from lecture_runs import EPS32, QUICK, quick
from torch import Tensor

from batchnorm.experiment.claim import Result
from batchnorm.experiment.judgement import Status
from batchnorm.instruments.layer_drift import IDLE, drift, noise_floor
from batchnorm.layers import BatchNorm1d
from batchnorm.lecture.claims import third_layer
from batchnorm.lecture.networks import Ensemble, fully_connected
from batchnorm.lecture.rate_sweep import digits, probe_indices


@pytest.fixture(scope="module")
def result() -> Result:
    return quick("layer3").result


# A sum of 64 values of up to 4 sd in float32 is off by less than 64 * EPS32 of an sd; so are the ratios made of it.
ROUNDING = 64 * EPS32


def values(n: int = 64, units: int = 5) -> Tensor:
    """Values of a layer, every unit with another standard deviation."""
    return torch.randn(n, units) * torch.arange(1.0, units + 1)


def test_a_shift_by_d_standard_deviations_is_a_drift_of_d() -> None:
    before = values()
    d = torch.tensor([0.1, -0.2, 0.3, -0.4, 0.5])
    moved = drift(before, before + d * before.std(0, correction=0))
    rms = float(d.square().mean().sqrt())
    assert float(moved.total) == pytest.approx(rms, rel=ROUNDING)
    assert float(moved.mean) == pytest.approx(rms, rel=ROUNDING)
    assert float(moved.log_sd) == pytest.approx(0, abs=ROUNDING)


def test_a_stretch_by_c_is_a_drift_of_c_less_one_in_root_mean_squares() -> None:
    before, c = values() + 2, 1.25
    mean, sd = before.mean(0), before.std(0, correction=0)
    moved = drift(before, c * before)
    # W2(P, cP)^2 = (c - 1)^2 E[x^2]
    expected = (c - 1) * ((mean.square() + sd.square()) / sd.square()).mean().sqrt()
    assert float(moved.total) == pytest.approx(float(expected), rel=ROUNDING)
    assert float(moved.mean) == pytest.approx((c - 1) * float((mean / sd).square().mean().sqrt()), rel=ROUNDING)
    assert float(moved.log_sd) == pytest.approx(math.log(c), rel=ROUNDING)


def test_the_same_values_in_another_order_do_not_drift() -> None:
    before = values()
    moved = drift(before, before[torch.randperm(len(before))])
    assert moved.total == moved.log_sd == moved.mean == 0


def test_rescaling_or_mirroring_a_unit_changes_no_drift() -> None:
    before, after = values(), values()
    factor = torch.tensor([1e-3, 1.0, -1.0, 7.0, -1e4])
    moved, rescaled = drift(before, after), drift(factor * before, factor * after)
    for part in ("total", "mean", "log_sd", "idle"):
        assert float(getattr(rescaled, part)) == pytest.approx(float(getattr(moved, part)), rel=ROUNDING)


def test_a_swap_of_units_is_a_drift_though_the_layer_as_a_set_stays() -> None:
    before = values()
    assert drift(before, before.flip(1)).total > 0.5


def test_an_idle_unit_is_left_out_and_counted() -> None:
    before = torch.cat([values(), torch.zeros(64, 3)], 1)
    before[: 64 // IDLE, 5] = 1.0  # active on just as few examples as still count as idle
    after = before + 1.0
    alone, together = drift(before[:, :5], after[:, :5]), drift(before, after)
    assert together.total == alone.total
    assert float(together.idle) == pytest.approx(3 / 8)
    before[: 64 // IDLE + 1, 5] = 1.0
    assert float(drift(before, before).idle) == pytest.approx(2 / 8)


def test_a_layer_of_idle_units_does_not_drift() -> None:
    moved = drift(torch.full((20, 3), 0.1), torch.randn(20, 3))
    assert (float(moved.total), float(moved.log_sd), float(moved.idle)) == (0, 0, 1)


def test_a_unit_that_falls_idle_drifts_but_has_no_logarithm() -> None:
    moved = drift(values(), torch.zeros(64, 5))
    assert float(moved.log_sd) == 0
    assert 0 < float(moved.total) < math.inf


def test_the_noise_floor_falls_as_the_root_of_the_probe() -> None:
    floors = {n: float(noise_floor(torch.randn(50, n, 8)).mean()) for n in (64, 1024)}
    # W2 of two samples of n / 2 falls as n ** -0.5 up to logarithms: 4 from 64 to 1024; 400 draws leave a few percent
    assert 3.2 < floors[64] / floors[1024] < 4.8


def test_the_noise_floor_is_the_drift_from_even_to_odd_places() -> None:
    half = values()
    both = torch.stack([half, half + 0.25 * half.std(0, correction=0)], 1).flatten(0, 1)
    assert float(noise_floor(both)) == pytest.approx(0.25, rel=4 * ROUNDING)
    assert float(noise_floor(half.repeat_interleave(2, 0))) == 0
    assert float(noise_floor(both[:-1])) < 0.5  # an odd probe leaves its last example out


def test_values_behind_a_child_are_those_of_the_network_cut_there_and_change_nothing() -> None:
    net = Ensemble.of(lambda: fully_connected((64, 8, 4, 10)), range(2))
    x = digits()[probe_indices(QUICK, 32)].x
    kept = {name: value.clone() for name, value in net.buffers.items()}
    seen = net.behind("act2", x, train=True)
    assert seen.shape == (2, 32, 4)
    last = {name: net.parameters[f"w3.{name}"].detach() for name in ("weight", "bias")}
    logits = torch.baddbmm(last["bias"].unsqueeze(1), seen, last["weight"].mT)
    # sums of 4 products, in another order
    torch.testing.assert_close(
        logits, net(x, train=True, keep_statistics=True).detach(), rtol=16 * EPS32, atol=16 * EPS32
    )
    assert all(torch.equal(kept[name], value) for name, value in net.buffers.items())


def test_both_arms_start_from_the_same_weights() -> None:
    arms = third_layer._paired(QUICK, (64, 8, 4, 10))
    for layer in (1, 2, 3):
        assert torch.equal(arms["with"].parameters[f"w{layer}.weight"], arms["without"].parameters[f"w{layer}.weight"])
    assert arms["with"].parameters["w1.weight"].is_leaf


def test_z_in_the_batch_that_normalizes_has_mean_beta_and_sd_gamma() -> None:
    norm = BatchNorm1d(3, eps=1e-12)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -2.0, 1.0]))
        norm.bias.copy_(torch.tensor([1.0, 0.0, -3.0]))
    z = norm(torch.randn(200, 3) * 5 + 1).detach()[None, None]
    seen = third_layer.Layer3Values(
        torch.zeros(1),
        z,
        z,
        norm.bias.detach()[None, None],
        norm.weight.detach()[None, None],
        torch.zeros(2, 1),
        torch.ones(1),
    )
    # mean and standard deviation of 200 values in float32, up to 3 sd around 3
    assert max(map(float, third_layer._in_batch_errors(seen))) < 200 * EPS32
    assert float(third_layer._distances(seen).max()) < 200 * EPS32


@pytest.mark.slow
def test_every_chart_has_an_axis_of_numbers(result: Result) -> None:
    assert [chart.kind for chart in result.charts] == ["ribbons", "lines", "lines"]
    assert all(chart.y is not None for chart in result.charts)


@pytest.mark.slow
def test_the_picture_has_the_four_units_in_both_arms(result: Result) -> None:
    cells = {(row["row"], row["panel"]) for row in result.charts[0].rows}
    assert cells == {(f"a[2]{unit}", f"{arm} batch norm") for unit in range(1, 5) for arm in ("without", "with")}


def test_a_full_run_stays_within_the_rows_that_a_chart_can_show() -> None:
    for count in (2, 3, 31, 81):
        shown = third_layer._every(count, 40)
        assert shown[0] == 0
        assert len(shown) <= 41


@pytest.mark.slow
def test_arms_that_did_not_learn_make_no_verdict(result: Result) -> None:
    wide = result.verdicts[0]
    assert wide.status is Status.INVALID  # a tenth of the training is not enough without batch norm
    assert "without batch norm" in wide.failed_guard


@pytest.mark.slow
def test_titles_state_the_measured_drift(result: Result) -> None:
    drifts = []
    for arm in ("without", "with"):
        series = {"series": f"{arm} batch norm", "panel": "four units"}
        rows = [row for row in result.charts[1].rows if series.items() <= row.items()]
        drifts.append(sum((row["low"] + row["high"]) / 2 for row in rows) / len(rows))  # the range of two seeds
    plain, normed = re.findall(r"by ([\d.]+)", result.charts[0].title)
    assert float(plain) == pytest.approx(drifts[0], rel=0.05)  # two figures
    assert float(normed) == pytest.approx(drifts[1], rel=0.05)
