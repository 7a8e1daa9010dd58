"""Questions "speed" and "rates": does batch norm learn in fewer steps, and at larger learning rates?"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor, nn

from batchnorm.ablation.arm_training import MOMENTUM
from batchnorm.ablation.arms import CALLED, ONCE, WITH, WITHOUT
from batchnorm.ablation.grid import Grid
from batchnorm.ablation.question_criteria import TARGET, USABLE, judge
from batchnorm.ablation.study import PAIR, Study
from batchnorm.ablation.user_model import Subject
from batchnorm.experiment import paired_seeds
from batchnorm.experiment.claim import Claim, Numbers, Result, chart, claim
from batchnorm.experiment.figures_in_words import Figure
from batchnorm.experiment.judgement import Bound, Verdict
from batchnorm.reporting.charts.chart_data import Axis, Chart, Role, Row, Rows

ROLES: dict[str, Role] = {WITH: "with", WITHOUT: "without", ONCE: "neutral"}
_POINTS = 60  # the most points of a curve in a chart
_WIDE = 30  # a loss that falls by more than this factor is drawn on a log axis
_SPAN = 5  # values whose largest is at most this multiple of the smallest are drawn on a linear axis
_TOP = 1.5  # a loss axis ends at this multiple of the first loss


def measure(study: Study) -> Result:
    """Steps to the target for all arms."""
    grid, subject, plan = study.grid, study.subject, study.plan
    verdicts = [_judge_steps(grid), versus(grid, "speed-once", ONCE, WITH)]
    numbers: Numbers = {
        "training loss at the start": paired_seeds.figures(grid.start),
        "target": paired_seeds.figures(grid.target),
    }
    for arm in grid.losses:
        final = grid.final(arm)[:, grid.best(arm)]
        numbers[f"{CALLED[arm]}, best learning rate"] = plan.rates[grid.best(arm)]
        numbers[f"{CALLED[arm]}, final training loss"] = paired_seeds.mean(final)
    for arm in PAIR:
        held = [_held_loss(subject, watched.model) for watched in study.best(arm)]
        numbers[f"{CALLED[arm]}, held-out loss at the end"] = paired_seeds.mean(torch.tensor(held))
    return Result(verdicts, [curves(grid, ROLES, verdicts[0])], numbers)


def measure_rates(study: Study) -> Result:
    """The largest usable rate of each arm."""
    verdict = _judge_rates(study.grid)
    return Result([verdict], [_usable_chart(study.grid, verdict)])


def _held_loss(subject: Subject, model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        return float(torch.stack([subject.value(model, batch) for batch in subject.data.held]).mean())


def ratio(grid: Grid) -> Tensor:
    """Steps of the pair's first arm over the steps of its second arm, each at its best rate, (seeds,)."""
    slow, fast = (grid.arrival(arm).steps for arm in grid.pair)
    return slow / fast


def effect(grid: Grid) -> list[float]:
    """log2 of the ratio for each seed; [] if no target exists, because every rate has a run that diverged."""
    return ratio(grid).log2().tolist() if isfinite(grid.target) else []


def _bound(slower: bool, faster: bool) -> Bound:
    """Whether the ratio of steps is a bound; the arguments say if an arm has seeds that never arrived."""
    return "" if slower == faster else "at least" if slower else "at most"


def judge_steps(grid: Grid, key: str, words: str = "", **figures: Figure) -> Verdict:
    """The verdict on the steps of the pair's arms; ``words`` continue the sentence."""
    slow, fast = grid.pair
    slower, faster = grid.arrival(slow), grid.arrival(fast)
    # the sentence has medians of steps and the mean of paired ratios, which may disagree about the faster arm
    comparison = "seed by seed {bound}{ratio:times} times as many"
    if slower.late == faster.late == len(slower.first):
        comparison = "neither reached it"
    return judge(
        key, effect(grid),
        f"{{faster}} steps {{fast}}, {{slower}} {{slow}} ({comparison}) to a training loss of {{target:.3g}}{words}.",
        bound=_bound(bool(slower.late), bool(faster.late)),
        failed_guard=grid.unlearned(grid.better, grid.best(grid.better)), faster=str(faster), fast=CALLED[fast],
        slower=str(slower), slow=CALLED[slow], ratio=paired_seeds.factor(ratio(grid)), target=grid.target, **figures,
    )  # fmt: skip


def versus(grid: Grid, key: str, slow: str, fast: str) -> Verdict:
    """The verdict on the steps of two arms to the target of these arms."""
    if failed := grid.failed.get(slow) or grid.failed.get(fast):
        return judge(key, [], "", failed_guard=failed)
    return judge_steps(grid.versus(slow, fast), key)


def _judge_steps(grid: Grid) -> Verdict:
    at = " and ".join(f"{_best(grid, arm)} {arm}" for arm in PAIR)
    return judge_steps(grid, "speed-steps", ", from {start:.3g}, at the rates {at}", start=grid.start, at=at)


def _best(grid: Grid, arm: str) -> str:
    """An arm's best rate in words."""
    edge = grid.edge(arm)
    return f"{grid.rates[grid.best(arm)]:g}" + (f" ({edge})" if edge else "")


def largest(grid: Grid, arm: str) -> Tensor:
    """The largest usable rate for each seed, (seeds,); 0 if no rate is usable."""
    usable = (grid.final(arm) <= grid.usable) & grid.final(arm).isfinite()
    return torch.where(usable, torch.tensor(grid.rates), 0.0).amax(1)


def _judge_rates(grid: Grid) -> Verdict:
    limits = {arm: largest(grid, arm) for arm in PAIR}
    factor = limits[WITH].clamp_min(min(grid.rates)) / limits[WITHOUT].clamp_min(min(grid.rates))
    none = {arm: bool((rates == 0).any()) for arm, rates in limits.items()}
    bound = _bound(none[WITHOUT], none[WITH])
    return judge(
        "rates-largest", factor.log2().tolist(),
        "The largest learning rate with a final training loss of {usable:.3g} or less is {normed} with batch norm, "
        "{plain} without (medians over seeds)" + ("; so {bound}{ratio:times} times as large." if bound else "."),
        bound=bound, failed_guard=grid.unlearned(grid.better, grid.best(grid.better)), usable=grid.usable,
        normed=_rate(limits[WITH], grid), plain=_rate(limits[WITHOUT], grid), ratio=paired_seeds.factor(factor),
    )  # fmt: skip


def _rate(rates: Tensor, grid: Grid) -> str:
    median = float(paired_seeds.median(rates))
    if not median:
        return "not in the grid"
    return f"{median:.3g}" + (" (the grid's largest)" if median >= max(grid.rates) * 0.999 else "")


def loss_axis(grid: Grid, values: Sequence[float]) -> Axis:
    """The axis of a training loss: logarithmic if the loss falls far, and cut above 1.5 times the first loss."""
    low, top = min(values, default=0.0), _TOP * grid.start
    if not (isfinite(low) and isfinite(top)):
        return Axis("training loss")
    if low > 0 and grid.start / low > _WIDE:
        return Axis("training loss", log=True, domain=(low / 1.2, max(top, low * 2)))
    return Axis("training loss", domain=(min(0.0, low), top) if top > low else None)


def wide_axis(title: str, rows: Sequence[Row]) -> Axis:
    """The value axis of a chart of dots: logarithmic if the largest value is over 5 times the smallest."""
    values = [row["value"] for row in rows]
    return Axis(title, log=bool(values) and min(values) > 0 and max(values) > _SPAN * min(values))


def curves(grid: Grid, roles: dict[str, Role], verdict: Verdict) -> Chart:
    """Chart of the smoothed training loss of the arms in ``roles`` against steps, each arm at its best rate."""
    rows: Rows = []
    for arm in filter(grid.losses.__contains__, roles):
        smooth = grid.smooth(arm)[:, grid.best(arm)].T  # (times, seeds)
        places = paired_seeds.evenly(len(smooth), _POINTS)
        steps = (places + grid.window).tolist()
        rows += paired_seeds.curve(steps, smooth[places], series=CALLED[arm])
    if isfinite(grid.target):
        rows += [
            {"x": x, "y": paired_seeds.figures(grid.target), "series": "target"} for x in (grid.window, grid.steps)
        ]
    return chart(
        "ablation", "speed", "curves", rows, {CALLED[arm]: role for arm, role in roles.items()} | {"target": "neutral"},
        dashed=("target",), y=loss_axis(grid, [row.get("low", row["y"]) for row in rows]), title=verdict.heading,
        told=verdict.statement,
    )  # fmt: skip


def _usable_chart(grid: Grid, verdict: Verdict) -> Chart:
    rows: Rows = []
    for arm in PAIR:
        rows += paired_seeds.curve(grid.rates, grid.final(arm).T, series=CALLED[arm])
    ends = (min(grid.rates), max(grid.rates))
    if isfinite(grid.usable):
        rows += [{"x": rate, "y": paired_seeds.figures(grid.usable), "series": "usable"} for rate in ends]
    return chart(
        "ablation", "rates", "usable", rows, {CALLED[arm]: ROLES[arm] for arm in PAIR} | {"usable": "neutral"},
        dashed=("usable",), y=loss_axis(grid, [row.get("low", row["y"]) for row in rows]), title=verdict.heading,
        told=verdict.statement,
    )  # fmt: skip


ARMS = "The runs of the first question, with batch norm and without."


def arms_in_words(study: Study) -> str:
    """What is compared: the text for the first question about training."""
    plan = study.plan
    rates = ", ".join(f"{rate:g}" for rate in plan.rates)
    return (
        f"Your model with batch norm is compared with the same model in which each batch norm layer is replaced by "
        f"gamma x + beta (the same parameters). Both start from the same weights and train on the same batches of "
        f"{study.subject.data.size}: {plan.steps} steps of SGD with momentum {MOMENTUM}, at each of the rates {rates}, "
        f"from {plan.seeds} seeds."
    )


def speed(study: Study) -> Claim:
    """The claim that training is faster with batch norm."""
    return claim(
        "ablation", "speed", lambda _, __: measure(study), compared=arms_in_words(study),
        window=study.grid.window, target=TARGET,
    )  # fmt: skip


def rates(study: Study) -> Claim:
    """The claim that larger rates are usable with batch norm."""
    return claim("ablation", "rates", lambda _, __: measure_rates(study), compared=ARMS, usable=USABLE)
