"""Questions "speed" and "rates": does batch norm learn in fewer steps, and at larger learning rates?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from batchnorm.ablation.arm_training import MOMENTUM
from batchnorm.ablation.arms import CALLED, ONCE, WITH, WITHOUT
from batchnorm.ablation.criteria import TARGET, USABLE, judge, times
from batchnorm.ablation.grid import Grid
from batchnorm.ablation.study import PAIR, Study
from batchnorm.lecture import over_seeds
from batchnorm.lecture.claim import Axis, Chart, Claim, Result, Role, Verdict
from batchnorm.lecture.verdict import minus

ROLES: dict[str, Role] = {WITH: "with", WITHOUT: "without", ONCE: "neutral"}
_POINTS = 60  # of a curve that a chart shows
_WIDE = 30  # a loss that spans more than this factor is drawn on a log axis
_SPAN = 5  # dots that lie within this factor are drawn on a linear axis
_TOP = 1.5  # a loss axis ends at this multiple of the start: what is above has not begun to learn


def measure(study: Study) -> Result:
    """Steps to the target of all arms."""
    grid, subject, plan = study.grid, study.subject, study.plan
    verdicts = [_judge_steps(grid), versus(grid, "speed-once", ONCE, WITH)]
    numbers: dict[str, float | int | str | None] = {
        "training loss at the start": over_seeds.figures(grid.start),
        "target": over_seeds.figures(grid.target),
    }
    for arm in grid.losses:
        final = grid.final(arm)[:, grid.best(arm)]
        numbers[f"{CALLED[arm]}, best learning rate"] = plan.rates[grid.best(arm)]
        numbers[f"{CALLED[arm]}, final training loss"] = over_seeds.mean(final)
    for arm in PAIR:
        held = [_held_loss(subject, watched.model) for watched in study.best(arm)]
        numbers[f"{CALLED[arm]}, held-out loss at the end"] = over_seeds.mean(torch.tensor(held))
    return Result(verdicts, [curves(grid, ROLES, verdicts[0].told)], numbers)


def measure_rates(study: Study) -> Result:
    """The largest usable rate of both arms."""
    verdict = _judge_rates(study.grid)
    return Result([verdict], [_usable_chart(study.grid, verdict)])


def _held_loss(subject: Any, model: Any) -> float:
    model.eval()
    with torch.no_grad():
        return float(torch.stack([subject.value(model, batch) for batch in subject.data.held]).mean())


def ratio(grid: Grid) -> Tensor:
    """Steps of the pair's slower arm over those of its faster one, each at its best rate, (seeds,)."""
    slow, fast = (grid.arrival(arm).steps for arm in grid.pair)
    return slow / fast


def effect(grid: Grid) -> list[float]:
    """log2 of the ratio for each seed; [] where all runs diverged, so that there is no target."""
    return ratio(grid).log2().tolist() if isfinite(grid.target) else []


def told(grid: Grid) -> str:
    """Both arms' steps in words, and their ratio."""
    slow, fast = grid.pair
    slower, faster = grid.arrival(slow), grid.arrival(fast)
    bound = "at least " if slower.late and not faster.late else "at most " if faster.late and not slower.late else ""
    # a median of steps beside a mean of paired ratios, which may differ in direction
    said = f"seed by seed {bound}{times(over_seeds.factor(ratio(grid)))} times as many"
    if slower.late == faster.late == len(slower.first):
        said = "neither arrived"
    return f"{faster} steps {CALLED[fast]}, {slower} {CALLED[slow]} ({said}) to a training loss of {grid.target:.3g}"


def versus(grid: Grid, key: str, slow: str, fast: str) -> Verdict:
    """Steps of one arm against another, to the target of these two."""
    if failed := grid.failed.get(slow) or grid.failed.get(fast):
        return judge(key, [], "", failed_guard=failed)
    grid = grid.versus(slow, fast)
    failed = grid.unlearned(grid.better, grid.best(grid.better))
    return judge(key, effect(grid), f"{told(grid)}.", failed_guard=failed)


def _judge_steps(grid: Grid) -> Verdict:
    at = " and ".join(f"{_best(grid, arm)} {arm}" for arm in PAIR)
    sentence = f"{told(grid)}, from {grid.start:.3g}, at the rates {at}."
    failed = grid.unlearned(grid.better, grid.best(grid.better))
    return judge("speed-steps", effect(grid), sentence, failed_guard=failed)


def _best(grid: Grid, arm: str) -> str:
    """An arm's best rate in words."""
    edge = grid.edge(arm)
    return f"{grid.rates[grid.best(arm)]:g}" + (f" ({edge})" if edge else "")


def largest(grid: Grid, arm: str) -> Tensor:
    """For each seed the largest usable rate, (seeds,); 0 where there is none."""
    usable = (grid.final(arm) <= grid.usable) & grid.final(arm).isfinite()
    return torch.where(usable, torch.tensor(grid.rates), 0.0).amax(1)


def _judge_rates(grid: Grid) -> Verdict:
    found = {arm: largest(grid, arm) for arm in PAIR}
    factor = found[WITH].clamp_min(min(grid.rates)) / found[WITHOUT].clamp_min(min(grid.rates))
    sentence = (
        f"The largest learning rate that ends at a training loss of {grid.usable:.3g} or less is "
        f"{_rate(found[WITH], grid)} with batch norm, {_rate(found[WITHOUT], grid)} without (medians over seeds)."
    )
    failed = grid.unlearned(grid.better, grid.best(grid.better))
    some = {arm: bool((rates > 0).all()) for arm, rates in found.items()}
    if some[WITH] != some[WITHOUT]:
        bound = "at least" if some[WITH] else "at most"
        sentence = f"{sentence.rstrip('.')}; so {bound} {times(over_seeds.factor(factor))} times as large."
    return judge("rates-largest", factor.log2().tolist(), sentence, failed_guard=failed)


def _rate(rates: Tensor, grid: Grid) -> str:
    median = float(over_seeds.median(rates))
    if not median:
        return "none of the grid"
    return f"{median:.3g}" + (" (the grid's largest)" if median >= max(grid.rates) * 0.999 else "")


def loss_axis(grid: Grid, values: Sequence[float]) -> Axis:
    """The axis of a training loss: logarithmic where it falls by decades, and without what never learned."""
    low, top = min(values, default=0.0), _TOP * grid.start
    if not (isfinite(low) and isfinite(top)):
        return Axis("training loss")
    if low > 0 and grid.start / low > _WIDE:
        return Axis("training loss", log=True, domain=(low / 1.2, max(top, low * 2)))
    return Axis("training loss", domain=(min(0.0, low), top) if top > low else None)


def wide_axis(title: str, rows: Sequence[Mapping[str, Any]]) -> Axis:
    """The value axis of a chart of dots: logarithmic where the values span much."""
    values = [row["value"] for row in rows]
    return Axis(title, log=bool(values) and min(values) > 0 and max(values) > _SPAN * min(values))


def curves(grid: Grid, roles: dict[str, Role], title: str) -> Chart:
    """Smoothed training loss of some arms against steps, each at its best rate."""
    rows: list[dict[str, Any]] = []
    for arm in filter(grid.losses.__contains__, roles):
        smooth = grid.smooth(arm)[:, grid.best(arm)].T  # (times, seeds)
        kept = torch.linspace(0, len(smooth) - 1, min(_POINTS, len(smooth))).round().long().unique()
        steps = (kept + grid.window).tolist()
        rows += over_seeds.curve(steps, smooth[kept], series=CALLED[arm])
    if isfinite(grid.target):
        rows += [{"x": x, "y": over_seeds.figures(grid.target), "series": "target"} for x in (grid.window, grid.steps)]
    shown = {row["series"] for row in rows}
    return Chart(
        "lines",
        minus(title.rstrip(".")),
        "Training loss against steps, each arm at its best learning rate, with bands over all seeds; the dashed line "
        f"is the target. {title}",
        rows,
        Axis("training step"),
        loss_axis(grid, [row.get("low", row["y"]) for row in rows]),
        {CALLED[arm]: role for arm, role in roles.items() if CALLED[arm] in shown} | {"target": "neutral"},
        dashed=("target",),
    )


def _usable_chart(grid: Grid, verdict: Verdict) -> Chart:
    rows: list[dict[str, Any]] = []
    for arm in PAIR:
        rows += over_seeds.curve(grid.rates, grid.final(arm).T, series=CALLED[arm])
    ends = (min(grid.rates), max(grid.rates))
    if isfinite(grid.usable):
        rows += [{"x": rate, "y": over_seeds.figures(grid.usable), "series": "usable"} for rate in ends]
    shown = {row["series"] for row in rows}
    return Chart(
        "points",
        verdict.told.rstrip("."),
        "Final training loss against the learning rate on a log scale, one point with its range over seeds for each "
        "arm and rate; a point that is missing diverged in a seed. Below the dashed line a rate is usable. "
        f"{verdict.told}",
        rows,
        Axis("learning rate", log=True),
        loss_axis(grid, [row.get("low", row["y"]) for row in rows]),
        {CALLED[arm]: ROLES[arm] for arm in PAIR if CALLED[arm] in shown} | {"usable": "neutral"},
        dashed=("usable",),
    )


ARMS = "The runs of the first question, with batch norm and without."


def arms_in_words(study: Study) -> str:
    """What is compared, for every question about training."""
    plan = study.plan
    rates = ", ".join(f"{rate:g}" for rate in plan.rates)
    return (
        f"Your model with batch norm as it is, and with gamma x + beta in the place of each batch norm layer (the same "
        f"parameters), from the same first weights and on the same batches of {study.subject.data.size}: {plan.steps} "
        f"steps of SGD with momentum {MOMENTUM}, at each of the rates {rates}, from {plan.seeds} seeds."
    )


def speed(study: Study) -> Claim:
    """The question whether batch norm is faster here."""
    return Claim(
        name="speed",
        title="Speed",
        sentence="With batch norm a network learns in fewer steps.",
        arms=(
            f"{arms_in_words(study)} A third arm normalizes by the statistics of its first batch for good: it has the "
            "good start and not the normalization while training. The loss is that of each step's own batch, averaged "
            f"over {study.grid.window} steps; the target is {TARGET:.0%} of the way that the better arm came."
        ),
        how_to_read=(
            "Further left is faster. Where grey runs beside blue, the start is all that batch norm gives here. A curve "
            "that is missing diverged at every rate."
        ),
        not_shown=(
            "What a full training run, another optimizer or a schedule would give: only the first steps are trained. "
            "A step with batch norm also takes more time. An arm that never arrives counts with the last step."
        ),
        sources=("Ioffe and Szegedy 2015, Batch Normalization, section 4",),
        run=lambda _, __: measure(study),
    )


def rates(study: Study) -> Claim:
    """The question whether larger rates are usable."""
    return Claim(
        name="rates",
        title="Larger learning rates",
        sentence="With batch norm, training stands larger learning rates.",
        arms=f"{ARMS} A rate is usable if it ends {USABLE:.0%} of the way that the better arm came.",
        how_to_read="See how far to the right the points stay below the dashed line. An arm without points diverged.",
        not_shown="Rates between those of the grid: a factor is known to one step of it. --rates sets another grid.",
        sources=("Bjorck et al. 2018, Understanding Batch Normalization",),
        run=lambda _, __: measure_rates(study),
    )
