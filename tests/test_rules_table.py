"""rules.toml: each row has a function of its slug, each rule has a row, and the words of its findings are complete."""

import ast
from pathlib import Path

import pytest

from batchnorm import rules
from batchnorm.files.room_tables import room_table
from batchnorm.rules import RULES, Fix, Rule, Severity, bn0_state
from batchnorm.rules.rule_evidence import Evidence

TABLE = room_table("rules", "rules")
KEYS = {"slug", "severity", "needs", "reads", "limit", "consequence", "remedy", "fixable"}


def test_every_rule_of_a_family_has_a_row_and_every_row_a_rule():
    files = Path(rules.__file__).parent.glob("bn[0-9]_*.py")
    rows, found = {row["slug"].replace("-", "_") for row in TABLE.values()}, set()
    for file in [*files, *Path(rules.__file__).parent.glob("bn[0-9]_*/*.py")]:
        functions = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
        found |= {node.name for node in functions if "Example:" in (ast.get_docstring(node) or "")}
    assert found == rows


def test_rows_are_in_the_order_of_codes_and_have_known_keys():
    assert list(TABLE) == sorted(TABLE)
    assert all(row.keys() <= KEYS for row in TABLE.values())
    assert all(rule.check.__module__.split(".")[-1].startswith(rule.code[:3].lower()) for rule in RULES.values())


def test_a_limit_names_the_constants_of_its_rule():
    assert RULES["BN008"].limit == f"below {bn0_state.HIGHEST_MOMENTUM:g}"
    assert not [rule.code for rule in RULES.values() if "{" in rule.limit]


def test_a_row_gives_what_a_finding_leaves_empty_and_a_finding_overrides_it():
    def check(evidence):
        yield rules.Finding("bn", "plain")
        yield rules.Finding("bn", "own", limit="l", consequence="c", remedy="r", fixable=Fix.DATA)

    row = {"slug": "x", "severity": "warning", "needs": [], "limit": "L", "consequence": "C", "remedy": "R"}
    plain, own = Rule.of("BN000", row | {"fixable": "safe"}, check).findings(Evidence(stored={}, target="model"))
    assert (plain.limit, plain.consequence, plain.remedy, plain.fixable) == ("L", "C", "R", Fix.SAFE)
    assert (own.limit, own.consequence, own.remedy, own.fixable) == ("l", "c", "r", Fix.DATA)
    assert plain.severity is Severity.WARNING


def test_a_row_with_an_unknown_key_or_value_is_refused():
    row = {"slug": "x", "severity": "warning", "needs": []}
    with pytest.raises(TypeError, match="colour"):
        Rule.of("BN000", row | {"colour": "red"}, list)
    with pytest.raises(KeyError):
        Rule.of("BN000", row | {"reads": "nothing"}, list)
