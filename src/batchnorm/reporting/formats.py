"""The table of output formats. Every command offers all of them; a new format is one entry."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import final

from batchnorm.reporting.github import github
from batchnorm.reporting.html import page
from batchnorm.reporting.json_values import to_json_line
from batchnorm.reporting.junit import junit
from batchnorm.reporting.markdown import markdown
from batchnorm.reporting.rows import Report
from batchnorm.reporting.sarif import sarif
from batchnorm.reporting.text import columns, paragraphs, plain


@final
@dataclass(frozen=True, slots=True)
class Format:
    """An output format: the function that makes its text, and the ending of its files; "" if it has no ending."""

    make: Callable[[Report], str]
    suffix: str = ""


def full(report: Report, *, to_file: bool = False) -> str:
    """The report for people, in lines as wide as ``columns`` says."""
    width = columns(to_file=to_file)
    return report.full(width) if report.full else paragraphs(report.document, width)


def concise(report: Report) -> str:
    """The lines of the report, one for each row."""
    return "\n".join(map(plain, report.lines))


def jsonl(report: Report) -> str:
    """Each record as JSON, on a line of its own."""
    return "\n".join(map(to_json_line, report.records))


def html(report: Report) -> str:
    """A single HTML file that loads nothing."""
    return report.page() if report.page else page(report.command, report.target, report.headline, report.document)


FORMATS: dict[str, Format] = {
    "full": Format(full),
    "concise": Format(concise),
    "json": Format(lambda report: report.json(), ".json"),
    "jsonl": Format(jsonl, ".jsonl"),
    "github": Format(github),
    "sarif": Format(sarif, ".sarif"),
    "junit": Format(junit, ".xml"),
    "html": Format(html, ".html"),
    "md": Format(lambda report: report.md() if report.md else markdown(report.document), ".md"),
}


def by_suffix(path: Path | None) -> str:
    """The name of the format with a file's ending; "" if there is no path or no such format."""
    suffix = path.suffix.lower() if path is not None else ""
    return next((name for name, each in FORMATS.items() if suffix and each.suffix == suffix), "")


def chosen(
    asked: str | None, output: Path | None = None, settled: str | None = None, *, in_workflow: str = "github"
) -> str:
    """The name of the format.

    The first of these that is given decides: the option, the ending of the output file, the project's setting. Without
    them it is ``in_workflow`` in a GitHub workflow, and otherwise "full".

    Raises:
        ValueError: If the project's setting names a format that does not exist.
    """
    if named := asked or by_suffix(output):
        return named
    if settled and settled not in FORMATS:
        raise ValueError(f"output-format must be one of {', '.join(FORMATS)}, got {settled!r}. Correct the setting.")
    return settled or (in_workflow if os.environ.get("GITHUB_ACTIONS") == "true" else "full")


def rendered(report: Report, name: str, *, to_file: bool = False) -> str:
    """The report in the format ``name``."""
    return full(report, to_file=to_file) if name == "full" else FORMATS[name].make(report)
