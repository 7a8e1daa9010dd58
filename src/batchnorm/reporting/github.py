"""Workflow commands of GitHub Actions: one annotation for each row; GitHub shows it beside the row's line of code."""

from __future__ import annotations

from collections.abc import Mapping

from batchnorm.reporting.rows import Report, Row
from batchnorm.reporting.severity import Severity
from batchnorm.reporting.text import plain

_COMMANDS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "notice"}


def github(report: Report) -> str:
    """One line for each row and each note; "" if there are neither."""
    rows = [_command(_COMMANDS[row.severity], _properties(row), _about(report, row.words)) for row in report.rows]
    notes = [_command("notice", {"title": "note"}, _about(report, note)) for note in report.notes]
    return "\n".join([*rows, *notes])


def _about(report: Report, words: str) -> str:
    return ": ".join(filter(None, (report.target, words)))


def _properties(row: Row) -> dict[str, str]:
    place = {"file": row.file, "line": str(row.line or 1)} if row.file else {}
    return {"title": f"{row.rule} {row.name}".strip(), **place}


def _command(name: str, properties: Mapping[str, str], message: str) -> str:
    settings = ",".join(f"{key}={_property(plain(value))}" for key, value in properties.items())
    return f"::{name} {settings}::{_message(plain(message))}"


def _message(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _message(text).replace(":", "%3A").replace(",", "%2C")
