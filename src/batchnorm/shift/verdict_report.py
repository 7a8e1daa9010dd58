"""The report of a verdict: its rows, checks and tables, for all formats."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.reporting.blocks import Block, Items, Text, TextTable
from batchnorm.reporting.rows import Check, Report, Row, RuleWords, Suite
from batchnorm.reporting.severity import Severity
from batchnorm.shift.verdict import LayerVerdict, ShiftVerdict
from batchnorm.shift.verdict_page import page
from batchnorm.shift.verdict_words import (
    HINTS,
    cells,
    concise,
    facts,
    follows,
    full,
    headline,
    neighbours,
    odds,
    outcome,
    sentence,
    table,
    unseen,
)

_SHIFT, _DEPENDENT = "covariate-shift", "dependent-observations"
_RULES = (
    RuleWords(code=_SHIFT, title="Data are not distributed like the data of the reference."),
    RuleWords(code=_DEPENDENT, title="Neighbouring observations are alike, so that false alarms are not bounded."),
)


def report(verdict: ShiftVerdict, *, source: str = "") -> Report:
    """The report for all formats.

    Args:
        verdict: The result of ``judge``.
        source: The file of the model's code.
    """
    rows = list(_rows(verdict, source))
    return Report(
        command="batchnorm shift", target=f"{verdict.target} {verdict.data}".strip(), source=source,
        identified_by="modelAndData/v1", seconds=verdict.seconds, headline=sentence(verdict), rows=rows, rules=_RULES,
        suites=[Suite(name="shift", checks=list(_checks(verdict, rows)))], lines=[concise(verdict)],
        document=list(_document(verdict)), records=[verdict.to_dict()], json=verdict.to_json,
        full=lambda width: full(verdict, width=width), page=lambda: page(verdict),
    )  # fmt: skip


def _rows(verdict: ShiftVerdict, source: str) -> Iterator[Row]:
    if verdict.rang is not None:
        hint = f" Hint: {HINTS[verdict.hint]}." if verdict.hint else ""
        words = f"{outcome(verdict)}.{hint} Labels tell whether accuracy fell."
        yield Row(
            rule=_SHIFT, severity=Severity.ERROR, place=verdict.first or "model", words=words, file=source,
            identity=(verdict.target, verdict.data, _SHIFT),
        )  # fmt: skip
    if verdict.dependent:
        yield Row(
            rule=_DEPENDENT, severity=Severity.WARNING, place="model", words=f"{neighbours(verdict)}.", file=source,
            identity=(verdict.target, verdict.data, _DEPENDENT),
        )  # fmt: skip


def _checks(verdict: ShiftVerdict, rows: list[Row]) -> Iterator[Check]:
    """One check of all layers together, one of each layer, and one of neighbours, which gives at most a warning."""
    yield Check(name="all layers together", rows=[row for row in rows if row.rule == _SHIFT])
    yield from (_check(verdict, layer) for layer in verdict.layers)
    yield Check(name="neighbouring observations", rows=[row for row in rows if row.rule == _DEPENDENT])


def _check(verdict: ShiftVerdict, layer: LayerVerdict) -> Check:
    words = f"evidence {odds(layer.log_evidence)} by {layer.kind}, limit {odds(verdict.log_limit)}"
    moved = Row(rule=_SHIFT, severity=Severity.ERROR, place=layer.name, words=words)
    return Check(name=layer.name or "model", rows=[moved] if layer.moved else [])


def _document(verdict: ShiftVerdict) -> Iterator[Block]:
    yield Text(sentence(verdict), strong=headline(verdict))
    yield TextTable(("", ""), list(facts(verdict)), words=2)
    yield table([cells(layer) for layer in verdict.layers])
    yield Items(unseen(verdict), title="Not seen")
    yield from map(Text, follows(verdict))
