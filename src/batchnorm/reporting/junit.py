"""JUnit XML: a suite for each group of checks, a case for each check, a failure in each check that fails."""

from __future__ import annotations

from xml.etree.ElementTree import Element, SubElement, indent, tostring

from batchnorm.reporting.rows import Check, Report, Suite
from batchnorm.reporting.severity import Severity
from batchnorm.reporting.text import plain


def junit(report: Report) -> str:
    """The report as XML; if all rows of a check are below ``fail_on``, they are the check's output, not a failure."""
    root = Element("testsuites", name=report.command)
    notes = [Suite(name="target", checks=[Check(name="notes", output="\n".join(map(plain, report.notes)))])]
    for suite in [*(notes if report.notes else ()), *report.suites]:
        _suite(root, suite, plain(report.target), report.fail_on)
    for name in ("tests", "failures"):
        root.set(name, str(sum(int(suite.get(name, 0)) for suite in root)))
    root.set("time", f"{report.seconds:.3f}")
    indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + tostring(root, encoding="unicode")


def _suite(root: Element, suite: Suite, target: str, fail_on: Severity | None) -> None:
    element = SubElement(root, "testsuite", name=suite.name)
    failures = [_case(element, check, target, fail_on) for check in suite.checks]
    skipped = sum(bool(check.skipped) for check in suite.checks)
    counts = {"tests": len(failures), "failures": sum(failures), "errors": 0, "skipped": skipped, "time": 0}
    for name, number in counts.items():
        element.set(name, str(number))


def _case(suite: Element, check: Check, target: str, fail_on: Severity | None) -> bool:
    """Add one case; return whether it fails."""
    element = SubElement(suite, "testcase", classname=target or "model", name=plain(check.name), time="0")
    if check.skipped:
        SubElement(element, "skipped").text = plain(check.skipped)
        return False
    text = "\n".join(plain(row.words) for row in check.rows) or check.output
    failed = fail_on is not None and any(row.severity >= fail_on for row in check.rows)
    if failed:
        first = check.rows[0]
        SubElement(element, "failure", type=str(first.severity), message=first.name or first.rule).text = text
    elif text:
        SubElement(element, "system-out").text = text
    return failed
