"""Rows: what a command found, and the report of it, which every output format takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from batchnorm.reporting.blocks import Block
from batchnorm.reporting.json_values import Json
from batchnorm.reporting.severity import Severity


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One thing that was found.

    Args:
        rule: The code of the rule that found it.
        name: The rule's name; "" if its code is its name.
        severity: How bad it is.
        place: The layer, or "model".
        words: Sentences that stand alone beside the name of the target.
        file: The file of code that it is about; "" if there is none.
        line: The line there, from 1; 0 if it is not known.
        identity: Words by which a later run knows it again.
    """

    rule: str
    severity: Severity
    place: str
    words: str
    name: str = ""
    file: str = ""
    line: int = 0
    identity: tuple[str, ...] = ()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RuleWords:
    """A rule that was there to find something, whether it did or not."""

    code: str
    title: str
    name: str = ""
    page: str = ""
    help: str = ""
    severity: Severity | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One check: what it found, or why it did not run, or what it says though nothing is wrong."""

    name: str
    rows: Sequence[Row] = ()
    skipped: str = ""
    output: str = ""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """Checks that belong together."""

    name: str
    checks: Sequence[Check]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a command shows.

    Args:
        command: The command, such as "batchnorm doctor".
        target: What was looked at.
        json: Everything, as JSON.
        records: The same row by row, for one line each.
        lines: One line for each row.
        headline: What came out, in one sentence.
        document: Paragraphs and tables, which Markdown shows, and text and a page that have no layout of their own.
        rows: What was found.
        rules: What was looked for.
        suites: The checks by groups.
        notes: What else there is to know about the target.
        source: The file that findings without a place in code are about.
        driver: The program's name by which code scanning groups its alerts.
        identified_by: What ``Row.identity`` consists of, with a version.
        seconds: How long it took.
        fail_on: Rows of this severity and worse ones make a check fail; None if none does.
        full: Makes the text for people, in so many columns; of ``document`` if it is left out.
        page: Makes the HTML page; of ``document`` if it is left out.
        md: Makes the Markdown; of ``document`` if it is left out.
    """

    command: str
    target: str
    json: Callable[[], str]
    records: Sequence[Json] = ()
    lines: Sequence[str] = ()
    headline: str = ""
    document: Sequence[Block] = ()
    rows: Sequence[Row] = ()
    rules: Sequence[RuleWords] = ()
    suites: Sequence[Suite] = ()
    notes: Sequence[str] = ()
    source: str = ""
    driver: str = ""
    identified_by: str = "ruleAndPlace/v1"
    seconds: float = 0.0
    fail_on: Severity | None = Severity.ERROR
    full: Callable[[int], str] | None = None
    page: Callable[[], str] | None = None
    md: Callable[[], str] | None = None
