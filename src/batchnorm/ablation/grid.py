"""The grid of runs, every arm at every rate from every seed, and its targets, best rates and steps to the target."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from batchnorm.ablation.arm_training import train
from batchnorm.ablation.arms import CALLED, WITH, WITHOUT
from batchnorm.ablation.question_criteria import LEARNED, TARGET, USABLE
from batchnorm.ablation.user_model import Subject
from batchnorm.experiment import paired_seeds
from batchnorm.experiment.paired_seeds import Arrival, first_step


@final
@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Training losses of all runs.

    Args:
        rates: Learning rates, the same for every arm.
        losses: Arm -> the loss before each step, (seeds, rates, steps); infinity from divergence on.
        pair: The two arms that are compared and define the levels (``question_criteria``); the question supposes that
            the second is faster.
        failed: Arm that could not be trained -> the reason; such an arm has no losses.
    """

    rates: Sequence[float]
    losses: Mapping[str, Tensor]
    pair: tuple[str, str] = (WITHOUT, WITH)
    failed: Mapping[str, str] = field(default_factory=dict)

    def versus(self, slow: str, fast: str) -> Grid:
        """The same runs with another pair of arms, and so another target."""
        return replace(self, pair=(slow, fast))

    @property
    def steps(self) -> int:
        """Number of steps of each run."""
        return self.losses[self.pair[0]].shape[-1]

    @property
    def window(self) -> int:
        """Number of steps over which a loss is averaged, since the loss of one batch is noisy."""
        return min(self.steps, max(3, self.steps // 20))

    def smooth(self, arm: str) -> Tensor:
        """Loss averaged over the last ``window`` steps, (seeds, rates, steps - window + 1)."""
        return self.losses[arm].unfold(-1, self.window, 1).mean(-1)

    def final(self, arm: str) -> Tensor:
        """Loss at the end, averaged over 2 ``window`` steps, (seeds, rates); infinity if the run diverged."""
        return self.losses[arm][..., -2 * self.window :].mean(-1)

    @property
    def start(self) -> float:
        """The mean first loss of the arm of the pair that starts lower."""
        return min(float(self.losses[arm][:, 0, 0].mean()) for arm in self.pair)

    @property
    def end(self) -> float:
        """The lowest mean final loss of the pair over all rates; infinity if every rate has a run that diverged."""
        return min(float(self.final(arm).mean(0).min()) for arm in self.pair)

    @property
    def target(self) -> float:
        """The loss up to which steps are counted."""
        return self._level(TARGET)

    @property
    def usable(self) -> float:
        """The largest final loss of a run at a usable rate."""
        return self._level(USABLE)

    def _level(self, share: float) -> float:
        return self.start - share * (self.start - self.end)

    @property
    def better(self) -> str:
        """The arm of the pair with the lower final loss at its best rate."""
        return min(self.pair, key=lambda arm: float(self.final(arm)[:, self.best(arm)].mean()))

    def steps_to(self, arm: str) -> Tensor:
        """First step at which the smoothed loss is at or below the target, (seeds, rates); infinity if it never is."""
        reached = (self.smooth(arm) <= self.target) & self.smooth(arm).isfinite()
        return first_step(reached.movedim(-1, 0), torch.arange(self.window, self.steps + 1))

    def best(self, arm: str) -> int:
        """Index of the rate with the fewest median steps to the target; the lower final loss decides ties."""
        median, final = paired_seeds.median(self.steps_to(arm), 0), self.final(arm).mean(0)
        return min(range(len(self.rates)), key=lambda n: (float(median[n]), float(final[n]), n))

    def edge(self, arm: str) -> str:
        """At which end of the grid the best rate is, in words; "" if it is at neither end."""
        ends = {0: "the grid's smallest", len(self.rates) - 1: "the grid's largest"}
        return ends.get(self.best(arm), "")

    def arrival(self, arm: str) -> Arrival:
        """Steps to the target at the arm's best rate."""
        return Arrival(self.steps_to(arm)[:, self.best(arm)], self.steps)

    def shared(self) -> int:
        """Index of the rate at which both arms are compared: the larger of their mean final losses is lowest there."""
        worst = torch.maximum(*(self.final(arm).mean(0) for arm in self.pair))
        return int(worst.argmin())

    def unlearned(self, arm: str, rate: int) -> str:
        """Why an arm has not learned at a rate, in words; "" if it has."""
        needed = self.start - LEARNED * abs(self.start)
        final = self.final(arm)[:, rate]
        if bool((final <= needed).all()):
            return ""
        if bool(final.isinf().any()):
            return f"{_arm(arm)} {'every' if bool(final.isinf().all()) else 'a'} seed diverged"
        return f"{_arm(arm)} the worst seed ended at a training loss of {float(final.max()):.3g}, from {self.start:.3g}"


def _arm(arm: str) -> str:
    return CALLED[arm] if arm in {WITH, WITHOUT} else f"{CALLED[arm]},"


def sweep(
    subject: Subject, arms: Sequence[str], seeds: Sequence[int], rates: Sequence[float], steps: int,
    progress: Callable[[], None],
) -> Grid:  # fmt: skip
    """Train every arm at every rate from every seed.

    An error in an arm is stored in ``failed``; an error in the arms with and without batch norm is raised.
    """
    losses: dict[str, Tensor] = {}
    failed: dict[str, str] = {}
    for arm in arms:
        runs = []
        try:
            for seed in seeds:
                for rate in rates:
                    runs.append(train(subject, arm, seed, rate, steps)[0])
                    progress()
        except Exception as error:
            if arm in {WITH, WITHOUT}:
                raise
            failed[arm] = f"the arm {CALLED[arm]} could not be trained: {type(error).__name__}: {error}"
        else:
            losses[arm] = torch.stack(runs).unflatten(0, (len(seeds), len(rates)))
    return Grid(tuple(rates), losses, failed=failed)
