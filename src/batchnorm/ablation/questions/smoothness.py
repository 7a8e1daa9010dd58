"""Question "smooth": is the loss smoother along the gradient, at an equal rate and at the best rate of each arm?

beta-hat is the largest change of the gradient per distance (``beta`` in ``instruments.loss_landscape``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.ablation.arm_training import MOMENTUM
from batchnorm.ablation.arms import CALLED, WITH, WITHOUT
from batchnorm.ablation.question_criteria import judge
from batchnorm.ablation.questions.speed_and_rates import ARMS
from batchnorm.ablation.study import PAIR, Study
from batchnorm.ablation.watched_runs import WatchedRun
from batchnorm.experiment import paired_seeds
from batchnorm.experiment.claim import Claim, Numbers, Result, chart, claim
from batchnorm.experiment.judgement import Verdict
from batchnorm.reporting.charts.chart_data import SERIES, Chart, Role, Rows

# for a quadratic loss, gradient descent with momentum m is stable if rate × curvature < 2 (1 + m)
EDGE = 2 * (1 + MOMENTUM)
_EDGE = "edge of stability"


def measure(study: Study) -> Result:
    """The verdicts on beta-hat at the equal rate, and on rate × beta-hat at the best rates."""
    verdicts = [_judge(study, "smooth-equal", equal=True), _judge(study, "smooth-best", equal=False)]
    numbers: Numbers = {}
    for at, runs in (("equal rate", study.equal), ("best rate", study.best)):
        for arm in PAIR:
            cosine = torch.cat([run.landscape.cosine_after for run in runs(arm)])
            numbers[f"cosine of the gradients before and after a step, {at}, {CALLED[arm]}"] = paired_seeds.mean(cosine)
    chart = _chart(study, verdicts)
    return Result(verdicts, [chart], numbers)


def _betas(runs: list[WatchedRun], factor: float) -> Tensor:
    """log2 of factor × beta-hat, mean over each run, (seeds,)."""
    return torch.stack([(factor * run.landscape.beta).log2().mean() for run in runs])


def _judge(study: Study, key: str, *, equal: bool) -> Verdict:
    runs = study.equal if equal else study.best
    rates = [study.plan.rates[study.grid.shared() if equal else study.grid.best(arm)] for arm in PAIR]
    plain, normed = (_betas(runs(arm), 1.0 if equal else rate) for arm, rate in zip(PAIR, rates, strict=True))
    effect = plain - normed
    failed = study.unlearned(equal=equal) or study.unwatched(equal=equal)
    at = f"the equal rate {rates[0]:g}" if equal else f"the best rates {rates[0]:g} without and {rates[1]:g} with"
    return judge(
        key, effect.tolist(),
        "{quantity} at {at}: {plain:.2g} without batch norm, {normed:.2g} with ({ratio:times} times as large without).",
        failed_guard=failed, quantity="beta-hat" if equal else "rate × beta-hat", at=at, plain=plain.mean().exp2(),
        normed=normed.mean().exp2(), ratio=effect.mean().exp2(),
    )  # fmt: skip


def _chart(study: Study, verdicts: list[Verdict]) -> Chart:
    rows: Rows = []
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
            rows += paired_seeds.curve(steps, values, positive=True, series=CALLED[arm], panel=panel)
        rows += [{"x": x, "y": EDGE, "series": _EDGE, "panel": panel} for x in (0, study.plan.steps)]
    reference: dict[str, Role] = {_EDGE: "neutral"}
    return chart(
        "ablation", "smooth", "main", rows, SERIES | reference, dashed=(_EDGE,), title=verdicts[1].heading, edge=EDGE,
        equal=verdicts[0].statement,
    )  # fmt: skip


def smooth(study: Study) -> Claim:
    """The claim about the loss along the gradient."""
    return claim("ablation", "smooth", lambda _, __: measure(study), compared=ARMS, edge=EDGE)
