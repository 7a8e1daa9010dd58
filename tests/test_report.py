"""The report as text: what it says, in which order, what it must never contain, and how it is written."""

from __future__ import annotations

import dataclasses
import errno
import html
import os
import re
import subprocess
import sys

import pytest
from sample_verdicts import CHARTS, accuracies, groups, learning, noise_power, only, picture, sample

from batchnorm import report
from batchnorm.experiment.environment import environment
from batchnorm.experiment.judgement import Status
from batchnorm.experiment.run_settings import RunSettings
from batchnorm.lecture.claim_criteria import CRITERIA, judge


@pytest.fixture(scope="module")
def page() -> str:
    return report.render(sample())


def words(page: str) -> str:
    """The text of a page, in order, without its markup."""
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).replace("\u00a0", " ").split())


def section(page: str, name: str) -> str:
    """The text of one claim's section."""
    return words(page.partition(f'aria-labelledby="{name}">')[2].partition("</section>")[0])


def in_order(text: str, *parts: str) -> bool:
    """Whether each part occurs behind the one before it."""
    place = 0
    for part in parts:
        place = text.find(part, place)
        if place < 0:
            return False
    return True


# -- contents -------------------------------------------------------------------------------------------------


def test_the_verdict_comes_first_then_the_table_the_claims_what_failed_and_how_it_was_measured(page):
    titles = [outcome.claim.title for outcome in sample().outcomes]
    text = words(page.split("<body>")[1])
    assert text.startswith(f"Why batch norm works, measured {sample().headline} Verdicts")
    after = text[text.index("neither, or theory") :]
    assert in_order(after, *titles, "Where a claim does not hold", "How this was measured")


def test_every_claim_says_its_criteria_before_its_results(page):
    for outcome in sample().outcomes:
        text = section(page, outcome.claim.name)
        for verdict in outcome.result.verdicts:
            criterion = verdict.criterion
            assert in_order(text, criterion.question, criterion.effect, "What came out", verdict.sentence), (
                criterion.key
            )
            assert criterion.guard in text
            assert text.index("What came out") < text.index(verdict.status.value)
        assert f"Criteria version {CRITERIA.version}" in text


def test_every_claim_shows_all_its_parts(page):
    for outcome in sample().outcomes:
        claim = outcome.claim
        text = section(page, claim.name)
        assert in_order(
            text, claim.title, claim.sentence, claim.arms, claim.how_to_read, claim.not_shown, *claim.sources
        )
        for what in outcome.result.numbers:
            assert what in text


def test_the_table_has_every_claim_with_its_status_its_sentence_and_a_link(page):
    rows = page.split('<table class="summary"')[1].split("</table>")[0].split("<tr")[2:]
    assert len(rows) == 8
    for outcome, row in zip(sample().outcomes, rows, strict=True):
        assert f'href="#{outcome.claim.name}"' in row
        assert in_order(words("<" + row), outcome.main.status.value, outcome.claim.title, outcome.main.sentence)


def test_a_verdict_shows_its_effect_interval_level_and_number_of_seeds(page):
    assert "Effect −0.9918, interval −1.106 to −0.8773 (99.375 %, 5 seeds)" in section(page, "noise")


def test_a_failed_guard_is_told_with_its_number(page):
    text = section(page, "hidden")
    assert "Not comparable: without batch norm the arm ends at 10 % training accuracy" in text


def test_many_numbers_are_folded_away_and_few_are_not(page):
    numbers = sample().outcomes[5].result.numbers
    assert len(numbers) == 24
    assert f"Further numbers {len(numbers)} numbers parameters 21,770" in section(page, "noise")
    assert "Further numbers parameters 21,770" in section(page, "scale")


def test_a_verdict_without_an_estimate_shows_its_guard_and_no_interval():
    verdicts = only("cause", learning())
    verdict = judge("cause-drift", [float("nan")] * 5, "nothing to compare", failed_guard="the noise was 3 % short")
    assert verdict.estimate is None
    outcome = verdicts.outcomes[0]
    result = dataclasses.replace(outcome.result, verdicts=[verdict])
    text = words(report.render(dataclasses.replace(verdicts, outcomes=[dataclasses.replace(outcome, result=result)])))
    assert "Nothing to compare Not comparable: the noise was 3 % short" in text
    assert "interval nan" not in text


@pytest.mark.slow
def test_every_verdict_that_does_not_support_its_claim_is_listed_at_the_end(page):
    text = words(page.split('aria-labelledby="does-not-hold"')[1].split("</section>")[0])
    for outcome in sample().outcomes:
        for verdict in outcome.result.verdicts:
            assert (verdict.sentence in text) == (verdict.status != Status.SUPPORTED), verdict.criterion.key


def test_a_run_in_which_nothing_failed_says_so():
    text = words(report.render(only("test-time", accuracies())))
    assert "Where a claim does not hold Every criterion of this run was met; none failed." in text


def test_the_page_says_how_it_was_measured(page):
    text = words(page.split('aria-labelledby="measured"')[1])
    assert "Seeds 5, from 0 to 4." in text
    assert "99.375 %: a full run tests 8 claims" in text
    assert "Bonferroni" in text
    assert f"Criteria Version {CRITERIA.version}" in text
    assert len(environment()) >= 5
    for what, value in environment().items():
        assert f"{what} {value}" in text
    assert "220 s in all" in text
    assert text.endswith("Repeat it batchnorm why --seed 0 --seeds 5")


def test_a_shortened_run_says_above_everything_that_it_gives_no_verdicts(page):
    short = words(report.render(dataclasses.replace(only("noise", learning()), settings=RunSettings(effort=0.05))))
    banner = (
        "This run only checks that the experiments work; its results are no verdicts. It trained for 5 % of the steps"
    )
    assert short.index(banner) < short.index("Verdicts", short.index("held in these"))
    assert "This run only checks" not in page


# -- charts ---------------------------------------------------------------------------------------------------


def test_every_chart_has_its_finding_as_text_and_an_alternative_for_who_does_not_see_it(page):
    charts = [chart for outcome in sample().outcomes for chart in outcome.result.charts]
    figures = re.findall(r"<figure .*?</figure>", page, flags=re.DOTALL)
    assert len(figures) == len(charts) == 20
    for chart, figure in zip(charts, figures, strict=True):
        assert words(figure.split("</figcaption>")[0]).startswith(chart.title)
        attribute = "alt" if chart.kind == "picture" else 'role="img" aria-label'
        assert f'{attribute}="{html.escape(chart.alt)}"' in figure


def test_no_drawing_repeats_itself_to_a_screen_reader(page):
    assert page.count("<svg") == page.count('aria-hidden="true"')


@pytest.mark.slow
def test_names_in_the_page_are_unique_and_links_lead_somewhere(page):
    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(names) == len(set(names))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(names)
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(names)


def test_every_colour_of_a_drawing_exists_on_the_page(page):
    defined = set(re.findall(r"(--[\w-]+):", page))
    assert set(re.findall(r"var\((--[\w-]+)\)", page)) <= defined


def test_a_picture_is_embedded():
    page = report.render(only("cats", picture()))
    assert f'<img src="data:image/png;base64,{picture().rows[0]["png"]}" width="480" alt="Two rows of cats.">' in page


def test_the_table_of_a_long_chart_keeps_both_ends_of_each_series_and_says_how_much_it_shows():
    chart = learning()
    page = report.render(only("hidden", chart))
    table = page.split('<table class="data">')[1].split("</table>")[0]
    cells = [[html.unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", row)] for row in table.split("<tr>")[2:]]
    for panel in ("ReLU", "sigmoid"):
        for series in chart.series:
            steps = [int(cell[2].replace(",", "")) for cell in cells if cell[:2] == [panel, series]]
            assert steps[0] == 0
            assert steps[-1] == 396
    assert f"{len(cells)} of 400 rows." in page
    assert 35 <= len(cells) <= 45


def test_a_share_is_written_in_percent_in_the_table():
    assert "<td>93 %</td>" in report.render(only("cats", accuracies()))


def test_a_chart_that_cannot_be_drawn_is_named():
    broken = dataclasses.replace(learning("Broken finding"), x=None)
    with pytest.raises(ValueError, match="Broken finding"):
        report.render(only("hidden", broken))


# -- the strip of a verdict -----------------------------------------------------------------------------------


def test_the_strip_draws_an_interval_inside_the_region_that_it_lies_in():
    strip = report._strip(judge("noise-regularizes", [0.018, 0.019, 0.017, 0.018], "s"))
    (start, end), (low, high) = strip.regions["supported"], strip.interval
    assert 0 < start < low < strip.mean < high < end == 100
    assert strip.regions["opposite"][0] == 0
    assert [label for _, label, _ in strip.bounds] == ["−0.005", "0.005"]
    assert len(strip.seeds) == 4


def test_the_strip_of_an_effect_without_spread_has_a_width():
    strip = report._strip(judge("test-time-alone", [0.0, 0.0, 0.0], "s"))
    assert 0 <= strip.mean < strip.regions["supported"][1] < strip.regions["opposite"][0] < 100


# -- words ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        ("never", "never"),
        (21_770, "21,770"),
        (-3, "−3"),
        (0.123456, "0.1235"),
        (-1.5, "−1.5"),
        (0.0, "0"),
        (3e-5, "3 × 10⁻⁵"),
        (-2.5e-7, "−2.5 × 10⁻⁷"),
        (1.25e9, "1.25 × 10⁹"),
    ],
)
def test_numbers_are_written_as_people_write_them(value, text):
    assert report._number(value) == text.replace(" ", "\u00a0")


@pytest.mark.parametrize(
    ("region", "text"),
    [
        ((0.5, float("inf")), "above 0.5"),
        ((-float("inf"), -1), "below −1"),
        ((-1.15, -0.85), "between −1.15 and −0.85"),
    ],
)
def test_regions_are_written_in_words(region, text):
    assert report._region(region) == text


# -- safety ---------------------------------------------------------------------------------------------------


def test_text_from_claims_is_escaped_wherever_it_stands():
    attack = "</figcaption></style><script>alert(1)</script>\"' onload=x"
    chart = dataclasses.replace(learning(attack), alt=attack, series={f"{attack} a": "without", attack: "with"})
    rows = [{**row, "series": attack, "panel": attack, "row": attack} for row in chart.rows]
    dots = dataclasses.replace(accuracies(), title=attack)
    dots = dataclasses.replace(dots, rows=[{**row, "label": attack} for row in dots.rows])
    fake = dataclasses.replace(picture(), alt=attack, rows=[{"png": attack, "width": attack}])
    verdicts = only("noise", dataclasses.replace(chart, rows=rows), dots, fake)
    outcome = verdicts.outcomes[0]
    texts = ("title", "sentence", "arms", "how_to_read", "not_shown")
    claim = dataclasses.replace(outcome.claim, **dict.fromkeys(texts, attack), sources=[attack])
    verdict = dataclasses.replace(
        outcome.main, words="{attack}", figures={"attack": attack}, failed_guard=attack, status=Status.INVALID
    )
    result = dataclasses.replace(outcome.result, verdicts=[verdict], numbers={attack: attack})
    outcome = dataclasses.replace(outcome, claim=claim, result=result)
    page = report.render(dataclasses.replace(verdicts, outcomes=[outcome], command=attack))
    assert "<script" not in page
    assert page.count("</style>") == 1
    assert not re.search(r"<[^>]*\sonload=x", re.sub(r'"[^"]*"', '""', page))
    assert page.count("&lt;script&gt;") >= 12


def test_the_default_page_has_no_script_and_a_policy_that_allows_none(page):
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in page
    assert "<script" not in page
    assert not re.search(r"\son\w+=", re.sub(r'"[^"]*"', '""', page))


def test_the_page_names_nothing_to_load(page):
    assert not re.search(r"""https?://|@import|(?:src|href)=["'](?!#|data:)""", page)


def test_twenty_charts_stay_below_half_a_megabyte(page):
    assert len(page.encode()) < 500_000


@pytest.mark.slow
def test_the_same_verdicts_give_the_same_page():
    verdicts = only("noise", groups(), accuracies(), noise_power(), learning())
    assert report.render(verdicts) == report.render(verdicts)


@pytest.mark.slow
def test_an_interactive_page_allows_only_its_own_script():
    verdicts = only("noise", *CHARTS["noise"]())
    first = report.render(verdicts, interactive=True)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', first)[1]
    assert re.fullmatch(
        r"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-[\w+/=]{44}'", policy
    )
    assert first.count("<svg") > 5  # the drawings are there for who runs no script
    assert report.render(verdicts, interactive=True) == first


# -- writing --------------------------------------------------------------------------------------------------


@pytest.fixture
def small():
    return only("noise", learning())


def test_writing_replaces_the_file_with_the_page(tmp_path, small):
    path = tmp_path / "why.html"
    path.write_text("old")
    report.write(small, path)
    assert path.read_bytes() == report.render(small).encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, small, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "why.html"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        report.write(small, str(path))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_while_writing_leaves_nothing_behind(tmp_path, small, monkeypatch):
    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report.write(small, tmp_path / "why.html")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_exist_is_an_oserror(tmp_path, small):
    with pytest.raises(FileNotFoundError):
        report.write(small, tmp_path / "nowhere" / "why.html")


def test_a_link_keeps_pointing_to_the_file_that_is_replaced(tmp_path, small):
    (tmp_path / "real.html").write_text("old")
    (tmp_path / "link.html").symlink_to(tmp_path / "real.html")
    report.write(small, tmp_path / "link.html")
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "real.html").read_text(encoding="utf-8") != "old"


# -- dependencies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["altair", "jinja2", "vl_convert"])
def test_without_the_extra_the_error_says_what_to_install(package, small, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    message = "The report needs altair, vl-convert-python and jinja2. Run: pip install 'batchnorm[report]'"
    with pytest.raises(ModuleNotFoundError, match=f"^{re.escape(message)}$"):
        report.render(small)


def test_importing_the_report_loads_nothing_heavy():
    code = "import sys, batchnorm.report, batchnorm.reporting.charts; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "batchnorm.reporting.charts" in loaded
    assert not {"altair", "jinja2", "vl_convert", "torch", "numpy", "scipy"} & set(loaded)
