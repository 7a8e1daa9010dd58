"""Claim "layer3": the inputs of the third layer shift less with batch norm."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from batchnorm.experiment import paired_seeds
from batchnorm.experiment.claim import Numbers, Result, chart, claim
from batchnorm.experiment.judgement import Verdict
from batchnorm.experiment.run_settings import Progress, RunSettings
from batchnorm.instruments.layer_drift import IDLE, drift, noise_floor
from batchnorm.lecture.claim_criteria import judge
from batchnorm.lecture.ensemble_training import accuracies, losses, sgd
from batchnorm.lecture.networks import Ensemble, fully_connected
from batchnorm.lecture.rate_sweep import BOTH, SIZES, STEPS, digits, probe_indices, training_indices
from batchnorm.reporting.charts.chart_data import SERIES, Chart

RATE = 0.1
EVERY = 10  # steps between two measurements of a[2]
PROBE = 256  # examples
LEARNED = 0.9  # training accuracy
# Widths and training steps. The network of the lecture's picture has only the four units a[2]1 .. a[2]4 in its second
# hidden layer. Without batch norm it needs the longer training to reach 90% accuracy.
NETWORKS = {"four": ((64, 64, 4, 64, 64, 10), 800), "wide": (SIZES, STEPS)}
CALLED = {"four": "four units", "wide": "wide"}


@dataclass(frozen=True, slots=True, eq=False)
class Layer3Values:
    """Values before the activation in front of layer 3 of one arm: T times, S seeds, a probe of N examples.

    Args:
        steps: Training steps at which the values were measured, (T,).
        batch: z~[2] (z[2] without batch norm) by the statistics of the probe, as in training, (T, S, N, units).
        stored: z~[2] by stored statistics, as in eval mode, (T, S, N, units).
        beta, gamma: Parameters of the second batch norm layer, (T, S, units); (T, S, 0) without batch norm.
        loss: Loss on the probe in eval mode before and after the training, nats, (2, S).
        accuracy: Final accuracy on the probe in eval mode, (S,).
    """

    steps: Tensor
    batch: Tensor
    stored: Tensor
    beta: Tensor
    gamma: Tensor
    loss: Tensor
    accuracy: Tensor

    @property
    def received(self) -> Tensor:
        """a[2], the inputs of layer 3 in training, (T, S, N, units)."""
        return self.batch.relu()


def run(settings: RunSettings, progress: Progress) -> Result:
    """Train both arms of both networks, and measure a[2] during the training."""
    readings: dict[str, dict[str, Layer3Values]] = {}
    for done, (name, (sizes, steps)) in enumerate(NETWORKS.items(), start=1):
        readings[name] = {arm: _watch(settings, net, steps) for arm, net in _paired(settings, sizes).items()}
        progress(done / len(NETWORKS))
    shifts = {name: {arm: Shift.of(s) for arm, s in arms.items()} for name, arms in readings.items()}
    verdicts = [_judge_shift(name, readings[name], shifts[name]) for name in ("wide", "four")]
    governed = {name: _distances(arms["with"]) for name, arms in readings.items()}
    charts = [_ribbons(readings["four"], shifts["four"], settings.seed), _over_time(readings, shifts)]
    charts.append(_governed_chart(readings["four"]["with"], governed["four"], settings.seed))
    return Result([*verdicts, _judge_governed(governed)], charts, _numbers(readings, shifts))


def _paired(settings: RunSettings, sizes: tuple[int, ...]) -> dict[str, Ensemble]:
    """Both arms, with the same first weights for each seed."""
    arms = {
        arm: Ensemble.of(partial(fully_connected, sizes, "relu", norm), settings.all_seeds)
        for arm, norm in BOTH.items()
    }
    with torch.no_grad():
        for layer in range(1, len(sizes)):
            weight = f"w{layer}.weight"
            arms["with"].parameters[weight].copy_(arms["without"].parameters[weight])
    return arms


def _watch(settings: RunSettings, net: Ensemble, full_steps: int) -> Layer3Values:
    steps = settings.steps(full_steps)
    probe = digits()[probe_indices(settings, PROBE)]
    last = "norm2" if "norm2.weight" in net.parameters else "w2"
    copies: list[tuple[Tensor, ...]] = []
    ends: list[tuple[Tensor, Tensor]] = []

    def observe(step: int) -> None:
        if step % EVERY == 0:
            copies.append((
                torch.tensor(step), net.behind(last, probe.x, train=True), net.behind(last, probe.x, train=False),
                *(net.parameters[name].detach().clone() for name in ("norm2.bias", "norm2.weight") if last == "norm2"),
            ))  # fmt: skip
        if step in {0, steps}:
            with torch.no_grad():
                logits = net(probe.x)
            ends.append((losses(logits, probe.y), accuracies(logits, probe.y)))

    sgd(net, digits(), training_indices(settings, steps), torch.full((settings.seeds,), RATE), observe)
    at, batch, stored, *affine = (torch.stack(values) for values in zip(*copies, strict=True))
    beta, gamma = affine or (stored.new_empty(len(at), settings.seeds, 0),) * 2
    loss = torch.stack([value for value, _ in ends])
    return Layer3Values(at, batch, stored, beta, gamma, loss, ends[-1][1])


@dataclass(frozen=True, slots=True, eq=False)
class Shift:
    """Drift of a[2] per EVERY steps over a training run.

    Args:
        total: Drift in train mode from each time to the next, (T - 1, S).
        floor: Noise floor at each time, (T, S).
        mean, log_sd: Mean part and log-sd part of the drift, averaged over the run, (S,).
        idle: Share of idle units, averaged over the run, (S,).
        eval: Drift in eval mode, averaged over the run, (S,).
    """

    total: Tensor
    floor: Tensor
    mean: Tensor
    log_sd: Tensor
    idle: Tensor
    eval: Tensor

    @classmethod
    def of(cls, readings: Layer3Values) -> Shift:
        """The drift between successive times."""
        moved, stored = (drift(values[:-1], values[1:]) for values in (readings.received, readings.stored.relu()))
        parts = (moved.mean.mean(0), moved.log_sd.mean(0), moved.idle.mean(0))
        return cls(moved.total, noise_floor(readings.received), *parts, stored.total.mean(0))

    @property
    def average(self) -> Tensor:
        """Drift per EVERY steps averaged over the run, (S,)."""
        return self.total.mean(0)


def _judge_shift(name: str, readings: dict[str, Layer3Values], shifts: dict[str, Shift]) -> Verdict:
    plain, normed = (shifts[arm].average for arm in BOTH)
    ratio = plain / normed
    lowest = {arm: float(readings[arm].accuracy.min()) for arm in BOTH}
    late = [f"{low:.0%} {arm} batch norm" for arm, low in lowest.items() if not low >= LEARNED]
    failed = f"{CALLED[name]}: the worst seed ended at {' and '.join(late)}" if late else ""
    return judge(
        f"layer3-{name}", ratio.log2().tolist(),
        "{network}: a[2] moves by {normed:.2g} standard deviations per {every} steps with batch norm, by {plain:.2g} "
        "without ({ratio:.1f} times as much); in eval mode by {normed_eval:.2g} with and {plain_eval:.2g} without.",
        failed_guard=failed, network=CALLED[name], every=EVERY, normed=normed.mean(), plain=plain.mean(),
        ratio=paired_seeds.factor(ratio), normed_eval=shifts["with"].eval.mean(),
        plain_eval=shifts["without"].eval.mean(),
    )  # fmt: skip


def _distances(readings: Layer3Values) -> Tensor:
    """Distance from (mean, sd) of z~ by stored statistics to (beta, |gamma|), in units of |gamma|, (T, S, units)."""
    mean, sd = readings.stored.mean(2), readings.stored.std(2, correction=0)
    return torch.hypot(mean - readings.beta, sd - readings.gamma.abs()) / readings.gamma.abs()


def _judge_governed(distances: dict[str, Tensor]) -> Verdict:
    """The verdict on the distances; each seed counts with the network in which its distance is larger."""
    medians = {name: _median_of_seeds(values) for name, values in distances.items()}
    return judge(
        "layer3-governed", torch.stack([*medians.values()]).amax(0).tolist(),
        "By stored statistics, the distance from mean and standard deviation of z~ to beta and |gamma| is {wide:.2g} "
        "(wide) and {four:.2g} (four units) times |gamma|, in the median over units and steps.",
        {name: values.mean() for name, values in medians.items()},
    )  # fmt: skip


def _median_of_seeds(values: Tensor) -> Tensor:
    """Median over times and units for each seed, (T, S, units) -> (S,)."""
    return paired_seeds.median(values.transpose(0, 1).flatten(1), 1)


def _in_batch_errors(readings: Layer3Values) -> tuple[Tensor, Tensor]:
    """Largest differences of mean and sd of z~ by batch statistics from beta and |gamma|, in units of |gamma|."""
    scale = readings.gamma.abs()
    mean, sd = readings.batch.mean(2), readings.batch.std(2, correction=0)
    return ((mean - readings.beta) / scale).abs().max(), ((sd - scale) / scale).abs().max()


def _numbers(readings: dict[str, dict[str, Layer3Values]], shifts: dict[str, dict[str, Shift]]) -> Numbers:
    numbers: Numbers = {}
    for name, arms in shifts.items():
        for arm, shift in arms.items():
            figures = {
                "part of the drift in the mean, sd": shift.mean,
                "part of the drift in the log of the sd": shift.log_sd,
                "share of idle units": shift.idle,
            }
            numbers |= {
                f"{what}, {CALLED[name]}, {arm} batch norm": paired_seeds.mean(v) for what, v in figures.items()
            }
        plain, normed = (
            arms[arm].total.sum(0) / (readings[name][arm].loss[0] - readings[name][arm].loss[1]) for arm in BOTH
        )
        what = f"drift per nat of loss decrease, {CALLED[name]}, log2 of without / with batch norm"
        numbers[what] = paired_seeds.mean((plain / normed).log2())
    off = torch.stack([error for arms in readings.values() for error in _in_batch_errors(arms["with"])]).max()
    what = "mean or sd of z~ off beta or |gamma| in the batch (rounding and eps), largest, |gamma|"
    numbers[what] = paired_seeds.mean(off)
    return numbers


def _every(count: int, most: int) -> range:
    """Indices of at most ``most + 1`` of ``count`` times, evenly spaced, beginning with the first."""
    return range(0, count, -(-(count - 1) // most))


def _ribbons(readings: dict[str, Layer3Values], shifts: dict[str, Shift], seed: int) -> Chart:
    levels = {"p2": 0.02, "p16": 0.16, "p50": 0.5, "p84": 0.84, "p98": 0.98}
    rows = []
    for arm, what in readings.items():
        bands = what.received[:, 0].quantile(torch.tensor([*levels.values()]), dim=1)  # (levels, T, units)
        rows += [
            {
                "x": int(what.steps[t]), **{p: round(float(bands[i, t, unit]), 3) for i, p in enumerate(levels)},
                "series": f"{arm} batch norm", "panel": f"{arm} batch norm", "row": f"a[2]{unit + 1}",
            }
            for unit in range(bands.shape[2])
            for t in _every(len(what.steps), 40)
            if bool(bands[:, t, unit].isfinite().all())
        ]  # fmt: skip
    plain, normed = (float(shifts[arm].average.mean()) for arm in BOTH)
    return chart(
        "lecture", "layer3", "ribbons", rows, SERIES, plain=plain, every=EVERY, normed=normed, probe=PROBE, seed=seed,
    )  # fmt: skip


def _over_time(readings: dict[str, dict[str, Layer3Values]], shifts: dict[str, dict[str, Shift]]) -> Chart:
    rows = []
    for name in ("wide", "four"):
        for arm, shift in shifts[name].items():
            indices = list(_every(len(shift.total), 40))
            steps = readings[name][arm].steps[indices].tolist()
            for series, values in ((f"{arm} batch norm", shift.total), (f"noise floor {arm}", shift.floor)):
                rows += paired_seeds.curve(steps, values[indices], positive=True, series=series, panel=CALLED[name])
    apart = " and ".join(
        f"{paired_seeds.factor(shifts[name]['without'].average / shifts[name]['with'].average):.1f} times "
        f"({CALLED[name]})"
        for name in ("wide", "four")
    )
    return chart(
        "lecture", "layer3", "over-time",
        [{k: v for k, v in row.items() if row["series"] in SERIES or k not in ("low", "high")} for row in rows],
        SERIES | {"noise floor without": "without", "noise floor with": "with"},
        dashed=("noise floor without", "noise floor with"), apart=apart, every=EVERY,
    )  # fmt: skip


def _governed_chart(readings: Layer3Values, distances: Tensor, seed: int) -> Chart:
    panels = {
        "mean, beta": (readings.stored.mean(2), readings.beta),
        "sd, |gamma|": (readings.stored.std(2, correction=0), readings.gamma.abs()),
    }
    rows = [
        {
            "x": int(readings.steps[t]), "y": round(float(values[t, 0, unit]), 3), "series": series,
            "panel": panel, "row": f"z~[2]{unit + 1}",
        }
        for panel, (measured, set_to) in panels.items()
        for series, values in (("z~ by stored statistics", measured), ("beta, |gamma|", set_to))
        for unit in range(measured.shape[2])
        for t in _every(len(readings.steps), 27)
        if bool(values[t, 0, unit].isfinite())
    ]  # fmt: skip
    return chart(
        "lecture", "layer3", "governed", rows, {"z~ by stored statistics": "with", "beta, |gamma|": "neutral"},
        dashed=("beta, |gamma|",), apart=_median_of_seeds(distances).mean(), seed=seed, probe=PROBE,
    )  # fmt: skip


CLAIM = claim(
    "lecture", "layer3", run, rate=RATE, wide_steps=NETWORKS["wide"][1], four_steps=NETWORKS["four"][1],
    every=EVERY, probe=PROBE, idle=IDLE,
)  # fmt: skip
