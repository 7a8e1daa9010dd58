"""Monitor settings: checks of the numbers that a ``ShiftMonitor`` is made with."""

from __future__ import annotations

import math

from batchnorm.argument_types import require_number, require_whole_number


def check_settings(
    *, alpha: float, arl: float | None, examples: int | None, budget: float | None, kurtosis: float | None
) -> None:
    """Refuse settings that are no numbers, or out of range.

    Raises:
        TypeError: If a setting that must be a number, or a whole number, is not.
        ValueError: If a setting is out of range.
    """
    given = {"alpha": alpha, "arl": arl, "examples": examples, "budget": budget, "kurtosis": kurtosis}
    for name, value in given.items():
        if value is not None or name == "alpha":
            require = require_whole_number if name == "examples" else require_number
            require(value, name, "Leave it out for the default.")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}. Use 0.01 for at most 1 % false alarms.")
    if arl is not None and not arl > 1:
        raise ValueError(f"arl must be more than 1 observation, got {arl}. Use 1e5, for example, or None.")
    if examples is not None and examples < 1:
        raise ValueError(f"examples must be 1 or more, got {examples}. Use None for all examples of a batch.")
    if budget is not None and not budget > 0:
        raise ValueError(f"budget must be above 0, got {budget}. Use 0.01 for 1 % of the time, or None for no limit.")
    if kurtosis is not None and not 1 <= kurtosis < math.inf:
        raise ValueError(f"kurtosis must be finite and 1 or more, got {kurtosis}. Use 3 for normal values, else None.")
