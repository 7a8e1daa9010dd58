"""The report of a fleet's verdict: its words, rows and tables, for all formats."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from batchnorm.reporting.blocks import Block, CommandText, Items, Text, TextTable
from batchnorm.reporting.rows import Check, Report, Row, RuleWords, Suite
from batchnorm.reporting.severity import GLYPHS, Severity
from batchnorm.reporting.text import many, plain
from batchnorm.shift.fleet import AVERAGE, LARGEST, PRODUCT, SUM
from batchnorm.shift.fleet_verdict import FleetLayer, FleetVerdict, ReplicaVerdict
from batchnorm.shift.verdict_words import HINTS, odds

_SHIFT, _DEPENDENT, _ALONE = "covariate-shift", "dependent-observations", "replica-alarm"
_RULES = (
    RuleWords(code=_SHIFT, title="The data of a fleet are not distributed like the data of the reference."),
    RuleWords(code=_DEPENDENT, title="Neighbouring observations are alike, so that false alarms are not bounded."),
    RuleWords(code=_ALONE, title="A replica raised the alarm by itself; the fleet's evidence decides."),
)
_SHOWN = 20  # number of replicas in the table
_WORDS = {
    AVERAGE: "average of e-values of one time; of several times the largest sum counts",
    LARGEST: "the largest e-value, divided by the number of replicas, because all share the clean observations",
    PRODUCT: "product of the replicas, which are declared to be independent",
    SUM: "sum of the evidence of one time; of several times the largest sum counts",
}


def report(verdict: FleetVerdict) -> Report:
    """The report for all formats."""
    rows = list(_rows(verdict))
    return Report(
        command="batchnorm shift", target=verdict.target, identified_by="files/v1", headline=sentence(verdict),
        rows=rows, rules=_RULES, suites=[Suite(name="shift", checks=list(_checks(verdict, rows)))],
        lines=[f"{verdict.target}: {outcome(verdict)}"], document=list(_document(verdict)),
        records=[verdict.to_dict()], json=verdict.to_json, notes=verdict.left_out,
    )  # fmt: skip


def sentence(verdict: FleetVerdict) -> str:
    """The verdict in one sentence."""
    counted = many(len(verdict.replicas), "replica")
    if not verdict.shift:
        return f"No shift found in {counted}; the list below says what could not be seen"
    return f"Shift found: the data of {counted} are not distributed as the reference says"


def outcome(verdict: FleetVerdict) -> str:
    """The result with the evidence."""
    about = f"evidence {odds(verdict.log_evidence)}, limit {odds(verdict.log_limit)}"
    about += f", {many(len(verdict.replicas), 'replica')}, {many(verdict.examples, 'example')}"
    return (
        f"shift found, first at {verdict.first or 'no layer'}: {about}" if verdict.shift else f"no shift found: {about}"
    )


def _rows(verdict: FleetVerdict) -> Iterator[Row]:
    if verdict.shift:
        hint = f" Hint: {HINTS[verdict.hint]}." if verdict.hint else ""
        words = f"{outcome(verdict)}.{hint} Labels tell whether accuracy fell."
        yield _row(verdict, _SHIFT, Severity.ERROR, verdict.first or "model", words)
    for replica in verdict.replicas:
        if replica.dependent:
            words = f"{replica.file}: correlation {replica.correlation:.2f} of neighbours is too much for this unit."
            yield _row(verdict, _DEPENDENT, Severity.WARNING, "model", words, replica.file)
        if replica.alarm and not verdict.shift:
            words = f"{replica.file}: the replica raised the alarm by itself; the fleet's evidence is below the limit."
            yield _row(verdict, _ALONE, Severity.WARNING, "model", words, replica.file)


def _row(verdict: FleetVerdict, rule: str, severity: Severity, place: str, words: str, file: str = "") -> Row:
    return Row(rule=rule, severity=severity, place=place, words=words, identity=(verdict.target, file, rule))


def _checks(verdict: FleetVerdict, rows: list[Row]) -> Iterator[Check]:
    yield Check(name="all replicas together", rows=[row for row in rows if row.rule == _SHIFT])
    for layer in verdict.layers:
        words = f"evidence {odds(layer.log_evidence)} by {layer.kind}, limit {odds(verdict.log_limit)}"
        moved = Row(rule=_SHIFT, severity=Severity.ERROR, place=layer.name, words=words)
        yield Check(name=layer.name or "model", rows=[moved] if layer.moved and verdict.shift else [])
    yield Check(name="each replica", rows=[row for row in rows if row.rule != _SHIFT])


def _document(verdict: FleetVerdict) -> Iterator[Block]:
    severity = Severity.ERROR if verdict.shift else Severity.INFO
    yield Text(f"[{GLYPHS[severity]} {severity}] {sentence(verdict)}")
    yield TextTable(("", ""), [(name, plain(words)) for name, words in _facts(verdict)], words=2)
    head = ("file", "saved (UTC)", "alone", "counts", "observations")
    strongest = sorted(verdict.replicas, key=lambda replica: -replica.log_evidence)[:_SHOWN]
    shown = [replica for replica in verdict.replicas if replica in strongest]
    others = f"{many(len(verdict.replicas) - len(shown), 'other replica')} with less evidence"
    title = "" if len(shown) == len(verdict.replicas) else f"The {_SHOWN} replicas with most evidence; {others}"
    yield TextTable(head, [_cells(replica) for replica in shown], words=4, title=title)
    head = ("layer", "evidence", "kind", "channels", "W2", "KL")
    yield TextTable(head, [_layer(layer) for layer in verdict.layers], words=4)
    if verdict.left_out:
        yield Items([plain(text) for text in verdict.left_out], title="Left out")
    yield Items(list(_unseen(verdict)), title="Not seen")
    yield CommandText("again", plain(verdict.command))


def _facts(verdict: FleetVerdict) -> Iterator[tuple[str, str]]:
    yield "compared with", _reference(verdict)
    yield "evidence", f"{odds(verdict.log_evidence)} against clean data; limit {odds(verdict.log_limit)}"
    yield "combined", _WORDS[verdict.rule]
    yield "replicas", _number(verdict)
    if verdict.shift:
        yield "first moved", verdict.first or "no layer by itself; all together reach the limit"
    if verdict.hint:
        yield "hint", HINTS[verdict.hint]
    if alone := sum(replica.alarm for replica in verdict.replicas):
        yield "alone", f"alarms of {many(alone, 'replica')}, of which each keeps the promise for one replica only"
    if alike := sum(replica.dependent for replica in verdict.replicas):
        yield "neighbours", f"alike in {many(alike, 'replica')}: the promise about false alarms does not hold"
    if verdict.other_files:
        yield "other files", f"{many(verdict.other_files, 'file')} at the addresses are no states and were not read"


def _reference(verdict: FleetVerdict) -> str:
    if verdict.source == "calibrated":
        return "a calibrated reference" if verdict.rule != PRODUCT else "a calibrated reference for each replica"
    return "the checkpoint's stored statistics alone; nothing was calibrated, so tolerances are wide"


def _number(verdict: FleetVerdict) -> str:
    counted, files = sum(replica.counted for replica in verdict.replicas), len(verdict.replicas)
    late = f"; {counted} of them count, saved within {verdict.within:g} s" if counted < files else ""
    if verdict.arl is not None:
        return f"{files} with a file{late}"
    if verdict.declared:
        return f"{verdict.fleet} declared, {files} with a file{late}"
    return f"{files} found{late}. If the number may change, declare its largest value with --fleet"


def _cells(replica: ReplicaVerdict) -> tuple[str, ...]:
    saved = datetime.fromtimestamp(replica.saved, UTC).strftime("%Y-%m-%d %H:%M:%S")
    counts = "yes" if replica.counted else "no: other time"
    return plain(replica.file), saved, odds(replica.log_evidence), counts, f"{replica.observations:,}"


def _layer(layer: FleetLayer) -> tuple[str, ...]:
    evidence = odds(layer.log_evidence)
    channels = ", ".join(map(str, layer.channels[:4])) or "–"
    kind = "–" if evidence == "none" else layer.kind
    return plain(layer.name), evidence, kind, channels, f"{layer.w2:.2f}", f"{layer.kl:.2f}"


def _unseen(verdict: FleetVerdict) -> Iterator[str]:
    yield "evidence that rose and fell again between two readings of the files"
    if verdict.source == "checkpoint":
        yield "heavy tails, which each replica's monitor checks and warns about in its own process"
    if missing := verdict.fleet - len(verdict.replicas) if verdict.arl is None else 0:
        yield f"{many(missing, 'replica')} without a file"
    yield "a change that keeps every channel's mean and every layer's energy"
    yield "whether accuracy fell: labels are needed for that"
