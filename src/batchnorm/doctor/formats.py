"""A diagnosis for programs: every output format by its name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from batchnorm.doctor import junit, sarif
from batchnorm.doctor.page import page
from batchnorm.doctor.text import concise, full, place, plain, reasons, summary
from batchnorm.rules.finding import Severity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from batchnorm.doctor.diagnosis import Diagnosis
    from batchnorm.rules.finding import Finding

_COMMANDS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "notice"}


def jsonl(diagnosis: Diagnosis) -> str:
    """One finding in a line."""
    found = json.loads(diagnosis.to_json())["findings"]
    return "\n".join(json.dumps({"target": diagnosis.target, **finding}) for finding in found)


def github(diagnosis: Diagnosis) -> str:
    """Workflow commands, which GitHub shows beside the code."""
    notes = (f"::notice title=left unread::{message(plain(f'{diagnosis.target}: {text}'))}" for text in diagnosis.notes)
    return "\n".join([*(_command(diagnosis, finding) for finding in diagnosis.findings), *notes])


def markdown(diagnosis: Diagnosis) -> str:
    """A table of findings, for a pull request."""
    lines = [f"**{cell(diagnosis.target)}**: {cell(summary(diagnosis))}"]
    if diagnosis.notes:
        lines += ["", *(f"- {cell(note)}" for note in diagnosis.notes)]
    if diagnosis.findings:
        lines += ["", "| | code | layer | measured | limit | fix |", "|---|---|---|---|---|---|"]
        lines += [row((str(f.severity), f"{f.code} {f.slug}", place(f), f.measured, f.limit, f.remedy))
                  for f in diagnosis.findings]  # fmt: skip
    if diagnosis.not_checked:
        lines += ["", *(f"- not checked, {cell(why)}: {', '.join(c)}" for why, c in reasons(diagnosis).items())]
    return "\n".join(lines)


def row(cells: Iterable[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(map(cell, cells)) + " |"


def cell(text: str) -> str:
    """The text as Markdown shows it, in a table too."""
    text = plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for mark in "\\`*_|[]":
        text = text.replace(mark, "\\" + mark)
    return text


def _command(diagnosis: Diagnosis, f: Finding) -> str:
    file, _, line = f.where.rpartition(":")
    options = {"title": f"{f.code} {f.slug}"}
    if file:
        options |= {"file": file, "line": line}
    text = f"{diagnosis.target} {place(f)}: {f.measured} (limit: {f.limit}). {f.consequence} Fix: {f.remedy}"
    given = ",".join(f"{name}={property_value(value)}" for name, value in options.items())
    return f"::{_COMMANDS[f.severity]} {given}::{message(plain(text))}"


def message(text: str) -> str:
    """The text as a message of GitHub's workflow commands."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def property_value(text: str) -> str:
    """The text as a property's value of GitHub's workflow commands."""
    return message(text).replace(":", "%3A").replace(",", "%2C")


# what -o and --output-format take; "full" is made by the command line, which knows its width
FORMATS: dict[str, Callable[[Diagnosis], str]] = {
    "full": full,
    "concise": concise,
    "json": lambda diagnosis: diagnosis.to_json(),
    "jsonl": jsonl,
    "github": github,
    "sarif": sarif.sarif,
    "junit": junit.junit,
    "html": page,
    "md": markdown,
}
