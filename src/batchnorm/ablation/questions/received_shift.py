"""Question "shift": do the inputs of batch norm layers shift less with batch norm while earlier layers learn?"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.ablation.arms import CALLED, WITH, WITHOUT
from batchnorm.ablation.question_criteria import judge
from batchnorm.ablation.questions.speed_and_rates import ARMS, wide_axis
from batchnorm.ablation.study import PAIR, Study
from batchnorm.ablation.watched_runs import WatchedRun
from batchnorm.experiment import paired_seeds
from batchnorm.experiment.claim import Claim, Numbers, Result, chart, claim
from batchnorm.experiment.figures_in_words import known
from batchnorm.experiment.judgement import Verdict
from batchnorm.reporting.charts.chart_data import SERIES, Chart, Rows
from batchnorm.reporting.text import many

_LAYERS = 16  # the most layers in the chart by layer


def measure(study: Study) -> Result:
    """The drift of all layers in both arms, at the same learning rate."""
    verdict = _judge(study)
    charts = [chart for chart in (_by_layer(study), _over_time(study)) if chart.rows]
    rate = study.plan.rates[study.grid.shared()]
    numbers: Numbers = {"equal learning rate": rate}
    for arm in PAIR:
        floor = [torch.tensor([*w.floor.values()]).mean() for w in study.equal(arm) if w.floor]
        if floor:
            numbers[f"noise floor {CALLED[arm]}, sd"] = paired_seeds.mean(torch.stack(floor))
    return Result([verdict], charts, numbers)


def _averages(runs: list[WatchedRun]) -> Tensor:
    return torch.tensor([run.average for run in runs])


def _judge(study: Study) -> Verdict:
    if failed := study.unlearned(equal=True) or study.unwatched(equal=True):
        return judge("shift-drift", [], "", failed_guard=failed)
    plain, normed = (_averages(study.equal(arm)) for arm in PAIR)
    ratio = plain / normed
    return judge(
        "shift-drift", ratio.log2().tolist(),
        "The layers' inputs move by {normed:.2g} standard deviations in {steps} with batch norm, by {plain:.2g} "
        "without ({ratio:times} times as much), both at the rate {rate:g}.",
        normed=paired_seeds.factor(normed), steps=many(_apart(study), "step"), plain=paired_seeds.factor(plain),
        ratio=paired_seeds.factor(ratio), rate=study.plan.rates[study.grid.shared()],
    )  # fmt: skip


def _apart(study: Study) -> int:
    looked = study.equal(WITH)[0].looked
    return looked[1] - looked[0] if len(looked) > 1 else study.plan.steps


def _layers(study: Study) -> list[str]:
    """Paths of layers that were measured in every run, in the order of the forward, at most 16."""
    runs = [run for arm in PAIR for run in study.equal(arm)]
    paths = [path for path in runs[0].moved if all(path in run.moved for run in runs)]
    return [paths[i] for i in paired_seeds.evenly(len(paths), _LAYERS).tolist()]


def _by_layer(study: Study) -> Chart:
    rows: Rows = []
    for path in _layers(study):
        for arm in PAIR:
            values = torch.stack([run.moved[path].mean() for run in study.equal(arm)])
            if bool((values > 0).all()) and bool(values.isfinite().all()):
                row = {"label": path or "the layer", "value": paired_seeds.figures(paired_seeds.median(values))}
                extent = {"low": paired_seeds.figures(values.min()), "high": paired_seeds.figures(values.max())}
                rows.append(row | extent | {"series": CALLED[arm]})
    less = sum(
        float(paired_seeds.median(torch.stack([run.moved[path].mean() for run in study.equal(WITH)])))
        < float(paired_seeds.median(torch.stack([run.moved[path].mean() for run in study.equal(WITHOUT)])))
        for path in _layers(study)
    )
    title = f"{less} of {len(_layers(study))} layers in this chart have inputs that move less with batch norm"
    return chart(
        "ablation", "shift", "by-layer", rows, SERIES, x=wide_axis(f"drift in {_apart(study)} steps [sd]", rows),
        title=title,
    )  # fmt: skip


def _over_time(study: Study) -> Chart:
    rows: Rows = []
    for arm in PAIR:
        runs = study.equal(arm)
        times = min((len(next(iter(run.moved.values()))) for run in runs if run.moved), default=0)
        if not times or not all(run.moved for run in runs):
            continue
        values = torch.stack([torch.stack([d[:times] for d in run.moved.values()]).mean(0) for run in runs], 1)
        steps = runs[0].looked[1 : times + 1]
        rows += paired_seeds.curve(steps, values, positive=True, series=CALLED[arm])
    plain, normed = (paired_seeds.factor(_averages(study.equal(arm))) for arm in PAIR)
    title = f"Averaged over layers, the drift is {known(plain)} without batch norm and {known(normed)} with batch norm"
    return chart("ablation", "shift", "over-time", rows, SERIES, title=title, steps=_apart(study))


def shift(study: Study) -> Claim:
    """The claim about drift."""
    return claim("ablation", "shift", lambda _, __: measure(study), compared=ARMS)
