"""The plan of a study: seeds, steps and arms, chosen by a few timed runs so that the study takes a few minutes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

from batchnorm.ablation.arm_training import RATES, train
from batchnorm.ablation.arms import ONCE, SCALED, WITH, WITHOUT, input_norm
from batchnorm.ablation.user_data import inputs_of
from batchnorm.ablation.user_model import Subject, undisturbed
from batchnorm.ablation.watched_runs import watch
from batchnorm.layers import batch_norms

SECONDS = 150.0  # planned duration of a study, unless steps and seeds are set
_PILOT = 12  # steps of a timed run, which has as many looks as a longer run
# if a run of 1 step takes more than 0.2 s, the timed run has 2 more steps, and the measurements of a run count as 40
_SLOW, _FEW = 0.2, 2
_LOOKING = 40
_POPULATION, _ALONE = 512, 17  # examples for population statistics, and passes for examples alone
# with these gaps, a slightly slower machine chooses the same number of steps
_STEPS = (40, 50, 60, 80, 100, 120, 150, 200, 250, 300)
_SEEDS = (5, 3)
_ENOUGH = 60  # if there is no time for this number of steps, fewer seeds are used
_WATCHED = 4  # runs for each seed that are measured during the training: two arms at two rates
# inputs count as normalized if every feature has a mean below 0.1 sd, and an sd between 0.8 and 1.25
_MEAN, _SD = 0.1, 1.25


@final
@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of the parts of a study.

    Args:
        step: One training step.
        run: The rest of a run, without its steps.
        looks: All measurements during one run ("looks", in ``watched_runs``).
        questions: All questions for one seed.
    """

    step: float
    run: float
    looks: float
    questions: float

    def of(self, arms: int, rates: int, seeds: int, steps: int) -> float:
        """Seconds of the whole study."""
        runs = self.run + steps * self.step
        return seeds * ((arms * rates + _WATCHED) * runs + _WATCHED * self.looks + self.questions)


@final
@dataclass(frozen=True, slots=True)
class StudyPlan:
    """The runs of a study: every arm, from every seed, at every learning rate.

    Args:
        arms: The arms in the order in which they are trained.
        seed: The first seed; the seeds are seed, seed + 1, ...
        seeds: Number of seeds.
        steps: Training steps of each run.
        rates: Learning rates.
        cost: Seconds of the parts of the study.
        left_out: Pairs (question, reason why it is not asked).
    """

    arms: tuple[str, ...]
    seed: int
    seeds: int
    steps: int
    rates: tuple[float, ...]
    cost: Cost
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def all_seeds(self) -> range:
        """All seeds."""
        return range(self.seed, self.seed + self.seeds)

    @property
    def runs(self) -> int:
        """Number of runs, arms x rates x seeds."""
        return len(self.arms) * len(self.rates) * self.seeds

    @property
    def estimate(self) -> float:
        """Expected seconds of training and questions."""
        return self.cost.of(len(self.arms), len(self.rates), self.seeds, self.steps)

    @property
    def seconds(self) -> float:
        """Seconds of one training step."""
        return self.cost.step


def plan(
    subject: Subject, *, seed: int = 0, seeds: int | None = None, steps: int | None = None,
    rates: Sequence[float] = RATES, seconds: float = SECONDS,
) -> StudyPlan:  # fmt: skip
    """A plan that takes at most ``seconds`` if possible; ``seeds`` and ``steps`` are chosen unless they are given."""
    with undisturbed(subject):
        arms, left_out = _arms(subject)
        cost = _timed(subject, seed, rates[0])
    chosen = None
    for some in [seeds] if seeds else _SEEDS:
        fitting = [steps] if steps else [s for s in _STEPS if cost.of(len(arms), len(rates), some, s) <= seconds]
        chosen = (some, fitting[-1] if fitting else _STEPS[0])
        if chosen[1] >= _ENOUGH:
            break
    assert chosen is not None  # noqa: S101 - the loop has run
    return StudyPlan(arms, seed, *chosen, tuple(rates), cost, left_out)


def _arms(subject: Subject) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    arms = (WITH, WITHOUT, ONCE)
    if reason := _unscaled(subject):
        return arms, (("normalizing the inputs", reason),)
    return (*arms, SCALED), ()


def _unscaled(subject: Subject) -> str:
    """Why there is no arm with normalized inputs; "" if there is one."""
    inputs = [inputs_of(batch) for batch in subject.data.train]
    if any(x is None for x in inputs):
        return "the input is not one tensor of floating-point features"
    if len({x.shape[1] for x in inputs if x is not None}) > 1:
        return "the number of features differs between batches"
    norm = input_norm(subject.data)
    if not bool((norm.mean.isfinite() & norm.var.isfinite()).all()):
        return "the inputs have NaN or infinite values"
    varies = norm.var > 0
    means, sd = (norm.mean / norm.scale)[varies].abs(), norm.scale[varies]
    if bool((means < _MEAN).all() and (sd < _SD).all() and (sd > 1 / _SD).all()):
        return "the inputs are normalized already"
    return ""


def _timed(subject: Subject, seed: int, rate: float) -> Cost:
    """The seconds of the parts of a study on this machine, measured by a few short runs."""
    train(subject, WITH, seed, rate, 1)  # not timed, because imports and the like happen only once
    short = _seconds(partial(train, subject, WITH, seed, rate, 1))
    pilot = _FEW if short > _SLOW else _PILOT
    long = _seconds(partial(train, subject, WITH, seed, rate, 1 + pilot))
    step = max((long - short) / pilot, long / 1000)
    run, questions = max(short - step, 0.0), _passes(subject) * step
    if short > _SLOW:
        return Cost(step, run, _LOOKING * step, questions)
    looked = _seconds(partial(watch, subject, WITH, seed, rate, 1 + _PILOT))
    return Cost(step, run, max(looked - run - (1 + _PILOT) * step, 0.0), questions)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _passes(subject: Subject) -> float:
    """The cost of the questions for one seed in training steps, where a forward pass counts as a third of a step.

    Population statistics need a pass for every layer. Held-out data pass in batches of several sizes, and some
    examples pass alone.
    """
    layers, size = len(batch_norms(subject.fresh(0))), subject.data.size
    held = subject.data.counts[1]
    population = (layers + 1) * max(1, _POPULATION / size)
    return (population + held * (1 / 4 + 1 / 16 + 1 / 64 + 4 / size) + _ALONE + _POPULATION / size) / 3
