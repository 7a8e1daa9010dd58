"""Verdicts as a full run gives them, but made up: every status, kind of chart and layout that a page must carry."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from functools import cache

import numpy as np

from batchnorm.experiment.claim import Claim, Result
from batchnorm.experiment.outcomes import ClaimOutcome
from batchnorm.experiment.run_settings import RunSettings
from batchnorm.lecture import NAMES
from batchnorm.lecture.claim_criteria import CRITERIA, judge
from batchnorm.lecture.verdicts import LectureVerdicts
from batchnorm.reporting.charts.chart_data import Axis, Chart

PAIR = {"without batch norm": "without", "with batch norm": "with"}

# Mean effect and a sentence for each criterion; the rest of its seeds scatters by a tenth around the mean.
EFFECTS = {
    "scale-wine": (1.62, "24 steps instead of 1,010 to the target loss (42× fewer)"),
    "scale-cancer": (0.94, "31 steps instead of 268 to the target loss (8.7× fewer)"),
    "scale-digits": (0.08, "118 steps instead of 142 to the target loss (1.2× fewer)"),
    "hidden-speed-relu": (2.0, "20 steps instead of 80 to 95% training accuracy (4.0× fewer)"),
    "hidden-speed-sigmoid": (3.3, "40 steps; without batch norm 95% was not reached in 400 steps"),
    "hidden-rate-relu": (3.3, "largest usable learning rate 3 instead of 0.3 (10× larger)"),
    "hidden-rate-sigmoid": (0.4, "no learning rate is usable without batch norm"),
    "layer3-wide": (4.2, "drift 0.011 instead of 0.198 SD per 10 steps (18× less)"),
    "layer3-four": (0.7, "drift 0.14 instead of 0.23 SD per 10 steps (1.6× less)"),
    "layer3-governed": (0.11, "median distance from (beta, |gamma|) is 0.11 |gamma|"),
    "cause-drift": (-0.02, "with the shift brought back 20 steps instead of 20: no speed-up is lost"),
    "cats-shift": (0.31, "accuracy falls from 94% on black to 63% on coloured cats"),
    "cats-robust": (-0.12, "63% on coloured cats instead of 75% without batch norm (12 points lower)"),
    "cats-repair-coloured": (0.74, "88% after re-estimation: 0.74 of the lost accuracy is won back"),
    "cats-repair-affine": (0.97, "93% after re-estimation: 0.97 of the lost accuracy is won back"),
    "cats-repair-noise": (0.2, "0.20 of the lost accuracy is won back"),
    "cats-repair-inversion": (0.04, "0.04 of the lost accuracy is won back"),
    "cats-repair-mix": (-0.31, "accuracy falls from 94% to 63% by re-estimating (31 points lower)"),
    "noise-slope": (-1.0, "noise power falls with slope -1.00 from M = 2 to 512"),
    "noise-regularizes": (0.018, "test loss 0.018 nats lower with groups of 16 than with 512"),
    "test-time-small": (0.557, "97% with population statistics instead of 41% with batches of 2"),
    "test-time-medium": (0.133, "97% with population statistics instead of 84% with batches of 8"),
    "test-time-alone": (2e-6, "largest difference of a logit 2.0e-6 of the logits' standard deviation"),
    "smooth-equal": (2.0, "beta-hat 4.5 instead of 18.3 at rate 0.1 (4.0× smaller)"),
    "smooth-variation": (4.1, "loss range 0.096 instead of 1.62 (17× smaller)"),
    "smooth-predictive": (4.1, "largest gradient distance 0.61 instead of 10.8 (18× smaller)"),
    "smooth-best": (0.1, "rate times beta-hat 1.91 instead of 2.07 at each arm's best rate"),
}
FAILED_GUARDS = {"hidden-rate-sigmoid": "without batch norm the arm ends at 10 % training accuracy, chance level"}

TITLES = {
    "scale": "The scale of the input features",
    "hidden": "Normalizing hidden units speeds up learning",
    "layer3": "What the third layer receives",
    "cause": "Is the reduced shift the cause?",
    "cats": "Black cats and coloured cats",
    "noise": "The noise of a mini-batch",
    "test-time": "One example at a time",
    "smooth": "A smoother loss",
}
SENTENCES = {
    "scale": "Features of very different range make the loss a long narrow valley; brought to one range, gradient "
    "descent can take larger steps and arrives sooner.",
    "hidden": "What helps the inputs helps every layer: normalize the values of the hidden units, and the weights "
    "that follow learn faster, over a wider range of learning rates.",
}


@cache
def sample(*, seeds: int = 5, effort: float = 1.0) -> LectureVerdicts:
    """All eight claims, with 20 charts."""
    outcomes = [ClaimOutcome(_claim(name), _result(name, seeds), 3.0 + 7 * n) for n, name in enumerate(NAMES)]
    return LectureVerdicts(RunSettings(0, seeds, effort), outcomes, "batchnorm why --seed 0 --seeds 5")


def only(name: str, *charts: Chart) -> LectureVerdicts:
    """One claim, with the given charts."""
    result = _result(name, 5)
    outcome = ClaimOutcome(_claim(name), Result(result.verdicts, charts, result.numbers), 1.0)
    return LectureVerdicts(RunSettings(), [outcome], f"batchnorm why --claim {name}")


def _claim(name: str) -> Claim:
    return Claim(
        name=name,
        title=TITLES[name],
        sentence=SENTENCES.get(name, "Batch norm keeps what a layer receives in one place while others learn."),
        arms="Five layers W1 to W5 of 64 units each, on 1,200 of the digits images, batch 64, plain gradient "
        "descent for 400 steps. Both arms start from the same weights, see the same batches, and take the best "
        "of seven learning rates from 0.003 to 3.",
        how_to_read="A line is the mean over seeds, its band the interval of the mean. Lower and further left "
        "is faster.",
        not_shown="Small networks on small images; what holds here need not hold for large ones.",
        sources=("Ioffe and Szegedy 2015, Batch Normalization", "Santurkar et al. 2018, section 3"),
        run=lambda settings, progress: _result(name, settings.seeds),
    )


def _result(name: str, seeds: int) -> Result:
    scatter = np.random.default_rng(len(name)).standard_normal(seeds)
    verdicts = []
    for key in CRITERIA:
        if key.rpartition(f"{name}-")[0] == "" and key.startswith(f"{name}-"):
            mean, sentence = EFFECTS[key]
            values = (mean * (1 + 0.05 * scatter)).tolist()
            verdicts.append(judge(key, values, sentence, failed_guard=FAILED_GUARDS.get(key, "")))
    numbers = {"parameters": 21_770, "test accuracy without, %": 93.25, "smallest rate": 3e-5, "steps": None}
    numbers |= {"a batch of one": "refused: a variance needs more than one value for each channel, got (1, 64)"}
    if name == "noise":
        numbers |= {f"batches of {2**n}, dropout with the same noise power, %": 0.5**n for n in range(1, 20)}
    return Result(verdicts, CHARTS[name](), numbers)


# -- charts ---------------------------------------------------------------------------------------------------


def learning(title: str = "With batch norm 95% is reached in 20 steps instead of 80", row: str = "") -> Chart:
    """Accuracy over 100 steps, as two lines with bands."""
    rows = [
        {"x": step, "y": y, "low": max(0, y - 0.04), "high": min(1, y + 0.04), "series": name, "panel": panel}
        for panel, slow in (("ReLU", 1), ("sigmoid", 3))
        for name, rate in (("without batch norm", 60 * slow), ("with batch norm", 15))
        for step in range(0, 400, 4)
        for y in [round(0.1 + 0.88 * (1 - math.exp(-step / rate)), 4)]
    ]
    alt = "Two panels of training accuracy over steps; the blue line rises at once, the orange one slowly."
    y = Axis("training accuracy", percent=True)
    return Chart("lines", title, alt, rows, Axis("step"), y, PAIR)


def usable_rates() -> Chart:
    """Final accuracy over learning rate, with values that diverged left out, one inside a series."""
    rates = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    rows = [
        {"x": rate, "y": y, "low": y - 0.02, "high": y + 0.02, "series": name}
        for name, values in (
            ("without batch norm", (0.6, 0.85, None, 0.93, 0.9, None, None)),
            ("with batch norm", (0.7, 0.9, 0.95, 0.96, 0.97, 0.97, 0.94)),
        )
        for rate, y in zip(rates, values, strict=True)
        if y is not None
    ]
    title = "Learning rates up to 3 are usable with batch norm, up to 0.3 without"
    alt = "Final accuracy over learning rate; the orange line ends at 0.3, the blue one goes on to 3."
    y = Axis("final training accuracy", percent=True)
    return Chart("lines", title, alt, rows, Axis("learning rate", log=True), y, PAIR)


def noise_power() -> Chart:
    """Measured points with error bars on two logarithmic axes, and a dashed line of theory."""
    sizes = (2, 4, 8, 16, 32, 64, 128, 256, 512)
    measured = [{"x": m, "y": 1.04 / m, "low": 0.9 / m, "high": 1.2 / m, "series": "mean, measured"} for m in sizes]
    spread = [{"x": m, "y": 0.55 / m, "low": 0.5 / m, "high": 0.6 / m, "series": "SD, measured"} for m in sizes]
    theory = [{"x": m, "y": 1 / m, "series": "1 / M"} for m in (2, 512)]
    title = "The noise of a mini-batch's mean falls as one over its size: slope -1.00 from 2 to 512"
    alt = "Blue points on a straight falling line of slope minus one, on two logarithmic axes."
    series = {"mean, measured": "with", "SD, measured": "with", "1 / M": "neutral"}
    axes = Axis("batch size M", log=True), Axis("noise power, in variances", log=True)
    return Chart("points", title, alt, [*measured, *spread, *theory], *axes, series, ("1 / M",))


def accuracies() -> Chart:
    """Categories with long names, two series, intervals."""
    labels = ("black", "coloured", "coloured, after re-estimating statistics", "inverted", "another mix")
    values = {"without batch norm": (0.93, 0.75, 0.75, 0.4, 0.93), "with batch norm": (0.94, 0.63, 0.88, 0.3, 0.63)}
    rows = [
        {"label": label, "value": value, "low": value - 0.03, "high": value + 0.02, "series": name}
        for name, several in values.items()
        for label, value in zip(labels, several, strict=True)
    ]
    title = "Re-estimated statistics win back 25 of 31 points on coloured cats, and lose 31 where classes shift"
    alt = "Accuracy for five kinds of images; blue falls below orange on coloured cats and rises above it after."
    return Chart("dots", title, alt, rows, Axis("accuracy", percent=True), None, PAIR)


def one_series() -> Chart:
    """Categories with one series and a linear axis."""
    rows = [
        {"label": f"layer {n}", "value": 0.1 * n, "low": 0.1 * n - 0.05, "high": 0.1 * n + 0.05, "series": "distance"}
        for n in range(1, 6)
    ]
    alt = "Five points that move to the right from layer 1 to layer 5."
    title = "Stored statistics are furthest from coloured cats in the last layer: 0.5 SD"
    return Chart("dots", title, alt, rows, Axis("distance, SD"), None, {"distance": "neutral"})


def four_units() -> Chart:
    """Ribbons of four units in columns, without and with batch norm in rows."""
    rows = []
    for row, name, drift in (("without", "without batch norm", 2.2), ("with", "with batch norm", 0.15)):
        for unit in range(1, 5):
            for step in range(0, 300, 3):
                middle = drift * (1 - math.exp(-step / 80)) * (-1) ** unit + 0.1 * math.sin(step / (5 + unit))
                spread = 0.4 + 0.6 * drift * step / 300
                quantiles = zip((2, 16, 50, 84, 98), (-2, -1, 0, 1, 2), strict=True)
                values = {f"p{p}": round(middle + z * spread, 3) for p, z in quantiles}
                rows.append(
                    {"x": step, **values, "series": name, "panel": f"unit a[2]{unit}", "row": f"{row} batch norm"}
                )
    title = "The four units that feed layer 3 wander by 2.2 SD without batch norm and stay in place with it"
    alt = "Eight panels on one scale: the four orange ribbons drift apart and widen, the four blue ones stay level."
    return Chart("ribbons", title, alt, rows, Axis("step"), Axis("value of the unit"), PAIR)


def drift() -> Chart:
    """Lines with dashed noise floors, three panels, a logarithmic vertical axis."""
    series = {**PAIR, "noise floor without": "without", "noise floor with": "with"}
    floors = ("noise floor without", "noise floor with")
    rows = [
        {"x": x, "y": scale * math.exp(-x / 200), "series": name, "panel": panel}
        for panel, times in (("ReLU", 1), ("sigmoid", 0.6), ("tanh", 0.4))
        for name, scale in zip(series, (0.2 * times, 0.011, 0.002, 0.001), strict=True)
        for x in range(0, 400, 10)
    ]
    axes = Axis("step"), Axis("drift of a[2], SD per 10 steps", log=True)
    title = "Layer 3 sees 18 times less drift with batch norm: 0.011 instead of 0.198 SD per 10 steps"
    alt = "Three panels; the orange line lies about a decade above the blue one, both above their dashed floors."
    return Chart("lines", title, alt, rows, *axes, series, floors)


def groups() -> Chart:
    """Several series of one role, and an axis with a domain that cuts off what lies outside."""
    series = {f"groups of {m}": "with" for m in (4, 16, 64, 512)} | {"no batch norm": "without"}
    rows = [
        {"x": x, "y": 0.2 + 0.01 * n + 2 * math.exp(-x / (40 + 10 * n)), "series": name}
        for n, name in enumerate(series)
        for x in range(0, 500, 10)
    ]
    title = "Test loss is lowest with groups of 16: 0.018 nats below groups of 512"
    alt = "Five falling lines; the one for groups of 16 ends lowest."
    return Chart("lines", title, alt, rows, Axis("step"), Axis("test loss, nats", domain=(0, 1)), series)


def picture() -> Chart:
    """A picture of 240 x 80 pixels: stripes."""
    rows = [{"png": base64.b64encode(_png(240, 80)).decode(), "width": 480}]
    return Chart("picture", "Training saw black cats only; the test has coloured ones", "Two rows of cats.", rows)


def _png(width: int, height: int) -> bytes:
    line = bytes(c for x in range(width) for c in ((40, 40, 40) if x // 20 % 2 else (200, 150, 90)))
    body = zlib.compress(b"".join(b"\0" + line for _ in range(height)))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    parts = [struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


CHARTS = {
    "scale": lambda: [learning("Normalized wine reaches the target in 24 steps instead of 1,010"), usable_rates()],
    "hidden": lambda: [learning(), usable_rates(), groups()],
    "layer3": lambda: [four_units(), drift(), learning("z~ lands on beta and gamma")],
    "cause": lambda: [learning("Noise that brings the shift back leaves the speed: 20 steps either way"), drift()],
    "cats": lambda: [picture(), accuracies(), one_series()],
    "noise": lambda: [noise_power(), groups()],
    "test-time": lambda: [accuracies(), noise_power()],
    "smooth": lambda: [drift(), usable_rates(), noise_power()],
}
