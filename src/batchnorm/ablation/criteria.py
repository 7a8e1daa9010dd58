"""Every criterion by which a user's model is judged, fixed before it runs: change one, and VERSION goes up.

An arm is a way to train the model, and a run one arm at one learning rate from one seed. With the loss of the step's
own batch averaged over a few steps, three levels are fixed by a rule before anything is trained:

    start  = mean first loss of the arm that starts lower, of the two that are compared
    end    = lowest mean final loss of these two arms over all rates
    target = start - TARGET (start - end),    usable = start - USABLE (start - end)

so the arm that ends lower always has a target it can reach, and no arm is held to a level chosen in its favour. Log
ratios are base 2 (1 = twice).
"""

from __future__ import annotations

import math
from math import inf, log2, log10
from typing import TYPE_CHECKING

from batchnorm.lecture.claim import Criterion, Status, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence


VERSION = "1"

# Of each question by itself: with few seeds an interval that covers all questions together would decide nothing.
# The page says how many were asked.
LEVEL = 0.95

TARGET = 0.8  # share of the better arm's decrease of the loss at which steps are counted
USABLE = 0.5  # share of it that a run at a usable learning rate reaches
LEARNED = 0.25  # an arm has learned when its loss ends this share of the start below the start, in every seed

_PERCENT = 10.0  # from a thousand percent on
_MANY = 1e6  # from here on the digits of a ratio say nothing

_MORE = (log2(1.5), inf)
_LESS = (-inf, -log2(1.5))
_BOTH = f"both arms have learned: their training loss fell by {LEARNED:.0%} of the start or more"
_BETTER = f"the arm that ends lower has learned: its training loss fell by {LEARNED:.0%} of the start or more"

_TABLE = (
    Criterion(
        "speed-steps",
        "Does this model reach the target training loss in fewer steps with batch norm than without?",
        f"log2 of steps to {TARGET:.0%} of the better arm's decrease, without / with, each at its best learning rate",
        _MORE,
        _LESS,
        guard=_BETTER,
    ),
    Criterion(
        "speed-once",
        "Is normalizing while it trains faster than normalizing once, at the start?",
        f"log2 of steps to {TARGET:.0%} of the better arm's decrease, normalized once / with, each at its best rate",
        _MORE,
        _LESS,
        guard=_BETTER,
    ),
    Criterion(
        "rates-largest",
        "Are larger learning rates usable with batch norm?",
        f"log2 of the largest rate that ends with {USABLE:.0%} of the better arm's decrease, with / without",
        (log2(3), inf),
        (-inf, -log2(3)),
        guard=_BETTER,
    ),
    Criterion(
        "scale-inputs",
        "Without batch norm, does normalizing the input features speed this model up?",
        f"log2 of steps to {TARGET:.0%} of the better arm's decrease, as they are / normalized, each at its best rate",
        _MORE,
        _LESS,
        guard=_BETTER,
    ),
    Criterion(
        "scale-instead",
        "Does normalizing the inputs alone do as well as batch norm?",
        f"log2 of steps to {TARGET:.0%} of the better arm's decrease, normalized inputs only / with, at the best rates",
        (-inf, log2(1.5)),
        (log2(1.5), inf),
        guard=_BETTER,
    ),
    Criterion(
        "scale-spread",
        "Are the input features on different scales?",
        "log10 of the largest over the smallest standard deviation of a feature or channel",
        (1.0, inf),
        (-inf, log10(2)),
    ),
    Criterion(
        "shift-drift",
        "Does what the batch norm layers receive move less with batch norm, at an equal learning rate?",
        "log2 of the drift between looks in standard deviations, mean over layers and time, without / with",
        (1.0, inf),
        (-inf, -1.0),
        guard=_BOTH,
    ),
    Criterion(
        "noise-slope",
        "Does the noise that a mini-batch adds fall as one over its size?",
        "slope of log noise power on log batch size, mean over layers",
        (-1.15, -0.85),
    ),
    Criterion(
        "test-time-small",
        "At test time, are stored statistics better than those of a batch of 4?",
        "held-out loss by batches of 4 minus by population statistics, as a share of the latter",
        (0.05, inf),
        (-inf, -0.05),
    ),
    Criterion(
        "test-time-stored",
        "Are the running averages of training as good as exact population statistics?",
        "held-out loss in eval mode minus by population statistics, as a share of the latter",
        (-inf, 0.05),
        (0.05, inf),
    ),
    Criterion(
        "test-time-alone",
        "Does an example get one answer in eval mode, alone and in a batch?",
        "largest difference of an output, in standard deviations of the outputs",
        (-inf, 1e-4),
        (1e-2, inf),
    ),
    Criterion(
        "smooth-equal",
        "Is the loss smoother along the gradient with batch norm, at an equal learning rate?",
        "log2 of the gradient's change per distance (beta-hat), without / with batch norm",
        _MORE,
        _LESS,
        guard=_BOTH,
    ),
    Criterion(
        "smooth-best",
        "Is it still smoother when each arm trains at its own best learning rate?",
        "log2 of rate × beta-hat, without / with batch norm, each at its best rate",
        _MORE,
        _LESS,
        guard=_BOTH,
    ),
    Criterion(
        "depth-rank",
        "Can examples be told apart in the last batch norm layer as well as in the first?",
        "log2 of the stable rank of what it receives, last / first layer",
        (-1.0, inf),
        (-inf, -3.0),
    ),
    Criterion(
        "census-dead",
        "Does every channel carry a signal, by gamma, beta and its stored variance?",
        "share of dead channels, mean over layers",
        (-inf, 0.01),
        (0.1, inf),
    ),
)

CRITERIA: dict[str, Criterion] = {criterion.key: criterion for criterion in _TABLE}


def judge(key: str, values: Sequence[float], sentence: str, *, failed_guard: str = "") -> Verdict:
    """The verdict on one criterion, by the lecture's rule: which region holds the whole interval.

    Args:
        key: A key of CRITERIA.
        values: The effect for each seed; where one is not finite there is no verdict.
        sentence: The measurement in plain words, with its numbers.
        failed_guard: What did not hold, with its number; it makes the verdict INVALID.
    """
    from batchnorm.lecture.verdict import estimate, minus, status_of

    criterion, sentence = CRITERIA[key], minus(sentence[:1].upper() + sentence[1:])
    finite = len(values) > 1 and all(map(math.isfinite, values))
    failed = failed_guard or ("" if finite else "the effect is not a finite number in every seed")
    measured = estimate(values, LEVEL) if finite else None
    sentence = sentence if finite else "The arms could not be compared."
    if failed or measured is None:
        return Verdict(criterion, Status.INVALID, measured, sentence, failed)
    return Verdict(criterion, status_of(criterion, measured), measured, sentence)


def times(ratio: float) -> str:
    """A ratio with the digits that count, such as 4.7, 0.83, 120 or 3e+29; "any number of" for infinity."""
    if ratio == inf:
        return "any number of"
    if ratio >= _MANY:
        return f"{ratio:.1g}"
    if ratio >= 100:
        return f"{ratio:.0f}"
    return f"{ratio:.1f}" if ratio >= 0.95 else f"{ratio:.2g}"


def power(base: float, exponent: float) -> float:
    """A power, infinite where it is beyond floating-point numbers."""
    try:
        return float(base**exponent)
    except OverflowError:
        return inf


def share(value: float) -> str:
    """A signed share as a percentage, or as a multiple where a percentage says nothing: +4.1%, 31 times more."""
    if not math.isfinite(value) or abs(value) < _PERCENT:
        return f"{value:+.1%}"
    return f"{times(abs(value))} times {'more' if value > 0 else 'less'}"


def figure(value: float, digits: int = 2) -> str:
    """A number with the digits that count; "not known" where it is none."""
    return f"{value:.{digits}g}" if math.isfinite(value) else "not known"


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 step, 4 steps."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
