"""A diagnosis as people read it: in the terminal and as a page."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from planted import Net, batches, changed, trained

from batchnorm.doctor import examine
from batchnorm.doctor.diagnosis_value import groups, order
from batchnorm.doctor.examination import Selection
from batchnorm.doctor.family_text import families, full
from batchnorm.rules import FAMILIES, RULES, Finding


def many():
    return examine(trained(Net(bias=True)), batches())


def test_findings_of_one_kind_are_one_block():
    diagnosis = many()
    assert [len(group) for group in groups(diagnosis.findings) if group[0].code == "BN301"] == [2]
    text = full(diagnosis)
    assert text.count("BN301") == 2  # the block, and what to explain
    assert "stem.1, body.1" in text
    assert "(the first of 2)" in text


@pytest.mark.parametrize("width", [40, 80, 100])
def test_lines_fit_the_terminal(width):
    text = full(examine(changed(running_var=-1.0), batches()), width=width, verbose=True, command="batchnorm doctor")
    # a command stays in one piece, to be copied
    assert max(len(line) for line in text.splitlines() if not line.startswith("next: ")) <= width


def found(*codes):
    """A diagnosis of these findings, all rules having run."""
    findings = [
        Finding("layer", "m", "l", "c", "r", code=code, slug=RULES[code].slug, severity=RULES[code].severity)
        for code in codes
    ]
    return replace(examine(trained()), findings=order(findings), checked=tuple(RULES), not_checked={})


def statuses(text):
    return [line for line in text.splitlines() if line.startswith("[")]


def test_findings_are_read_by_family_the_worst_first():
    text = full(found("BN003", "BN401", "BN110", "BN102", "BN108", "BN301"))
    assert statuses(text) == [
        "[✗ error] Stored statistics: 1 error, 1 warning, 1 info",
        "[! warning] Shift: 1 warning",
        "[· info] Mode and state: 1 info",
        "[· info] Architecture: 1 info",
        "[✓ ok] Batches and training loop, Deployment, Distributed, Environment",
    ]
    codes = [line.split()[2] for line in text.splitlines() if line.startswith("  ") and " BN" in line]
    assert codes == ["BN102", "BN108", "BN110", "BN401", "BN003", "BN301"]


def test_a_family_s_findings_are_told_worst_first_in_whatever_order_they_come():
    diagnosis = found("BN110", "BN108", "BN102")
    mixed = replace(diagnosis, findings=diagnosis.findings[::-1])
    assert [f.code for f in families(mixed)[0].findings] == ["BN102", "BN108", "BN110"]


def test_a_family_that_was_not_checked_says_why_and_one_that_was_says_how_far():
    sick = replace(examine(changed(running_var=-1.0)), data="")
    text = full(sick)
    assert "[✗ error] Stored statistics (15 of 16 checks): 1 error" in text
    assert "[– not checked] Shift: needs data" in text
    words = " ".join(text.split())
    assert "[✓ ok] Mode and state, Architecture (3 of 4 checks), Distributed (3 of 5 checks), Environment" in words


def test_every_family_has_one_status():
    for diagnosis in (many(), examine(changed(running_var=-1.0)), found("BN102")):
        for verbose in (False, True):
            lines = " ".join(full(diagnosis, width=1000, verbose=verbose).splitlines()).split("[")[1:]
            assert all(sum(name.capitalize() in line for line in lines) == 1 for name in FAMILIES.values())


def test_families_that_were_not_asked_for_are_left_out():
    text = full(examine(changed(running_var=-1.0), selection=Selection(select=("BN1",))))
    assert statuses(text) == ["[✗ error] Stored statistics (15 of 16 checks): 1 error"]
    assert "not checked: needs data (-v lists all)" in text


def test_a_healthy_target_has_no_families_unless_all_is_asked_for():
    healthy = replace(examine(trained()), findings=())
    assert len([line for line in full(healthy).splitlines() if line]) == 3
    assert "[✓ ok] Mode and state\n" in full(healthy, verbose=True)


def test_a_reason_that_a_family_has_told_is_not_told_again():
    diagnosis = replace(found("BN102"), checked=("BN102",), not_checked={"BN401": "needs data"})
    assert full(diagnosis).count("needs data") == 1
    assert "-v lists the checks that did not run" in full(diagnosis)
    assert "-v" not in full(diagnosis, verbose=True)


def test_checks_that_did_not_run_are_counted_and_listed():
    diagnosis = examine(trained())
    assert f"{len(diagnosis.not_checked)} not run" in full(diagnosis)
    assert "needs data" in full(diagnosis)
    listed = full(diagnosis, verbose=True)
    assert all(code in listed for code in diagnosis.not_checked)


class Words(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.words, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.words.append(data)


def test_a_page_reads_well_without_its_styles():
    diagnosis = examine(changed(running_var=-1.0), batches())
    page = Words(diagnosis.to_html())
    text = " ".join(" ".join(page.words).split())
    assert text.index("Errors found") < text.index("BN103") < text.index("Layers") < text.index("Not checked")
    assert "running_var down to -1, 1 of 8 channels" in text
    assert not {"script", "img", "iframe"} & set(page.tags)
    assert re.findall(r'<link[^>]*href="([^"]*)"', diagnosis.to_html()) == ["data:,"]  # no icon is asked for
    assert "default-src 'none'" in diagnosis.to_html()


def test_a_rule_s_page_is_in_the_page_and_not_in_the_fragment():
    diagnosis = examine(changed(running_var=-1.0))
    assert "If var &lt; -eps, the square root is NaN" in diagnosis.to_html()
    assert "the square root is NaN" not in diagnosis._repr_mimebundle_()["text/html"]


def test_a_target_without_layers_says_so():
    diagnosis = replace(examine(trained()), layers=(), findings=())
    assert "0 batch norm layers" in full(diagnosis)
    assert "No batch norm layer." in diagnosis.to_html()
