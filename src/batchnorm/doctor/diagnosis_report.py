"""The report of a diagnosis for all formats: rows and checks for programs, tables, and an HTML page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby

from batchnorm import __version__
from batchnorm.doctor.diagnosis_value import DiagnosisValue, LayerRow, codes_by_reason, counted, groups
from batchnorm.doctor.family_text import concise, full, headline, summary
from batchnorm.reporting import html
from batchnorm.reporting.blocks import Block, Facts, Items, Text, TextTable
from batchnorm.reporting.rows import Check, Report, Row, Suite
from batchnorm.reporting.severity import Severity
from batchnorm.rules import FAMILIES, RULES
from batchnorm.rules.finding import Finding

_COMMAND = "batchnorm doctor"
_COLUMNS = ("layer", "kind", "mode", "channels", "batches", "mean", "variance", "gamma", "eps", "momentum", "gap / sd")


def report(
    diagnosis: DiagnosisValue, *, source: str = "", fail_on: Severity | None = Severity.ERROR, verbose: bool = False,
    command: str = "",
) -> Report:  # fmt: skip
    """The contents of a report in every format.

    Args:
        diagnosis: The diagnosis.
        source: The file to name for findings without a place in code; by default the target.
        fail_on: The lowest severity at which a check of JUnit fails. None: no check fails.
        verbose: Whether the text lists every check that did not run.
        command: The command that was called; "" leaves out the line that names the command to mend the target.
    """
    rows = [_row(diagnosis.target, finding) for finding in diagnosis.findings]
    records = json.loads(diagnosis.to_json())["findings"]
    return Report(
        command=_COMMAND, driver="batchnorm", identified_by="codeAndLayer/v1", target=diagnosis.target,
        source=source or diagnosis.target, seconds=diagnosis.seconds, fail_on=fail_on, headline=_headline(diagnosis),
        rows=rows, rules=[rule.words for rule in RULES.values()], suites=list(_suites(diagnosis, rows)),
        notes=diagnosis.notes, lines=concise(diagnosis), document=list(_document(diagnosis)), json=diagnosis.to_json,
        records=[{"target": diagnosis.target, **finding} for finding in records], page=lambda: page(diagnosis),
        full=lambda width: full(diagnosis, width=width, verbose=verbose, command=command),
    )  # fmt: skip


def _headline(diagnosis: DiagnosisValue) -> str:
    return f"{'No error' if diagnosis.ok else 'Errors found'}: {counted(diagnosis.findings)}"


def _row(target: str, f: Finding) -> Row:
    file, _, line = f.where.rpartition(":")
    words = f"{f.place}: {f.measured} (limit: {f.limit}). {f.consequence} Fix: {f.remedy}"
    return Row(
        rule=f.code, name=f.slug, severity=f.severity, place=f.place, words=words, file=file,
        line=int(line) if line.isdigit() else 0, identity=(target, f.code, f.layer),
    )  # fmt: skip


def _suites(diagnosis: DiagnosisValue, rows: Sequence[Row]) -> Iterator[Suite]:
    """A suite for each family of rules, a check for each rule."""
    codes = sorted([*diagnosis.checked, *diagnosis.not_checked])
    for family, members in groupby(codes, key=lambda code: code[:3]):
        checks = [
            Check(
                name=code, rows=[row for row in rows if row.rule == code], skipped=diagnosis.not_checked.get(code, "")
            )
            for code in members
        ]
        yield Suite(name=f"{family} {FAMILIES.get(family, '')}".strip(), checks=checks)


def _document(diagnosis: DiagnosisValue) -> Iterator[Block]:
    yield Text(summary(diagnosis), strong=diagnosis.target)
    if diagnosis.notes:
        yield Items(diagnosis.notes)
    if diagnosis.findings:
        rows = [(str(f.severity), f"{f.code} {f.slug}", f.place, f.measured, f.limit, f.remedy)
                for f in diagnosis.findings]  # fmt: skip
        yield TextTable(("severity", "code", "layer", "measured", "limit", "fix"), rows, words=6)
    if diagnosis.not_checked:
        reasons = codes_by_reason(diagnosis.not_checked)
        yield Items([f"not checked, {why}: {', '.join(codes)}" for why, codes in reasons.items()])


def page(diagnosis: DiagnosisValue) -> str:
    """The HTML file of a diagnosis."""
    return html.page(_COMMAND, diagnosis.target, _headline(diagnosis), [*blocks(diagnosis, pages=True)])


def blocks(diagnosis: DiagnosisValue, *, pages: bool = False) -> list[Block]:
    """The blocks of HTML output; with ``pages`` also the pages of rules, and the versions of the software."""
    reasons = codes_by_reason(diagnosis.not_checked)
    return [
        *([] if pages else [Text(strong=_headline(diagnosis))]),
        Text(headline(diagnosis)),
        Text(summary(diagnosis)),
        *map(Text, diagnosis.notes),
        *(_facts(group, pages=pages) for group in groups(diagnosis.findings)),
        _layers(diagnosis.layers) if diagnosis.layers else Text("No batch norm layer."),
        *([Items([f"{why}: {_named(codes)}" for why, codes in reasons.items()], "Not checked")] if reasons else []),
        *([_made(diagnosis)] if pages else []),
    ]


def _facts(group: Sequence[Finding], *, pages: bool) -> Facts:
    first = group[0]
    facts = (
        ("measured", "\n".join(f"{f.place}: {f.measured}" for f in group)),
        ("limit", first.limit),
        ("so", first.consequence),
        ("fix", "\n".join(dict.fromkeys(f.remedy for f in group))),
        ("where", first.where),
    )
    rule = RULES[first.code]
    filled = [(name, text) for name, text in facts if text]
    about = [("Finds", rule.title), *rule.sections] if pages else []
    return Facts(f"{first.code} {first.slug}", filled, first.severity, ("fix",), f"About {first.code}", about)


def _layers(rows: Sequence[LayerRow]) -> TextTable:
    return TextTable(_COLUMNS, [_cells(row) for row in rows], words=3, title="Layers")


def _cells(row: LayerRow) -> tuple[str, ...]:
    ranges = map(_range, (row.mean_range, row.var_range, row.gamma_range))
    numbers = (_number(row.eps), _number(row.momentum), _number(row.gap))
    return (
        row.name or "model",
        row.kind,
        row.mode or "–",
        f"{row.channels:,}",
        _number(row.batches),
        *ranges,
        *numbers,
    )


def _range(values: tuple[float, float] | None) -> str:
    return "–" if values is None else f"{values[0]:.3g} to {values[1]:.3g}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else f"{value:,}"


def _named(codes: Sequence[str]) -> str:
    return ", ".join(f"{code} {RULES[code].slug}" for code in codes)


def _made(diagnosis: DiagnosisValue) -> Text:
    versions = ", ".join(f"{name} {version}" for name, version in diagnosis.versions.items())
    return Text(
        f"Made by batchnorm {__version__}, {versions}. Nothing in the target was changed. "
        "batchnorm explain CODE shows a rule."
    )
