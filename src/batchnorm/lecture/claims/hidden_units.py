"""Claim "hidden": batch norm helps hidden units as normalization helps inputs."""

from __future__ import annotations

from torch import Tensor

from batchnorm.experiment import paired_seeds
from batchnorm.experiment.claim import Numbers, Result, chart, claim
from batchnorm.experiment.judgement import Verdict
from batchnorm.experiment.run_settings import Progress, RunSettings
from batchnorm.lecture.claim_criteria import judge
from batchnorm.lecture.rate_sweep import BOTH, EVERY, RATES, TARGET, Sweep, sweep
from batchnorm.reporting.charts.chart_data import SERIES, Chart

ACTIVATIONS = ("relu", "sigmoid")
_NAMES = {"relu": "ReLU", "sigmoid": "sigmoid"}
USABLE = 0.9  # final training accuracy of a usable rate


def run(settings: RunSettings, progress: Progress) -> Result:
    """Train the network with and without batch norm, with ReLU and sigmoid, at every rate of one grid, and judge it."""
    sweeps: dict[str, dict[str, Sweep]] = {}
    for done, activation in enumerate(ACTIVATIONS, start=1):
        sweeps[activation] = {arm: sweep(settings, activation, norm) for arm, norm in BOTH.items()}
        progress(done / len(ACTIVATIONS))
    speeds = [judge_speed(name, arms) for name, arms in sweeps.items()]
    ranges = [_judge_rate(name, arms) for name, arms in sweeps.items()]
    numbers: Numbers = {
        f"best learning rate, {_NAMES[name]}, {arm} batch norm": RATES[s.best_rate()]
        for name, arms in sweeps.items()
        for arm, s in arms.items()
    }
    return Result([*speeds, *ranges], [_curves(sweeps, speeds), _usable(sweeps, ranges)], numbers)


def judge_speed(activation: str, arms: dict[str, Sweep]) -> Verdict:
    """The verdict on a ratio: steps to TARGET without batch norm divided by steps with it, each at its best rate.

    A seed that never reaches TARGET counts with the last step.
    """
    slow, fast = arms["without"].best(), arms["with"].best()
    ratios = slow.steps / fast.steps
    failed = f"with batch norm not every seed reached {TARGET:.0%} in {fast.last} steps" if fast.late else ""
    return judge(
        f"hidden-speed-{activation}", ratios.log2().tolist(),
        "{activation}: {fast} steps to {target:.0%} training accuracy with batch norm, {slow} without "
        "({bound}{ratio:.1f} times as many).", bound="at least" if slow.late else "", failed_guard=failed,
        target=TARGET, activation=_NAMES[activation], fast=str(fast), slow=str(slow),
        ratio=paired_seeds.factor(ratios),
    )  # fmt: skip


def _judge_rate(activation: str, arms: dict[str, Sweep]) -> Verdict:
    """The verdict on a ratio: the largest usable rate with batch norm divided by the largest without it.

    For a seed without a usable rate, the smallest rate of the grid is used.
    """
    largest = {name: arm.largest_rate(USABLE) for name, arm in arms.items()}
    ratio = largest["with"].clamp_min(RATES[0]) / largest["without"].clamp_min(RATES[0])
    failed = (
        f"with batch norm a seed ended below {USABLE:.0%} at every rate" if bool((largest["with"] == 0).any()) else ""
    )
    return judge(
        f"hidden-rate-{activation}", ratio.log2().tolist(),
        "{activation}: the largest learning rate with a final training accuracy of {usable:.0%} or more is {normed} "
        "with batch norm, {plain} without (medians over seeds).", failed_guard=failed, activation=_NAMES[activation],
        usable=USABLE, normed=_largest(largest["with"]), plain=_largest(largest["without"]),
    )  # fmt: skip


def _largest(rates: Tensor) -> str:
    """The median over seeds in words; a median of 0 means that at least half of the seeds have no usable rate."""
    median = float(paired_seeds.median(rates))
    if not median:
        return "not in the grid"
    return f"{median:g}" + (" (the grid's largest)" if median == RATES[-1] else "")


def _curves(sweeps: dict[str, dict[str, Sweep]], verdicts: list[Verdict]) -> Chart:
    rows = [
        row
        for activation, arms in sweeps.items()
        for name, arm in arms.items()
        for row in paired_seeds.curve(
            arm.steps.tolist(), arm.best_curve(), series=f"{name} batch norm", panel=_NAMES[activation]
        )
    ]
    return chart(
        "lecture", "hidden", "curves", rows, SERIES, first=verdicts[0].heading,
        verdicts=" ".join(verdict.sentence for verdict in verdicts),
    )  # fmt: skip


def _usable(sweeps: dict[str, dict[str, Sweep]], verdicts: list[Verdict]) -> Chart:
    rows, summaries = [], []
    for activation, arms in sweeps.items():
        counts = {}
        for name, arm in arms.items():
            final = arm.accuracy[-1]  # (seeds, rates)
            rows += paired_seeds.curve(arm.rates, final.T, series=f"{name} batch norm", panel=_NAMES[activation])
            counts[name] = int((paired_seeds.median(final, 0) >= USABLE).sum())
        summaries.append(f"{_NAMES[activation]} {counts['with']} with batch norm and {counts['without']} without")
    return chart(
        "lecture", "hidden", "usable", rows, SERIES, rates=len(RATES), usable=USABLE, counts=", ".join(summaries),
        verdicts=" ".join(verdict.sentence for verdict in verdicts),
    )  # fmt: skip


CLAIM = claim("lecture", "hidden", run, rates=len(RATES), lowest=RATES[0], highest=RATES[-1], every=EVERY)
