"""A data set judged offline: the same evidence as live, and what is said of it."""

from __future__ import annotations

import itertools
import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
from fingerprint import fingerprint
from small_networks import Written
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.reporting.command_line import CommandLine
from batchnorm.reporting.text import plain
from batchnorm.shift import ShiftMonitor
from batchnorm.shift.verdict import Channel, LayerVerdict, ShiftVerdict, judge
from batchnorm.shift.verdict_page import page
from batchnorm.shift.verdict_words import concise, facts, full, odds, unseen

COMMAND = CommandLine("batchnorm shift", "net.py:model", "--data net.py:loader")


def images(n: int, seed: int) -> Tensor:
    """Smooth colours, brightness of their own, and some noise."""
    random = torch.Generator().manual_seed(seed)
    colours = torch.randn(n, 3, 4, 4, generator=random).repeat_interleave(5, 2).repeat_interleave(5, 3)
    light = 0.5 * torch.randn(n, 1, 1, 1, generator=random)
    return colours + light + 0.3 * torch.randn(n, 3, 20, 20, generator=random)


def batches(count: int, seed: int, by: float = 0.0) -> list[Tensor]:
    return [images(32, 1000 * seed + i) - by for i in range(count)]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    widths = [3, 8, 16, 16]
    blocks = (
        nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        for a, b in itertools.pairwise(widths)
    )
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    bn.recalibrate(model, [images(256, seed) for seed in range(8)])
    return model.eval()


@pytest.fixture(scope="module")
def calibrated(net: nn.Module) -> ShiftMonitor:
    monitor = ShiftMonitor(net)
    monitor.calibrate(batches(16, 9))
    return monitor


def told(**changes: object) -> ShiftVerdict:
    """A verdict as it could be."""
    layers = tuple(
        LayerVerdict(f"stage{i}.bn", 64, i > 0, 9.0 * i - 1, "mean", (Channel(i, 0.4, 1.2, 12.0),) * i, 0.3, 0.1)
        for i in range(3)
    )
    verdict = ShiftVerdict(
        target="net.py:model", data="net.py:loader", command=COMMAND,
        source="checkpoint", calibrated=0, unit="example", alpha=0.01, examples=400, batches=4, left_out=0,
        observations=400, log_evidence=math.log(4567), trail=tuple((n, n / 50) for n in range(8, 401, 8)), rang=232,
        rise=0, first="stage1.bn", hint="", layers=layers, correlation=0.01, dependent=False, sight=0.2, seconds=1.5,
    )  # fmt: skip
    return replace(verdict, **changes)


# -- what is judged -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_clean_data_do_not_ring_and_others_do(calibrated: ShiftMonitor) -> None:
    clean, dark = judge(calibrated, batches(8, 1)), judge(calibrated, batches(8, 2, by=0.7))
    assert clean.rang is None
    assert clean.log_evidence < clean.log_limit
    assert dark.rang is not None
    assert dark.rang <= 48
    assert (dark.first, dark.hint) == ("0.1", "inputs")
    assert (clean.examples, clean.batches, clean.observations) == (256, 8, 256)


def test_a_change_on_the_way_is_dated_and_is_no_fault_of_the_unit(calibrated: ShiftMonitor) -> None:
    verdict = judge(calibrated, [*batches(8, 3), *batches(8, 4, by=1.0)])
    assert verdict.rang is not None
    assert verdict.rise is not None
    assert 240 <= verdict.rise <= 264
    assert verdict.rise < verdict.rang <= 288
    assert not verdict.dependent


def test_a_shift_that_went_away_is_told_with_the_table_of_its_alarm(net: nn.Module) -> None:
    data = [*batches(1, 5, by=2.0), *batches(40, 6)]
    verdict = judge(ShiftMonitor(net), data)
    assert verdict.rang is not None
    if verdict.trail[-1][1] < verdict.log_limit:  # gone at the end
        assert any(layer.log_evidence > 0 for layer in verdict.layers)


def test_the_evidence_is_that_of_a_live_monitor(net: nn.Module) -> None:
    monitor, data = ShiftMonitor(net, examples=None, budget=None), [images(8, seed) - 0.4 for seed in range(12)]
    with monitor, torch.no_grad():
        for batch in data:
            net(batch)
    verdict = judge(ShiftMonitor(net), data)
    assert verdict.trail[-1][1] == pytest.approx(monitor.log_evidence, rel=1e-12)
    assert verdict.rang == (monitor.alarm.examples if monitor.alarm else None)


def test_neighbours_that_are_alike_are_told(net: nn.Module) -> None:
    one_after_another = [
        images(1, seed).expand(32, -1, -1, -1) + 0.05 * torch.randn(32, 3, 20, 20) for seed in range(8)
    ]

    verdict = judge(ShiftMonitor(net), one_after_another, command=COMMAND)
    assert verdict.dependent
    assert "the promise about false alarms does not hold" in full(verdict).replace("\n" + " " * 17, " ")
    assert "--unit batch" in full(verdict)
    assert not judge(ShiftMonitor(net, unit="batch"), one_after_another).dependent


def test_model_monitor_and_random_state_are_as_they_were_and_the_verdict_is_the_same_again(net: nn.Module) -> None:
    monitor, random, before = ShiftMonitor(net), torch.get_rng_state(), fingerprint(net)
    first, second = (judge(monitor, batches(6, 7, by=0.5), pictures=3) for _ in range(2))
    assert replace(first, seconds=0, pictures=()) == replace(second, seconds=0, pictures=())
    assert [p.example for p in first.pictures] == [p.example for p in second.pictures]
    assert fingerprint(net) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert monitor.stream.evidence.observations == 0
    assert monitor.alarm is None
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())


def test_a_monitor_that_observes_is_not_asked_to_judge(net: nn.Module) -> None:
    monitor = ShiftMonitor(net)
    with monitor, pytest.raises(RuntimeError, match=r"not observing, got one that is. Call monitor.stop\(\) first"):
        judge(monitor, batches(1, 3))


def test_a_model_in_train_mode_is_judged_in_eval_mode_and_left_in_train_mode(net: nn.Module) -> None:
    expected = judge(ShiftMonitor(net), batches(2, 8))
    net.train()
    try:
        assert judge(ShiftMonitor(net), batches(2, 8)).trail == expected.trail
        assert all(module.training for module in net.modules())
    finally:
        net.eval()


def test_examples_that_are_not_finite_are_counted_apart(net: nn.Module) -> None:
    data = batches(2, 10)
    data[0][3:5] = torch.nan
    verdict = judge(ShiftMonitor(net), data)
    assert (verdict.left_out, verdict.observations, verdict.examples) == (2, 62, 64)
    assert "2 examples: they have NaN or infinite activations" in full(verdict)
    with pytest.raises(ValueError, match=r"shift needs one observation or more with finite activations, got none"):
        judge(ShiftMonitor(net), [images(8, 0) * torch.nan])


def test_a_unit_of_keys_gets_the_inputs_of_each_batch(net: nn.Module) -> None:
    verdict = judge(ShiftMonitor(net, unit=lambda x: [row // 4 for row in range(len(x))]), batches(2, 11))
    assert (verdict.unit, verdict.examples) == ("key", 64)
    assert verdict.observations == 15  # runs of four examples; the last run is still open


def test_a_layer_that_sees_parts_of_a_batch_is_refused() -> None:
    halves = Written(lambda net, x: net.bn(x[::2]), bn=nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"shift needs passes that reach every batch norm layer with each example"):
        judge(ShiftMonitor(halves), [torch.randn(8, 3)])


def test_the_least_move_that_could_be_seen_is_about_right() -> None:
    layer = nn.BatchNorm1d(40)
    bn.recalibrate(layer, [torch.randn(4096, 40, generator=torch.Generator().manual_seed(0))])
    monitor = ShiftMonitor(layer.eval())

    def moved(by: float) -> list[Tensor]:
        x = torch.randn(1024, 40, generator=torch.Generator().manual_seed(1))
        x[:, 7] += by
        return [x]

    sight = judge(monitor, moved(0)).sight
    assert judge(monitor, moved(1.4 * sight)).rang is not None
    assert judge(monitor, moved(0.7 * sight)).rang is None
    named = judge(monitor, moved(2 * sight)).layers[0].channels[0]
    assert named.index == 7
    assert named.moved == pytest.approx(2 * sight, abs=4 / 1024**0.5)
    assert judge(monitor, moved(0), max_examples=2).sight > 3


def test_pictures_are_of_the_examples_that_rang(calibrated: ShiftMonitor) -> None:
    data = torch.cat(batches(6, 11))
    odd = list(range(100, 112))
    data[odd] -= 3.0
    verdict = judge(calibrated, list(data.split(32)), pictures=12)
    assert {picture.example for picture in verdict.pictures} == set(odd)
    assert all(torch.equal(picture.pixels, data[picture.example]) for picture in verdict.pictures)
    assert judge(calibrated, batches(2, 1), pictures=3).pictures == ()
    with pytest.raises(ValueError, match=r"pictures need inputs \(N, C, H, W\) with C = 1 or 3, got \(8, 3\)"):
        judge(ShiftMonitor(nn.BatchNorm1d(3)), [torch.randn(8, 3)], pictures=1)


# -- what is said -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("evidence", "words"),
    [(0.2, "none"), (1.0, "none"), (1.4, "1 in 1"), (4567, "1 in 4,500"), (100, "1 in 100"), (99.99, "1 in 99"),
     (1e6, "1 in 1,000,000"), (9.99e6, "1 in 9,900,000"), (1e7 * 1.01, "1 in 10^7"), (3e86, "1 in 10^86")],
)  # fmt: skip
def test_evidence_is_said_as_odds_that_never_claim_more(evidence: float, words: str) -> None:
    assert odds(math.log(evidence)) == words


def test_a_shift_is_told_in_80_columns() -> None:
    text = full(told())
    assert "Shift found: these data are not distributed as the reference says" in text
    assert "1 in 4,500 against clean data; limit 1 in 100" in text
    assert "after 232 of 400 examples; the evidence rose from the start" in text
    assert "stage1.bn, layer 2 of 3; 2 moved beyond the limit by themselves" in text
    assert "whether accuracy fell" in text
    assert "next: batchnorm doctor net.py:model --data clean.py:loader" in text
    assert max(map(len, text.splitlines())) <= 80


def test_no_shift_found_is_not_said_to_be_no_shift() -> None:
    verdict = told(rang=None, rise=None, first=None, log_evidence=-1.0)
    for text in (full(verdict), concise(verdict), page(verdict)):
        assert "no shift found" in text.lower()
        assert not re.search(r"\bno shift\b(?! found)", text, re.IGNORECASE)
    assert "less than about 0.2 stored sd" in full(verdict).replace("\n    ", " ")
    assert "[· info]" in full(verdict)
    assert "too few observations" in " ".join(unseen(told(sight=math.inf)))


@pytest.mark.parametrize("changes", [
    {}, {"rang": None, "rise": None, "first": None}, {"first": None}, {"dependent": True}, {"left_out": 1},
    {"source": "calibrated", "calibrated": 800}, {"unit": "batch", "observations": 4}, {"hint": "inputs"},
    {"target": "a" * 200 + ":b"}, {"dependent": True, "unit": "batch"}, {"rise": 200},
])  # fmt: skip
def test_every_verdict_is_told_in_80_columns_but_for_commands(changes: dict) -> None:
    lines = full(told(**changes)).splitlines()
    assert max(len(line) for line in lines if not line.startswith("next: ")) <= 80
    assert all(len(text) > 3 for _, text in facts(told(**changes)))


def test_long_names_and_many_channels_are_cut_in_the_table() -> None:
    channels = tuple(Channel(100 + i, 0.1, 1.0, 9.0) for i in range(20))
    layer = LayerVerdict("features." * 20 + "bn", 512, True, 800.0, "channel energy", channels, 12.3, 45.6)
    lines = full(told(layers=(layer,), first=layer.name)).splitlines()
    (row,) = (line for line in lines if line.startswith("…"))
    assert len(row) <= 80
    assert "1 in 10^347" in row
    assert "100, 101, 1" in row


@pytest.mark.parametrize("kind", ["mean", "component means", "energy of components"])
def test_every_column_of_the_table_begins_below_its_title(kind: str) -> None:
    layers = tuple(replace(layer, kind=kind, log_evidence=9.0) for layer in told().layers)
    lines = full(told(layers=layers)).splitlines()
    (at,) = (i for i, line in enumerate(lines) if line.startswith("layer "))
    start = lines[at].index("channels moved")
    assert all(row[start - 1] == " " and row[start] != " " for row in lines[at + 1 : at + 3])


def test_hidden_characters_are_shown() -> None:
    hostile = "<b>\x1b[31m\n::error::\u202e\ud800|`&\x00\uffff"
    assert plain(hostile).isprintable()
    layers = tuple(replace(layer, name=hostile) for layer in told().layers)
    verdict = told(target=hostile, data=hostile, command=hostile, layers=layers, first=hostile)
    for text in (full(verdict), concise(verdict), page(verdict)):
        assert "\x1b" not in text
        assert "\x00" not in text
        assert "\n::error::" not in text
        text.encode()
    assert "<b>" not in page(verdict)


# -- the page -----------------------------------------------------------------------------------------------------


def test_a_page_of_a_large_model_is_small_and_loads_nothing(calibrated: ShiftMonitor) -> None:
    channels = tuple(Channel(i, 0.123 * i, 1.0 + i, 90.0 - i) for i in range(20))
    layers = tuple(
        LayerVerdict(f"layer{i}.block.bn2", 2048, True, 300.0, "mean", channels, 0.5, 0.2) for i in range(53)
    )
    trail = tuple((n, math.sin(n / 900)) for n in range(8, 100_008, 8))
    noise = judge(calibrated, batches(6, 2, by=0.7), pictures=12).pictures
    pictures = tuple(replace(picture, pixels=torch.rand(3, 224, 224)) for picture in noise)
    assert len(pictures) == 12
    large = {"layers": layers, "first": layers[0].name, "trail": trail, "examples": 100_000, "pictures": pictures}
    text = page(told(**large))
    assert len(text.encode()) < 300_000
    assert text.count("data:image/png") == 12
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text)
    assert "<script" not in text
    assert text == page(told(**large))


def test_a_page_does_not_say_to_make_itself() -> None:
    calibrated = told(source="calibrated", calibrated=256)
    assert "-o shift.html" in full(calibrated)
    assert "-o shift.html" not in page(calibrated)


def test_the_line_of_evidence_rises_from_none_also_where_the_first_round_is_far_above_the_frame() -> None:
    text = page(told(trail=((8, 1126.0), (16, 2300.0)), log_evidence=2300.0, rang=8))
    points = re.search(r'polyline points="([^"]+)"', text)
    assert points is not None
    (start, low), (first, high), *_ = (tuple(map(float, point.split(","))) for point in points[1].split())
    assert (start, first) == (0.0, 20.0)  # 8 of 400 examples, in thousandths
    assert high < 0 < low < 1000  # the line leaves the frame at the top


def test_the_first_layer_that_moved_is_open_and_others_are_closed() -> None:
    text = page(told())
    assert text.count('<details class="moves" open>') == 1
    assert text.count('<details class="moves">') == 1


@pytest.mark.slow
def test_the_page_is_readable_in_a_browser(tmp_path) -> None:
    sync_playwright = pytest.importorskip("playwright.sync_api").sync_playwright
    (tmp_path / "a.html").write_text(page(told(log_evidence=200.0, hint="inputs")))
    (tmp_path / "b.html").write_text(page(told(rang=None, rise=None, first=None, dependent=True)))
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    assert executable, "the page tests need Chromium: install the package 'chromium'"
    said: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        for name in ("a", "b"):
            for width in (1100, 390):
                view = browser.new_page(viewport={"width": width, "height": 800}, java_script_enabled=True)
                view.on("console", lambda message: said.append(message.text))
                view.goto((tmp_path / f"{name}.html").as_uri())
                assert view.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
                assert view.locator("svg.line polyline").bounding_box()["height"] > 20
                assert view.locator(".headline").is_visible()
        browser.close()
    assert said == []
