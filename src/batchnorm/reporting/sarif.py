"""SARIF 2.1.0 (OASIS 2023), for code scanning. All rules are declared, so that an alert of a mended fault closes."""

from __future__ import annotations

import hashlib
import json
import os
from importlib.metadata import version
from urllib.parse import quote

from batchnorm.reporting.json_values import Json
from batchnorm.reporting.rows import Report, Row, RuleWords
from batchnorm.reporting.severity import Severity
from batchnorm.reporting.text import plain

_LEVELS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "note"}


def sarif(report: Report) -> str:
    """The report as a SARIF log of one run."""
    name, rules = report.driver or report.command, [_rule(rule) for rule in report.rules]
    order = {rule.code: index for index, rule in enumerate(report.rules)}
    number = version("batchnorm")
    driver = {"name": name, "version": number, "semanticVersion": number, "rules": rules}
    results = [_result(report, row, order[row.rule]) for row in report.rows]
    notes = [{"level": "note", "message": {"text": plain(note)}} for note in report.notes]
    extra = {"invocations": [{"executionSuccessful": True, "toolExecutionNotifications": notes}]} if notes else {}
    run = {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results, **extra}
    log = {"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": [run]}
    return json.dumps(log, indent=1)


def _rule(rule: RuleWords) -> dict[str, Json]:
    more = {"fullDescription": rule.page, "help": rule.help}
    return {
        "id": rule.code,
        **({"name": "".join(map(str.title, rule.name.split("-")))} if rule.name else {}),
        "shortDescription": {"text": rule.title},
        **{key: {"text": text} for key, text in more.items() if text},
        **({} if rule.severity is None else {"defaultConfiguration": {"level": _LEVELS[rule.severity]}}),
    }


def _result(report: Report, row: Row, index: int) -> dict[str, Json]:
    region = {"region": {"startLine": row.line}} if row.file and row.line else {}
    parts = "\0".join(row.identity).encode(errors="surrogatepass")
    return {
        "ruleId": row.rule,
        "ruleIndex": index,
        "level": _LEVELS[row.severity],
        "message": {"text": plain(row.words)},
        "locations": [{
            "physicalLocation": {"artifactLocation": {"uri": _uri(row.file or report.source)}, **region},
            "logicalLocations": [{"fullyQualifiedName": plain(row.place), "kind": "module"}],
        }],
        "partialFingerprints": {report.identified_by: hashlib.sha256(parts).hexdigest()},
    }  # fmt: skip


def _uri(path: str) -> str:
    return quote(path.replace(os.sep, "/"), errors="surrogatepass")
