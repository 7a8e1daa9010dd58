"""Colour for severities in plain text, where a terminal shows it. The words say everything without."""

from __future__ import annotations

import os
import re
import sys

import click

_COLORS = {"✗ error": "red", "! warning": "yellow", "· info": "blue"}
_SIGNS = "✗·–×"
_PLAIN = str.maketrans(_SIGNS, "x--x")
_MARKS = re.compile("|".join(map(re.escape, _COLORS)))


def colored(text: str) -> str:
    """The text, with its severities in colour if standard output shows colours."""
    if not _shows_colors():
        return text
    return re.sub(
        rf"^(?:{_MARKS.pattern})", lambda m: click.style(m[0], fg=_COLORS[m[0]], bold=True), text, flags=re.MULTILINE
    )


def spelled(text: str) -> str:
    """The text without signs that standard output cannot show: the word beside each says the same."""
    try:
        _SIGNS.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return text.translate(_PLAIN)
    return text


def _shows_colors() -> bool:
    """By the conventions of NO_COLOR, FORCE_COLOR and TERM=dumb."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
