"""Claim "cause": batch norm trains faster because it reduces the shift; the experiment restores the shift by noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from batchnorm.experiment import paired_seeds
from batchnorm.experiment.claim import Numbers, Result, chart, claim
from batchnorm.experiment.judgement import Verdict
from batchnorm.experiment.paired_seeds import first_step
from batchnorm.experiment.run_settings import Progress, RunSettings
from batchnorm.instruments.internal_covariate_shift import Turn
from batchnorm.instruments.layer_drift import drift, noise_floor
from batchnorm.layers import BatchNorm1d
from batchnorm.lecture.claim_criteria import CRITERIA, judge
from batchnorm.lecture.data_sets import Examples
from batchnorm.lecture.ensemble_training import accuracies, losses, sgd
from batchnorm.lecture.networks import Ensemble, Norm, fully_connected
from batchnorm.lecture.rate_sweep import (
    BOTH,
    RATES,
    SIZES,
    TARGET,
    Sweep,
    digits,
    probe_indices,
    sweep,
    training_indices,
)
from batchnorm.reporting.charts.chart_data import Chart, Role

# The outputs of batch norm have standard deviation 1 at the start, so the shift is in standard deviations.
# SHIFT and SCALE are the smallest round values with which a[2], the inputs of layer 3, drifts more than without batch
# norm. Only the drift was looked at when they were chosen.
SHIFT = 1.0  # the mean of a unit moves by -SHIFT .. SHIFT
SCALE = 1.5  # the standard deviation of a unit is multiplied by 1 / SCALE .. SCALE
WINDOW = 100  # steps over which the drift is averaged; the slowest arm needs about 100 steps to the target
EVERY = 10  # steps between two measurements of a[2]
READ = 5  # steps between two measurements of the accuracy in train mode; the sweeps measure in eval mode
PROBE = 256
LAYER = 3
CALLED = {
    "without": "without batch norm",
    "with": "with batch norm",
    "noisy": "with batch norm and noise",
    "half": "with batch norm and half the noise",
}


class Noisy(nn.Module):
    """Batch norm, followed in train mode by a random shift and scale of every unit, drawn anew at each call.

    All examples of a batch get the same shift and scale: the distribution of the next layer's inputs changes, the
    order of the examples in each unit does not.

    Args:
        width: Number of units.
        strength: 1 for shifts up to SHIFT and factors up to SCALE; 0.5 for half the shift and the square root of the
            factor.
    """

    def __init__(self, width: int, strength: float = 1.0) -> None:
        super().__init__()
        self.norm = BatchNorm1d(width)
        self.strength = strength

    def forward(self, x: Tensor) -> Tensor:
        """Normalized values, (N, width), shifted and scaled in train mode only."""
        y = self.norm(x)
        if not self.training:
            return y
        shift, scale = self.strength * (2 * torch.rand(2, y.shape[1]) - 1)
        return y * SCALE**scale + SHIFT * shift


ARMS: dict[str, Norm | None] = {**BOTH, "noisy": Noisy, "half": partial(Noisy, strength=0.5)}


def run(settings: RunSettings, progress: Progress) -> Result:
    """Tune the rate of every arm on one grid, then measure the inputs of layer 3 at each arm's best rate."""
    sweeps: dict[str, Sweep] = {}
    watched: dict[str, ArmAtBestRate] = {}
    for arm, norm in ARMS.items():
        with _noise_from(settings.seed):
            sweeps[arm] = sweep(settings, "relu", norm)
        progress(len(sweeps) / 5)
    for arm in ARMS:
        with _noise_from(settings.seed):
            watched[arm] = _watch(settings, arm, RATES[sweeps[arm].best_rate()])
        progress(0.8 + len(watched) / 20)
    charts = [_curves(sweeps), _drifts(watched)]
    return Result([_judge(sweeps, watched)], charts, _numbers(sweeps, watched))


@contextmanager
def _noise_from(seed: int) -> Iterator[None]:
    """A block with random numbers from this seed; then the caller's random state is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True, slots=True, eq=False)
class ArmAtBestRate:
    """Measurements at layer 3 of one arm at its best rate, for S seeds.

    Args:
        rate: The arm's best rate.
        drift: Drift of a[2] per EVERY steps, averaged over the window, (S,).
        floor: Noise floor of the drift, (S,).
        relative: Change of layer 3's gradient by a step of earlier layers, divided by the gradient's length; mean over
            the measured steps, (S,).
        cosine: Cosine between layer 3's gradients before and after such a step; mean over the measured steps, (S,).
        reached: First step with the target accuracy, measured in train mode, so with the noise of the arm if it has
            any, (S,); infinity if it was not reached in the window.
    """

    rate: float
    drift: Tensor
    floor: Tensor
    relative: Tensor
    cosine: Tensor
    reached: Tensor


def _watch(settings: RunSettings, arm: str, rate: float) -> ArmAtBestRate:
    steps = settings.steps(WINDOW)
    net = Ensemble.of(lambda: fully_connected(SIZES, "relu", ARMS[arm]), settings.all_seeds)
    probe = digits()[probe_indices(settings, PROBE)]
    indices = training_indices(settings, steps)
    values: list[Tensor] = []
    curve: list[Tensor] = []
    changes: list[Tensor] = []
    before: dict[str, Tensor] = {}

    def observe(step: int) -> None:
        if step % EVERY == 1:
            changes.append(gradient_shift(net, before, digits()[indices[:, step - 1]], settings.seed + step))
        if step % EVERY == 0:
            values.append(net.behind(f"act{LAYER - 1}", probe.x, train=True))
            before.update({name: value.detach().clone() for name, value in net.parameters.items()})
        if step % READ == 0:
            with torch.no_grad():
                curve.append(accuracies(net(probe.x, train=True, keep_statistics=True), probe.y))

    sgd(net, digits(), indices, torch.full((settings.seeds,), rate), observe)
    stacked = torch.stack(values)
    relative, cosine = torch.stack(changes).mean(0)
    reached = first_step(torch.stack(curve) >= TARGET, torch.arange(len(curve)) * READ)
    moved = drift(stacked[:-1], stacked[1:]).total.mean(0)
    return ArmAtBestRate(rate, moved, noise_floor(stacked).mean(0), relative, cosine, reached)


def gradient_shift(after: Ensemble, before: dict[str, Tensor], batch: Examples, seed: int) -> Tensor:
    """How a step of the layers before layer 3 changes the gradient of W3: relative change and cosine, (2, S).

    After Santurkar et al. 2018, definition 2.1. Two gradients of W3 are compared, on the same batch and with the same
    noise: one with all parameters as before the step, one with the layers before layer 3 as after the step. S is the
    number of seeds.
    """
    moved = {
        name: after.parameters[name].detach() if int(name.split(".")[0][-1]) < LAYER else value
        for name, value in before.items()
    }
    turned = Turn.between(*([_gradient(after, parameters, batch, seed)] for parameters in (before, moved)))
    return torch.stack([turned.relative, turned.cosine])


def _gradient(net: Ensemble, parameters: dict[str, Tensor], batch: Examples, seed: int) -> Tensor:
    """Gradient of the loss with respect to W3, (S, ...) for S seeds."""
    weight = f"w{LAYER}.weight"
    parameters = parameters | {weight: parameters[weight].detach().requires_grad_()}
    with _noise_from(seed):
        logits = Ensemble(net.template, parameters, net.buffers)(batch.x, train=True, keep_statistics=True)
    return torch.autograd.grad(losses(logits, batch.y).sum(), parameters[weight])[0]


def _lost(without: Tensor, batch_norm: Tensor, noisy: Tensor) -> Tensor:
    """Share of batch norm's log speed-up that is lost with the noise, for each seed; all arguments are steps."""
    return 1 - (without / noisy).log() / (without / batch_norm).log()


def _share(values: Tensor) -> str:
    return f"{values.mean():.0%}" if bool(values.isfinite().all()) else "an unknown share"


def _judge(sweeps: dict[str, Sweep], watched: dict[str, ArmAtBestRate]) -> Verdict:
    best = {arm: sweeps[arm].best() for arm in ARMS}
    lost, half = (_lost(*(best[name].steps for name in ("without", "with", arm))) for arm in ("noisy", "half"))
    moved = {arm: float(watched[arm].drift.mean()) for arm in ARMS}
    failed = ""
    if best["without"].late or best["with"].late:
        failed = f"not every seed reached {TARGET:.0%} in {best['with'].last} steps with and without batch norm"
    elif not bool((best["without"].steps > best["with"].steps).all()):
        failed = "batch norm gave no speed-up in at least one seed"
    elif not moved["noisy"] >= moved["without"]:
        failed = f"the drift is {moved['noisy']:.2g} with the noise, below {moved['without']:.2g} without batch norm"
    return judge(
        "cause-drift", lost.tolist(),
        "{steps_with} steps to {target:.0%} with batch norm, {steps_noisy} with batch norm and noise, {steps_without} "
        "without batch norm: the noise costs {lost} of the (log) speed-up. With the noise a[2] moves by {noisy:.2g} "
        "standard deviations per {every} steps, with batch norm alone by {with:.2g} and without batch norm by "
        "{without:.2g}. Half the noise (a[2] moves by {half:.2g}) costs {lost_by_half}.",
        {**moved, **{f"steps_{arm}": str(arrival) for arm, arrival in best.items()}},
        failed_guard=failed, target=TARGET, lost=_share(lost), every=EVERY, lost_by_half=_share(half),
    )  # fmt: skip


def _numbers(sweeps: dict[str, Sweep], watched: dict[str, ArmAtBestRate]) -> Numbers:
    numbers: Numbers = {}
    for arm, measured in watched.items():
        shift = "change of layer 3's gradient by the layers before it"
        numbers[f"best learning rate, {CALLED[arm]}"] = measured.rate
        numbers[f"{shift}, relative, {CALLED[arm]}"] = paired_seeds.mean(measured.relative)
        numbers[f"{shift}, cosine, {CALLED[arm]}"] = paired_seeds.mean(measured.cosine)
    read = {arm: watched[arm].reached for arm in ("with", "noisy")}
    for arm, reached in read.items():
        numbers[f"steps to {TARGET:.0%} accuracy in train mode, {CALLED[arm]}"] = paired_seeds.mean(
            paired_seeds.median(reached)
        )
    share = _lost(sweeps["without"].best().steps, *read.values())
    numbers["share of the log speed-up lost, accuracy in train mode"] = paired_seeds.mean(share)
    return numbers


_SERIES: dict[str, Role] = {
    CALLED["without"]: "without",
    CALLED["with"]: "with",
    CALLED["noisy"]: "neutral",
    CALLED["half"]: "neutral",
}


def _curves(sweeps: dict[str, Sweep]) -> Chart:
    rows = [
        row
        for arm, swept in sweeps.items()
        for row in paired_seeds.curve(swept.steps.tolist(), swept.best_curve(), series=CALLED[arm])
    ]
    summary = ", ".join(f"{swept.best()} {CALLED[arm]}" for arm, swept in sweeps.items())
    return chart("lecture", "cause", "curves", rows, _SERIES, target=TARGET, summary=summary)


def _drifts(watched: dict[str, ArmAtBestRate]) -> Chart:
    rows = [
        {"label": label, **paired_seeds.interval(values, CRITERIA.level), "series": CALLED[arm]}
        for arm, measured in watched.items()
        for label, values in ((CALLED[arm], measured.drift), (f"noise floor {CALLED[arm]}", measured.floor))
        if bool((values > 0).all() & values.isfinite().all())
    ]
    summary = ", ".join(f"{measured.drift.mean():.2g} {CALLED[arm]}" for arm, measured in watched.items())
    return chart("lecture", "cause", "drifts", rows, _SERIES, every=EVERY, summary=summary, window=WINDOW)


CLAIM = claim("lecture", "cause", run, shift=SHIFT, scale=SCALE, rates=len(RATES), window=WINDOW)
