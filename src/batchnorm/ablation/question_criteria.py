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

from functools import partial
from math import inf, log2, log10

from batchnorm.experiment.judgement import Criteria, Criterion, beyond

TARGET = 0.8  # share of the better arm's decrease of the loss at which steps are counted
USABLE = 0.5  # share of it that a run at a usable learning rate reaches
LEARNED = 0.25  # an arm has learned when its loss ends this share of the start below the start, in every seed

_FELL = f"training loss fell by {LEARNED:.0%} of the start or more"
_BOTH = f"both arms have learned: their {_FELL}"
_BETTER = f"the arm that ends lower has learned: its {_FELL}"
_steps = partial(
    Criterion, quantity=f"steps to {TARGET:.0%} of the better arm's decrease", log=2, guard=_BETTER,
)  # fmt: skip
_smooth = partial(Criterion, log=2, guard=_BOTH, **beyond(log2(1.5)))

CRITERIA = Criteria("1", 0.95, (
    # The level is that of each question by itself: with few seeds an interval that covers all questions together would
    # decide nothing. The page says how many were asked.
    _steps(
        "speed-steps", "Does this model reach the target training loss in fewer steps with batch norm than without?",
        compares="without / with, each at its best learning rate", **beyond(log2(1.5)),
    ),
    _steps(
        "speed-once", "Is normalizing while it trains faster than normalizing once, at the start?",
        compares="normalized once / with, each at its best rate", **beyond(log2(1.5)),
    ),
    Criterion(
        "rates-largest", "Are larger learning rates usable with batch norm?",
        f"the largest rate that ends with {USABLE:.0%} of the better arm's decrease", log=2, compares="with / without",
        guard=_BETTER, **beyond(log2(3)),
    ),
    _steps(
        "scale-inputs", "Without batch norm, does normalizing the input features speed this model up?",
        compares="as they are / normalized, each at its best rate", **beyond(log2(1.5)),
    ),
    _steps(
        "scale-instead", "Does normalizing the inputs alone do as well as batch norm?",
        compares="normalized inputs only / with, at the best rates",
        supported=(-inf, log2(1.5)), opposite=(log2(1.5), inf),
    ),
    Criterion(
        "scale-spread", "Are the input features on different scales?",
        "the largest over the smallest standard deviation of a feature or channel", (1.0, inf), (-inf, log10(2)),
        log=10,
    ),
    Criterion(
        "shift-drift", "Does what the batch norm layers receive move less with batch norm, at an equal learning rate?",
        "the drift between looks in standard deviations, mean over layers and time", log=2, compares="without / with",
        guard=_BOTH, **beyond(1.0),
    ),
    Criterion(
        "noise-slope", "Does the noise that a mini-batch adds fall as one over its size?",
        "slope of log noise power on log batch size, mean over layers", (-1.15, -0.85),
    ),
    Criterion(
        "test-time-small", "At test time, are stored statistics better than those of a batch of 4?",
        "held-out loss by batches of 4 minus by population statistics, as a share of the latter", **beyond(0.05),
    ),
    Criterion(
        "test-time-stored", "Are the running averages of training as good as exact population statistics?",
        "held-out loss in eval mode minus by population statistics, as a share of the latter",
        (-inf, 0.05), (0.05, inf),
    ),
    Criterion(
        "test-time-alone", "Does an example get one answer in eval mode, alone and in a batch?",
        "largest difference of an output, in standard deviations of the outputs", (-inf, 1e-4), (1e-2, inf),
    ),
    _smooth(
        "smooth-equal", "Is the loss smoother along the gradient with batch norm, at an equal learning rate?",
        "the gradient's change per distance (beta-hat)", compares="without / with batch norm",
    ),
    _smooth(
        "smooth-best", "Is it still smoother when each arm trains at its own best learning rate?",
        "rate × beta-hat", compares="without / with batch norm, each at its best rate",
    ),
    Criterion(
        "depth-rank", "Can examples be told apart in the last batch norm layer as well as in the first?",
        "the stable rank of what it receives", (-1.0, inf), (-inf, -3.0), log=2, compares="last / first layer",
    ),
    Criterion(
        "census-dead", "Does every channel carry a signal, by gamma, beta and its stored variance?",
        "share of dead channels, mean over layers", (-inf, 0.01), (0.1, inf),
    ),
))  # fmt: skip
judge = CRITERIA.judge
