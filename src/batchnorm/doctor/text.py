"""A diagnosis as plain text: in full for people, or one line for each finding."""

from __future__ import annotations

import re
from collections import defaultdict
from textwrap import wrap
from typing import TYPE_CHECKING

from batchnorm.doctor.diagnosis import counted
from batchnorm.rules.finding import Fix, Severity
from batchnorm.rules.words import listed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchnorm.doctor.diagnosis import Diagnosis
    from batchnorm.rules.finding import Finding

GLYPHS = {Severity.ERROR: "✗", Severity.WARNING: "!", Severity.INFO: "·"}
# control characters, ends of lines, marks that turn the direction of writing or are not seen, lone surrogates
_CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def concise(diagnosis: Diagnosis) -> str:
    """One line for each finding, and one with their number."""
    lines = [
        f"{diagnosis.target}: {place(f)}: {f.code} {f.severity} {f.slug}: {f.measured} (limit: {f.limit})"
        for f in diagnosis.findings
    ]
    return "\n".join(plain(line) for line in [*lines, f"{diagnosis.target}: {summary(diagnosis)}"])


def full(diagnosis: Diagnosis, *, width: int = 80, verbose: bool = False, command: str = "") -> str:
    """For people: findings by severity with what follows and what mends them; a healthy target takes three lines.

    Args:
        diagnosis: What was found.
        width: Columns to wrap at.
        verbose: Also every check that did not run, with its reason.
        command: How to call again, for the hint at the end.
    """
    lines = wrap(headline(diagnosis), width)
    for group in groups(diagnosis.findings):
        lines += ["", *_block(group, width)]
    if verbose:
        lines += ["", "not checked:", *_not_checked(diagnosis, width)]
    lines += ["", *wrap(summary(diagnosis), width), *_next(diagnosis, command, width)]
    return "\n".join(plain(line) for line in lines)


def headline(diagnosis: Diagnosis) -> str:
    """What was looked at."""
    channels = sum(row.channels for row in diagnosis.layers)
    number = len(diagnosis.layers)
    parts = [f"{diagnosis.target}", f"{number} batch norm layer{'s' if number != 1 else ''}", f"{channels:,} channels"]
    return " · ".join([*parts, *([diagnosis.data] if diagnosis.data else [])])


def summary(diagnosis: Diagnosis) -> str:
    """How many findings, checks that ran, and checks that did not."""
    silenced = [f"{diagnosis.silenced} silenced"] if diagnosis.silenced else []
    skipped = len(diagnosis.not_checked)
    return " · ".join([
        counted(diagnosis.findings),
        *silenced,
        f"{len(diagnosis.checked)} checks run, {skipped} not run",
        f"{diagnosis.seconds:.1f} s",
    ])  # fmt: skip


def groups(findings: tuple[Finding, ...]) -> list[list[Finding]]:
    """Findings of one rule with one consequence together, in their order."""
    found: dict[tuple, list[Finding]] = defaultdict(list)
    for finding in findings:
        found[finding.code, finding.consequence].append(finding)
    return list(found.values())


def place(finding: Finding) -> str:
    """The layer, or the model as a whole."""
    return finding.layer or "model"


def plain(text: str) -> str:
    """Text without characters that would steer a terminal, begin a line, hide, or fit no file."""
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


def reasons(diagnosis: Diagnosis) -> dict[str, list[str]]:
    """Codes that were not checked, by reason."""
    found: dict[str, list[str]] = defaultdict(list)
    for code, reason in diagnosis.not_checked.items():
        found[reason].append(code)
    return dict(found)


def _block(group: list[Finding], width: int) -> Iterator[str]:
    first = group[0]
    where = f"  {first.where}" if first.where and len(group) == 1 else ""
    names = listed(place(finding) for finding in group)
    yield from _hanging(f"{GLYPHS[first.severity]} {first.severity} {first.code} {first.slug}  {names}{where}", width)
    more = "" if len(group) == 1 else f" (the first of {len(group)})"
    alike = " and so on" if len({finding.remedy for finding in group}) > 1 else ""
    for text in (f"{first.measured}{more}; limit: {first.limit}", first.consequence, f"fix: {first.remedy}{alike}"):
        yield from wrap(text, width, initial_indent="    ", subsequent_indent="      ", break_on_hyphens=False)


def _hanging(text: str, width: int) -> list[str]:
    return wrap(text, width, subsequent_indent="    ", break_on_hyphens=False)


def _not_checked(diagnosis: Diagnosis, width: int) -> Iterator[str]:
    for reason, codes in reasons(diagnosis).items():
        yield from wrap(f"{reason}: {', '.join(codes)}", width, initial_indent="  ", subsequent_indent="    ")


def _next(diagnosis: Diagnosis, command: str, width: int) -> Iterator[str]:
    """What to type next."""
    if diagnosis.not_checked and not command.endswith("-v"):
        yield from wrap(f"not checked: {'; '.join(list(reasons(diagnosis))[:2])} (-v lists all)", width)
    if not diagnosis.findings:
        return
    worst = diagnosis.findings[0]
    remedies = {f.fixable: f.remedy for f in reversed(diagnosis.findings) if f.remedy.startswith("batchnorm fix ")}
    if command and (remedy := remedies.get(Fix.SAFE) or remedies.get(Fix.DATA)):
        yield f"next: {remedy} --diff"
    yield f"more: batchnorm explain {worst.code}"
