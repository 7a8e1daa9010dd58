"""The report in a browser: nothing loaded, nothing said on the console, readable in every setting."""

from __future__ import annotations

import contextlib
import re

import pytest
from sample_verdicts import CHARTS, only, sample

from batchnorm import report

pytestmark = pytest.mark.slow

# Every visible text with its contrast (WCAG 2.2, 1.4.3) against the nearest ground that is painted behind it.
CONTRASTS = """() => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const light = text => {
    const [r, g, b] = parse(text).map(v => (v /= 255, v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if ((parse(colour)[3] ?? 1) > 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  for (let node; node = texts.nextNode();) {
    const e = node.parentElement, style = getComputedStyle(e);
    if (!node.data.trim() || !e.getClientRects().length || style.visibility === "hidden") continue;
    const colour = e instanceof SVGElement ? style.fill : style.color;
    const [low, high] = [light(colour), light(ground(e))].sort((a, b) => a - b);
    found.push([(high + 0.05) / (low + 0.05), e.tagName.toLowerCase(), node.data.trim().slice(0, 40)]);
  }
  return found;
}"""

EDGES = "all => all.map(e => e.getBoundingClientRect()).map(box => [box.left, box.right, box.height])"

COLOURS = """() => Object.fromEntries([...document.styleSheets[0].cssRules[0].style].filter(n => n.startsWith("--"))
  .map(n => [n, getComputedStyle(document.documentElement).getPropertyValue(n).trim()]))"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    report.write(sample(), folder / "why.html")
    report.write(only("noise", *CHARTS["noise"](), *CHARTS["cats"]()), folder / "live.html", interactive=True)
    return folder


@pytest.fixture
def visit(browser, files):
    """Opens a page and, at the end, checks that it loaded nothing else and said nothing."""
    said: list[str] = []
    loaded: list[str] = []

    with contextlib.ExitStack() as stack:

        def visit(name: str = "why.html", **settings):
            context = browser.new_context(**settings)
            stack.callback(context.close)
            page = context.new_page()
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda request: loaded.append(request.url))
            page.goto((files / name).as_uri())
            return page

        yield visit
    assert said == []
    assert {url for url in loaded if not url.startswith("data:")} <= {path.as_uri() for path in files.iterdir()}
    assert loaded


@pytest.mark.parametrize("javascript", [True, False])
def test_every_claim_and_its_verdict_are_visible_and_the_page_is_silent(visit, javascript):
    page = visit(java_script_enabled=javascript)
    assert page.locator(".headline").inner_text() == sample().headline
    for outcome in sample().outcomes:
        assert page.locator(f"h2#{outcome.claim.name}").is_visible()
        for verdict in outcome.result.verdicts:
            shown = page.locator(f"#{verdict.criterion.key}")
            assert shown.is_visible()
            assert verdict.status.value in shown.inner_text()
    drawings = page.locator("figure .drawing")
    assert drawings.count() == 19
    assert all(drawing.is_visible() for drawing in drawings.all())


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_reaches_beyond_the_page(visit, width):
    page = visit(viewport={"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    edges = page.locator("figure svg, figure img").evaluate_all(EDGES)
    assert all(left >= 0 and right <= width for left, right, _ in edges)


def test_panels_stand_side_by_side_on_a_wide_page_and_below_each_other_on_a_narrow_one(visit):
    def corners(width: int) -> tuple[set[float], set[float]]:
        page = visit(viewport={"width": width, "height": 900})
        boxes = [panel.bounding_box() for panel in page.locator("#hidden-1 .panel svg").all()]
        assert len(boxes) == 2
        return {round(box["x"]) for box in boxes}, {round(box["y"]) for box in boxes}

    assert [len(side) for side in corners(1280)] == [2, 1]
    assert [len(side) for side in corners(390)] == [1, 2]


def test_labels_of_charts_stay_readable_on_a_telephone(visit):
    page = visit(viewport={"width": 390, "height": 900})
    heights = [height for _, _, height in page.locator("figure .panel svg text").evaluate_all(EDGES)]
    assert min(heights) >= 10  # CSS pixels of a line: letters of 9 and more


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["why.html", "live.html"])
def test_every_text_has_a_contrast_of_4_5(visit, scheme, name):
    page = visit(name, color_scheme=scheme)
    page.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")
    found = page.evaluate(CONTRASTS)
    assert {"h1", "h2", "h3", "p", "td", "text", "figcaption", "span"} <= {tag for _, tag, _ in found}
    assert [text for text in found if text[0] < 4.5] == []


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in channels]
    return sum(weight * v for weight, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_mark_has_a_contrast_of_3(visit, scheme):
    colours = visit(color_scheme=scheme).evaluate(COLOURS)
    ground = luminance(colours["--ground"])
    marks = {name: luminance(c) for name, c in colours.items() if re.match("--(with|neutral)", name)}
    assert len(marks) == 12
    contrast = {name: (max(m, ground) + 0.05) / (min(m, ground) + 0.05) for name, m in marks.items()}
    assert {name: ratio for name, ratio in contrast.items() if ratio < 3} == {}


def test_dark_and_light_differ(visit):
    grounds = {
        visit(color_scheme=scheme).evaluate("getComputedStyle(document.body).backgroundColor")
        for scheme in ("light", "dark")
    }
    assert len(grounds) == 2


def test_a_printed_page_is_light_and_cuts_no_chart(visit):
    page = visit(color_scheme="dark", viewport={"width": 700, "height": 1000})
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert [text for text in page.evaluate(CONTRASTS) if text[0] < 4.5] == []
    figures = page.locator("figure")
    assert set(figures.evaluate_all("all => all.map(e => getComputedStyle(e).breakInside)")) == {"avoid"}
    # a page of A4 within its margins is as high as this when it is 700 wide
    assert max(height for _, _, height in figures.evaluate_all(EDGES)) < 1000
    assert not page.locator("figure details").first.is_visible()
    assert page.locator("#noise ~ .part .more dd").last.is_visible()  # folded on the screen, open on paper
    assert page.evaluate("document.documentElement.scrollWidth") <= 700
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_an_interactive_page_draws_its_charts_and_shows_values_under_the_pointer(visit):
    page = visit("live.html")
    page.locator(".vega-embed > svg").nth(3).wait_for()
    assert page.locator("[data-panel]").count() == 4
    page.locator("#noise-1 .mark-symbol path").nth(3).hover()
    tooltip = page.locator("#vg-tooltip-element.visible")
    tooltip.wait_for()
    assert re.sub(r"\s+", " ", tooltip.inner_text()) == (
        "series mean, measured batch size M 16 noise power, in variances 0.065"
    )


def test_the_wheel_scrolls_an_interactive_page_also_over_a_chart(visit):
    page = visit("live.html", viewport={"width": 1280, "height": 700})
    page.locator(".vega-embed > svg").nth(3).wait_for()
    page.locator("#noise-1 .panel").hover()
    before = page.evaluate("scrollY")
    page.mouse.wheel(0, 200)
    for _ in range(100):
        page.wait_for_timeout(50)  # the page's policy forbids wait_for_function, which evaluates text
        if page.evaluate("scrollY") > before:
            return
    pytest.fail("the page did not scroll")


def test_an_interactive_page_shows_its_charts_without_javascript(visit):
    page = visit("live.html", java_script_enabled=False)
    drawings = page.locator("[data-panel] > svg")
    assert drawings.count() == 4
    assert all(drawing.is_visible() for drawing in drawings.all())
