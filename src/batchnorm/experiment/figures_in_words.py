"""Numbers in sentences: a sentence is a template, and only this module puts figures into it.

A template names its figures in braces, with a Python format after a colon. This package adds three formats: ``times``
for ratios, ``share`` for signed shares, ``known`` for two digits of a number that may be NaN or infinite.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from string import Formatter
from typing import SupportsFloat

# A value for a template; a tensor of one number can be converted to float too
Figure = SupportsFloat | str

_PERCENT = 10.0  # shares from 1,000 % on are written as multiples
_MANY = 1e6  # ratios from here on are written with one digit


def in_words(template: str, figures: Mapping[str, Figure] | None = None, /, **more: Figure) -> str:
    """A template with its figures as a sentence: with a capital letter, and a true minus sign in negative numbers.

    Raises:
        KeyError: If the template names a figure that is missing.
    """
    text = filled(template, {**(figures or {}), **more})
    return minus(text[:1].upper() + text[1:])


def filled(template: str, figures: Mapping[str, Figure]) -> str:
    """A template with its figures, without further changes.

    Raises:
        KeyError: If the template names a figure that is missing.
    """
    return _Words().vformat(template, (), figures)


class _Words(Formatter):
    def format_field(self, value: Figure, format_spec: str) -> str:
        if format_spec in _FORMATS and not isinstance(value, str):
            return _FORMATS[format_spec](float(value))
        return format(value, format_spec)


def minus(text: str) -> str:
    """The text with a true minus sign before negative numbers; hyphens and exponents are not changed."""
    return re.sub(r"(?<![\w)\]])-(?=[\d.])", "−", text)


def times(ratio: float) -> str:
    """A ratio with the digits that matter, such as 4.7, 0.83, 120 or 3e+29; "any number of" for infinity."""
    if ratio == math.inf:
        return "any number of"
    if ratio >= _MANY:
        return f"{ratio:.1g}"
    if ratio >= 100:
        return f"{ratio:.0f}"
    return f"{ratio:.1f}" if ratio >= 0.95 else f"{ratio:.2g}"


def share(value: float) -> str:
    """A signed share as a percentage, such as +4.1%; from 1,000 % on as a multiple, such as "31.4 times more"."""
    if not math.isfinite(value) or abs(value) < _PERCENT:
        return f"{value:+.1%}"
    return f"{times(abs(value))} times {'more' if value > 0 else 'less'}"


def known(value: float, digits: int = 2) -> str:
    """A number with its significant digits; "not known" for NaN and infinity."""
    return f"{value:.{digits}g}" if math.isfinite(value) else "not known"


_FORMATS: dict[str, Callable[[float], str]] = {"times": times, "share": share, "known": known}
