"""The settings that determine a run of experiments: seeds and effort."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# Called with the finished share of the work, from 0 to 1
Progress = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Seeds and effort of a run; the same settings give the same numbers.

    Args:
        seed: The first seed; the seeds are seed, seed + 1, ...
        seeds: Number of seeds. All compared networks use the same seeds, so differences are paired.
        effort: Share of each experiment's full number of training steps, above 0 and at most 1. Use a share below 1 to
            try an experiment; its verdicts do not count.
    """

    seed: int = 0
    seeds: int = 5
    effort: float = 1.0

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise ValueError(f"seeds must be 2 or more, got {self.seeds}. An interval needs two seeds.")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}. Choose another first seed.")
        if not 0 < self.effort <= 1:
            raise ValueError(f"effort must be above 0 and at most 1, got {self.effort}. Use 1 for verdicts.")

    @property
    def all_seeds(self) -> range:
        """Every seed of the run."""
        return range(self.seed, self.seed + self.seeds)

    def steps(self, full: int) -> int:
        """``full`` steps times the effort, rounded, and at least 20."""
        return max(20, round(full * self.effort))
