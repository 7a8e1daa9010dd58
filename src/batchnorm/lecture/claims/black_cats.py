"""Claim "cats": a model that learned from black cats fails on coloured ones; and what new statistics repair."""

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
# What a criterion asks about: cats-repair-<name>
REPAIRS = {"coloured": "coloured", "affine": "contrast", "noise": "noise", "inversion": "inverted"}
LEARNED = 0.85
LEAST = 0.05  # of accuracy lost; below, there is nothing to win back


def run(settings: RunSettings, progress: Progress) -> Result:
    """Train both arms on black cats, then test them on every shift, as they stand and re-estimated."""
    total, done = settings.seeds * 2 * len(RATES), 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress(done / total)

    found = measure(settings, tick)
    verdicts = [_shift(found), _robust(found), *(_repair(found, name) for name in REPAIRS), _mix(found)]
    numbers: Numbers = {
        "best learning rate, median, without batch norm": round(
            float(paired_seeds.median(found["rate", "without"])), 4
        ),
        "best learning rate, median, with batch norm": round(float(paired_seeds.median(found["rate", "with"])), 4),
        "test answers that less contrast changes after re-estimation, share": round(found.mean("changed"), 5),
    }
    rang = found["rang", "coloured"]
    numbers["coloured cats and dogs until the alarm, median"] = _pictures(rang)
    numbers["coloured cats and dogs until the alarm, most of any seed"] = _pictures(rang, of=torch.amax)
    numbers[f"black cats and dogs, {STREAM} a seed: seeds with an alarm"] = int(found["rang", "black"].isfinite().sum())
    numbers["coloured cats and dogs until an adapter uses new statistics, median"] = _pictures(
        found["adapted", "coloured"]
    )
    for shift in STREAMED:
        numbers[f"accuracy on {shift} cats and dogs, deployed"] = round(found.mean("with", shift), 4)
        numbers[f"accuracy on {shift} cats and dogs, after the guarded repair"] = round(found.mean("guarded", shift), 4)
    charts = [_picture(found, settings.seed), _shifts(found), _by_number(found), _distances(found), _alarm(found)]
    return Result(verdicts, charts, numbers)


# -- verdicts -------------------------------------------------------------------------------------------------


def _shift(found: Findings) -> Verdict:
    black, coloured = found["with", "black"], found["with", "coloured"]
    failed = f"only {black.mean():.1%} on black" if black.mean() < LEARNED else ""
    return judge(
        "cats-shift", (black - coloured).tolist(),
        "With batch norm {black:.1%} on black cats and {coloured:.1%} on coloured ones ({change}).",
        failed_guard=failed, black=black.mean(), coloured=coloured.mean(), change=_change(coloured - black),
    )  # fmt: skip


def _robust(found: Findings) -> Verdict:
    return judge(
        "cats-robust", (found["with", "coloured"] - found["without", "coloured"]).tolist(),
        "{with_coloured:.1%} with and {without_coloured:.1%} without batch norm on coloured; {with_black:.1%} with and "
        "{without_black:.1%} without batch norm on black.",
        {f"{arm}_{shift}": found.mean(arm, shift) for arm in ("with", "without") for shift in ("coloured", "black")},
    )  # fmt: skip


def _repair(found: Findings, name: str) -> Verdict:
    shift, key = REPAIRS[name], f"cats-repair-{name}"
    before, after = found["with", shift], found["again", shift]
    lost, words = _lost(found, shift), "{pictures}: {before:.1%} as it stands, {after:.1%} re-estimated"
    figures = {"pictures": NAMES[shift].capitalize(), "before": before.mean(), "after": after.mean()}
    if lost < LEAST:
        return judge(key, [], f"{words}.", figures, failed_guard=f"only {_points(lost)} lost")
    shares = recovered(found["with", "black"], before, after)
    words += " ({won:.0%} of {lost} won back)."
    return judge(key, shares.tolist(), words, figures, won=shares.mean(), lost=_points(lost))


def _mix(found: Findings) -> Verdict:
    before, after = found["with", "mix"], found["again", "mix"]
    return judge(
        "cats-repair-mix", (after - before).tolist(),
        "Where 1 in 20 is a cat: {before:.1%} as it stands, {after:.1%} re-estimated ({change}).",
        before=before.mean(), after=after.mean(), change=_change(after - before),
    )  # fmt: skip


def _lost(found: Findings, shift: str) -> float:
    return found.mean("with", "black") - found.mean("with", shift)


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


def _picture(found: Findings, seed: int) -> Chart:
    silhouettes = data_sets.cats()
    shown = torch.cat([(silhouettes.y == c).nonzero().flatten()[:5] for c in (0, 1)])
    picture = mosaic([paint(name, silhouettes.x[shown], seed) for name in PAINTINGS], zoom=3)
    below = ", ".join(f"{found.mean('with', name):.0%} ({NAMES[name]})" for name in PAINTINGS if name != "black")
    return chart(
        "lecture", "cats", "picture", [{"png": base64.b64encode(png(picture)).decode(), "width": picture.shape[2]}],
        black=found.mean("with", "black"), below=below,
    )  # fmt: skip


def _shifts(found: Findings) -> Chart:
    rows = [
        {"label": NAMES[shift], **_interval(found[arm, shift], "value"), "series": series}
        for shift in SHIFTS
        for arm, (series, _) in _LINES.items()
    ]
    shares = [
        f"{recovered(found['with', 'black'], found['with', shift], found['again', shift]).mean():.0%} ({name})"
        for name, shift in REPAIRS.items()
        if _lost(found, shift) >= LEAST
    ]
    won = f"wins back {', '.join(shares)} of the lost accuracy" if shares else "finds no lost accuracy to win back"
    return chart(
        "lecture", "cats", "shifts", rows, _SERIES, won=won,
        change=_change(found["again", "mix"] - found["with", "mix"]),
    )  # fmt: skip


def _by_number(found: Findings) -> Chart:
    again = _LINES["again"][0]
    rows = []
    for shift in COUNTED:
        panel = {"panel": NAMES[shift]}
        rows += [
            {"x": number, **_interval(found["again", shift, number], "y"), "series": again, **panel}
            for number in NUMBERS
        ]
        levels = {_LINES[arm][0]: found.mean(arm, shift) for arm in ("without", "with")}
        levels[_ON_BLACK] = found.mean("with", "black")
        rows += [
            {"x": number, "y": round(level, 4), "series": series, **panel}
            for series, level in levels.items()
            for number in NUMBERS
        ]
    reached = ", ".join(f"{found.mean('again', 'coloured', number):.0%} with {number}" for number in NUMBERS)
    return chart(
        "lecture", "cats", "by-number", rows, {**_SERIES, _ON_BLACK: "neutral"},
        dashed=(*(_LINES[arm][0] for arm in ("without", "with")), _ON_BLACK), coloured=found.mean("with", "coloured"),
        reached=reached,
    )  # fmt: skip


def _distances(found: Findings) -> Chart:
    rows = [
        {
            "label": NAMES[shift],
            "value": paired_seeds.figures(found.mean("moved", shift, layer), 3),
            "series": f"layer {layer}",
        }
        for shift in SHIFTS
        for layer in LAYERS
    ]
    (contrast, far), (coloured, deep) = (
        [found.mean("moved", shift, layer) for layer in (LAYERS[0], LAYERS[-1])] for shift in COUNTED[::-1]
    )
    return chart(
        "lecture", "cats", "distances", rows, {f"layer {layer}": "with" for layer in LAYERS}, contrast=contrast,
        far=far, coloured=coloured, deep=deep,
    )  # fmt: skip


def _alarm(found: Findings) -> Chart:
    looks = range(LOOK, STREAM + 1, LOOK)
    names = {"black": "black, as learned", "coloured": "coloured"}
    rows = [
        row
        for shift in STREAMED
        for row in paired_seeds.curve(
            looks, torch.stack([found["evidence", shift, n] for n in looks]), series=names[shift]
        )
    ]
    limit = f"alarm: {1 / ALPHA:.0f} to 1"
    rows += [{"x": n, "y": -math.log10(ALPHA), "series": limit} for n in (looks[0], looks[-1])]
    rang, false = found["rang", "coloured"], found["rang", "black"]
    heard = f"after {_pictures(rang)} coloured pictures" if rang.isfinite().any() else "in no seed"
    return chart(
        "lecture", "cats", "alarm", rows, {names["black"]: "neutral", names["coloured"]: "with", limit: "neutral"},
        dashed=(limit,), heard=heard, alarms=int(rang.isfinite().sum()), seeds=len(false),
        false_alarms=int(false.isfinite().sum()), repaired=_repaired(found),
    )  # fmt: skip


def _repaired(found: Findings) -> str:
    """What a guarded adapter did after the alarm."""
    began = int(found["adapted", "coloured"].isfinite().sum())
    answers = f"{found.mean('guarded', 'coloured'):.0%} of coloured ones right for {found.mean('with', 'coloured'):.0%}"
    return f"a guarded repair then answers {answers} (it began in {began} of {len(found['adapted', 'coloured'])} seeds)"


def _pictures(rang: Tensor, of: Callable[[Tensor], Tensor] = torch.median) -> int | None:
    """So many pictures; None for a monitor that stayed silent."""
    number = float(of(rang))
    return int(number) if math.isfinite(number) else None


CLAIM = claim(
    "lecture", "cats", run, light=LIGHT, contrast=CONTRAST, brightness=BRIGHTNESS, noise=NOISE, steps=STEPS,
    learned=PARTS["train"], batch=BATCH, rates=", ".join(map(str, RATES)), validation=PARTS["validation"],
    adaptation=PARTS["adaptation"],
)  # fmt: skip
