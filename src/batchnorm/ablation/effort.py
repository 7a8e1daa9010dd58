"""How much is trained: seeds, steps and arms, chosen so that the whole takes a few minutes, from a few short runs."""

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

SECONDS = 150.0  # that a run should take, if neither steps nor seeds are given
_PILOT = 12  # steps of the runs that time is measured by: so few are looked at as often as a longer run is
_SLOW, _FEW = 0.2, 2  # seconds of a step from which on so few must do, and looks are taken for 40 steps
_LOOKING = 40
_POPULATION, _ALONE = 512, 17  # examples that population statistics are measured on, passes of examples alone
# a ladder, so that a slightly busier machine chooses the same steps
_STEPS = (40, 50, 60, 80, 100, 120, 150, 200, 250, 300)
_SEEDS = (5, 3)
_ENOUGH = 60  # steps, below which fewer seeds are the better use of the time
_WATCHED = 4  # runs for each seed that are looked at while they train: two arms at two rates
# inputs whose features have means below 0.1 sd, and sd between 0.8 and 1.25, are normalized already
_MEAN, _SD = 0.1, 1.25


@final
@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds that the parts of a study take: a step, a run beside its steps, the looks at one, a seed's questions."""

    step: float
    run: float
    looks: float
    questions: float

    def of(self, arms: int, rates: int, seeds: int, steps: int) -> float:
        """Seconds in all."""
        runs = self.run + steps * self.step
        return seeds * ((arms * rates + _WATCHED) * runs + _WATCHED * self.looks + self.questions)


@final
@dataclass(frozen=True, slots=True)
class StudyPlan:
    """What is trained.

    Args:
        arms: In the order in which they are trained.
        seed, seeds, steps, rates: Each arm trains from ``seeds`` seeds, at every rate, for ``steps`` steps.
        cost: What its parts take.
        left_out: Question -> why it is not asked.
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
        """Every seed."""
        return range(self.seed, self.seed + self.seeds)

    @property
    def runs(self) -> int:
        """Runs of the grid."""
        return len(self.arms) * len(self.rates) * self.seeds

    @property
    def estimate(self) -> float:
        """Seconds that training and the questions take."""
        return self.cost.of(len(self.arms), len(self.rates), self.seeds, self.steps)

    @property
    def seconds(self) -> float:
        """Seconds that a step takes."""
        return self.cost.step


def plan(
    subject: Subject, *, seed: int = 0, seeds: int | None = None, steps: int | None = None,
    rates: Sequence[float] = RATES, seconds: float = SECONDS,
) -> StudyPlan:  # fmt: skip
    """The plan that fits ``seconds``, as far as seeds and steps are not given."""
    with undisturbed(subject):
        arms, left_out = _arms(subject)
        cost = _timed(subject, seed, rates[0])
    chosen = None
    for some in [seeds] if seeds else _SEEDS:
        fitting = [steps] if steps else [s for s in _STEPS if cost.of(len(arms), len(rates), some, s) <= seconds]
        chosen = (some, fitting[-1] if fitting else _STEPS[0])
        if chosen[1] >= _ENOUGH:
            break
    assert chosen is not None  # noqa: S101 - there is a number of seeds
    return StudyPlan(arms, seed, *chosen, tuple(rates), cost, left_out)


def _arms(subject: Subject) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    arms = (WITH, WITHOUT, ONCE)
    if reason := _unscaled(subject):
        return arms, (("normalizing the inputs", reason),)
    return (*arms, SCALED), ()


def _unscaled(subject: Subject) -> str:
    """Why normalized inputs are not an arm of their own; "" where they are."""
    inputs = [inputs_of(batch) for batch in subject.data.train]
    if any(x is None for x in inputs):
        return "the input is not one tensor of floating-point features"
    if len({x.shape[1] for x in inputs if x is not None}) > 1:
        return "the number of features differs between batches"
    norm = input_norm(subject.data)
    if not bool((norm.mean.isfinite() & norm.var.isfinite()).all()):
        return "the inputs hold NaN or infinity"
    varies = norm.var > 0
    off, sd = (norm.mean / norm.scale)[varies].abs(), norm.scale[varies]
    if bool((off < _MEAN).all() and (sd < _SD).all() and (sd > 1 / _SD).all()):
        return "the inputs are normalized already"
    return ""


def _timed(subject: Subject, seed: int, rate: float) -> Cost:
    """The seconds that the parts of a study take on this machine now, from a few short runs."""
    train(subject, WITH, seed, rate, 1)  # what happens once, such as imports, is no part of a run
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
    """Steps that the passes of the questions of one seed are worth: a forward pass is a third of a step.

    Population statistics take a pass for every layer, held-out data pass in batches of several sizes, and some
    examples alone.
    """
    layers, size = len(batch_norms(subject.fresh(0))), subject.data.size
    held = subject.data.counts[1]
    population = (layers + 1) * max(1, _POPULATION / size)
    return (population + held * (1 / 4 + 1 / 16 + 1 / 64 + 4 / size) + _ALONE + _POPULATION / size) / 3
