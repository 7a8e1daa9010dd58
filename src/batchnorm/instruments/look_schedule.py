"""Schedule: after which steps a watch measures ("looks"), so that looks take a limited share of the training time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import final

_SHORTEST = 10  # steps between the first looks
_GROWTH = 5  # the distance of later looks is a fifth of the steps so far, up to ``every``


@final
class Schedule:
    """When the next look is due, by steps and by the time that looks have taken.

    Most changes happen early in a training, so the first looks are ten steps apart, and after step s the distance is
    s / 5, up to ``every`` steps. A look is put off if it would bring the share of time above ``budget``. The expected
    time of a look is the time of the last look of its kind ("free" or "probe"); before the first look it is 0 unless
    ``expect`` sets it.

    Args:
        every: Steps between looks, 1 or more.
        budget: Largest share of the training time that looks may take, above 0.
        clock: Function that returns the time in seconds.
    """

    def __init__(self, every: int, budget: float, clock: Callable[[], float] = time.perf_counter) -> None:
        if every < 1:
            raise ValueError(f"every must be 1 step or more, got {every}. Use 100, for example.")
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
        """The settings of the schedule, as a log stores them."""
        return {"every": self.every, "budget": self.budget}

    @property
    def training(self) -> float:
        """Seconds since the start that were not spent looking."""
        return max(1e-9, self._clock() - self._began - self.spent)

    @property
    def cost(self) -> float:
        """Time spent looking, divided by the time that was left for training."""
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
        """A block inside ``spending``; its time becomes the expected time of the next look of this kind."""
        start = self._clock()
        try:
            yield
        finally:
            self._took[kind] = self._clock() - start

    def is_due(self) -> bool:
        """Count a step, and return whether a look is due after it."""
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
        """Set the expected time of a kind's first look, once: ``seconds`` plus the mean time of a training step."""
        self._took.setdefault(kind, seconds + self.training / max(1, self._steps))
