"""Claim "cats": a model that learned from black cats fails on coloured cats, and new statistics repair part of it."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable

import torch
from torch import Tensor

from batchnorm.experiment import paired_seeds
from batchnorm.experiment.claim import Numbers, Result, chart, claim
from batchnorm.experiment.judgement import Verdict
from batchnorm.experiment.run_settings import Progress, RunSettings
from batchnorm.lecture import data_sets
from batchnorm.lecture.claim_criteria import judge
from batchnorm.lecture.painted_cats import BRIGHTNESS, CONTRAST, LIGHT, NOISE, PAINTINGS, mosaic, paint
from batchnorm.lecture.tested_on_other_cats import (
    ALPHA,
    BATCH,
    COUNTED,
    LAYERS,
    LOOK,
    NUMBERS,
    PARTS,
    RATES,
    SHIFTS,
    STEPS,
    STREAM,
    STREAMED,
    Findings,
    measure,
    recovered,
)
from batchnorm.reporting.charts.chart_data import Chart, Role
from batchnorm.reporting.png import png

NAMES = {
    "black": "black cats, as learned",
    "coloured": "coloured cats",
    "contrast": f"contrast × {CONTRAST:g}, brightness + {BRIGHTNESS:g}",
    "noise": f"noise of sd {NOISE:g}",
    "inverted": "inverted",
    "mix": "black, 1 in 20 a cat",
}
# <name> of the criterion cats-repair-<name> -> the shift that it is about
REPAIRS = {"coloured": "coloured", "affine": "contrast", "noise": "noise", "inversion": "inverted"}
LEARNED = 0.85  # accuracy on black cats below which the failure on coloured cats is not judged
LEAST = 0.05  # loss of accuracy below which a repair is not judged


def run(settings: RunSettings, progress: Progress) -> Result:
    """Train both arms on black cats, then test them on every shift, with stored and with re-estimated statistics."""
    total, done = settings.seeds * 2 * len(RATES), 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress(done / total)

    findings = measure(settings, tick)
    verdicts = [_shift(findings), _robust(findings), *(_repair(findings, name) for name in REPAIRS), _mix(findings)]
    charts = [
        _picture(findings, settings.seed),
        _shifts(findings),
        _by_number(findings),
        _distances(findings),
        _alarm(findings),
    ]
    return Result(verdicts, charts, _numbers(findings))


def _numbers(findings: Findings) -> Numbers:
    numbers: Numbers = {
        "best learning rate, median, without batch norm": round(
            float(paired_seeds.median(findings["rate", "without"])), 4
        ),
        "best learning rate, median, with batch norm": round(float(paired_seeds.median(findings["rate", "with"])), 4),
        "test answers that less contrast changes after re-estimation, share": round(findings.mean("changed"), 5),
    }
    rang = findings["rang", "coloured"]
    numbers["coloured cats and dogs until the alarm, median"] = _pictures(rang)
    numbers["coloured cats and dogs until the alarm, most of any seed"] = _pictures(rang, of=torch.amax)
    numbers[f"black cats and dogs, {STREAM} a seed: seeds with an alarm"] = int(
        findings["rang", "black"].isfinite().sum()
    )
    numbers["coloured cats and dogs until an adapter uses new statistics, median"] = _pictures(
        findings["adapted", "coloured"]
    )
    for shift in STREAMED:
        numbers[f"accuracy on {shift} cats and dogs, deployed"] = round(findings.mean("with", shift), 4)
        numbers[f"accuracy on {shift} cats and dogs, after the guarded repair"] = round(
            findings.mean("guarded", shift), 4
        )
    return numbers


# -- verdicts -------------------------------------------------------------------------------------------------


def _shift(findings: Findings) -> Verdict:
    black, coloured = findings["with", "black"], findings["with", "coloured"]
    failed = f"only {black.mean():.1%} on black cats" if black.mean() < LEARNED else ""
    return judge(
        "cats-shift", (black - coloured).tolist(),
        "With batch norm the accuracy is {black:.1%} on black cats and {coloured:.1%} on coloured cats ({change}).",
        failed_guard=failed, black=black.mean(), coloured=coloured.mean(), change=_change(coloured - black),
    )  # fmt: skip


def _robust(findings: Findings) -> Verdict:
    return judge(
        "cats-robust", (findings["with", "coloured"] - findings["without", "coloured"]).tolist(),
        "Accuracy on coloured cats: {with_coloured:.1%} with and {without_coloured:.1%} without batch norm; on black "
        "cats: {with_black:.1%} with and {without_black:.1%} without batch norm.",
        {f"{arm}_{shift}": findings.mean(arm, shift) for arm in ("with", "without") for shift in ("coloured", "black")},
    )  # fmt: skip


def _repair(findings: Findings, name: str) -> Verdict:
    shift, key = REPAIRS[name], f"cats-repair-{name}"
    before, after = findings["with", shift], findings["again", shift]
    lost, words = _lost(findings, shift), "{pictures}: {before:.1%} with stored, {after:.1%} with new statistics"
    figures = {"pictures": NAMES[shift].capitalize(), "before": before.mean(), "after": after.mean()}
    if lost < LEAST:
        return judge(key, [], f"{words}.", figures, failed_guard=f"only {_points(lost)} lost")
    shares = recovered(findings["with", "black"], before, after)
    words += " ({won:.0%} of {lost} won back)."
    return judge(key, shares.tolist(), words, figures, won=shares.mean(), lost=_points(lost))


def _mix(findings: Findings) -> Verdict:
    before, after = findings["with", "mix"], findings["again", "mix"]
    return judge(
        "cats-repair-mix", (after - before).tolist(),
        "If 1 in 20 is a cat: {before:.1%} with stored, {after:.1%} with re-estimated statistics ({change}).",
        before=before.mean(), after=after.mean(), change=_change(after - before),
    )  # fmt: skip


def _lost(findings: Findings, shift: str) -> float:
    return findings.mean("with", "black") - findings.mean("with", shift)


def _points(share: float) -> str:
    return f"{100 * share:.1f} points"


def _change(values: Tensor) -> str:
    mean = float(values.mean())
    return f"{_points(abs(mean))} {'lost' if mean < 0 else 'won'}"


# -- charts ---------------------------------------------------------------------------------------------------

_LINES: dict[str, tuple[str, Role]] = {
    "without": ("without batch norm", "without"),
    "with": ("with batch norm", "with"),
    "again": ("with batch norm, re-estimated", "with"),
}
_SERIES: dict[str, Role] = dict(_LINES.values())
_ON_BLACK = "with batch norm on black cats"


def _interval(values: Tensor, name: str) -> dict[str, float]:
    """Mean over seeds as ``name``, and its 95% interval inside 0 to 1."""
    return {key: min(max(value, 0.0), 1.0) for key, value in paired_seeds.interval(values, 0.95, name).items()}


def _picture(findings: Findings, seed: int) -> Chart:
    silhouettes = data_sets.cats()
    shown = torch.cat([(silhouettes.y == c).nonzero().flatten()[:5] for c in (0, 1)])
    picture = mosaic([paint(name, silhouettes.x[shown], seed) for name in PAINTINGS], zoom=3)
    below = ", ".join(f"{findings.mean('with', name):.0%} ({NAMES[name]})" for name in PAINTINGS if name != "black")
    return chart(
        "lecture", "cats", "picture", [{"png": base64.b64encode(png(picture)).decode(), "width": picture.shape[2]}],
        black=findings.mean("with", "black"), below=below,
    )  # fmt: skip


def _shifts(findings: Findings) -> Chart:
    rows = [
        {"label": NAMES[shift], **_interval(findings[arm, shift], "value"), "series": series}
        for shift in SHIFTS
        for arm, (series, _) in _LINES.items()
    ]
    shares = [
        f"{recovered(findings['with', 'black'], findings['with', shift], findings['again', shift]).mean():.0%} ({name})"
        for name, shift in REPAIRS.items()
        if _lost(findings, shift) >= LEAST
    ]
    won = f"wins back {', '.join(shares)} of the lost accuracy" if shares else "finds no lost accuracy to win back"
    return chart(
        "lecture", "cats", "shifts", rows, _SERIES, won=won,
        change=_change(findings["again", "mix"] - findings["with", "mix"]),
    )  # fmt: skip


def _by_number(findings: Findings) -> Chart:
    again = _LINES["again"][0]
    rows = []
    for shift in COUNTED:
        panel = {"panel": NAMES[shift]}
        rows += [
            {"x": number, **_interval(findings["again", shift, number], "y"), "series": again, **panel}
            for number in NUMBERS
        ]
        levels = {_LINES[arm][0]: findings.mean(arm, shift) for arm in ("without", "with")}
        levels[_ON_BLACK] = findings.mean("with", "black")
        rows += [
            {"x": number, "y": round(level, 4), "series": series, **panel}
            for series, level in levels.items()
            for number in NUMBERS
        ]
    reached = ", ".join(f"{findings.mean('again', 'coloured', number):.0%} with {number}" for number in NUMBERS)
    return chart(
        "lecture", "cats", "by-number", rows, {**_SERIES, _ON_BLACK: "neutral"},
        dashed=(*(_LINES[arm][0] for arm in ("without", "with")), _ON_BLACK),
        coloured=findings.mean("with", "coloured"), reached=reached,
    )  # fmt: skip


def _distances(findings: Findings) -> Chart:
    rows = [
        {
            "label": NAMES[shift],
            "value": paired_seeds.figures(findings.mean("moved", shift, layer), 3),
            "series": f"layer {layer}",
        }
        for shift in SHIFTS
        for layer in LAYERS
    ]
    (contrast, far), (coloured, deep) = (
        [findings.mean("moved", shift, layer) for layer in (LAYERS[0], LAYERS[-1])] for shift in COUNTED[::-1]
    )
    return chart(
        "lecture", "cats", "distances", rows, {f"layer {layer}": "with" for layer in LAYERS}, contrast=contrast,
        far=far, coloured=coloured, deep=deep,
    )  # fmt: skip


def _alarm(findings: Findings) -> Chart:
    looks = range(LOOK, STREAM + 1, LOOK)
    names = {"black": "black, as learned", "coloured": "coloured"}
    rows = [
        row
        for shift in STREAMED
        for row in paired_seeds.curve(
            looks, torch.stack([findings["evidence", shift, n] for n in looks]), series=names[shift]
        )
    ]
    limit = f"alarm: {1 / ALPHA:.0f} to 1"
    rows += [{"x": n, "y": -math.log10(ALPHA), "series": limit} for n in (looks[0], looks[-1])]
    rang, false = findings["rang", "coloured"], findings["rang", "black"]
    number = _pictures(rang)
    seldom = "in fewer than half of the seeds" if rang.isfinite().any() else "in no seed"
    heard = seldom if number is None else f"after {number} coloured pictures"
    return chart(
        "lecture", "cats", "alarm", rows, {names["black"]: "neutral", names["coloured"]: "with", limit: "neutral"},
        dashed=(limit,), heard=heard, alarms=int(rang.isfinite().sum()), seeds=len(false),
        false_alarms=int(false.isfinite().sum()), repaired=_repaired(findings),
    )  # fmt: skip


def _repaired(findings: Findings) -> str:
    """What the guarded adapter did after the alarm, in words."""
    began = int(findings["adapted", "coloured"].isfinite().sum())
    answers = (
        f"{findings.mean('guarded', 'coloured'):.0%} of coloured pictures right, not "
        f"{findings.mean('with', 'coloured'):.0%}"
    )
    return f"a guarded repair then gets {answers} (it began in {began} of {len(findings['adapted', 'coloured'])} seeds)"


def _pictures(rang: Tensor, of: Callable[[Tensor], Tensor] = paired_seeds.median) -> int | None:
    """A number of pictures over seeds, by default the median, rounded down; None if it is infinite."""
    number = float(of(rang))
    return int(number) if math.isfinite(number) else None


CLAIM = claim(
    "lecture", "cats", run, light=LIGHT, contrast=CONTRAST, brightness=BRIGHTNESS, noise=NOISE, steps=STEPS,
    learned=PARTS["train"], batch=BATCH, rates=", ".join(map(str, RATES)), validation=PARTS["validation"],
    adaptation=PARTS["adaptation"],
)  # fmt: skip
