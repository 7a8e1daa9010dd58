"""What guards are made of: information, energies and the fading of old examples, by NumPy."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from batchnorm.adaptation.answer_window import PredictionWindow
from batchnorm.adaptation.cumulative import Cumulative, energy, faded
from batchnorm.adaptation.guards import Limits, against_start, against_use, required_share
from batchnorm.adaptation.predictions import Predictions
from batchnorm.moments import Moments
from batchnorm.population.hooks import seeing
from batchnorm.population.stored_statistics import Statistics


def entropy(p: np.ndarray) -> np.ndarray:
    return -(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0)).sum(-1)


def of_classes(*classes: int, k: int = 4) -> torch.Tensor:
    return nn.functional.one_hot(torch.tensor(classes), k).double()


def window_of(p: torch.Tensor) -> PredictionWindow:
    window = PredictionWindow(64)
    window.add_answers(p, len(p))
    return window


def test_information_is_the_entropy_of_the_mix_less_that_of_single_answers():
    p = torch.randn(30, 5).double().softmax(1)
    expected = entropy(p.numpy().mean(0)) - entropy(p.numpy()).mean()
    assert Predictions.of(p).information == pytest.approx(expected)
    halves = Predictions.of(p[:11]) + Predictions.of(p[11:])
    assert halves.information == pytest.approx(expected)
    assert halves.top_share == pytest.approx(p.mean(0).max().item())


def test_predictions_of_more_classes_add_to_those_of_fewer():
    both = Predictions.of(of_classes(0, 1, k=2)) + Predictions.of(of_classes(3, 3, k=4))
    assert both.total.tolist() == [1, 1, 0, 2]


@pytest.mark.parametrize(("k", "size"), [(10, 64), (10, 16), (2, 32), (100, 64), (1000, 64)])
def test_the_information_expected_of_a_window_is_what_draws_have_on_average(k, size):
    random = np.random.default_rng(0)
    before = Predictions(torch.full((k,), 1000.0, dtype=torch.float64), 0.0, 1000 * k)
    counts = [np.bincount(random.integers(k, size=size), minlength=k) / size for _ in range(400)]
    assert before.expected(size) == pytest.approx(np.mean([entropy(c) for c in counts]), rel=0.06)


def test_few_predictions_of_one_class_do_not_lower_what_is_expected():
    assert Predictions.of(of_classes(*[1] * 40)).expected(64) > 1.3  # of log 4 = 1.39


def test_energy_is_the_mean_square_of_what_is_standardized():
    layer, x = nn.BatchNorm1d(3), torch.randn(20, 3) * 2 + 1
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    z = (x.double() - layer.running_mean) / (layer.running_var.double() + layer.eps).sqrt()
    assert energy(layer, Moments.of(x)) == pytest.approx(z.square().mean().item())


def test_examples_count_equally_until_the_floor_and_fade_from_then_on():
    assert faded(0, 8, 0.01) == 1
    assert faded(50, 8, 0.01) == pytest.approx(1)
    kept = faded(1000, 1, 0.01)
    assert 1 / (1000 * kept + 1) == pytest.approx(0.01)
    examples = 0.0
    for _ in range(2000):
        examples = examples * faded(examples, 8, 0.01) + 8
    assert 8 / examples == pytest.approx(1 - 0.99**8)


def test_cumulative_statistics_are_those_of_all_examples_and_the_prior():
    layer = nn.BatchNorm2d(3).eval()
    x = torch.randn(24, 3, 4, 4) * 2 + 1
    growing = Cumulative(Statistics.of({"norm": layer}), 16, 1e-3)
    with seeing({"norm": layer}, growing.see):
        for part in x.split([1, 8, 15]):
            layer(part)
    values = x.double().movedim(1, -1).reshape(-1, 3).numpy()
    w = 16 / 40
    mean, var = values.mean(0), values.var(0, ddof=1)
    np.testing.assert_allclose(layer.running_mean.numpy(), (1 - w) * mean, rtol=1e-5)
    np.testing.assert_allclose(layer.running_var.numpy(), w + (1 - w) * var + w * (1 - w) * mean**2, rtol=1e-5)


def test_a_window_forgets_what_is_older():
    window = PredictionWindow(4)
    window.add_answers(of_classes(0, 0, 0), 3)
    window.add_answers(of_classes(1, 1, 1), 3)
    assert window.answers is not None
    assert window.answers.total.tolist() == [1, 3, 0, 0]
    assert window.examples == 6


def test_energies_are_judged_in_units_of_what_they_should_have_been():
    window = PredictionWindow(8)
    window.add_energies({"norm": (4.0, 2.0)}, 4)
    assert against_use(window, None, Limits(), 0.7) is None
    window.add_energies({"norm": (20.0, 2.0)}, 4)
    assert window.energies == {"norm": 6.0}
    assert "layer 'norm' under the new statistics is 6.00 times" in str(against_use(window, None, Limits(), 0.7))
    assert against_start(window, PredictionWindow(8), None, Limits()) == against_use(window, None, Limits(), 0.7)
    window.add_energies({"norm": (math.nan, 2.0)}, 4)
    assert against_use(window, None, Limits(), 0.7) is not None


BEFORE = Predictions.of(of_classes(*[0, 1, 2, 3] * 100))
MIXED, ONE = of_classes(*[0, 1, 2, 3] * 16), of_classes(*[2] * 60, 0, 1, 3, 3)


def unsure(doubt: float, p: Tensor = MIXED) -> Tensor:
    """Predictions of the same classes with so much probability spread over all classes."""
    return (1 - doubt) * p + doubt / p.shape[1]


def test_during_use_answers_of_one_class_and_answers_without_information_are_objected_to():
    assert against_use(window_of(MIXED), BEFORE, Limits(), 0.7) is None
    assert "of the predictions are of one class" in str(against_use(window_of(ONE), BEFORE, Limits(), 0.7))
    assert "carry 0.00 nats of information" in str(against_use(window_of(unsure(1.0)), BEFORE, Limits(), 0.7))
    assert against_use(window_of(of_classes(2, 2, 2)), BEFORE, Limits(), 0.7) is None  # too few to tell
    assert against_use(window_of(torch.full_like(MIXED, math.nan)), BEFORE, Limits(), 0.7) is not None


@pytest.mark.parametrize(
    ("new", "old", "furthest", "objection"),
    [
        # unsure before, sure now
        (MIXED, unsure(0.4), None, None),
        # answers that do not depend on the input are no use, however sure
        (MIXED, ONE, None, None),
        # nothing to win: the deployed statistics are sure
        (MIXED, unsure(0.02), None, "the deployed statistics are as sure as before"),
        (MIXED, of_classes(*[0, 1] * 32), None, "the deployed statistics are as sure as before"),
        # ... unless nothing but other inputs can be the reason: K = 4 classes alone move by sqrt(3) at most
        (MIXED, unsure(0.05), (2.0, 0.2), None),
        (MIXED, unsure(0.02), (1.9, 0.2), "the deployed statistics are as sure as before"),
        (MIXED, unsure(0.4), (0.9, 0.2), "another mix of known examples could look like this"),
        (MIXED, unsure(0.4), (1.3, 0.4), "another mix of known examples could look like this"),
        (MIXED, unsure(0.4), (1.5, 0.4), None),
        # no gain
        (unsure(0.4), unsure(0.4), None, "hardly more than"),
        # a gain, but little information: enough if much surer than the deployed ones, or if inputs moved for certain
        (unsure(0.25), unsure(0.3), None, "nats of information, below the required"),
        (unsure(0.25), unsure(0.3), (3.0, 1.0), None),
        (unsure(0.25), unsure(0.45), None, None),
        (ONE, unsure(0.9), (9.0, 1.0), "of the predictions are of one class"),
    ],
)
def test_what_speaks_against_beginning(new, old, furthest, objection):
    found = against_start(window_of(torch.cat([new, new])), window_of(old), BEFORE, Limits(), furthest)
    assert (found is None) if objection is None else objection in str(found)


def test_who_begins_with_less_information_is_asked_for_less_during_use():
    windows = window_of(torch.cat([unsure(0.25)] * 2)), window_of(unsure(0.3))
    assert required_share(*windows, BEFORE, Limits()) == 0.7
    assert required_share(*windows, BEFORE, Limits(), (3.0, 1.0)) == 0.5
    assert required_share(window_of(unsure(0.25)), windows[1], BEFORE, Limits(), (3.0, 1.0)) == 0.7
    # 0.52 nats are carried; of log 4 less 3 / 128, half (0.7 * 5 / 7) or 0.36 (0.5 * 5 / 7) are required
    less = window_of(unsure(0.35))
    assert "nats of information, below the required 0.68" in str(against_use(less, BEFORE, Limits(), 0.7))
    assert against_use(less, BEFORE, Limits(), 0.5) is None


def test_little_information_is_never_enough_before_twice_a_window():
    found = against_start(window_of(unsure(0.25)), window_of(unsure(0.3)), BEFORE, Limits(), (3.0, 1.0))
    assert "nats of information, below the required" in str(found)


def test_a_beginning_needs_answers_of_the_deployed_statistics_to_compare_with():
    assert "have not answered any" in str(against_start(window_of(MIXED), PredictionWindow(64), BEFORE, Limits()))
    assert against_start(window_of(MIXED), PredictionWindow(64), None, Limits()) is None  # there are no classes


def test_more_doubt_is_usual_for_some_models():
    before = Predictions.of(unsure(0.3, of_classes(*[0, 1, 2, 3] * 100)))
    found = against_start(window_of(MIXED), window_of(unsure(0.35)), before, Limits())
    assert "as sure as before" in str(found)
    assert against_start(window_of(MIXED), window_of(unsure(0.7)), before, Limits()) is None
