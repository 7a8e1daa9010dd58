"""Every criterion of the lecture, fixed before its experiment runs: change one, and the version goes up.

Log ratios are base 2 for steps, rates and drifts (1 = twice) and base 10 for input scales (1 = ten times), so a
margin reads the same in both directions.
"""

from __future__ import annotations

from functools import partial
from math import inf, log2, log10

from batchnorm.experiment.judgement import Criteria, Criterion, beyond

_LEARNED = "both arms reach 90% training accuracy"
_PAIR = "without / with batch norm"

_best = ", each at its best learning rate"
_inputs = partial(
    Criterion, quantity="steps to the target loss", log=10, compares=f"raw / normalized{_best}",
    guard="the normalized arm reaches the target loss", **beyond(log10(2)),
)  # fmt: skip
_speed = partial(
    Criterion, quantity="steps to 95%", log=2, compares=_PAIR + _best, guard="the arm with batch norm reaches 95%",
    **beyond(log2(1.5)),
)  # fmt: skip
_rate = partial(
    Criterion, quantity="the largest rate that ends at 90% or more", log=2, compares="with / without batch norm",
    guard="the arm with batch norm has a usable rate", **beyond(log2(3)),
)  # fmt: skip
_drift = partial(
    Criterion, quantity="the drift of a[2] per 10 steps in standard deviations", log=2,
    compares=f"{_PAIR}, equal rate", guard=_LEARNED, **beyond(1),
)  # fmt: skip
_repair = partial(
    Criterion, quantity="share of the lost accuracy that is won back", supported=(0.5, inf), opposite=(-inf, 0),
    guard="at least 5 points were lost",
)  # fmt: skip
_smooth = partial(Criterion, log=2, compares=_PAIR, guard=_LEARNED, **beyond(log2(1.5)))

CRITERIA = Criteria("1", 1 - 0.05 / 8, (
    # Eight claims are made in one run. An interval of level 1 - 0.05 / 8 each makes all eight hold together with
    # 95% (Bonferroni), and gives one claim run alone the same verdict as in the full run.
    _inputs(
        "scale-wine", "Does normalizing the input features of the wine data (ranges 0.13 to 1680) speed up learning?",
    ),
    _inputs(
        "scale-cancer",
        "Does normalizing the input features of the breast cancer data (sd 0.003 to 569) speed up learning?",
    ),
    Criterion(
        "scale-digits", "Control: does it change little where all features already have one range (pixels 0 to 16)?",
        "steps to the target loss", (-log10(2), log10(2)), log=10, compares=f"pixels / 16 against normalized{_best}",
        guard="both arms reach the target loss",
    ),
    _speed("hidden-speed-relu", "Does batch norm on hidden units reach 95% training accuracy in fewer steps (ReLU)?"),
    _speed(
        "hidden-speed-sigmoid", "Does batch norm on hidden units reach 95% training accuracy in fewer steps (sigmoid)?"
    ),
    _rate("hidden-rate-relu", "Does batch norm widen the range of usable learning rates (ReLU)?"),
    _rate("hidden-rate-sigmoid", "Does batch norm widen the range of usable learning rates (sigmoid)?"),
    _drift(
        "layer3-wide", "Does batch norm reduce how much the values that layer 3 receives keep shifting (wide layers)?"
    ),
    _drift("layer3-four", "Does batch norm reduce the shift of the lecture's four units a[2]1 to a[2]4?"),
    Criterion(
        "layer3-governed",
        "Do mean and standard deviation of z~ land on beta and |gamma|, for examples outside the batch too?",
        "median over units and steps of the distance of (mean, sd) from (beta, |gamma|), in units of |gamma|",
        (-inf, 0.25), (0.5, inf),
    ),
    Criterion(
        "cause-drift", "Is the reduced shift the reason why batch norm trains faster?",
        "share of batch norm's log speed-up that is lost when noise after it brings the shift back",
        (0.5, inf), (-inf, 0.2),
        guard="with the noise, layer 3 sees at least the drift that it sees without batch norm",
    ),
    Criterion(
        "cats-shift", "Does a model that learned from black cats fail on coloured cats?",
        "accuracy on black minus accuracy on coloured, with batch norm",
        **beyond(0.05), guard="at least 85% accuracy on black",
    ),
    Criterion(
        "cats-robust", "Is a model with batch norm, as it stands, the better one on coloured cats?",
        "accuracy on coloured, with minus without batch norm", **beyond(0.02),
    ),
    _repair(
        "cats-repair-coloured",
        "Does re-estimating the statistics on unlabelled coloured images win back half of what was lost?",
    ),
    _repair(
        "cats-repair-affine", "Does re-estimating win back half of what a change of contrast and brightness costs?"
    ),
    _repair("cats-repair-noise", "Does re-estimating win back half of what added noise costs?"),
    _repair(
        "cats-repair-inversion",
        "Does re-estimating win back half of what inversion costs (light cats on a dark ground)?",
    ),
    Criterion(
        "cats-repair-mix",
        "Is re-estimating harmless where only the mix of classes shifts (one example in twenty is a cat)?",
        "accuracy after minus before re-estimation, on black images with the shifted mix", (-0.02, inf), (-inf, -0.02),
    ),
    Criterion(
        "noise-slope", "Does the noise that a mini-batch adds fall as one over its size, from 2 to 512?",
        "slope of log noise power on log batch size", (-1.15, -0.85),
    ),
    Criterion(
        "noise-regularizes",
        "Does the noise of small batches regularize: is the test loss lower with groups of 16 than with 512?",
        "test loss with 512 minus with 16, nats, at an optimizer batch of 512", **beyond(0.005),
        guard="both arms reach 95% training accuracy",
    ),
    Criterion(
        "test-time-small", "At test time, are stored statistics better than those of a batch of 2?",
        "accuracy with population statistics minus with batches of 2", **beyond(0.02),
    ),
    Criterion(
        "test-time-medium", "At test time, are stored statistics better than those of a batch of 8?",
        "accuracy with population statistics minus with batches of 8", **beyond(0.02),
    ),
    Criterion(
        "test-time-alone", "Does an example get one answer, alone and in any batch, with stored statistics?",
        "largest difference of a logit, in units of the logits' standard deviation", (-inf, 1e-4), (1e-2, inf),
    ),
    _smooth(
        "smooth-equal", "Is the loss smoother along the gradient with batch norm, at an equal learning rate?",
        "the gradient's change per distance (beta-hat)",
    ),
    _smooth(
        "smooth-variation", "Does the loss vary less along the gradient with batch norm, at an equal learning rate?",
        "the range of the loss over steps of 1/2 to 4 times the rate",
    ),
    _smooth(
        "smooth-predictive",
        "Does the gradient predict the next gradient better with batch norm, at an equal learning rate?",
        "the largest distance between gradients over the same steps",
    ),
    _smooth(
        "smooth-best", "Is it still smoother when each arm trains at its own best learning rate?",
        "rate times beta-hat", compares=f"{_PAIR}, each at its best rate",
    ),
))  # fmt: skip
judge = CRITERIA.judge
