"""Question "scale": are the input features on different scales, and does normalizing them do what batch norm does?"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.ablation.arms import SCALED, WITH, WITHOUT
from batchnorm.ablation.question_criteria import judge
from batchnorm.ablation.questions.speed_and_rates import ARMS, curves, versus, wide_axis
from batchnorm.ablation.study import Study
from batchnorm.ablation.user_data import Data, inputs_of
from batchnorm.experiment import paired_seeds
from batchnorm.experiment.claim import Claim, Numbers, Result, chart, claim
from batchnorm.experiment.judgement import Verdict
from batchnorm.instruments.condition_number import condition_number
from batchnorm.moments import Moments
from batchnorm.reporting.charts.chart_data import Chart, Role

_FEATURES = 4096  # at most so many, for their covariance
_SHOWN = 16  # features in the chart
_HUGE = 1e9  # ratios from here on are told by their power of ten


def inputs(data: Data) -> Tensor | None:
    """All training inputs, (N, ...), or None where they are not one float tensor of one shape."""
    found = [x for x in map(inputs_of, data.train) if x is not None]
    alike = len(found) == len(data.train) and len({x.shape[1:] for x in found}) == 1
    return torch.cat(found).cpu() if alike else None


def can_ask(study: Study) -> bool:
    """Whether there is anything to say of the inputs' scale: an arm, or several features."""
    x = inputs(study.subject.data)
    return SCALED in {*study.grid.losses, *study.grid.failed} or (x is not None and x.shape[1] > 1)


def measure(study: Study) -> Result:
    """Spread of the features, and the arm with normalized inputs where there is one."""
    x = inputs(study.subject.data)
    verdicts: list[Verdict] = []
    charts: list[Chart] = []
    if SCALED in {*study.grid.losses, *study.grid.failed}:
        verdicts.append(versus(study.grid, "scale-inputs", WITHOUT, SCALED))
        verdicts.append(versus(study.grid, "scale-instead", SCALED, WITH))
    if SCALED in study.grid.losses:
        roles: dict[str, Role] = {WITH: "with", WITHOUT: "without", SCALED: "without"}
        charts.append(curves(study.grid.versus(WITHOUT, SCALED), roles, verdicts[0]))
    if x is not None and x.shape[1] > 1:
        found = spread(x, study.plan.all_seeds)
        verdicts, charts = [*verdicts, *found.verdicts], [*charts, *found.charts]
        return Result(verdicts, charts, found.numbers)
    return Result(verdicts, charts)


def spread(x: Tensor, seeds: range) -> Result:
    """How far the standard deviations of features lie apart, in random halves of the examples."""
    whole = Moments.of(x)
    halves = [_ratio(Moments.of(x[_half(len(x), seed)])) for seed in seeds]
    sds = whole.std[whole.var > 0]
    noun = "feature" if x.ndim == 2 else "channel"
    failed = "" if len(sds) else f"no {noun} of the {len(whole.mean)} has a finite variance above 0"
    verdict = judge(
        "scale-spread", torch.tensor(halves).log10().tolist(),
        "The standard deviations of the {count} {noun}s lie between {least:.3g} and {most:.3g} ({ratio} times).",
        failed_guard=failed, count=len(whole.mean), noun=noun, ratio=_many(_ratio(whole)),
        least=sds.min() if len(sds) else 0.0, most=sds.max() if len(sds) else 0.0,
    )  # fmt: skip
    numbers: Numbers = {f"{noun}s that never vary": int((whole.var == 0).sum()), **_conditions(x)}
    return Result([verdict], [_spread_chart(whole, noun, verdict)], numbers)


def _many(ratio: float) -> str:
    """A ratio that may be huge, to three digits."""
    return f"{float(f'{ratio:.3g}'):,.0f}" if 1000 <= ratio < _HUGE else f"{ratio:.3g}"


def _half(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: max(2, count // 2)]


def _ratio(moments: Moments) -> float:
    sds = moments.std[moments.var > 0]
    return float(sds.max() / sds.min()) if len(sds) else 1.0


def _condition(x: Tensor) -> float:
    """Condition number over features that vary: (N, F)."""
    x = x.double()
    return condition_number(x[:, x.std(0) > 0])


def _conditions(x: Tensor) -> Numbers:
    """Of all features where there are enough examples to tell, else of channels; before and after normalization."""
    flat, what = x.flatten(1), "features"
    if flat.shape[1] > min(_FEATURES, len(x) // 2):
        flat, what = x.movedim(1, -1).flatten(0, -2), "channels"
    if flat.shape[1] > min(_FEATURES, len(flat) // 2):
        return {}
    moments = Moments.of(flat)
    z = (flat.double() - moments.mean) / torch.where(moments.var > 0, moments.std, 1)
    pair = {"as they are": _condition(flat), "normalized": _condition(z)}
    return {f"condition number of {what}, {name}": paired_seeds.figures(value, 3) for name, value in pair.items()}


def _spread_chart(moments: Moments, noun: str, verdict: Verdict) -> Chart:
    order = moments.std.argsort(descending=True)
    order = order[moments.var[order] > 0]
    kept = paired_seeds.evenly(len(order), _SHOWN)
    rows = [
        {"label": f"{noun} {int(i)}", "value": paired_seeds.figures(moments.std[i]), "series": "sd"}
        for i in order[kept]
    ]
    selected = (
        "" if len(rows) == len(moments.mean) else f" ({len(rows)} of {len(moments.mean)}, from widest to narrowest)"
    )
    return chart(
        "ablation", "scale", "spread", rows, {"sd": "neutral"},
        x=wide_axis(f"standard deviation of the input {noun}s", rows), title=verdict.heading, noun=noun,
        selected=selected, told=verdict.statement,
    )  # fmt: skip


def scale(study: Study) -> Claim:
    """The question about input features."""
    extra = "" if SCALED in study.grid.losses else dict(study.plan.left_out).get("normalizing the inputs", "")
    arms = (
        f"{ARMS} One more arm has no batch norm and an InputNorm of the training data in front."
        if not extra
        else f"The training inputs as the loader gives them. Training on normalized inputs was left out: {extra}."
    )
    return claim("ablation", "scale", lambda _, __: measure(study), compared=arms)
