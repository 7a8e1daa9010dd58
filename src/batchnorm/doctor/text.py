"""A diagnosis as plain text: in full for people, by families of rules, or one line for each finding."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from textwrap import wrap
from typing import TYPE_CHECKING, final

from batchnorm.doctor.diagnosis import counted
from batchnorm.rules import FAMILIES
from batchnorm.rules.finding import Fix, Severity
from batchnorm.rules.phrases import listed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from batchnorm.doctor.diagnosis import Diagnosis
    from batchnorm.rules.finding import Finding

GLYPHS = {Severity.ERROR: "✗", Severity.WARNING: "!", Severity.INFO: "·"}
_OK, _UNCHECKED = "✓ ok", "– not checked"
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
    rest = (*diagnosis.notes, summary(diagnosis))
    return "\n".join(plain(line) for line in [*lines, *(f"{diagnosis.target}: {text}" for text in rest)])


def full(diagnosis: Diagnosis, *, width: int = 80, verbose: bool = False, command: str = "") -> str:
    """For people: families of rules, the worst first, each with its findings; a healthy target takes three lines.

    Args:
        diagnosis: What was found.
        width: Columns to wrap at.
        verbose: Also every check that did not run, with its reason.
        command: How to call again, for the hint at the end.
    """
    lines = wrap(headline(diagnosis), width)
    lines += [line for note in diagnosis.notes for line in _hanging(note, width)]
    if diagnosis.findings or verbose:
        lines += _by_family(families(diagnosis), width, verbose=verbose)
    lines += ["", *wrap(summary(diagnosis), width)]
    if diagnosis.not_checked and not verbose:
        lines += _hint(diagnosis, width)
    return "\n".join(plain(line) for line in [*lines, *_next(diagnosis, command)])


def headline(diagnosis: Diagnosis) -> str:
    """What was looked at."""
    channels = sum(row.channels for row in diagnosis.layers)
    number = len(diagnosis.layers)
    states = [f"{len(diagnosis.states)} states"] if len(diagnosis.states) > 1 else []
    parts = [
        f"{diagnosis.target}",
        *states,
        f"{number} batch norm layer{'s' if number != 1 else ''}",
        f"{channels:,} channels",
    ]
    return " · ".join([*parts, *([diagnosis.data] if diagnosis.data else [])])


def summary(diagnosis: Diagnosis) -> str:
    """How many findings, checks that ran, and checks that did not; a target without layers is not called healthy."""
    silenced = [f"{diagnosis.silenced} silenced"] if diagnosis.silenced else []
    skipped = len(diagnosis.not_checked)
    nothing = not diagnosis.layers and not diagnosis.findings
    return " · ".join([
        "no batch norm layers" if nothing else counted(diagnosis.findings),
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


@final
@dataclass(frozen=True, slots=True)
class Family:
    """What came of the rules whose codes begin alike."""

    name: str
    findings: tuple[Finding, ...]  # worst first
    ran: int  # rules that ran
    missing: Mapping[str, str]  # codes of rules that did not, with the reason

    @property
    def status(self) -> str:
        """A sign and its word: of the worst finding, else whether anything was looked at."""
        if self.findings:
            return f"{GLYPHS[self.findings[0].severity]} {self.findings[0].severity}"
        return _OK if self.ran else _UNCHECKED

    @property
    def title(self) -> str:
        """The name, and how much was looked at if that is not all: "ok" promises no more than was checked."""
        total = self.ran + len(self.missing)
        return f"{self.name} ({self.ran} of {total} checks)" if self.ran and self.missing else self.name


def families(diagnosis: Diagnosis) -> list[Family]:
    """Families by their worst finding, then those without one, then those that were not checked.

    A family none of whose rules was asked for is left out.
    """
    codes = [*diagnosis.checked, *diagnosis.not_checked, *(finding.code for finding in diagnosis.findings)]
    return sorted((_family(diagnosis, start) for start in sorted({code[:3] for code in codes})), key=_rank)


def _family(diagnosis: Diagnosis, start: str) -> Family:
    found = [finding for finding in diagnosis.findings if finding.code.startswith(start)]
    return Family(
        FAMILIES.get(start, start).capitalize(),
        tuple(sorted(found, key=lambda finding: -finding.severity)),
        sum(code.startswith(start) for code in diagnosis.checked),
        {code: reason for code, reason in diagnosis.not_checked.items() if code.startswith(start)},
    )


def _rank(family: Family) -> int:
    return -family.findings[0].severity if family.findings else 1 if family.ran else 2


def place(finding: Finding) -> str:
    """The layer, or the model as a whole."""
    return finding.layer or "model"


def plain(text: str) -> str:
    """Text without characters that would steer a terminal, begin a line, hide, or fit no file."""
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


def reasons(diagnosis: Diagnosis) -> dict[str, list[str]]:
    """Codes that were not checked, by reason."""
    return _by_reason(diagnosis.not_checked)


def _by_reason(missing: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for code, reason in missing.items():
        found[reason].append(code)
    return dict(found)


def _by_family(found: list[Family], width: int, *, verbose: bool) -> Iterator[str]:
    for family in found:
        if family.findings:
            yield from ("", *_section(family, width, verbose=verbose))
    if others := [family for family in found if not family.findings]:
        yield ""
        yield from _in_full(others, width) if verbose else _collapsed(others, width)


def _in_full(found: list[Family], width: int) -> Iterator[str]:
    for family in found:
        yield from _section(family, width, verbose=True)


def _section(family: Family, width: int, *, verbose: bool) -> Iterator[str]:
    number = f": {counted(family.findings)}" if family.findings else ""
    yield from _hanging(f"[{family.status}] {family.title}{number}", width)
    for group in groups(family.findings):
        yield from _block(group, width)
    if verbose:
        for reason, codes in _by_reason(family.missing).items():
            yield from _hanging(f"not checked, {reason}: {', '.join(codes)}", width, indent=2)


def _collapsed(found: list[Family], width: int) -> Iterator[str]:
    """Families without findings: one line for all that are ok, and one for each reason not to check."""
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for family in found:
        why = "" if family.ran else f": {'; '.join(_by_reason(family.missing))}"
        alike[family.status, why].append(family.title)
    for (status, why), titles in alike.items():
        yield from _hanging(f"[{status}] {', '.join(titles)}{why}", width)


def _block(group: list[Finding], width: int) -> Iterator[str]:
    first = group[0]
    where = f"  {first.where}" if first.where and len(group) == 1 else ""
    names = listed(place(finding) for finding in group)
    head = f"{GLYPHS[first.severity]} {first.severity} {first.code} {first.slug}  {names}{where}"
    yield from _hanging(head, width, indent=2)
    more = "" if len(group) == 1 else f" (the first of {len(group)})"
    alike = " and so on" if len({finding.remedy for finding in group}) > 1 else ""
    for text in (f"{first.measured}{more}; limit: {first.limit}", first.consequence, f"fix: {first.remedy}{alike}"):
        yield from _hanging(text, width, indent=6, hang=2)


def _hanging(text: str, width: int, *, indent: int = 0, hang: int = 4) -> list[str]:
    return wrap(
        text, width, initial_indent=" " * indent, subsequent_indent=" " * (indent + hang), break_on_hyphens=False
    )


def _hint(diagnosis: Diagnosis, width: int) -> list[str]:
    """Why checks did not run, as far as no line of a family has said it."""
    shown = families(diagnosis) if diagnosis.findings else []
    told = {reason for family in shown if family.status == _UNCHECKED for reason in family.missing.values()}
    rest = [reason for reason in reasons(diagnosis) if reason not in told]
    if not rest:
        return ["-v lists the checks that did not run"]
    lines = wrap(_why(rest[:2]), width)
    # one line if nothing was found: a healthy target takes three
    return lines if diagnosis.findings or len(lines) == 1 else wrap(_why(rest[:1]), width)


def _why(some: list[str]) -> str:
    return f"not checked: {'; '.join(some)} (-v lists all)"


def _next(diagnosis: Diagnosis, command: str) -> Iterator[str]:
    """What to type next."""
    if not diagnosis.findings:
        return
    worst = diagnosis.findings[0]
    remedies = {f.fixable: f.remedy for f in reversed(diagnosis.findings) if f.remedy.startswith("batchnorm fix ")}
    if command and (remedy := remedies.get(Fix.SAFE) or remedies.get(Fix.DATA)):
        yield f"next: {remedy} --diff"
    yield f"more: batchnorm explain {worst.code}"
