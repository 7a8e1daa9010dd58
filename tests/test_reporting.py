"""One way to show: every command offers every format, text is safe and fits its columns, pages load nothing."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from batchnorm.cli import main
from batchnorm.reporting import formats
from batchnorm.reporting.blocks import CommandText, Facts, Items, Text, TextTable
from batchnorm.reporting.command_line import CommandLine
from batchnorm.reporting.formats import FORMATS, Format, by_suffix, chosen, rendered
from batchnorm.reporting.html import fragment
from batchnorm.reporting.json_values import to_json
from batchnorm.reporting.markdown import markdown
from batchnorm.reporting.page_shell import shell
from batchnorm.reporting.rows import Check, Report, Row, RuleWords, Suite
from batchnorm.reporting.severity import Severity
from batchnorm.reporting.text import aligned, columns, paragraphs, plain, wrapped

COMMANDS = ("bench", "doctor", "explain", "rules", "shift", "why")


def help_of(command):
    result = CliRunner().invoke(main, [command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_a_new_format_is_one_entry_and_every_command_has_it(monkeypatch, command):
    assert "[" + "|".join(FORMATS) + "]" in help_of(command)
    monkeypatch.setitem(formats.FORMATS, "count", Format(lambda report: str(len(report.rows)), ".count"))
    assert "|md|count]" in help_of(command)


def test_a_new_format_is_printed_and_written(monkeypatch, tmp_path):
    monkeypatch.setitem(formats.FORMATS, "count", Format(lambda report: f"rules: {len(report.rules)}", ".count"))
    found = CliRunner().invoke(main, ["rules", "--output-format", "count"]).stdout
    assert re.fullmatch(r"rules: \d\d\n", found)
    assert by_suffix(tmp_path / "a.COUNT") == "count"


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_format_is_refused_and_rich_is_full(command):
    words = [command, "--output-format", "pdf"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert "'full', 'concise'" in result.output
    assert formats.FORMATS.keys() == FORMATS.keys()
    if command == "rules":
        rich, full = (CliRunner().invoke(main, [command, "--output-format", name]).stdout for name in ("rich", "full"))
        assert rich == full


HIDDEN = {
    # what the doctor's text escaped
    "control": "\x00\x07\x1b\x7f\x9f", "line ends": "\n\r\u2028\u2029\x85", "direction": "\u061c\u200e\u202e\u2066",
    "not seen": "\xad\u200b\u2060\ufeff\ufff9", "lone surrogate": "\ud800\udfff",
    # what the shift's text escaped beside them
    "unassigned": "\uffff\U000e0080", "private": "\ue000", "spaces": "\xa0\u2009\u3000", "tags": "\U000e0041",
    "separator": "\u180e",
}  # fmt: skip


@pytest.mark.parametrize("name", HIDDEN)
def test_no_hidden_character_stays(name):
    for character in HIDDEN[name]:
        text = plain(f"a{character}b")
        assert text.isprintable()
        assert character not in text
        assert text[:2] == "a\\"
        text.encode()


def test_what_people_write_stays():
    text = "stage1.bn – ✓ 10⁴⁸⁹ × Müller 層 “x” 'y' \\n"
    assert plain(text) == text


def test_a_name_cannot_begin_a_line_also_where_lines_are_wrapped():
    lines = wrapped("layer one\n::error::two " + "x" * 50, 20, 4)
    assert max(map(len, lines)) <= 20
    assert not any(line.startswith("::error") for line in lines)


@pytest.mark.parametrize(("terminal", "expected"), [("20", 40), ("64", 64), ("300", 100)])
def test_one_rule_for_widths(monkeypatch, terminal, expected):
    monkeypatch.setenv("COLUMNS", terminal)
    assert columns() == expected
    assert columns(to_file=True) == 80


WIDE = TextTable(("name", "kind", "n"), [("stage" * 20, "component means", "1"), ("a", "b", "1,000")], words=2)
LONG = TextTable(("key", "sentence", "n"), [("k", "one two three " * 10, "1"), ("key-2", "b", "1,000")], words=2)


@pytest.mark.parametrize("table", [WIDE, LONG])
@pytest.mark.parametrize("width", [40, 80])
def test_columns_of_a_table_begin_together_and_fit(table, width):
    lines = aligned(table, width)
    assert max(map(len, lines)) <= width
    start = lines[0].index(table.head[1])
    assert all(line[start - 2 : start].strip() == "" for line in lines if len(line) > start)
    assert lines[-1].endswith("1,000")
    assert len({len(line) for line in lines if line.endswith(("n", "1", "1,000"))}) == 1


def test_a_long_name_is_cut_at_its_beginning_and_a_long_sentence_is_broken():
    assert aligned(WIDE, 40)[1].startswith("…")
    told = " ".join(line[aligned(LONG, 40)[0].index("sentence") :].strip() for line in aligned(LONG, 40)[1:-1])
    assert " ".join(LONG.rows[0][1].split()) == re.sub(r" +1\b", "", " ".join(told.split()))


@pytest.mark.parametrize("bad", ["<script>", "| a |", "`code`", "\x1b[31m", "\n::error::"])
def test_blocks_are_text_in_every_form(bad):
    blocks = [
        Text(bad, strong=bad), Items([bad], title=bad), TextTable((bad, "n"), [(bad, "1")], words=1, title=bad),
        Facts(bad, [(bad, bad)], Severity.ERROR, pages=[("Why", "text")]), CommandText(bad, bad),
    ]  # fmt: skip
    for text in (paragraphs(blocks, 80), markdown(blocks), fragment(blocks), shell(bad, fragment(blocks))):
        assert "\x1b" not in text
        assert "\n::error::" not in text
    assert "<script>" not in fragment(blocks) + shell(bad, "")
    assert "<script>" not in markdown([block for block in blocks if not isinstance(block, CommandText)])


def test_a_page_loads_nothing_and_allows_one_script():
    still, moving = shell("a", "<p>b</p>"), shell("a", "b", data={"d": "</script>"}, script="f()")
    assert "script" not in re.sub(r"<style>.*?</style>", "", still, flags=re.DOTALL)
    assert moving.count("</script>") == 2
    assert "script-src 'sha256-" in moving
    for page in (still, moving):
        assert "default-src 'none'" in page
        assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
        assert "prefers-color-scheme: dark" in page
        assert "@media print" in page


def some_report(**more):
    rows = [
        Row(rule="X1", name="a-b", severity=Severity.ERROR, place="bn1", words="bn1: wrong", file="a b.py", line=3,
            identity=("t", "X1")),
        Row(rule="X2", severity=Severity.INFO, place="model", words="50% of it"),
    ]  # fmt: skip
    return Report(
        command="batchnorm test", target="t", headline="Wrong", json=lambda: to_json({"x": float("nan")}), rows=rows,
        rules=[RuleWords(code="X1", title="One"), RuleWords(code="X2", title="Two", severity=Severity.INFO)],
        suites=[Suite(name="s", checks=[Check(name="c1", rows=rows[:1]), Check(name="c2", rows=rows[1:]),
                                        Check(name="c3", skipped="no data"), Check(name="c4", output="fine")])],
        notes=["note"], lines=["t: one"], records=[{"a": 1}, {"a": math.inf}], document=[Text("words")], **more,
    )  # fmt: skip


def test_every_format_of_one_report():
    told = {name: rendered(some_report(), name) for name in FORMATS}
    assert told["full"] == told["md"] == "words"
    assert told["concise"] == "t: one"
    assert json.loads(told["json"]) == {"x": "nan"}
    assert [json.loads(line) for line in told["jsonl"].split("\n")] == [{"a": 1}, {"a": "inf"}]
    assert told["github"].split("\n") == [
        "::error title=X1 a-b,file=a b.py,line=3::t: bn1: wrong",
        "::notice title=X2::t: 50%25 of it",
        "::notice title=note::t: note",
    ]
    run = json.loads(told["sarif"])["runs"][0]
    assert [result["ruleId"] for result in run["results"]] == ["X1", "X2"]
    place = run["results"][0]["locations"][0]["physicalLocation"]
    assert place == {"artifactLocation": {"uri": "a%20b.py"}, "region": {"startLine": 3}}
    assert '<testsuites name="batchnorm test" tests="5" failures="1"' in told["junit"]
    assert 'skipped="1"' in told["junit"]
    assert "<h1>batchnorm test</h1>" in told["html"]


@pytest.mark.parametrize(("limit", "failures"), [(Severity.INFO, 2), (Severity.WARNING, 1), (None, 0)])
def test_a_limit_says_what_fails(limit, failures):
    assert f'failures="{failures}"' in rendered(some_report(fail_on=limit), "junit")


def test_the_format_is_chosen_by_option_then_ending_then_project_then_workflow(monkeypatch):
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    page = Path("a.html")
    assert chosen("json", page, "sarif") == "json"
    assert chosen(None, page, "sarif") == "html"
    assert chosen(None, Path("a.txt"), "sarif") == "sarif"
    assert chosen(None) == "full"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert chosen(None) == "github"
    assert chosen(None, in_workflow="full") == "full"
    with pytest.raises(ValueError, match=r"output-format must be one of full, .*, got 'pdf'. Correct the setting"):
        chosen(None, None, "pdf")


def test_the_manual_names_every_format_and_every_ending_in_the_order_of_the_table():
    text = (Path(__file__).parents[1] / "docs" / "doctor.md").read_text(encoding="utf-8")
    (names, endings) = re.findall(r"`--output-format` is (.*?);.* takes the format from (.*?)\. In a", text, re.DOTALL)[
        0
    ]
    assert re.findall(r"`(\w+)`", names) == list(FORMATS)
    assert re.findall(r"`(\.\w+)`", endings) == [each.suffix for each in FORMATS.values() if each.suffix]


def test_a_command_line_is_text_and_keeps_its_parts():
    import copy
    import pickle

    line = CommandLine("batchnorm fix", "'a {b}.pt'", "--data x")
    assert line == "batchnorm fix 'a {b}.pt' --data x"
    for copied in (copy.deepcopy(line), pickle.loads(pickle.dumps(line))):
        assert (copied, copied.program, copied.target, copied.options) == (line, line.program, line.target, "--data x")
    assert CommandLine("batchnorm doctor") == "batchnorm doctor"
