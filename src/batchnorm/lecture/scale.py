"""Claim "scale": normalizing input features that differ in range makes the loss rounder and learning faster.

Softmax regression by full-batch gradient descent: with x~ = (x, 1), its Hessian is bounded by E[x~ x~^T], so the
condition number of that matrix says how long the bowl is that the lecture draws (LeCun et al. 1998, section 5).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from sklearn import datasets
from torch import Tensor

from batchnorm.inputs import InputNorm
from batchnorm.lecture import data
from batchnorm.lecture.claim import Axis, Chart, Claim, Progress, Result, Role, Settings, Verdict
from batchnorm.lecture.verdict import judge

# Half decades, wide enough that the best rate of every arm that arrives lies inside.
RATES = tuple(10 ** (k / 2) for k in range(-16, 7))
# At 0.1 nats the true class has a probability of 0.9 (geometric mean over examples), whatever the number of classes.
TARGET = 0.1
FLOOR = 1e-3  # smallest loss that charts tell apart
RAW, CENTRED, NORMALIZED = "as recorded", "only centred", "normalized"
_SERIES: dict[str, Role] = {RAW: "without", CENTRED: "neutral", NORMALIZED: "with"}


@dataclass(frozen=True, slots=True)
class Table:
    """One table of the claim: its name in sentences, training examples, steps at most, divisor of its features."""

    title: str
    train: int
    steps: int
    divisor: float = 1.0


# Four fifths of wine and breast cancer; 500 digits, as training on all would take most of the claim's time.
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
        """Number of steps that were taken."""
        return len(self.losses) - 1

    def steps_to_target(self) -> Tensor:
        """First step with a loss of TARGET or less, (seeds, rates); infinity where there was none."""
        reached = self.losses <= TARGET
        return torch.where(reached.any(0), reached.float().argmax(0).float(), torch.inf)

    def best_rate(self) -> int:
        """Index of the rate that is fastest to the target in the median over seeds; of the lowest last loss if none."""
        median = self.steps_to_target().median(0).values
        last = self.losses[-1].nan_to_num(torch.inf).median(0).values
        return int(median.argmin() if median.isfinite().any() else last.argmin())

    def steps_at_best(self) -> tuple[Tensor, bool]:
        """Each seed's steps to the target at the best rate; and whether a seed never got there and has the cap."""
        steps = self.steps_to_target()[:, self.best_rate()]
        return steps.clamp_max(self.cap), bool(steps.isinf().any())


def descend(x: Tensor, y: Tensor, steps: int) -> Descent:
    """Softmax regression from zero weights by gradient descent, every seed and rate in one product of matrices.

    Args:
        x: Inputs of each seed, (seeds, N, features).
        y: Classes, (seeds, N).
        steps: Number of full-batch steps.
    """
    classes, rates = int(y.max()) + 1, len(RATES)
    x = _with_bias(x)
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


def _with_bias(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)


def condition_number(x: Tensor) -> float:
    """Largest over smallest eigenvalue of E[x~ x~^T] with a column of ones, over directions that are not empty.

    From singular values in float64, whose square the eigenvalues are, so that 1e12 is still exact to some digits.
    A constant feature repeats the column of ones and adds an empty direction.

    Args:
        x: Inputs, (N, features).
    """
    values = torch.linalg.svdvals(_with_bias(x.double()))
    empty = values[0] * max(x.shape) * torch.finfo(torch.float64).eps  # as numpy's matrix_rank
    return float((values[0] / values[values > empty][-1]).square())


def arms(name: str, settings: Settings) -> tuple[dict[str, Tensor], Tensor]:
    """Each arm's inputs, (seeds, N, features), and the classes, (seeds, N), of every seed's training split."""
    table, examples = TABLES[name], data.table(name)
    picked = examples[torch.stack([data.split(len(examples), table.train, s)[0] for s in settings.all_seeds])]
    raw = picked.x / table.divisor
    normalized = torch.stack([InputNorm.fit(x)(x) for x in raw])
    return {RAW: raw, CENTRED: raw - raw.mean(1, keepdim=True), NORMALIZED: normalized}, picked.y


def run(settings: Settings, progress: Progress) -> Result:
    """Train on every table in every form over one grid of learning rates."""
    found: dict[str, dict[str, Descent]] = {}
    numbers: dict[str, float | int | str | None] = {}
    for done, (name, table) in enumerate(TABLES.items(), start=1):
        inputs, classes = arms(name, settings)
        steps = settings.steps(table.steps)
        found[name] = {arm: descend(x, classes, steps) for arm, x in inputs.items()}
        numbers |= _numbers(table, inputs, found[name])
        progress(done / len(TABLES))
    verdicts = [_judge(name, descents) for name, descents in found.items()]
    return Result(verdicts, [_curves(found), _rates(found), _spreads()], numbers)


def _numbers(
    table: Table, inputs: Mapping[str, Tensor], descents: Mapping[str, Descent]
) -> dict[str, float | int | str | None]:
    raw = inputs[RAW][0]
    ranges = (raw.amax(0) - raw.amin(0))[raw.std(0) > 0]
    numbers: dict[str, float | int | str | None] = {
        f"{table.title}, narrowest feature, range as recorded": float(f"{ranges.min():.3g}"),
        f"{table.title}, widest feature, range as recorded": float(f"{ranges.max():.3g}"),
    }
    for arm, x in inputs.items():
        numbers[f"{table.title}, {arm}, condition number"] = float(f"{condition_number(x[0]):.3g}")
        numbers[f"{table.title}, {arm}, best learning rate"] = float(f"{RATES[descents[arm].best_rate()]:.2g}")
        steps, cut = descents[arm].steps_at_best()
        numbers[f"{table.title}, {arm}, median steps to {TARGET} nats"] = _count(steps, cut)
    return numbers


def _count(steps: Tensor, cut: bool) -> str:
    return f"{'more than ' if cut else ''}{steps.median():.0f}"


def _judge(name: str, descents: Mapping[str, Descent]) -> Verdict:
    """Steps to the target as recorded against normalized, each at its best rate."""
    table = TABLES[name]
    (raw, raw_cut), (fast, fast_cut) = descents[RAW].steps_at_best(), descents[NORMALIZED].steps_at_best()
    ratio = float((raw / fast).log10().mean())
    sentence = (
        f"{table.title}: {_count(fast, fast_cut)} steps with normalized features, {_count(raw, raw_cut)} as "
        f"{'recorded' if table.divisor == 1 else f'pixels / {table.divisor:g}'} "
        f"({'at least ' if raw_cut else ''}{10**ratio:.3g} times as many), "
        f"{_count(*descents[CENTRED].steps_at_best())} if only centred."
    )
    control = name == "digits"
    late = [arm for arm, cut in ((NORMALIZED, fast_cut), (RAW, raw_cut and control)) if cut]
    failed = f"{' and '.join(late)}: not every seed reached {TARGET} nats in {descents[RAW].cap} steps" if late else ""
    return judge(f"scale-{name}", (raw / fast).log10().tolist(), sentence, failed_guard=failed)


def _span(values: Tensor) -> dict[str, float]:
    """Median with the range over seeds, of values (seeds,)."""
    values = values.clamp_min(FLOOR)
    spread = {"y": values.median(), "low": values.amin(), "high": values.amax()}
    return {key: float(f"{value:.4g}") for key, value in spread.items()}


def _curves(found: Mapping[str, Mapping[str, Descent]]) -> Chart:
    rows, counts = [], []
    for name, descents in found.items():
        panel = TABLES[name].title
        cap = descents[RAW].cap
        shown = sorted({round(cap ** (k / 30)) for k in range(31)})
        for arm, descent in descents.items():
            best = descent.losses[:, :, descent.best_rate()]  # (steps + 1, seeds)
            rows += [
                {"x": step, **_span(best[step]), "series": arm, "panel": panel}
                for step in shown
                if best[step].isfinite().all()
            ]
        rows += [{"x": x, "y": TARGET, "series": "target", "panel": panel} for x in (1, cap)]
        fast, slow = (_count(*descents[arm].steps_at_best()) for arm in (NORMALIZED, RAW))
        counts.append(f"{panel} {fast} instead of {slow}")
    return Chart(
        "lines",
        f"Steps to {TARGET} nats with normalized features, each form at its best learning rate: {', '.join(counts)}",
        "Training loss against steps, both on log scales, one panel for each table. On wine and breast cancer the "
        "blue curve of normalized features falls through the dashed target while the orange curve of features as "
        "recorded and the grey one of features that are only centred stay above it. On digits all three arrive, grey "
        "close behind blue.",
        rows,
        Axis("training step", log=True),
        Axis(f"training loss, nats (at least {FLOOR})", log=True),
        {**_SERIES, "target": "neutral"},
        dashed=("target",),
    )


def _rates(found: Mapping[str, Mapping[str, Descent]]) -> Chart:
    rows, reached = [], []
    for name, descents in found.items():
        for arm, descent in descents.items():
            last = descent.losses[-1]  # (seeds, rates)
            rows += [
                {"x": float(f"{rate:.3g}"), **_span(last[:, r]), "series": arm, "panel": TABLES[name].title}
                for r, rate in enumerate(RATES)
                if last[:, r].isfinite().all()
            ]
        count = {arm: int(d.steps_to_target().median(0).values.isfinite().sum()) for arm, d in descents.items()}
        reached.append(f"{TABLES[name].title} {count[NORMALIZED]} instead of {count[RAW]}")
    return Chart(
        "points",
        f"Of {len(RATES)} learning rates, so many arrive with normalized features instead of as recorded: "
        f"{', '.join(reached)}",
        "Training loss after the last step against the learning rate, both on log scales, one panel for each table. "
        "Blue points, normalized, are low over a wide range of rates; orange points, as recorded, are lowest at much "
        "smaller rates on wine and breast cancer and explode beyond.",
        rows,
        Axis("learning rate", log=True),
        Axis(f"last training loss, nats (at least {FLOOR})", log=True, domain=(FLOOR, 100)),
        _SERIES,
    )


def _spreads() -> Chart:
    """Standard deviation of every feature of the whole wine table before and after."""
    x = data.table("wine").x
    names = cast("Any", datasets.load_wine()).feature_names
    before, after = x.std(0, correction=0), InputNorm.fit(x)(x).std(0, correction=0)
    rows = [
        {"label": label.replace("_", " "), "value": float(f"{sd:.3g}"), "series": arm}
        for arm, spread in ((RAW, before), (NORMALIZED, after))
        for label, sd in zip(names, spread.tolist(), strict=True)
    ]
    return Chart(
        "dots",
        f"Wine as recorded has features with standard deviations from {before.min():.2g} to {before.max():.3g}; "
        f"normalized they all have {after.median():.3g}",
        f"One row for each of the {len(names)} features of wine. Orange dots, as recorded, spread over more than "
        "three powers of ten; blue dots, normalized, stand in one column.",
        rows,
        Axis("standard deviation, in the feature's unit (log)", log=True),
        series={arm: _SERIES[arm] for arm in (RAW, NORMALIZED)},
    )


CLAIM = Claim(
    name="scale",
    title="Normalizing the inputs",
    sentence=(
        "When input features have very different ranges, the loss is a long narrow bowl; normalizing them to mean 0 "
        "and variance 1 makes it rounder, so that gradient descent can take larger steps and learns faster."
    ),
    arms=(
        f"Softmax regression on wine ({TABLES['wine'].train} of 178 examples), breast cancer "
        f"({TABLES['cancer'].train} of 569) and, as a control, digits ({TABLES['digits'].train} of 1797, pixels / 16), "
        "with features as recorded, only centred, and normalized by InputNorm fitted on the training examples. "
        "Full-batch gradient descent from zero weights, so every form starts at the same loss; "
        f"{len(RATES)} learning rates from 1e-8 to 1000 for each; a seed is a draw of training examples. Counted are "
        f"the steps to a training loss of {TARGET} nats, where the true class has a probability of 0.9, "
        f"{TABLES['wine'].steps} at most ({TABLES['digits'].steps} for digits)."
    ),
    how_to_read=(
        "In the first chart look where a curve crosses the dashed line: that is the number of steps, each form at its "
        "own best rate, with the band spanning all seeds; grey shows how much of it is due to the mean alone. In the "
        "second look at how far apart the best rates are, and how low the points get there."
    ),
    not_shown=(
        "An arm that never arrives counts with the last step, so its ratio is a lower bound. Optimizers that scale "
        "each weight's step, such as Adam, and second-order methods narrow the gap; the test loss is not looked at."
    ),
    sources=(
        "LeCun, Bottou, Orr and Müller 1998, Efficient BackProp, sections 4.3 and 5",
        "Ioffe and Szegedy 2015, Batch Normalization, section 2",
    ),
    run=run,
)
