"""Rows: the results of a command, and the report of them, which every output format can show."""

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
    """One result, such as a finding of the doctor.

    Args:
        rule: The code of the rule that gave the result.
        severity: How bad the result is.
        place: The layer, or "model".
        words: Sentences that can be understood with the name of the target alone.
        name: The rule's name; "" if the rule has only a code.
        file: The file of code that the result is about; "" if there is none.
        line: The line in that file, from 1; 0 if it is unknown.
        identity: Texts that are the same in a later run if it has the same result.
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
    """A rule that was applied, with or without results."""

    code: str
    title: str
    name: str = ""
    page: str = ""
    help: str = ""
    severity: Severity | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One check: its rows; if it did not run, the reason in ``skipped``; if nothing is wrong, perhaps an ``output``."""

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
    """The results of a command, for every output format.

    Args:
        command: The command, such as "batchnorm doctor".
        target: The file, model or data that the command was about.
        json: Makes the JSON text of all results.
        records: One JSON value for each row, for the format jsonl.
        lines: One line of text for each row, for the format concise.
        headline: The result in one sentence.
        document: Paragraphs and tables for the text, page and Markdown whose function (see below) is None.
        rows: The results.
        rules: The rules that were applied.
        suites: The checks by groups.
        notes: Further sentences about the target.
        source: The file that a row without a file is about.
        driver: The program's name, by which code scanning groups its alerts; "" means ``command``.
        identified_by: The name and version of the method that makes ``Row.identity``.
        seconds: How long the command took.
        fail_on: Rows with this severity or a worse one make a check fail; None: no row does.
        full: Makes the text for people, from its number of columns; None makes it from ``document``.
        page: Makes the HTML page; None makes it from ``document``.
        md: Makes the Markdown; None makes it from ``document``.
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
