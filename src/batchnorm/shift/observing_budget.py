"""Observing budget: which share of the inference time observing may take, and whether it leaves enough examples."""

from __future__ import annotations

from typing import final

_ALWAYS = 256  # examples that are observed whatever the cost: a gross shift takes some tens
_JUDGED = 1024  # examples after those, before the observed share is judged
_LEAST_SHARE = 0.05


@final
class ObservingBudget:
    """The time of one stream's passes, and of observing in them.

    Args:
        share: Largest share of the inference time for observing, once 256 examples were observed; None for any.
    """

    def __init__(self, share: float | None) -> None:
        self._share = share
        self._spent = self._inference = 0.0
        self._tried = 0  # examples chosen for observation, also in passes whose layers showed none
        self._left_out = False  # whether a batch was skipped
        self._start: tuple[int, int] | None = None  # passed and observed examples before the budget counted

    @property
    def cost(self) -> float:
        """Time of observing as a share of the inference time without it."""
        return self._spent / max(1e-9, self._inference - self._spent)

    def allows(self, looked: int) -> bool:
        """Whether the next batch may be observed, after ``looked`` observed examples."""
        is_affordable = self._share is None or self._spent <= self._share * self._inference
        return is_affordable or not self._counts(looked)

    def skip(self) -> None:
        """Record that a batch was skipped."""
        self._left_out = True

    def add(self, tried: int, inference: float, spent: float) -> None:
        """Count a pass: examples chosen for observation, its seconds, and those of observing among them."""
        self._tried += tried
        self._inference += inference
        self._spent += spent

    def problem(self, passed: int, looked: int) -> str:
        """A warning if the budget leaves so few examples that a shift would be detected late; else ""."""
        if self._start is None:
            self._start = (passed, looked) if self._counts(looked) else None
            return ""
        passed, looked = passed - self._start[0], looked - self._start[1]
        if not self._left_out or passed < _JUDGED or looked >= _LEAST_SHARE * passed:
            return ""
        return (
            f"budget={self._share:g} leaves {looked} of {passed} examples to be observed after the first {_ALWAYS}: a "
            "shift would be detected late. Raise it, or use budget=None."
        )

    def _counts(self, looked: int) -> bool:
        return max(self._tried, looked) >= _ALWAYS
