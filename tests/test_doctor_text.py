"""A diagnosis as people read it: in the terminal and as a page."""

from dataclasses import replace
from html.parser import HTMLParser

import pytest
from planted import Net, batches, changed, trained

from batchnorm.doctor import examine
from batchnorm.doctor.text import full, groups


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
    assert text.index("errors found") < text.index("BN103") < text.index("Layers") < text.index("Not checked")
    assert "running_var down to -1, 1 of 8 channels" in text
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert "default-src 'none'" in diagnosis.to_html()


def test_a_rule_s_page_is_in_the_page_and_not_in_the_fragment():
    diagnosis = examine(changed(running_var=-1.0))
    assert "Below -eps the square root is NaN" in diagnosis.to_html()
    assert "Below -eps" not in diagnosis._repr_mimebundle_()["text/html"]


def test_a_target_without_layers_says_so():
    diagnosis = replace(examine(trained()), layers=(), findings=())
    assert "0 batch norm layers" in full(diagnosis)
    assert "No batch norm layer." in diagnosis.to_html()
