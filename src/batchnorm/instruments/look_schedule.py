"""Schedule: the times of looks, so that looks take less than a share of the training time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import final

_SHORTEST = 10  # steps between the first looks
_GROWTH = 5  # later ones are a fifth of the steps so far apart, until they are as far as was asked for


@final
class Schedule:
    """When the next look is due, by steps and by the time that looks have taken.

    Looks come every tenth step at first, then at step s after another s / 5, until they are ``every`` steps apart:
    most happens early. A look that would bring the share of time above ``budget`` waits; its time is
    that of the last look of its kind, or the one given to ``expect`` before the first.

    Args:
        every: Steps between looks, 1 or more.
        budget: Largest share of the time of training, above 0.
        clock: Seconds.
    """

    def __init__(self, every: int, budget: float, clock: Callable[[], float] = time.perf_counter) -> None:
        if every < 1:
            raise ValueError(f"every must be 1 step or more, got {every}.")
        if not budget > 0:
            raise ValueError(f"budget must be above 0, got {budget}. Use 0.02 for 2 % of the time, or do not watch.")
        self.every, self.budget = every, budget
        self.spent = 0.0
        self.postponed = 0
        self._clock = clock
        self._began = clock()
        self._took: dict[str, float] = {}
        self._due = min(every, _SHORTEST)  # steps of this run
        self._steps = 0

    def about(self) -> dict[str, float]:
        """What a log says of the schedule."""
        return {"every": self.every, "budget": self.budget}

    @property
    def training(self) -> float:
        """Seconds since the start that were not spent looking."""
        return max(1e-9, self._clock() - self._began - self.spent)

    @property
    def cost(self) -> float:
        """Time spent looking over the time that was left for training."""
        return self.spent / self.training

    @contextmanager
    def spending(self) -> Iterator[None]:
        """A block whose time counts as looking."""
        start = self._clock()
        try:
            yield
        finally:
            self.spent += self._clock() - start

    @contextmanager
    def looking(self, kind: str) -> Iterator[None]:
        """A block, inside ``spending``, whose time is what the next look of this kind is expected to take."""
        start = self._clock()
        try:
            yield
        finally:
            self._took[kind] = self._clock() - start

    def is_due(self) -> bool:
        """Count a step; whether to look after it."""
        self._steps += 1
        if self._steps < self._due:
            return False
        if not self.affords("free"):
            self._due = self._steps + max(1, self.every // _SHORTEST)
            self.postponed += 1
            return False
        self._due = self._steps + min(self.every, max(_SHORTEST, self._steps // _GROWTH))
        return True

    def affords(self, kind: str) -> bool:
        """Whether a look of this kind would leave the cost within the budget."""
        return self.spent + self._took.get(kind, 0.0) <= self.budget * self.training

    def expect(self, kind: str, seconds: float) -> None:
        """Say what a look takes beside a training step, before there was one."""
        self._took.setdefault(kind, seconds + self.training / max(1, self._steps))
