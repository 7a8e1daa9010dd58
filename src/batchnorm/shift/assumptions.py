"""Assumptions: checks on clean data whether the conditions of the alarm's promise hold.

With a reference from a checkpoint alone (``alarm_reference``), stored means must be exact to delta and stored variances
to d, a few examples must not carry most of the energy (``tails``), neighbouring observations must not be alike, and
later observations must be like earlier ones. With a calibrated reference, neighbouring observations must not be alike,
and all observations must be like those of the calibration.

Each condition "holds", is "doubtful" or is "broken". The conditions on stored means and variances are broken if a
measured value is outside its bound by more than c standard errors; with probability 99 %, none of the normal errors of
all measured values is larger than c. They are doubtful if the value is outside by less, or if its error is too large to
be sure. Energy that a few examples carry is doubtful, never broken. Neighbours that are alike are broken if the monitor
would warn about them, and the order is broken if the evidence reaches the monitor's limit; with weaker evidence against
them both are doubtful. Every condition with too few observations to judge it is doubtful.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from statistics import NormalDist
from typing import final

import torch
from torch import Tensor

from batchnorm.call_types import Batch
from batchnorm.reporting.text import many, plain, wrapped
from batchnorm.shift import tails
from batchnorm.shift.alarm_reference import LEAST, Reference
from batchnorm.shift.data_passes import passes
from batchnorm.shift.evidence import ShiftEvidence
from batchnorm.shift.layer_observer import LayerObserver
from batchnorm.shift.monitor import ShiftMonitor
from batchnorm.shift.observation_units import Autocorrelation, Grouping

SCHEMA_VERSION = 1
HOLDS, DOUBTFUL, BROKEN = "holds", "doubtful", "broken"
_CONFIDENCE = 0.99
_ROUND = 8  # observations per update of the evidence
_SUSPECT = 10.0  # evidence that clean data reach with probability at most 1/10
_LARGER = "Use a larger unit: --unit batch, or ShiftMonitor(unit=function) with one key for a session or a minute."
_NEIGHBOURS = 128  # observations, two windows of ``observation_units.Autocorrelation``


@final
@dataclass(frozen=True, slots=True)
class Condition:
    """One condition: name, state ("holds", "doubtful", "broken"), measured value, and remedy ("" if it holds)."""

    name: str
    state: str
    measured: str
    remedy: str


@final
@dataclass(frozen=True, slots=True)
class Assumptions:
    """The result of ``check``.

    Args:
        target: The model, in the caller's words.
        data: The data, in the caller's words.
        source: Source of the reference, "checkpoint" or "calibrated".
        unit: What one observation is.
        observations: Number of observations.
        conditions: The conditions, in the order in which they should be mended.
    """

    target: str
    data: str
    source: str
    unit: str
    observations: int
    conditions: tuple[Condition, ...]

    @property
    def hold(self) -> bool:
        """Whether every condition holds."""
        return all(condition.state == HOLDS for condition in self.conditions)

    def to_json(self) -> str:
        """The result as JSON."""
        head = {"schema_version": SCHEMA_VERSION, "batchnorm": version("batchnorm"), "hold": self.hold}
        versions = {"torch": str(torch.__version__)}
        return json.dumps({**head, **asdict(self), "versions": versions}, indent=1, allow_nan=False)


def check(
    monitor: ShiftMonitor, loader: Iterable[Batch], *, max_examples: int | None = None, target: str = "", data: str = ""
) -> Assumptions:
    """Check a monitor's assumptions on clean data; the model is left as it was, bit for bit.

    Args:
        monitor: The model's monitor, with its reference and unit.
        loader: Batches of clean data, in the forms that ``recalibrate`` accepts, in the order in which such data will
            come.
        max_examples: Largest number of examples to use; None uses all.
        target: The model's name in the report.
        data: The data's name in the report.

    Raises:
        ValueError: If there are fewer than 2 observations, activations are not finite, a layer does not run in a pass,
            or layers receive different numbers of examples.
        RuntimeError: If the monitor is observing.
    """
    if monitor.is_observing:
        raise RuntimeError("check needs a monitor that is not observing, got one that is. Call monitor.stop() first.")
    z, q = _observed(monitor, loader, max_examples)
    reference = monitor.reference
    first = (
        () if reference.clean is not None else (_means(reference, z), _variances(reference, z, q), _tails(reference, q))
    )
    conditions = (*first, _neighbours(reference, z), _order(reference, z, q, monitor.limit))
    return Assumptions(target, data, reference.source, reference.unit, len(z), conditions)


def _observed(monitor: ShiftMonitor, loader: Iterable[Batch], most: int | None) -> tuple[Tensor, Tensor]:
    grouping, tap = Grouping(monitor.unit, monitor.reference.examples), LayerObserver(monitor.layers, monitor.reference)
    with closing(passes(monitor.model, tap, loader, most, "check")) as batches:
        parts = [grouping.of(z, q, inputs) for inputs, z, q in batches]
    z, q = (torch.cat(rows) for rows in zip(*parts, strict=True)) if parts else (torch.empty(0, 1), torch.empty(0, 1))
    if len(z) < 2:
        raise ValueError(f"check needs 2 observations of clean data or more, got {len(z)}. Give more examples.")
    if not bool(z.isfinite().all()) or not bool(q.isfinite().all()):
        raise ValueError("check needs finite activations, got NaN or infinity. Look for the examples that cause it.")
    return z, q


# -- stored statistics --------------------------------------------------------------------------------------------


def _means(reference: Reference, z: Tensor) -> Condition:
    """Whether |E z| <= delta for every channel."""
    error = _errors(z.shape[1]) * (z.var(0) / len(z)).sqrt()
    far, at, state = _worst(z.mean(0).abs(), error, reference.delta)
    measured = (
        f"channel {_channel(reference, at)} is off by {far:.2g} sd, "
        f"standard error {_standard_error(error, z.shape[1], at):.2g}; {float(reference.delta[at]):.2g} is allowed"
    )
    return Condition("stored means are exact", state, measured, _remedy(state, error, reference.delta))


def _variances(reference: Reference, z: Tensor, q: Tensor) -> Condition:
    """Whether E Q <= 1 + d for every layer and Var z <= kappa for every channel; the worst of these is reported."""
    energy, n = reference.of_layers(q), len(z)
    centered = (z - z.mean(0)).square()
    means = torch.cat([energy.mean(0), centered.mean(0)])
    count = len(means)
    error = _errors(count) * (torch.cat([energy.var(0), centered.var(0)]) / n).sqrt()
    allowed = torch.cat([1 + reference.d, reference.kappa])
    far, at, state = _worst(means, error, allowed)
    layers = len(reference.sizes)
    where = (
        f"the energy of layer {reference.layers[at]!r}"
        if at < layers
        else f"the variance of channel {_channel(reference, at - layers)}"
    )
    measured = (
        f"{where} is {far:.3g} times the stored variance, standard error {_standard_error(error, count, at):.2g}; "
        f"{float(allowed[at]):.3g} is allowed"
    )
    return Condition("stored variances are exact", state, measured, _remedy(state, error, allowed - 1))


def _worst(values: Tensor, error: Tensor, allowed: Tensor) -> tuple[float, int, str]:
    """The value furthest beyond its bound, in units of its error; its index; and the state of the condition."""
    at = int(((values - allowed) / error.clamp_min(torch.finfo(torch.float64).tiny)).argmax())
    if bool((values - error > allowed).any()):
        state = BROKEN
    else:
        state = DOUBTFUL if bool((values + error > allowed).any()) else HOLDS
    return float(values[at]), at, state


def _remedy(state: str, error: Tensor, allowed: Tensor) -> str:
    if state == HOLDS:
        return ""
    few = state == DOUBTFUL and bool((error > allowed).any())
    more = "Give more clean examples: these are too few to measure it well. " if few else ""
    return f"{more}Recalibrate on clean data (batchnorm.recalibrate), or calibrate the monitor (--calibrate)."


def _errors(count: int) -> float:
    """The number c of standard errors: with probability 99 %, none of ``count`` normal errors is larger."""
    return NormalDist().inv_cdf(1 - (1 - _CONFIDENCE) / (2 * count))


def _standard_error(error: Tensor, count: int, at: int) -> float:
    return float(error[at]) / _errors(count)


def _channel(reference: Reference, at: int) -> str:
    for layer, size in zip(reference.layers, reference.sizes, strict=True):
        if at < size:
            return f"{at} of layer {layer!r}"
        at -= size
    raise IndexError(at)


# -- tails and order ----------------------------------------------------------------------------------------------


def _tails(reference: Reference, q: Tensor) -> Condition:
    name, energies = "no few examples carry most of the energy", tails.Tails(reference)
    energies.add(reference.of_layers(q))
    at = int(energies.ratios.argmax())
    ratio = f"E[Q^2] / E[Q]^2 is {float(energies.ratios[at]):.3g} in layer {reference.layers[at]!r}"
    ratio += f"; {float(tails.limits(reference)[at]):.3g} is allowed"
    if (tail := energies.heavy) is not None:
        return Condition(name, DOUBTFUL, f"{tail}; {ratio}", tail.remedy)
    if len(q) < tails.LEAST:
        return Condition(name, DOUBTFUL, f"not judged: {len(q)} observations", f"Give {tails.LEAST} or more.")
    return Condition(name, HOLDS, ratio, "")


def _neighbours(reference: Reference, z: Tensor) -> Condition:
    """Correlation in windows, as the monitor judges it."""
    name, correlation = "neighbouring observations are no more alike than others", Autocorrelation()
    correlation.add(z, reference.center, reference.spread)
    if correlation.count < _NEIGHBOURS:
        return Condition(name, DOUBTFUL, f"not judged: {len(z)} observations", f"Give {_NEIGHBOURS} or more.")
    text, larger = f"correlation {correlation.r:.2f}", _LARGER
    if correlation.is_wrong:
        return Condition(name, BROKEN, text, larger)
    # 0.1 is allowed, and a standard error is at most 1 / sqrt(n)
    return Condition(name, DOUBTFUL, text, larger) if correlation.r > 0.1 else Condition(name, HOLDS, text, "")


def _order(reference: Reference, z: Tensor, q: Tensor, limit: float) -> Condition:
    """Whether later observations look like earlier ones, by the bets of a calibrated monitor."""
    name = "later observations are like earlier ones"
    half = 0 if reference.clean is not None else len(z) // 2
    if reference.clean is None and half < LEAST:
        return Condition(name, DOUBTFUL, f"not judged: {len(z)} observations", f"Give {2 * LEAST} or more.")
    evidence = ShiftEvidence.start(
        reference if reference.clean is not None else reference.calibrated(z[:half], q[:half])
    )
    most = 0.0
    for at in range(half, len(z), _ROUND):
        evidence = evidence.after(z[at : at + _ROUND], q[at : at + _ROUND])
        most = max(most, evidence.log)
    claim = (
        "the second half is unlike the first"
        if reference.clean is None
        else "these observations are unlike the calibration's"
    )
    text = f"evidence that {claim}: {_size(most)}; 1 is none, the limit is {_size(limit)}"
    if most < math.log(_SUSPECT):
        return Condition(name, HOLDS, text, "")
    remedy = "Shuffle if the order has no meaning; else use a larger unit, or calibrate on data of one kind."
    return Condition(name, BROKEN if most >= limit else DOUBTFUL, text, remedy)


def _size(log: float) -> str:
    return f"{math.exp(log):.3g}" if log < math.log(1e6) else f"10^{math.floor(log / math.log(10))}"


# -- text ---------------------------------------------------------------------------------------------------------

_MARKS = {HOLDS: "✓", DOUBTFUL: "?", BROKEN: "✗"}


def full(found: Assumptions, *, width: int = 80) -> str:
    """The report for people, in ``width`` columns."""
    counted = many(found.observations, found.unit if found.unit in {"example", "batch"} else "observation")
    lines = wrapped(" · ".join(filter(None, [found.target, found.data, counted])), width)
    against = "a calibrated reference" if found.source == "calibrated" else "the checkpoint alone"
    lines += ["", f"what an alarm against {against} assumes:"]
    for condition in found.conditions:
        lines += ["", *wrapped(f"[{_MARKS[condition.state]} {condition.state}] {condition.name}", width)]
        lines += wrapped(f"  {condition.measured}", width, 2)
        lines += wrapped(f"  {condition.remedy}", width, 2)
    return "\n".join([*lines, "", promise(found)])


def concise(found: Assumptions) -> list[str]:
    """One line for each condition."""
    return [plain(f"{found.target}: {c.name}: {c.state}: {c.measured}") for c in found.conditions]


def promise(found: Assumptions) -> str:
    """A sentence that says whether the alarm's promise can be relied on."""
    if found.hold:
        return "The promise about false alarms can be relied on, as far as these data show."
    return "The promise about false alarms cannot be relied on until these conditions hold."
