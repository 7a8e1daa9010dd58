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

_MOST_FEATURES = 4096  # with more features, no condition number of the features is computed
_MOST_IN_CHART = 16  # features
_HUGE = 1e9  # ratios of at least this are written in scientific notation, with three digits


def inputs(data: Data) -> Tensor | None:
    """All training inputs in one tensor, (N, ...), on the CPU.

    None unless each is a floating-point tensor of two axes or more, and all have the same shape except for the number
    of examples.
    """
    tensors = [x for x in map(inputs_of, data.train) if x is not None]
    fits = len(tensors) == len(data.train) and len({x.shape[1:] for x in tensors}) == 1
    return torch.cat(tensors).cpu() if fits else None


def can_ask(study: Study) -> bool:
    """Whether the question can be asked: an arm with normalized inputs was planned, or there are several features."""
    x = inputs(study.subject.data)
    return SCALED in {*study.grid.losses, *study.grid.failed} or (x is not None and x.shape[1] > 1)


def measure(study: Study) -> Result:
    """The spread of the features, and the verdicts on the arm with normalized inputs, if there is one."""
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
        spread_result = spread(x, study.plan.all_seeds)
        verdicts, charts = [*verdicts, *spread_result.verdicts], [*charts, *spread_result.charts]
        return Result(verdicts, charts, spread_result.numbers)
    return Result(verdicts, charts)


def spread(x: Tensor, seeds: range) -> Result:
    """The largest over the smallest standard deviation of the features that vary.

    The sentence is about all examples, and the interval about a random half of the examples for each seed.
    """
    whole = Moments.of(x)
    halves = [_ratio(Moments.of(x[_half(len(x), seed)])) for seed in seeds]
    sds = whole.std[whole.var > 0]
    noun = "feature" if x.ndim == 2 else "channel"
    failed = "" if len(sds) else f"not one of the {len(whole.mean)} {noun}s has a finite variance above 0"
    verdict = judge(
        "scale-spread", torch.tensor(halves).log10().tolist(),
        "The standard deviations of the {count} {noun}s{varying} lie between {least:.3g} and {most:.3g}: the largest "
        "is {ratio} times the smallest.", varying="" if len(sds) == len(whole.mean) else " that vary",
        failed_guard=failed, count=len(sds), noun=noun, ratio=_ratio_in_words(_ratio(whole)),
        least=sds.min() if len(sds) else 0.0, most=sds.max() if len(sds) else 0.0,
    )  # fmt: skip
    numbers: Numbers = {f"{noun}s that never vary": int((whole.var == 0).sum()), **_conditions(x)}
    return Result([verdict], [_spread_chart(whole, noun, verdict)], numbers)


def _ratio_in_words(ratio: float) -> str:
    """A ratio with three significant digits."""
    return f"{float(f'{ratio:.3g}'):,.0f}" if 1000 <= ratio < _HUGE else f"{ratio:.3g}"


def _half(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: max(2, count // 2)]


def _ratio(moments: Moments) -> float:
    sds = moments.std[moments.var > 0]
    return float(sds.max() / sds.min()) if len(sds) else 1.0


def _condition(x: Tensor) -> float:
    """Condition number of the inputs ``x``, (N, F), without their constant features."""
    x = x.double()
    return condition_number(x[:, x.std(0) > 0])


def _conditions(x: Tensor) -> Numbers:
    """Condition numbers before and after normalization.

    Of all features, if they are at most 4,096 and at most half as many as the examples. Otherwise of channels, if they
    are at most 4,096 and at most half as many as the values of a channel; {} if there are more.
    """
    flat, what = x.flatten(1), "features"
    if flat.shape[1] > min(_MOST_FEATURES, len(x) // 2):
        flat, what = x.movedim(1, -1).flatten(0, -2), "channels"
    if flat.shape[1] > min(_MOST_FEATURES, len(flat) // 2):
        return {}
    moments = Moments.of(flat)
    z = (flat.double() - moments.mean) / torch.where(moments.var > 0, moments.std, 1)
    pair = {"as they are": _condition(flat), "normalized": _condition(z)}
    return {f"condition number of {what}, {name}": paired_seeds.figures(value, 3) for name, value in pair.items()}


def _spread_chart(moments: Moments, noun: str, verdict: Verdict) -> Chart:
    order = moments.std.argsort(descending=True)
    order = order[moments.var[order] > 0]
    indices = paired_seeds.evenly(len(order), _MOST_IN_CHART)
    rows = [
        {"label": f"{noun} {int(i)}", "value": paired_seeds.figures(moments.std[i]), "series": "sd"}
        for i in order[indices]
    ]
    selected = (
        "" if len(rows) == len(moments.mean) else f" ({len(rows)} of {len(moments.mean)}, from largest to smallest)"
    )
    return chart(
        "ablation", "scale", "spread", rows, {"sd": "neutral"},
        x=wide_axis(f"standard deviation of the input {noun}s", rows), title=verdict.heading, noun=noun,
        selected=selected, told=verdict.statement,
    )  # fmt: skip


def scale(study: Study) -> Claim:
    """The question about input features."""
    why_no_arm = "" if SCALED in study.grid.losses else dict(study.plan.left_out).get("normalizing the inputs", "")
    arms = (
        f"{ARMS} In one more arm an InputNorm of the training data is in front of the model without batch norm."
        if not why_no_arm
        else f"The training inputs as the loader gives them. Training on normalized inputs was left out: {why_no_arm}."
    )
    return claim("ablation", "scale", lambda _, __: measure(study), compared=arms)
