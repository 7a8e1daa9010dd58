"""Claim "smooth": batch norm makes the loss smoother along the gradient (Santurkar et al. 2018).

At parameters w of a training run, with gradient g on the batch of the step, the loss and its gradient are evaluated at
w - d g for d = rate * (1/2, 1, 2, 4). ``instruments.loss_landscape`` computes how rough the loss is there: its range,
the change of the gradient, beta-hat (the largest change of the gradient per distance), and the cosine between g and the
gradient after a step. beta-hat depends on the
scale of the weights: if all weights before batch norm are doubled, the network computes the same function, but its
beta-hat is divided by four. So rate × beta-hat and the cosine are always reported too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from batchnorm.experiment import paired_seeds
from batchnorm.experiment.claim import Numbers, Result, chart, claim
from batchnorm.experiment.judgement import Verdict
from batchnorm.experiment.run_settings import Progress, RunSettings
from batchnorm.instruments.loss_landscape import Evaluate, Roughness, along_gradient
from batchnorm.lecture.claim_criteria import CRITERIA, judge
from batchnorm.lecture.data_sets import Examples
from batchnorm.lecture.ensemble_training import accuracies, losses, sgd
from batchnorm.lecture.networks import Ensemble, fully_connected
from batchnorm.lecture.rate_sweep import BOTH, RATES, SIZES, STEPS, digits, probe_indices, sweep, training_indices
from batchnorm.reporting.charts.chart_data import SERIES, Axis, Chart, Role

RATE = 0.1  # the equal rate, at which both arms learn
EVERY = 10  # steps between two measurements
LEARNED = 0.9  # training accuracy
EDGE = 2.0  # rate × beta-hat from which on plain gradient descent on a quadratic loss is unstable


def of_batch(net: Ensemble, batch: Examples) -> Evaluate:
    """A function of the parameters: loss and gradient of an ensemble on a batch, in train mode.

    Stored statistics are not changed.
    """

    def evaluate(parameters: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        leaves = [parameter.detach().requires_grad_() for parameter in parameters]
        moved = Ensemble(net.template, dict(zip(net.parameters, leaves, strict=True)), net.buffers)
        loss = losses(moved(batch.x, train=True, keep_statistics=True), batch.y)
        return loss.detach(), torch.autograd.grad(loss.sum(), leaves)

    return evaluate


@dataclass(frozen=True, slots=True, eq=False)
class Course:
    """The loss along the gradients of one arm during the training, for S seeds and two rates.

    Args:
        rates: The equal rate and the arm's best rate.
        steps: Training steps at which the loss was measured, (T,).
        met: The measurements at these steps, (T, S, 2) each.
        accuracy: Highest training accuracy of the run in eval mode, (S, 2).
    """

    rates: tuple[float, float]
    steps: Tensor
    met: Roughness
    accuracy: Tensor

    @property
    def rate_beta(self) -> Tensor:
        """Rate times beta-hat, (T, S, 2)."""
        return self.met.beta * torch.tensor(self.rates)


def run(settings: RunSettings, progress: Progress) -> Result:
    """Train and measure both arms at an equal rate and at the best rate of each arm."""
    best: dict[str, float] = {}
    for arm, norm in BOTH.items():
        best[arm] = RATES[sweep(settings, "relu", norm).best_rate()]
        progress(len(best) / 4)
    courses: dict[str, Course] = {}
    for arm in BOTH:
        courses[arm] = _course(settings, arm, (RATE, best[arm]))
        progress(0.5 + len(courses) / 4)
    effects = _effects(courses)
    verdicts = [_judge(key, courses, effects) for key in _ASKED]
    charts = [_ratios(effects), *(_lines(name, courses) for name in _SHOWN)]
    return Result(verdicts, charts, _numbers(courses, effects))


def _course(settings: RunSettings, arm: str, rates: tuple[float, float]) -> Course:
    steps = settings.steps(STEPS)
    net = Ensemble.of(lambda: fully_connected(SIZES, "relu", BOTH[arm]), settings.all_seeds, repeat=2)
    indices = training_indices(settings, steps).repeat_interleave(2, 0)
    probe = digits()[probe_indices(settings).repeat_interleave(2, 0)]
    each = torch.tensor(rates).repeat(settings.seeds)
    met: list[Roughness] = []
    learned: list[Tensor] = []

    def observe(step: int) -> None:
        if step % EVERY == 0 or step == steps:
            with torch.no_grad():
                learned.append(accuracies(net(probe.x), probe.y))
        if step % EVERY == 0 and step < steps:
            batch = digits()[indices[:, step]]
            met.append(along_gradient(of_batch(net, batch), [*net.parameters.values()], each))

    sgd(net, digits(), indices, each, observe)
    accuracy = torch.stack(learned).amax(0).view(settings.seeds, 2)
    course = Roughness.joined(met, lambda values: torch.stack([v.unflatten(0, (-1, 2)) for v in values]))
    return Course(rates, torch.arange(len(met)) * EVERY, course, accuracy)


# Criterion -> quantity, and the index of the rate: 0 for the equal rate, 1 for the best rate
_ASKED = {
    "smooth-equal": ("beta-hat", 0),
    "smooth-variation": ("loss range", 0),
    "smooth-predictive": ("gradient change", 0),
    "smooth-best": ("rate × beta-hat", 1),
}
_QUANTITIES: dict[str, Callable[[Course], Tensor]] = {
    "beta-hat": lambda course: course.met.beta,
    "rate × beta-hat": lambda course: course.rate_beta,
    "loss range": lambda course: course.met.loss_range,
    "gradient change": lambda course: course.met.gradient_change,
    "cosine": lambda course: course.met.cosine_after,
}
_POSITIVE = tuple(name for name in _QUANTITIES if name != "cosine")
_EDGE = "edge of stability"
# Quantity with a chart over steps -> title and axis of the chart
_SHOWN = {
    "rate × beta-hat": (
        "Rate × beta-hat, the roughness for a step of that rate",
        Axis("rate × beta-hat", log=True),
    ),
    "loss range": (
        "Range of the loss over steps of 1/2 to 4 times the rate, in nats",
        Axis("range of the loss along the gradient [nats]", log=True),
    ),
    "gradient change": (
        "Largest change of the gradient over steps of 1/2 to 4 times the rate",
        Axis("largest change of the gradient", log=True),
    ),
    "cosine": (
        "Cosine of the gradients before and after a step",
        Axis("cosine of the gradients before and after a step", domain=(-1, 1)),
    ),
}


def _effects(courses: dict[str, Course]) -> dict[str, Tensor]:
    """Quantity -> log2 of without / with batch norm, averaged over the run, (S, 2); only positive quantities.

    Logarithms are averaged, so that every step has the same weight and a single spike has little influence.
    """
    return {
        name: (_QUANTITIES[name](courses["without"]) / _QUANTITIES[name](courses["with"])).log2().mean(0)
        for name in _POSITIVE
    }


def _typical(course: Course, name: str, which: int) -> float:
    """A quantity averaged over the run and the seeds; for a positive quantity the geometric mean."""
    values = _QUANTITIES[name](course)[:, :, which]
    return float(values.log().mean().exp() if name in _POSITIVE else values.mean())


def _judge(key: str, courses: dict[str, Course], effects: dict[str, Tensor]) -> Verdict:
    name, which = _ASKED[key]
    effect = effects[name][:, which]
    plain, normed = (_typical(courses[arm], name, which) for arm in BOTH)
    rates = [courses[arm].rates[which] for arm in BOTH]
    at = f"the equal rate {RATE:g}" if which == 0 else f"the best rates {rates[0]:g} without and {rates[1]:g} with"
    return judge(
        key, effect.tolist(),
        "{quantity} at {at}: {plain:.2g}{unit} without batch norm, {normed:.2g}{unit} with ({ratio:.1f} times as large "
        "without).",
        failed_guard=_failed(courses, effect, which), quantity=name, at=at, plain=plain, normed=normed,
        unit=" nats" if name == "loss range" else "", ratio=effect.mean().exp2(),
    )  # fmt: skip


def _failed(courses: dict[str, Course], effect: Tensor, which: int) -> str:
    late = [
        f"{float(courses[arm].accuracy[:, which].min()):.0%} {arm} batch norm"
        for arm in BOTH
        if not float(courses[arm].accuracy[:, which].min()) >= LEARNED
    ]
    if late:
        return f"the worst seed reached {' and '.join(late)}"
    return "" if bool(effect.isfinite().all()) else "the loss along the gradient is not finite everywhere"


def at_equal_loss(courses: dict[str, Course], name: str) -> Tensor:
    """The effect at the equal rate, compared at equal batch loss instead of at equal steps, (S,).

    At an equal step the arm with batch norm has learned more. Here each measurement without batch norm is compared with
    the value that the arm with batch norm had at the same loss, interpolated in logarithms. NaN if the losses of the
    arms do not overlap.
    """
    loss = {arm: course.met.loss[:, :, 0].log2().T.numpy() for arm, course in courses.items()}  # (S, T)
    value = {arm: _QUANTITIES[name](course)[:, :, 0].log2().T.numpy() for arm, course in courses.items()}
    ratios = []
    for seed, (at, reference) in enumerate(zip(loss["without"], loss["with"], strict=True)):
        order = np.argsort(reference)
        inside = (at >= reference.min()) & (at <= reference.max())
        matched = np.interp(at[inside], reference[order], value["with"][seed][order])
        ratios.append(float((value["without"][seed][inside] - matched).mean()) if inside.any() else float("nan"))
    return torch.tensor(ratios)


def _numbers(courses: dict[str, Course], effects: dict[str, Tensor]) -> Numbers:
    numbers: Numbers = {}
    for which, at in enumerate(("equal rate", "best rate")):
        for arm, course in courses.items():
            for name in ("rate × beta-hat", "cosine"):
                typical = paired_seeds.figures(_typical(course, name, which), 3)
                numbers[f"{name}, {at}, {arm} batch norm"] = typical if math.isfinite(typical) else None
    for name in ("loss range", "gradient change"):
        numbers[f"{name}, best rate, log2 of without / with"] = paired_seeds.mean(effects[name][:, 1])
    for name in ("beta-hat", "loss range", "gradient change"):
        matched = paired_seeds.mean(at_equal_loss(courses, name))
        numbers[f"{name} where both arms have the same loss, equal rate, log2 of without / with"] = matched
    return numbers


def _ratios(effects: dict[str, Tensor]) -> Chart:
    names = ("equal rate", "each at its best rate")
    rows = [
        {"label": name, **paired_seeds.interval(effects[name][:, which], CRITERIA.level), "series": series}
        for name in _POSITIVE
        for which, series in enumerate(names)
        if bool(effects[name][:, which].isfinite().all())
    ]
    equal, best = (
        float(effects[name][:, which].mean().exp2()) for name, which in (("beta-hat", 0), ("rate × beta-hat", 1))
    )
    return chart("lecture", "smooth", "ratios", rows, dict.fromkeys(names, "neutral"), equal=equal, best=best)


def _lines(name: str, courses: dict[str, Course]) -> Chart:
    rates = [courses[arm].rates[1] for arm in BOTH]
    panels = (f"equal rate {RATE:g}", f"best rates: {rates[0]:g} without, {rates[1]:g} with")
    rows = []
    for which, panel in enumerate(panels):
        for arm, course in courses.items():
            values = _QUANTITIES[name](course)[:, :, which]
            positive = name in _POSITIVE
            rows += paired_seeds.curve(
                course.steps.tolist(), values, positive=positive, series=f"{arm} batch norm", panel=panel
            )
        if name == "rate × beta-hat":
            ends = (0, int(courses["with"].steps[-1]))
            rows += [{"x": x, "y": EDGE, "series": _EDGE, "panel": panel} for x in ends]
    title, axis = _SHOWN[name]
    means = [[_typical(courses[arm], name, which) for arm in BOTH] for which in (0, 1)]
    edge = "; the dashed line is the edge of stability, 2" if name == "rate × beta-hat" else ""
    reference: dict[str, Role] = {_EDGE: "neutral"} if edge else {}
    return chart(
        "lecture", "smooth", "lines", rows, SERIES | reference, dashed=tuple(reference), y=axis, what=title,
        plain=means[0][0], normed=means[0][1], plain_best=means[1][0], normed_best=means[1][1], edge=edge,
    )  # fmt: skip


CLAIM = claim("lecture", "smooth", run, steps=STEPS, rate=RATE, rates=len(RATES), every=EVERY)
