"""How much is trained: seeds, steps and arms, chosen so that the whole takes a few minutes, from one timed step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch

from batchnorm.ablation.arms import ONCE, SCALED, WITH, WITHOUT, input_norm, make_arm
from batchnorm.ablation.data import inputs_of
from batchnorm.ablation.subject import undisturbed
from batchnorm.ablation.training import RATES

if TYPE_CHECKING:
    from batchnorm.ablation.subject import Subject

SECONDS = 150.0  # that a run should take where neither steps nor seeds are given
# a ladder, so that a slightly busier machine chooses the same steps
_STEPS = (40, 50, 60, 80, 100, 120, 150, 200, 250, 300)
_SEEDS = (5, 3)
_ENOUGH = 60  # steps, below which fewer seeds are the better use of the time
_WATCHED = 4  # runs for each seed that are looked at while they train: two arms at two rates
_LOOKING = 40  # steps that the looks of such a run cost
# inputs whose features have means below 0.1 sd, and sd between 0.8 and 1.25, are normalized already
_MEAN, _SD = 0.1, 1.25


@final
@dataclass(frozen=True, slots=True)
class Plan:
    """What is trained.

    Args:
        arms: In the order in which they are trained.
        seed, seeds, steps, rates: Each arm trains from ``seeds`` seeds, at every rate, for ``steps`` steps.
        seconds: What a step takes.
        left_out: Question -> why it is not asked.
    """

    arms: tuple[str, ...]
    seed: int
    seeds: int
    steps: int
    rates: tuple[float, ...]
    seconds: float
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
        """Seconds that training takes."""
        return self.seconds * _cost(len(self.arms), len(self.rates), self.seeds, self.steps)


def plan(
    subject: Subject, *, seed: int = 0, seeds: int | None = None, steps: int | None = None,
    rates: Sequence[float] = RATES, seconds: float = SECONDS,
) -> Plan:  # fmt: skip
    """The plan that fits ``seconds``, as far as seeds and steps are not given."""
    with undisturbed(subject):
        arms, left_out = _arms(subject)
        step = _timed(subject, seed)
    chosen = None
    for some in [seeds] if seeds else _SEEDS:
        fitting = [steps] if steps else [s for s in _STEPS if step * _cost(len(arms), len(rates), some, s) <= seconds]
        chosen = (some, fitting[-1] if fitting else _STEPS[0])
        if chosen[1] >= _ENOUGH:
            break
    assert chosen is not None  # noqa: S101 - there is a number of seeds
    return Plan(arms, seed, *chosen, tuple(rates), step, left_out)


def _cost(arms: int, rates: int, seeds: int, steps: int) -> int:
    """Steps in all."""
    return seeds * (arms * rates * steps + _WATCHED * (steps + _LOOKING))


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


def _timed(subject: Subject, seed: int) -> float:
    """Seconds of a training step with batch norm, the fastest of five: what it takes when nothing else runs."""
    model, batches = make_arm(subject, WITH, seed), subject.data.deal(seed)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        loss = subject.value(model, next(batches))
        if not loss.requires_grad:
            raise ValueError(
                "a loss must depend on the model's parameters, got one without gradient. Do not detach it."
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return min(times)
