"""Colours for statuses and severities in plain text, on terminals that show them. The words say the same."""

from __future__ import annotations

import os
import re
import sys
from typing import TextIO

import click

_COLORS = {"✗ error": "red", "! warning": "yellow", "· info": "blue", "✓ ok": "green"}
_STATUS_COLORS = {"✓ SUPPORTED": "green", "– NOT SUPPORTED": "yellow", "✗ OPPOSITE": "red"}
_SIGNS = {"✗": "x", "·": "-", "–": "-", "×": "x", "✓": "+", "→": "->", "…": "..."}
_PLAIN = str.maketrans(_SIGNS)
# a family's status in brackets, or a finding below it; and the status of a verdict, which is in capitals, anywhere
_MARKS = re.compile(
    rf"(?:(?<=^\[)|(?<=^  ))(?:{'|'.join(map(re.escape, _COLORS))})|{'|'.join(map(re.escape, _STATUS_COLORS))}",
    re.MULTILINE,
)
# how Node, chalk and their kin spell no; force-color.org says nothing of values but that an empty one is none
_NO = ("0", "false")


def colored(text: str) -> str:
    """The text, with its statuses and severities in colour if standard output shows colours."""
    if not _shows_colors():
        return text
    colors = _COLORS | _STATUS_COLORS
    return _MARKS.sub(lambda mark: click.style(mark[0], fg=colors[mark[0]], bold=True), text)


def spelled(text: str) -> str:
    """The text with plain signs in place of those that standard output cannot show."""
    try:
        "".join(_SIGNS).encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return text.translate(_PLAIN)
    return text


def show(text: str, stream: TextIO | None = None) -> None:
    """Print the text to standard output or another stream. Nobody listens to a closed pipe, which is no error."""
    if (stream := stream or sys.stdout) is None:
        return
    try:
        # not click.echo, which has ideas of its own about colours and encodings
        stream.write(spelled(colored(text)) + "\n")
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _shows_colors() -> bool:
    """By the conventions of NO_COLOR, FORCE_COLOR and TERM=dumb."""
    if os.environ.get("NO_COLOR"):
        return False
    if forced := os.environ.get("FORCE_COLOR"):
        return forced.lower() not in _NO
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
