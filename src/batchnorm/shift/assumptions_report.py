"""The report of assumptions: which conditions of the alarm's promise hold on clean data."""

from __future__ import annotations

from batchnorm.reporting.blocks import Text, TextTable
from batchnorm.reporting.rows import Check, Report, Row, RuleWords, Suite
from batchnorm.reporting.severity import Severity
from batchnorm.shift.assumptions import BROKEN, DOUBTFUL, Assumptions, Condition, concise, full, promise

_SEVERITIES = {DOUBTFUL: Severity.WARNING, BROKEN: Severity.ERROR}


def report(found: Assumptions, *, source: str = "") -> Report:
    """The report for all formats; a condition that is doubtful or broken fails its check, and the command."""
    rows = {condition.name: _row(found, condition, source) for condition in found.conditions if condition.remedy}
    checks = [
        Check(name=each.name, rows=[rows[each.name]] if each.name in rows else [], output=each.measured)
        for each in found.conditions
    ]
    table = [(each.state, each.name, each.measured, each.remedy) for each in found.conditions]
    return Report(
        command="batchnorm shift", target=f"{found.target} {found.data}".strip(), source=source,
        headline=promise(found),
        identified_by="modelDataAndCondition/v1", fail_on=Severity.WARNING, rows=list(rows.values()),
        rules=[RuleWords(code=_code(each), title=f"{each.name.capitalize()}.") for each in found.conditions],
        suites=[Suite(name="assumptions", checks=checks)], lines=concise(found), json=found.to_json,
        document=[Text(promise(found)), TextTable(("state", "condition", "measured", "remedy"), table, words=4)],
        records=[{"condition": each.name, "state": each.state, "measured": each.measured, "remedy": each.remedy}
                 for each in found.conditions], full=lambda width: full(found, width=width),
    )  # fmt: skip


def _row(found: Assumptions, condition: Condition, source: str) -> Row:
    return Row(
        rule=_code(condition), severity=_SEVERITIES[condition.state], place="model", file=source,
        words=f"{condition.name}: {condition.state}: {condition.measured}. {condition.remedy}",
        identity=(found.target, found.data, condition.name),
    )  # fmt: skip


def _code(condition: Condition) -> str:
    return condition.name.replace(" ", "-")
