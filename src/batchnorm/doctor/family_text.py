"""A diagnosis as plain text: in full for people, by families of rules, or one line for each finding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final

from batchnorm.doctor.diagnosis_value import DiagnosisValue, codes_by_reason, counted, groups
from batchnorm.reporting.command_line import CommandLine
from batchnorm.reporting.severity import GLYPHS
from batchnorm.reporting.text import many, plain, wrapped
from batchnorm.rules import FAMILIES
from batchnorm.rules.finding import Finding, Fix
from batchnorm.rules.phrases import listed

_OK, _UNCHECKED = "✓ ok", "– not checked"
_FAMILY = len("BN1")


def concise(diagnosis: DiagnosisValue) -> list[str]:
    """One line for each finding, then the notes and a line with the numbers."""
    lines = [f"{f.place}: {f.code} {f.severity} {f.slug}: {f.measured} (limit: {f.limit})" for f in diagnosis.findings]
    return [plain(f"{diagnosis.target}: {text}") for text in (*lines, *diagnosis.notes, summary(diagnosis))]


def full(diagnosis: DiagnosisValue, *, width: int = 80, verbose: bool = False, command: str = "") -> str:
    """Text for people: families of rules, worst first, each with its findings.

    Without findings and without ``verbose`` the text has up to three lines besides the notes: the headline, the numbers
    and, if some checks did not run, a hint about them.

    Args:
        diagnosis: The diagnosis.
        width: Columns to wrap at.
        verbose: Also list every check that did not run, with the reason.
        command: The command that was called; "" leaves out the line that names the command to mend the target.
    """
    lines = wrapped(headline(diagnosis), width)
    lines += [line for note in diagnosis.notes for line in wrapped(note, width, 4)]
    if diagnosis.findings or verbose:
        lines += _by_family(families(diagnosis), width, verbose=verbose)
    lines += ["", *wrapped(summary(diagnosis), width)]
    if diagnosis.not_checked and not verbose:
        lines += _hint(diagnosis, width)
    return "\n".join([*lines, *_next(diagnosis, hint=bool(command))])


def headline(diagnosis: DiagnosisValue) -> str:
    """The target with the numbers of its states, layers and channels, and the data."""
    states = f"{len(diagnosis.states)} states" if len(diagnosis.states) > 1 else ""
    layers, channels = many(len(diagnosis.layers), "batch norm layer"), sum(row.channels for row in diagnosis.layers)
    return " · ".join(filter(None, (diagnosis.target, states, layers, f"{channels:,} channels", diagnosis.data)))


def summary(diagnosis: DiagnosisValue) -> str:
    """The numbers of findings, of checks that ran, and of checks that did not; or that there are no layers."""
    silenced = f"{diagnosis.silenced} silenced" if diagnosis.silenced else ""
    nothing = not diagnosis.layers and not diagnosis.findings
    counts = "no batch norm layers" if nothing else counted(diagnosis.findings)
    checks = f"{len(diagnosis.checked)} checks run, {len(diagnosis.not_checked)} not run"
    return " · ".join(filter(None, (counts, silenced, checks, f"{diagnosis.seconds:.1f} s")))


@final
@dataclass(frozen=True, slots=True)
class Family:
    """The results of one family of rules: codes that begin with the same three characters."""

    name: str
    findings: tuple[Finding, ...]  # worst first
    ran: int  # rules that ran
    missing: Mapping[str, str]  # codes of rules that did not run: the reason

    @property
    def status(self) -> str:
        """A sign and a word: the worst finding's severity; "ok" without findings; "not checked" if no rule ran."""
        if self.findings:
            return f"{GLYPHS[self.findings[0].severity]} {self.findings[0].severity}"
        return _OK if self.ran else _UNCHECKED

    @property
    def title(self) -> str:
        """The name; with the number of checks that ran, if some did not: "ok" shall not promise more."""
        total = self.ran + len(self.missing)
        return f"{self.name} ({self.ran} of {total} checks)" if self.ran and self.missing else self.name


def families(diagnosis: DiagnosisValue) -> list[Family]:
    """Families ordered by their worst finding; then families without findings; then families that were not checked.

    Families without a selected rule are left out.
    """
    codes = [*diagnosis.checked, *diagnosis.not_checked, *(finding.code for finding in diagnosis.findings)]
    return sorted((_family(diagnosis, start) for start in sorted({code[:_FAMILY] for code in codes})), key=_rank)


def _family(diagnosis: DiagnosisValue, start: str) -> Family:
    findings = [finding for finding in diagnosis.findings if finding.code.startswith(start)]
    return Family(
        name=FAMILIES.get(start, start).capitalize(),
        findings=tuple(sorted(findings, key=lambda finding: -finding.severity)),
        ran=sum(code.startswith(start) for code in diagnosis.checked),
        missing={code: reason for code, reason in diagnosis.not_checked.items() if code.startswith(start)},
    )


def _rank(family: Family) -> int:
    return -family.findings[0].severity if family.findings else 1 if family.ran else 2


def _by_family(found: list[Family], width: int, *, verbose: bool) -> Iterator[str]:
    for family in found:
        if family.findings:
            yield from ("", *_section(family, width, verbose=verbose))
    if others := [family for family in found if not family.findings]:
        yield ""
        sections = (line for family in others for line in _section(family, width, verbose=True))
        yield from sections if verbose else _collapsed(others, width)


def _section(family: Family, width: int, *, verbose: bool) -> Iterator[str]:
    number = f": {counted(family.findings)}" if family.findings else ""
    yield from wrapped(f"[{family.status}] {family.title}{number}", width, 4)
    for group in groups(family.findings):
        yield from _block(group, width)
    if verbose:
        for reason, codes in codes_by_reason(family.missing).items():
            yield from wrapped(f"not checked, {reason}: {', '.join(codes)}", width, 6, indent=2)


def _collapsed(found: list[Family], width: int) -> Iterator[str]:
    """Families without findings: one line for all that are ok, and one line for each reason why others did not run."""
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for family in found:
        why = "" if family.ran else f": {'; '.join(codes_by_reason(family.missing))}"
        alike[family.status, why].append(family.title)
    for (status, why), titles in alike.items():
        yield from wrapped(f"[{status}] {', '.join(titles)}{why}", width, 4)


def _block(group: list[Finding], width: int) -> Iterator[str]:
    first = group[0]
    where = f"  {first.where}" if first.where and len(group) == 1 else ""
    names = listed(finding.place for finding in group)
    head = f"{GLYPHS[first.severity]} {first.severity} {first.code} {first.slug}  {names}{where}"
    yield from wrapped(head, width, 6, indent=2)
    more = "" if len(group) == 1 else f" (the first of {len(group)})"
    alike = " and so on" if len({finding.remedy for finding in group}) > 1 else ""
    for text in (f"{first.measured}{more}; limit: {first.limit}", first.consequence, f"fix: {first.remedy}{alike}"):
        yield from wrapped(text, width, 8, indent=6)


def _hint(diagnosis: DiagnosisValue, width: int) -> list[str]:
    """Reasons why checks did not run, without the reasons that a family's line already gives."""
    sections = families(diagnosis) if diagnosis.findings else []
    given = {reason for family in sections if family.status == _UNCHECKED for reason in family.missing.values()}
    reasons = [reason for reason in codes_by_reason(diagnosis.not_checked) if reason not in given]
    if not reasons:
        return ["-v lists the checks that did not run"]
    lines = wrapped(_why(reasons[:2]), width)
    # one line if there are no findings: the text of a healthy target has three lines
    return lines if diagnosis.findings or len(lines) == 1 else wrapped(_why(reasons[:1]), width)


def _why(some: list[str]) -> str:
    return f"not checked: {'; '.join(some)} (-v lists all)"


def _next(diagnosis: DiagnosisValue, *, hint: bool) -> Iterator[str]:
    """The commands to type next: one that mends or measures the target if ``hint``, and one that explains a rule."""
    if not diagnosis.findings:
        return
    commands = {f.fixable: f.remedy for f in reversed(diagnosis.findings) if isinstance(f.remedy, CommandLine)}
    if hint and (command := commands.get(Fix.SAFE) or commands.get(Fix.DATA)):
        yield f"next: {plain(command)} --diff"
    yield f"more: batchnorm explain {diagnosis.findings[0].code}"
