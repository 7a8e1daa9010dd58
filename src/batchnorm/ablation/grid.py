"""Every arm trained at every rate from every seed, and what is read off: targets, best rates, who has learned."""

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
        losses: Of each arm the loss before each step, (seeds, rates, steps); infinity from divergence on.
        pair: The two arms whose levels are meant: the slower as the question supposes, then the faster.
        failed: Arms that could not be trained -> why; they have no losses.
    """

    rates: Sequence[float]
    losses: Mapping[str, Tensor]
    pair: tuple[str, str] = (WITHOUT, WITH)
    failed: Mapping[str, str] = field(default_factory=dict)

    def versus(self, slow: str, fast: str) -> Grid:
        """The same runs with the target of another pair of arms."""
        return replace(self, pair=(slow, fast))

    @property
    def steps(self) -> int:
        """Steps of each run."""
        return self.losses[self.pair[0]].shape[-1]

    @property
    def window(self) -> int:
        """Steps that a loss is averaged over: one batch's loss is noisy."""
        return min(self.steps, max(3, self.steps // 20))

    def smooth(self, arm: str) -> Tensor:
        """Loss averaged over the last ``window`` steps, (seeds, rates, steps - window + 1)."""
        return self.losses[arm].unfold(-1, self.window, 1).mean(-1)

    def final(self, arm: str) -> Tensor:
        """Loss at the end, averaged over twice the window, (seeds, rates); infinity where the run diverged."""
        return self.losses[arm][..., -2 * self.window :].mean(-1)

    @property
    def start(self) -> float:
        """The level before training."""
        return min(float(self.losses[arm][:, 0, 0].mean()) for arm in self.pair)

    @property
    def end(self) -> float:
        """The lowest level that one of the two reached; infinity if all runs diverged."""
        return min(float(self.final(arm).mean(0).min()) for arm in self.pair)

    @property
    def target(self) -> float:
        """The loss that speed is counted to."""
        return self._level(TARGET)

    @property
    def usable(self) -> float:
        """The loss that a usable rate ends at or below."""
        return self._level(USABLE)

    def _level(self, share: float) -> float:
        return self.start - share * (self.start - self.end)

    @property
    def better(self) -> str:
        """The one of the two arms that ends lower at its best rate."""
        return min(self.pair, key=lambda arm: float(self.final(arm)[:, self.best(arm)].mean()))

    def steps_to(self, arm: str) -> Tensor:
        """First step at which the smoothed loss is at the target, (seeds, rates); infinity where it never was."""
        reached = (self.smooth(arm) <= self.target) & self.smooth(arm).isfinite()
        return first_step(reached.movedim(-1, 0), torch.arange(self.window, self.steps + 1))

    def best(self, arm: str) -> int:
        """Index of the rate with the fewest median steps to the target; the lower final loss decides ties."""
        median, final = paired_seeds.median(self.steps_to(arm), 0), self.final(arm).mean(0)
        return min(range(len(self.rates)), key=lambda n: (float(median[n]), float(final[n]), n))

    def edge(self, arm: str) -> str:
        """Whether the best rate lies at an end of the grid, where a better one may lie beyond."""
        ends = {0: "the grid's smallest", len(self.rates) - 1: "the grid's largest"}
        return ends.get(self.best(arm), "")

    def arrival(self, arm: str) -> Arrival:
        """Steps to the target at the best rate."""
        return Arrival(self.steps_to(arm)[:, self.best(arm)], self.steps)

    def shared(self) -> int:
        """Index of the rate at which the slower of the two arms ends lowest."""
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
    """Train every arm at every rate from every seed; of the two that all is about an error is raised."""
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
