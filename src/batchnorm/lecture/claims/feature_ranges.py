"""Claim "scale": normalizing input features that differ in range makes the loss rounder and learning faster.

The experiment is softmax regression by full-batch gradient descent. With x~ = (x, 1), the Hessian of its loss is
bounded by E[x~ x~^T]. So the condition number of this matrix shows how long and narrow the bowl is that the lecture
draws (LeCun et al. 1998, section 5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from sklearn import datasets
from torch import Tensor

from batchnorm.experiment import paired_seeds
from batchnorm.experiment.claim import Numbers, Result, chart, claim
from batchnorm.experiment.judgement import Verdict
from batchnorm.experiment.paired_seeds import Arrival, first_step
from batchnorm.experiment.run_settings import Progress, RunSettings
from batchnorm.inputs import InputNorm
from batchnorm.instruments.condition_number import condition_number, with_bias
from batchnorm.lecture import data_sets
from batchnorm.lecture.claim_criteria import judge
from batchnorm.reporting.charts.chart_data import Axis, Chart, Role

# In half decades. After a first run the grid was widened until no best rate was at its end, for arms that arrive.
RATES = tuple(10 ** (k / 2) for k in range(-16, 7))
# At 0.1 nats the true class has a probability of 0.9 (geometric mean over examples), whatever the number of classes.
TARGET = 0.1
FLOOR = 1e-3  # the smallest loss in charts; smaller losses are drawn there
RAW, CENTRED, NORMALIZED = "as recorded", "only centred", "normalized"
_SERIES: dict[str, Role] = {RAW: "without", CENTRED: "neutral", NORMALIZED: "with"}


@dataclass(frozen=True, slots=True)
class Table:
    """One table of the claim.

    Args:
        title: Name of the table in sentences.
        train: Number of training examples.
        steps: Number of training steps.
        divisor: Features are divided by this number.
    """

    title: str
    train: int
    steps: int
    divisor: float = 1.0


# Four fifths of wine and breast cancer; only 500 digits, since all digits would take most of the claim's time.
TABLES = {
    "wine": Table("wine", 142, 1000),
    "cancer": Table("breast cancer", 455, 1000),
    "digits": Table("digits", 500, 150, divisor=16.0),
}


@dataclass(frozen=True, slots=True, eq=False)
class Descent:
    """Learning curves of one arm.

    Args:
        losses: Training loss before every step and after the last, nats, (steps + 1, seeds, rates).
    """

    losses: Tensor

    @property
    def cap(self) -> int:
        """Number of training steps."""
        return len(self.losses) - 1

    def steps_to_target(self) -> Tensor:
        """First step with a loss of TARGET or less, (seeds, rates); infinity if there is no such step."""
        return first_step(self.losses <= TARGET, torch.arange(len(self.losses)))

    def best_rate(self) -> int:
        """Index of the rate with the fewest median steps to the target; if all are infinite, the lowest last loss."""
        median = paired_seeds.median(self.steps_to_target(), 0)
        last = paired_seeds.median(self.losses[-1].nan_to_num(torch.inf), 0)
        return int(median.argmin() if median.isfinite().any() else last.argmin())

    def best(self) -> Arrival:
        """Steps to the target at the best rate."""
        return Arrival(self.steps_to_target()[:, self.best_rate()], self.cap)


def descend(x: Tensor, y: Tensor, steps: int) -> Descent:
    """Softmax regression from zero weights by gradient descent, for all seeds and rates at once.

    Args:
        x: Inputs for each seed, (seeds, N, features).
        y: Classes for each seed, (seeds, N).
        steps: Number of full-batch steps.
    """
    classes, rates = int(y.max()) + 1, len(RATES)
    x = with_bias(x)
    true = y[:, :, None, None].expand(-1, -1, 1, rates)
    weights = torch.zeros(len(x), x.shape[2], classes * rates)
    scale = (torch.tensor(RATES) / x.shape[1]).repeat(classes)
    losses = []
    for step in range(steps + 1):
        logits = (x @ weights).unflatten(2, (classes, rates))  # (seeds, N, classes, rates)
        log_p = logits.log_softmax(2)
        losses.append(-log_p.gather(2, true).mean((1, 2)))
        if step < steps:
            error = log_p.exp_().scatter_add_(2, true, -torch.ones(true.shape))
            weights -= x.mT @ error.flatten(2) * scale
    return Descent(torch.stack(losses))


def arms(name: str, settings: RunSettings) -> tuple[dict[str, Tensor], Tensor]:
    """For the training split of every seed: inputs of each arm, (seeds, N, features), and classes, (seeds, N)."""
    table, examples = TABLES[name], data_sets.table(name)
    picked = examples[torch.stack([data_sets.split(len(examples), table.train, s)[0] for s in settings.all_seeds])]
    raw = picked.x / table.divisor
    normalized = torch.stack([InputNorm.fit(x)(x) for x in raw])
    return {RAW: raw, CENTRED: raw - raw.mean(1, keepdim=True), NORMALIZED: normalized}, picked.y


def run(settings: RunSettings, progress: Progress) -> Result:
    """Train on every table, with features in every form, at every rate of one grid."""
    curves: dict[str, dict[str, Descent]] = {}
    numbers: Numbers = {}
    for done, (name, table) in enumerate(TABLES.items(), start=1):
        inputs, classes = arms(name, settings)
        steps = settings.steps(table.steps)
        curves[name] = {arm: descend(x, classes, steps) for arm, x in inputs.items()}
        numbers |= _numbers(table, inputs, curves[name])
        progress(done / len(TABLES))
    verdicts = [_judge(name, descents) for name, descents in curves.items()]
    return Result(verdicts, [_curves(curves), _rates(curves), _spreads()], numbers)


def _numbers(table: Table, inputs: Mapping[str, Tensor], descents: Mapping[str, Descent]) -> Numbers:
    numbers: Numbers = {
        f"{table.title}, {_called(arm, table)}, condition number (first seed)": paired_seeds.figures(
            condition_number(x[0]), 3
        )
        for arm, x in inputs.items()
    }
    for arm in (RAW, NORMALIZED):
        rate = RATES[descents[arm].best_rate()]
        numbers[f"{table.title}, {_called(arm, table)}, best learning rate"] = paired_seeds.figures(rate, 2)
    return numbers


def _called(arm: str, table: Table) -> str:
    return f"as pixels / {table.divisor:g}" if arm == RAW and table.divisor != 1 else arm


def _judge(name: str, descents: Mapping[str, Descent]) -> Verdict:
    """The verdict on a ratio: steps to the target as recorded divided by steps normalized, each at its best rate."""
    table, control = TABLES[name], name == "digits"
    raw, centred, fast = (descents[arm].best() for arm in (RAW, CENTRED, NORMALIZED))
    ratios = raw.steps / fast.steps
    words = (
        "{table}: {fast} steps with normalized features, {raw} steps {recorded} ({bound}{ratio:.3g} times as many), "
        "{centred} steps if only centred."
    )
    if control:
        words += (
            " Normalizing also centres, and the control includes this effect: features that are only centred take "
            "{centred_bound}{centred_ratio:.3g} times as many steps as normalized features."
        )
    late = [arm for arm, arrival in ((NORMALIZED, fast), (RAW, raw)) if arrival.late and (control or arrival is fast)]
    failed = f"{' and '.join(late)}: not every seed reached {TARGET} nats in {fast.last} steps" if late else ""
    return judge(
        f"scale-{name}", ratios.log10().tolist(), words,
        bound="at least" if raw.late else "", failed_guard=failed, table=table.title, recorded=_called(RAW, table),
        fast=str(fast), raw=str(raw), centred=str(centred), ratio=paired_seeds.factor(ratios),
        centred_bound="at least " if centred.late else "",
        centred_ratio=paired_seeds.factor(centred.steps / fast.steps),
    )  # fmt: skip


def _curves(curves: Mapping[str, Mapping[str, Descent]]) -> Chart:
    rows, counts = [], []
    for name, descents in curves.items():
        panel, cap = TABLES[name].title, descents[RAW].cap
        chart_steps = sorted({round(cap ** (k / 30)) for k in range(31)})
        for arm, descent in descents.items():
            best = descent.losses[chart_steps, :, descent.best_rate()]  # (chart_steps, seeds)
            rows += paired_seeds.curve(chart_steps, best.clamp_min(FLOOR), series=arm, panel=panel)
        rows += [{"x": x, "y": TARGET, "series": "target", "panel": panel} for x in (1, cap)]
        counts.append(f"{panel} {descents[NORMALIZED].best()} instead of {descents[RAW].best()}")
    return chart(
        "lecture", "scale", "curves", rows, {**_SERIES, "target": "neutral"}, dashed=("target",), target=TARGET,
        counts=", ".join(counts), floor=FLOOR,
    )  # fmt: skip


def _rates(curves: Mapping[str, Mapping[str, Descent]]) -> Chart:
    rows, reached = [], []
    for name, descents in curves.items():
        panel = TABLES[name].title
        for arm, descent in descents.items():
            last = descent.losses[-1].T.clamp_min(FLOOR)  # (rates, seeds)
            rows += paired_seeds.curve(map(paired_seeds.figures, RATES), last, series=arm, panel=panel)
        count = {arm: int(paired_seeds.median(d.steps_to_target(), 0).isfinite().sum()) for arm, d in descents.items()}
        reached.append(f"{panel} {count[NORMALIZED]} instead of {count[RAW]}")
    return chart(
        "lecture", "scale", "rates", rows, _SERIES,
        y=Axis(f"last training loss, nats (at least {FLOOR})", log=True, domain=(FLOOR, 100)), rates=len(RATES),
        target=TARGET, reached=", ".join(reached), floor=FLOOR,
    )  # fmt: skip


def _spreads() -> Chart:
    """Chart of the standard deviations of the wine table's features, before and after normalization."""
    x = data_sets.table("wine").x
    names = cast("Any", datasets.load_wine()).feature_names
    before, after = x.std(0, correction=0), InputNorm.fit(x)(x).std(0, correction=0)
    rows = [
        {"label": label.replace("_", " "), "value": float(f"{sd:.3g}"), "series": arm}
        for arm, spread in ((RAW, before), (NORMALIZED, after))
        for label, sd in zip(names, spread.tolist(), strict=True)
    ]
    return chart(
        "lecture", "scale", "spreads", rows, {arm: _SERIES[arm] for arm in (RAW, NORMALIZED)},
        before_least=before.min(), before_most=before.max(), after_least=after.min(), after_most=after.max(),
        features=len(names), before_decades=math.log10(before.max() / before.min()),
        after_decades=math.log10(after.max() / after.min()),
    )  # fmt: skip


CLAIM = claim(
    "lecture", "scale", run, wine=TABLES["wine"].train, cancer=TABLES["cancer"].train,
    digits=TABLES["digits"].train, rates=len(RATES), target=TARGET, steps=TABLES["wine"].steps,
    digits_steps=TABLES["digits"].steps,
)  # fmt: skip
