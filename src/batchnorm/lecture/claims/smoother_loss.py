"""Claim "smooth": batch norm makes the loss smoother along the gradient (Santurkar et al. 2018).

At a point w of a training run with gradient g on the batch of the step, the loss and its gradient are evaluated at
w - d g for distances d = rate * (1/2, 1, 2, 4). ``instruments.loss_landscape`` says how rough the loss is there: its
range, the change of the gradient, beta-hat, and the cosine between g and the gradient after a step. beta-hat depends on
the scale of the weights: a network with batch norm computes the same with all weights before it doubled, but its
beta-hat is a quarter. So rate × beta-hat and the cosine are always told too.
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

RATE = 0.1  # equal for both arms: a rate at which both learn
EVERY = 10  # steps between two probes
LEARNED = 0.9
EDGE = 2.0


def of_batch(net: Ensemble, batch: Examples) -> Evaluate:
    """Loss and gradient of an ensemble on a batch in train mode; stored statistics stay as they are."""

    def evaluate(parameters: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        here = [parameter.detach().requires_grad_() for parameter in parameters]
        moved = Ensemble(net.template, dict(zip(net.parameters, here, strict=True)), net.buffers)
        loss = losses(moved(batch.x, train=True, keep_statistics=True), batch.y)
        return loss.detach(), torch.autograd.grad(loss.sum(), here)

    return evaluate


@dataclass(frozen=True, slots=True, eq=False)
class Course:
    """The loss along the gradients of one arm in training; S seeds, two rates each: equal and its best.

    Args:
        rates: The two rates.
        steps: Steps at which it was probed, (T,).
        met: What was measured there, (T, S, 2) each.
        accuracy: Best training accuracy reached, in eval mode, (S, 2).
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
    """Probe both arms at an equal rate and at the best rate of each."""
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


# Criterion -> quantity, and 0 for the equal rate or 1 for the best
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
# What has a chart over steps: its title, its axis
_SHOWN = {
    "rate × beta-hat": (
        "Rate × beta-hat, the roughness as a step of that rate meets it",
        Axis("rate × beta-hat", log=True),
    ),
    "loss range": (
        "Range of the loss over steps of 1/2 to 4 times the rate, in nats",
        Axis("range of the loss along the gradient [nats]", log=True),
    ),
    "gradient change": (
        "Largest change of the gradient over those steps",
        Axis("largest change of the gradient", log=True),
    ),
    "cosine": (
        "Cosine of the gradients before and after a step",
        Axis("cosine of the gradients before and after a step", domain=(-1, 1)),
    ),
}


def _effects(courses: dict[str, Course]) -> dict[str, Tensor]:
    """log2 of each positive quantity, without / with batch norm, averaged over the run, (S, 2).

    Logarithms are averaged, so that every time counts the same and no single spike decides.
    """
    return {
        name: (_QUANTITIES[name](courses["without"]) / _QUANTITIES[name](courses["with"])).log2().mean(0)
        for name in _POSITIVE
    }


def _typical(course: Course, name: str, which: int) -> float:
    """A quantity averaged over the run and the seeds, a positive one by its logarithm."""
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
    """As an effect at the equal rate, but where both arms have the same batch loss, (S,).

    At an equal step the arm with batch norm is further along. Here each probe without is held against the value that
    the arm with batch norm had at that loss, interpolated in logarithms; NaN where the losses do not overlap.
    """
    loss = {arm: course.met.loss[:, :, 0].log2().T.numpy() for arm, course in courses.items()}  # (S, T)
    value = {arm: _QUANTITIES[name](course)[:, :, 0].log2().T.numpy() for arm, course in courses.items()}
    ratios = []
    for seed, (at, known) in enumerate(zip(loss["without"], loss["with"], strict=True)):
        order = np.argsort(known)
        inside = (at >= known.min()) & (at <= known.max())
        matched = np.interp(at[inside], known[order], value["with"][seed][order])
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
