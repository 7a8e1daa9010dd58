"""Question "smooth": is the loss smoother along the gradient, at an equal rate and at the best one of each arm?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from batchnorm.ablation.arm_training import MOMENTUM
from batchnorm.ablation.arms import CALLED, WITH, WITHOUT
from batchnorm.ablation.criteria import judge, times
from batchnorm.ablation.questions.speed_and_rates import ARMS
from batchnorm.ablation.study import PAIR, Study
from batchnorm.lecture import over_seeds
from batchnorm.lecture.claim import SERIES, Axis, Chart, Claim, Result, Role, Verdict

if TYPE_CHECKING:
    from batchnorm.ablation.watched_runs import Watched

EDGE = 2 * (1 + MOMENTUM)  # of gradient descent with heavy-ball momentum on a quadratic: rate × curvature < 2 (1 + m)
_EDGE = "edge of stability"


def measure(study: Study) -> Result:
    """Beta-hat at the equal rate, and rate × beta-hat at the best rates."""
    verdicts = [_judge(study, "smooth-equal", equal=True), _judge(study, "smooth-best", equal=False)]
    numbers: dict[str, float | int | str | None] = {}
    for at, runs in (("equal rate", study.equal), ("best rate", study.best)):
        for arm in PAIR:
            cosine = torch.cat([run.landscape.cosine for run in runs(arm)])
            numbers[f"cosine of the gradients before and after a step, {at}, {CALLED[arm]}"] = over_seeds.mean(cosine)
    chart = _chart(study, verdicts)
    return Result(verdicts, [chart], numbers)


def _betas(runs: list[Watched], factor: float) -> Tensor:
    """Mean over the run of log2 of factor × beta-hat, (seeds,)."""
    return torch.stack([(factor * run.landscape.beta).log2().mean() for run in runs])


def _judge(study: Study, key: str, *, equal: bool) -> Verdict:
    runs = study.equal if equal else study.best
    rates = [study.plan.rates[study.grid.shared() if equal else study.grid.best(arm)] for arm in PAIR]
    plain, normed = (_betas(runs(arm), 1.0 if equal else rate) for arm, rate in zip(PAIR, rates, strict=True))
    effect = plain - normed
    failed = study.unlearned(equal=equal) or study.unwatched(equal=equal)
    at = f"the equal rate {rates[0]:g}" if equal else f"the best rates {rates[0]:g} without and {rates[1]:g} with"
    what = "beta-hat" if equal else "rate × beta-hat"
    sentence = (
        f"{what} at {at}: {float(plain.mean().exp2()):.2g} without batch norm, {float(normed.mean().exp2()):.2g} with "
        f"({times(float(effect.mean().exp2()))} times as large without)."
    )
    return judge(key, effect.tolist(), sentence, failed_guard=failed)


def _chart(study: Study, verdicts: list[Verdict]) -> Chart:
    rows: list[dict[str, Any]] = []
    shared = study.plan.rates[study.grid.shared()]
    best = {arm: study.plan.rates[study.grid.best(arm)] for arm in PAIR}
    panels = {
        f"equal rate {shared:g}": (study.equal, dict.fromkeys(PAIR, shared)),
        f"best rates: {best[WITHOUT]:g} without, {best[WITH]:g} with": (study.best, best),
    }
    for panel, (runs, rates) in panels.items():
        for arm in PAIR:
            times = min(len(run.landscape.beta) for run in runs(arm))
            values = torch.stack([rates[arm] * run.landscape.beta[:times] for run in runs(arm)], 1)
            steps = runs(arm)[0].probed[:times]
            rows += over_seeds.curve(steps, values, positive=True, series=CALLED[arm], panel=panel)
        rows += [{"x": x, "y": EDGE, "series": _EDGE, "panel": panel} for x in (0, study.plan.steps)]
    shown = {row["series"] for row in rows}
    reference: dict[str, Role] = {_EDGE: "neutral"}
    return Chart(
        "lines",
        verdicts[1].told.rstrip("."),
        "Rate × beta-hat, the roughness as a step of that rate meets it, against training steps on a log scale: one "
        f"panel at an equal rate, one at the best rates; the dashed line is {EDGE:.2g}. {verdicts[0].told}",
        rows,
        Axis("training step"),
        Axis("rate × beta-hat", log=True),
        {name: role for name, role in SERIES.items() if name in shown} | reference,
        dashed=(_EDGE,),
    )


def smooth(study: Study) -> Claim:
    """The question about the loss along the gradient."""
    return Claim(
        name="smooth",
        title="A smoother loss",
        sentence="Batch norm makes the loss smoother along the gradient, so that larger steps are safe.",
        arms=(
            f"{ARMS} Six times in a run, the loss and its gradient are evaluated on the step's own "
            "batch at 1/2, 1, 2 and 4 times the rate along the negative gradient; beta-hat is the largest change of "
            "the gradient per distance, averaged over the run by its logarithm."
        ),
        how_to_read=(
            "Look at how far apart the curves are at an equal rate, and whether that remains at the best rates; beyond "
            f"the dashed line, 2 (1 + momentum) = {EDGE:.2g}, steps overshoot on a quadratic."
        ),
        not_shown=(
            "That smoothness is the cause of any speed. beta-hat depends on the scale of weights before a batch norm "
            "layer, so only rate × beta-hat compares steps."
        ),
        sources=(
            "Santurkar et al. 2018, How Does Batch Normalization Help Optimization?, section 3",
            "Cohen et al. 2021, Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability",
        ),
        run=lambda _, __: measure(study),
    )
