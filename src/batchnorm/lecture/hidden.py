"""Claim "hidden": batch norm does for hidden units what normalization does for inputs."""

from __future__ import annotations

from torch import Tensor

from batchnorm.lecture.claim import Axis, Chart, Claim, Progress, Result, Role, Settings, Verdict
from batchnorm.lecture.sweep import EVERY, RATES, Sweep, sweep
from batchnorm.lecture.verdict import judge

ACTIVATIONS = ("relu", "sigmoid")
_NAMES = {"relu": "ReLU", "sigmoid": "sigmoid"}
TARGET = 0.95
USABLE = 0.9


def run(settings: Settings, progress: Progress) -> Result:
    """Sweep both arms with both activations over one grid of learning rates."""
    sweeps: dict[str, dict[str, Sweep]] = {}
    for done, activation in enumerate(ACTIVATIONS, start=1):
        sweeps[activation] = {arm: sweep(settings, activation, arm) for arm in ("without", "with")}
        progress(done / len(ACTIVATIONS))
    speeds = [judge_speed(name, arms) for name, arms in sweeps.items()]
    ranges = [_judge_rate(name, arms) for name, arms in sweeps.items()]
    numbers = {
        f"best learning rate, {_NAMES[name]}, {arm} batch norm": RATES[s.best_rate()]
        for name, arms in sweeps.items()
        for arm, s in arms.items()
    }
    return Result([*speeds, *ranges], [_curves(sweeps, speeds), _usable(sweeps, ranges)], numbers)


def steps_at_best(arm: Sweep) -> tuple[Tensor, bool]:
    """Each seed's steps to the target at the arm's best rate, and whether one never got there: it counts the last."""
    steps = arm.steps_to(TARGET)[:, arm.best_rate()]
    return steps.clamp_max(float(arm.steps[-1])), bool(steps.isinf().any())


def judge_speed(activation: str, arms: dict[str, Sweep]) -> Verdict:
    """Steps to the target without against with batch norm, each at its best rate."""
    (slow, slow_cut), (fast, fast_cut) = steps_at_best(arms["without"]), steps_at_best(arms["with"])
    ratio = float((slow / fast).log2().mean().exp2())
    sentence = (
        f"{_NAMES[activation]}: {fast.median():.0f} steps with batch norm, "
        f"{'more than ' if slow_cut else ''}{slow.median():.0f} without "
        f"({'at least ' if slow_cut else ''}{ratio:.1f} times as many)."
    )
    failed = (
        f"with batch norm not every seed reached {TARGET:.0%} in {int(arms['with'].steps[-1])} steps"
        if fast_cut
        else ""
    )
    return judge(f"hidden-speed-{activation}", (slow / fast).log2().tolist(), sentence, failed_guard=failed)


def _judge_rate(activation: str, arms: dict[str, Sweep]) -> Verdict:
    """Largest usable rate with against without; an arm with no usable rate counts with the smallest of the grid."""
    largest = {name: arm.largest_rate(USABLE) for name, arm in arms.items()}
    none = bool((largest["without"] == 0).any())
    ratio = largest["with"].clamp_min(RATES[0]) / largest["without"].clamp_min(RATES[0])
    plain = "no rate of the grid works without" if none else f"up to {largest['without'].median():g} without"
    sentence = f"{_NAMES[activation]}: learning rates up to {largest['with'].median():g} work with batch norm, {plain}."
    failed = f"no rate reached {USABLE:.0%} with batch norm" if bool((largest["with"] == 0).any()) else ""
    return judge(f"hidden-rate-{activation}", ratio.log2().tolist(), sentence, failed_guard=failed)


_SERIES: dict[str, Role] = {"without batch norm": "without", "with batch norm": "with"}


def _curves(sweeps: dict[str, dict[str, Sweep]], verdicts: list[Verdict]) -> Chart:
    rows = []
    for activation, arms in sweeps.items():
        for name, arm in arms.items():
            curve = arm.accuracy[:, :, arm.best_rate()]  # (T, seeds)
            rows += [_row(int(step), curve[t], name, activation) for t, step in enumerate(arm.steps)]
    return Chart(
        "lines",
        f"At its best learning rate each: {verdicts[0].sentence.rstrip('.')}",
        "Training accuracy against steps, one panel for ReLU and one for sigmoid, with a curve and its band over seeds "
        f"for each arm. {' '.join(verdict.sentence for verdict in verdicts)}",
        rows,
        Axis("training step"),
        Axis("training accuracy", domain=(0, 1), percent=True),
        _SERIES,
    )


def _row(x: float, accuracy: Tensor, arm: str, activation: str) -> dict[str, float | str]:
    """One point with its range over seeds."""
    y, low, high = (round(float(value), 4) for value in (accuracy.median(), accuracy.min(), accuracy.max()))
    return {"x": x, "y": y, "low": low, "high": high, "series": f"{arm} batch norm", "panel": _NAMES[activation]}


def _usable(sweeps: dict[str, dict[str, Sweep]], verdicts: list[Verdict]) -> Chart:
    rows = []
    for activation, arms in sweeps.items():
        for name, arm in arms.items():
            final = arm.accuracy[-1]  # (seeds, rates)
            rows += [_row(rate, final[:, r], name, activation) for r, rate in enumerate(arm.rates)]
    counts = {
        activation: [int((arm.accuracy[-1].median(0).values >= USABLE).sum()) for arm in arms.values()]
        for activation, arms in sweeps.items()
    }
    found = " and ".join(f"{w} instead of {wo} ({_NAMES[name]})" for name, (wo, w) in counts.items())
    return Chart(
        "points",
        f"Of {len(RATES)} learning rates, batch norm makes {found} end at {USABLE:.0%} or more",
        "Final training accuracy against learning rate on a log scale, one panel for each activation, one point with "
        f"its range over seeds for each arm and rate. {' '.join(verdict.sentence for verdict in verdicts)}",
        rows,
        Axis("learning rate", log=True),
        Axis("final training accuracy", domain=(0, 1), percent=True),
        _SERIES,
    )


CLAIM = Claim(
    name="hidden",
    title="The same for hidden units",
    sentence=(
        "Normalizing the inputs makes learning easier when features differ in range; batch norm does the same "
        "for the values of hidden units, not only for the inputs, and so speeds up learning."
    ),
    arms=(
        "The lecture's network with weights W1 to W5 (64 pixels, four hidden layers of 64, 10 digits) without and "
        "with batch norm before each activation, from the same initialization for its activation. Plain SGD, batches "
        f"of 64, {len(RATES)} learning rates from {RATES[0]} to {RATES[-1]:g} for both arms; accuracy on 300 training "
        f"examples every {EVERY} steps, in eval mode."
    ),
    how_to_read=(
        "In the first chart look at how far left a curve rises: that is speed, each arm at its own best rate, with "
        "the band spanning all seeds. In the second look at how many rates still end high."
    ),
    not_shown=(
        "It does not say why batch norm helps, and nothing about final test accuracy; residual networks and adaptive "
        "optimizers narrow the gap. An arm that never arrives counts with the last step, so its ratio is a lower bound."
    ),
    sources=(
        "Ioffe and Szegedy 2015, Batch Normalization, section 4",
        "Bjorck et al. 2018, Understanding Batch Normalization",
    ),
    run=run,
)
