"""Severity: how bad a finding is, as a number, a word and a sign."""

from __future__ import annotations

from enum import IntEnum


class Severity(IntEnum):
    """How bad a finding is; severities can be compared, because they are ordered numbers."""

    INFO = 0  # a possible improvement, or a fact to know
    WARNING = 1  # likely to harm results
    ERROR = 2  # results are wrong, or will be

    def __str__(self) -> str:
        return self.name.lower()


GLYPHS = {Severity.ERROR: "✗", Severity.WARNING: "!", Severity.INFO: "·"}
