"""Colours for statuses and severities in plain text, on terminals with colours. The words alone say the same."""

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
# the status of a family in brackets, the severity of a finding below it, and the status of a verdict in any place
_MARKS = re.compile(
    rf"(?:(?<=^\[)|(?<=^  ))(?:{'|'.join(map(re.escape, _COLORS))})|{'|'.join(map(re.escape, _STATUS_COLORS))}",
    re.MULTILINE,
)
# values of FORCE_COLOR that mean no, as in Node and chalk; by force-color.org an empty value counts as unset
_NO = ("0", "false")


def colored(text: str) -> str:
    """The text with coloured statuses and severities, if standard output shows colours."""
    if not _shows_colors():
        return text
    colors = _COLORS | _STATUS_COLORS
    return _MARKS.sub(lambda mark: click.style(mark[0], fg=colors[mark[0]], bold=True), text)


def spelled(text: str) -> str:
    """The text; with ASCII signs in place of all our signs if standard output cannot encode one of them."""
    try:
        "".join(_SIGNS).encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return text.translate(_PLAIN)
    return text


def show(text: str, stream: TextIO | None = None) -> None:
    """Print the text to standard output or another stream. A closed pipe is no error: the text is dropped."""
    if (stream := stream or sys.stdout) is None:
        return
    try:
        # not click.echo, which has its own rules for colours and encodings
        stream.write(spelled(colored(text)) + "\n")
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _shows_colors() -> bool:
    """Whether standard output shows colours, by NO_COLOR, FORCE_COLOR, TERM and whether it is a terminal."""
    if os.environ.get("NO_COLOR"):
        return False
    if forced := os.environ.get("FORCE_COLOR"):
        return forced.lower() not in _NO
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
