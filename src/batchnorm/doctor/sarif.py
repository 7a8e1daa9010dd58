"""SARIF 2.1.0 (OASIS 2023): findings for code scanning. Every rule is declared, so that what is mended closes."""

from __future__ import annotations

import hashlib
import json
import os
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from batchnorm import __version__
from batchnorm.doctor.text import place, plain
from batchnorm.rules import RULES
from batchnorm.rules.finding import Severity

if TYPE_CHECKING:
    from batchnorm.doctor.diagnosis import Diagnosis
    from batchnorm.rules.finding import Finding, Rule

_LEVELS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "note"}
_ORDER = {code: index for index, code in enumerate(RULES)}


def sarif(diagnosis: Diagnosis) -> str:
    """The diagnosis as a SARIF log of one run."""
    driver = {
        "name": "batchnorm",
        "version": __version__,
        "semanticVersion": __version__,
        "rules": [_rule(rule) for rule in RULES.values()],
    }
    run: dict[str, Any] = {
        "tool": {"driver": driver},
        "columnKind": "unicodeCodePoints",
        "results": [_result(diagnosis, finding) for finding in diagnosis.findings],
    }
    if diagnosis.notes:
        notes = [{"level": "note", "message": {"text": plain(note)}} for note in diagnosis.notes]
        run["invocations"] = [{"executionSuccessful": True, "toolExecutionNotifications": notes}]
    log = {"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": [run]}
    return json.dumps(log, indent=1)


def _rule(rule: Rule) -> dict[str, Any]:
    fix = re.search(r"^Fix:\n(.*?)(?=^\S|\Z)", rule.page, re.DOTALL | re.MULTILINE)
    return {
        "id": rule.code,
        "name": "".join(map(str.title, rule.slug.split("-"))),
        "shortDescription": {"text": rule.title},
        "fullDescription": {"text": rule.page},
        "help": {"text": " ".join(fix[1].split()) if fix else rule.title},
        "defaultConfiguration": {"level": _LEVELS[rule.severity]},
    }


def _result(diagnosis: Diagnosis, finding: Finding) -> dict[str, Any]:
    text = f"{place(finding)}: {finding.measured} (limit: {finding.limit}). {finding.consequence} Fix: {finding.remedy}"
    return {
        "ruleId": finding.code,
        "ruleIndex": _ORDER[finding.code],
        "level": _LEVELS[finding.severity],
        "message": {"text": plain(text)},
        "locations": [{
            "physicalLocation": _physical(diagnosis, finding),
            "logicalLocations": [{"fullyQualifiedName": plain(place(finding)), "kind": "module"}],
        }],
        "partialFingerprints": {"codeAndLayer/v1": _fingerprint(diagnosis, finding)},
    }  # fmt: skip


def _physical(diagnosis: Diagnosis, finding: Finding) -> dict[str, Any]:
    file, _, line = finding.where.rpartition(":")
    if file and line.isdigit():
        return {"artifactLocation": {"uri": _uri(file)}, "region": {"startLine": int(line)}}
    # an address such as model.py:make_model --weights w.pt is a place in its file
    return {"artifactLocation": {"uri": _uri(re.sub(r"(\.py):[\w.]+( --.*)?$", r"\1", diagnosis.target))}}


def _uri(path: str) -> str:
    return quote(path.replace(os.sep, "/"), errors="surrogatepass")


def _fingerprint(diagnosis: Diagnosis, finding: Finding) -> str:
    return hashlib.sha256(
        f"{diagnosis.target}\0{finding.code}\0{finding.layer}".encode(errors="surrogatepass")
    ).hexdigest()
