"""From the effects of several seeds to a verdict, by a rule that is the same for every claim."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from batchnorm.lecture.claim import Criterion, Estimate, Status, Verdict
from batchnorm.lecture.criteria import CRITERIA, LEVEL

if TYPE_CHECKING:
    from collections.abc import Sequence


def estimate(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Mean over seeds with Student's t interval; equal values give an interval of width 0."""
    values = [float(value) for value in values]
    mean = float(np.mean(values))
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * error
    return Estimate(mean, mean - half, mean + half, level, tuple(values))


def judge(key: str, values: Sequence[float], sentence: str, *, failed_guard: str = "") -> Verdict:
    """The verdict on one criterion.

    Args:
        key: A key of CRITERIA.
        values: The effect for each seed; all finite, unless a guard failed.
        sentence: The measurement in plain words, with its numbers.
        failed_guard: What did not hold, with its number; it makes the verdict INVALID.
    """
    criterion = CRITERIA[key]
    sentence = minus(sentence[:1].upper() + sentence[1:])
    if failed_guard:
        measured = estimate(values) if len(values) > 1 and all(map(math.isfinite, values)) else None
        return Verdict(criterion, Status.INVALID, measured, sentence, failed_guard)
    measured = estimate(values)
    return Verdict(criterion, status_of(criterion, measured), measured, sentence)


def minus(text: str) -> str:
    """The text with a true minus sign before negative numbers; hyphens and exponents stay."""
    return re.sub(r"(?<![\w)\]])-(?=[\d.])", "−", text)


def status_of(criterion: Criterion, measured: Estimate) -> Status:
    """The outcome by where the whole interval lies."""
    if _inside(measured, criterion.supported):
        return Status.SUPPORTED
    if criterion.opposite is not None and _inside(measured, criterion.opposite):
        return Status.OPPOSITE
    return Status.NOT_SUPPORTED


def _inside(measured: Estimate, interval: tuple[float, float]) -> bool:
    return interval[0] < measured.low and measured.high < interval[1]
