"""JUnit XML: a suite for each family of rules, a case for each rule, a failure for each error."""

from __future__ import annotations

import re
from itertools import groupby
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from batchnorm.doctor.text import place, plain
from batchnorm.rules import FAMILIES
from batchnorm.rules.finding import Severity

if TYPE_CHECKING:
    from batchnorm.doctor.diagnosis import Diagnosis

# characters that XML 1.0 has no way to write
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(diagnosis: Diagnosis, fail_on: Severity | None = Severity.ERROR) -> str:
    """The diagnosis as XML; findings below ``fail_on`` (all, if it is None) are told and do not fail their case."""
    root = Element("testsuites", name="batchnorm doctor")
    if diagnosis.notes:
        _notes(root, diagnosis)
    codes = sorted([*diagnosis.checked, *diagnosis.not_checked])
    for family, members in groupby(codes, key=lambda code: code[:3]):
        _suite(root, diagnosis, family, list(members), fail_on)
    root.set("tests", str(sum(int(suite.get("tests", 0)) for suite in root)))
    root.set("failures", str(sum(int(suite.get("failures", 0)) for suite in root)))
    root.set("time", f"{diagnosis.seconds:.3f}")
    indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + tostring(root, encoding="unicode")


def _notes(root: Element, diagnosis: Diagnosis) -> None:
    """What the target is and what of it was left unread, as the output of a case that passes."""
    suite = SubElement(root, "testsuite", name="target", tests="1", failures="0", errors="0", skipped="0", time="0")
    case = SubElement(suite, "testcase", classname=_legal(plain(diagnosis.target)), name="notes", time="0")
    SubElement(case, "system-out").text = _legal("\n".join(map(plain, diagnosis.notes)))


def _suite(root: Element, diagnosis: Diagnosis, family: str, codes: list[str], fail_on: Severity | None) -> None:
    suite = SubElement(root, "testsuite", name=f"{family} {FAMILIES.get(family, '')}".strip())
    failures = [_case(suite, diagnosis, code, fail_on) for code in codes]
    skipped = sum(code in diagnosis.not_checked for code in codes)
    counts = {"tests": len(codes), "failures": sum(failures), "errors": 0, "skipped": skipped, "time": 0}
    for name, number in counts.items():
        suite.set(name, str(number))


def _case(suite: Element, diagnosis: Diagnosis, code: str, fail_on: Severity | None) -> bool:
    """Add one rule; whether it fails."""
    case = SubElement(suite, "testcase", classname=_legal(plain(diagnosis.target)), name=code, time="0")
    if code in diagnosis.not_checked:
        SubElement(case, "skipped").text = _legal(plain(diagnosis.not_checked[code]))
        return False
    found = [f for f in diagnosis.findings if f.code == code]
    lines = "\n".join(
        plain(f"{place(f)}: {f.measured} (limit: {f.limit}). {f.consequence} Fix: {f.remedy}") for f in found
    )  # fmt: skip
    failed = fail_on is not None and any(f.severity >= fail_on for f in found)
    if failed:
        failure = SubElement(case, "failure", type=str(found[0].severity), message=_legal(found[0].slug))
        failure.text = _legal(lines)
    elif found:
        SubElement(case, "system-out").text = _legal(lines)
    return failed


def _legal(text: str) -> str:
    return _ILLEGAL.sub("\ufffd", text)
