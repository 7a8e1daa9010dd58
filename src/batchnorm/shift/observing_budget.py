"""Observing budget: the share of the inference time that a monitor may use, and a warning if it is too small."""

from __future__ import annotations

from typing import final

_ALWAYS = 256  # examples that are always observed: a large shift is detected within some tens
_BEFORE_WARNING = 1024  # further examples, before the monitor warns about the observed share
_LEAST_SHARE = 0.05  # the monitor warns if the observed share is smaller


@final
class ObservingBudget:
    """Adds up the seconds of a stream's passes, and the seconds of observing among them.

    Args:
        share: Largest share of the inference time that observing may use after the first 256 observed examples; None:
            any share is allowed.
    """

    def __init__(self, share: float | None) -> None:
        self._share = share
        self._seconds_observing = self._seconds_inference = 0.0
        self._chosen_count = 0  # examples chosen for observation, also in passes that did not reach every layer
        self._has_skipped = False  # whether a batch was skipped
        self._counts_at_start: tuple[int, int] | None = None  # passed and observed examples when _ALWAYS was reached

    @property
    def cost(self) -> float:
        """The seconds of observing divided by the other seconds of inference."""
        return self._seconds_observing / max(1e-9, self._seconds_inference - self._seconds_observing)

    def allows(self, looked: int) -> bool:
        """Whether the next batch may be observed, when ``looked`` examples have been observed."""
        is_affordable = self._share is None or self._seconds_observing <= self._share * self._seconds_inference
        return is_affordable or not self._counts(looked)

    def skip(self) -> None:
        """Record that a batch was skipped."""
        self._has_skipped = True

    def add(self, examples: int, inference: float, observing: float) -> None:
        """Count a pass: the examples chosen for observation, the seconds of the pass, and of observing among them."""
        self._chosen_count += examples
        self._seconds_inference += inference
        self._seconds_observing += observing

    def problem(self, passed: int, looked: int) -> str:
        """A warning if the budget leaves so few examples that a shift would be detected late; else ""."""
        if self._counts_at_start is None:
            self._counts_at_start = (passed, looked) if self._counts(looked) else None
            return ""
        passed, looked = passed - self._counts_at_start[0], looked - self._counts_at_start[1]
        if not self._has_skipped or passed < _BEFORE_WARNING or looked >= _LEAST_SHARE * passed:
            return ""
        return (
            f"budget={self._share:g} leaves {looked} of {passed} examples to be observed after the first {_ALWAYS}: a "
            "shift would be detected late. Raise the budget, or use budget=None."
        )

    def _counts(self, looked: int) -> bool:
        """Whether the first examples, which are always observed, are over, so that the budget counts."""
        return max(self._chosen_count, looked) >= _ALWAYS
