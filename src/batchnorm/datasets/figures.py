"""Figures: measured numbers as short texts for people."""

from __future__ import annotations

import math

_LEAST, _MOST = 1e-3, 1e7  # numbers in between have no exponent


def figure(value: float, digits: int = 4) -> str:
    """A number with so many significant digits: "30,123", "0.05", "1.2e-09"; "-" for NaN."""
    if math.isnan(value):
        return "-"
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    if not _LEAST <= abs(value) < _MOST:
        return f"{value:.{digits - 1}e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def percent(share: float) -> str:
    """A share in percent: "3.2 %"; "less than 0.01 %" for a smaller share that is not 0."""
    return "less than 0.01 %" if 0 < share < 1e-4 else f"{100 * share:.3g} %"
