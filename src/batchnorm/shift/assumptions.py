"""Assumptions: checks on clean data whether the conditions of the alarm's promise hold.

From a checkpoint alone (``alarm_reference``): stored means are exact to delta, stored variances to d, no few examples
carry most of the energy (``tails``), and observations do not predict later ones. If calibrated, only the last one, and
clean observations must be exchangeable with those of the calibration.

Each condition "holds", is "doubtful" or is "broken". It is broken if a measured value is outside its bound by more than
c standard errors, where c is such that of as many normal errors none is larger, with probability 99 %. It is doubtful
if the value is outside by less, if its error is too large to be sure, or if it could not be measured.
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
_ROUND = 8
_SUSPECT = 10.0  # evidence that clean data reach with probability at most 1/10
_NEIGHBOURS = 128  # observations, two windows of ``units.Autocorrelation``


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
        conditions: In the order in which they should be mended.
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
        """Everything as JSON."""
        head = {"schema_version": SCHEMA_VERSION, "batchnorm": version("batchnorm"), "hold": self.hold}
        versions = {"torch": str(torch.__version__)}
        return json.dumps({**head, **asdict(self), "versions": versions}, indent=1, allow_nan=False)


def check(
    monitor: ShiftMonitor, loader: Iterable[Batch], *, max_examples: int | None = None, target: str = "", data: str = ""
) -> Assumptions:
    """Check a monitor's assumptions on clean data; its model is left as it was, bit for bit.

    Args:
        monitor: The model's monitor, with its reference and unit.
        loader: Batches of clean data as ``recalibrate`` takes them, in the order in which such data will come.
        max_examples: At most this many.
        target: The model's name in the report.
        data: The data's name in the report.

    Raises:
        ValueError: If there is no observation, or some are not finite.
        RuntimeError: If the monitor is observing.
    """
    if monitor.is_observing:
        raise RuntimeError("check needs a monitor that is not observing, got one that is. Call monitor.stop() first.")
    z, q = _observed(monitor, loader, max_examples)
    known = monitor.reference
    first = () if known.clean is not None else (_means(known, z), _variances(known, z, q), _tails(known, q))
    conditions = (*first, _neighbours(known, z), _order(known, z, q, monitor.limit))
    return Assumptions(target, data, known.source, known.unit, len(z), conditions)


def _observed(monitor: ShiftMonitor, loader: Iterable[Batch], most: int | None) -> tuple[Tensor, Tensor]:
    grouping, tap = Grouping(monitor.unit, monitor.reference.examples), LayerObserver(monitor.layers, monitor.reference)
    with closing(passes(monitor.model, tap, loader, most, "check")) as seen:
        found = [grouping.of(z, q, inputs) for inputs, z, q in seen]
    z, q = (torch.cat(rows) for rows in zip(*found, strict=True)) if found else (torch.empty(0, 1), torch.empty(0, 1))
    if len(z) < 2:
        raise ValueError(f"check needs 2 observations of clean data or more, got {len(z)}. Give more examples.")
    if not bool(z.isfinite().all()) or not bool(q.isfinite().all()):
        raise ValueError("check needs finite activations, got NaN or infinity. Look for the examples that cause it.")
    return z, q


# -- stored statistics --------------------------------------------------------------------------------------------


def _means(known: Reference, z: Tensor) -> Condition:
    """|E z| <= delta."""
    error = _errors(z.shape[1]) * (z.var(0) / len(z)).sqrt()
    far, at, state = _worst(z.mean(0).abs(), error, known.delta)
    measured = (
        f"channel {_channel(known, at)} is off by {far:.2g} sd, standard error {_one(error, z.shape[1], at):.2g}; "
        f"{float(known.delta[at]):.2g} is allowed"
    )
    return Condition("stored means are exact", state, measured, _remedy(state, error, known.delta))


def _variances(known: Reference, z: Tensor, q: Tensor) -> Condition:
    """E Q <= 1 + d for layers, and Var z <= kappa for channels: the one that exceeds its bound most."""
    energy, n = known.of_layers(q), len(z)
    centered = (z - z.mean(0)).square()
    found = torch.cat([energy.mean(0), centered.mean(0)])
    count = len(found)
    error = _errors(count) * (torch.cat([energy.var(0), centered.var(0)]) / n).sqrt()
    allowed = torch.cat([1 + known.d, known.kappa])
    far, at, state = _worst(found, error, allowed)
    layers = len(known.sizes)
    where = f"the energy of layer {known.layers[at]!r}" if at < layers else f"channel {_channel(known, at - layers)}"
    measured = (
        f"{where} has {far:.3g} times its stored variance, standard error {_one(error, count, at):.2g}; "
        f"{float(allowed[at]):.3g} is allowed"
    )
    return Condition("stored variances are exact", state, measured, _remedy(state, error, allowed - 1))


def _worst(found: Tensor, error: Tensor, allowed: Tensor) -> tuple[float, int, str]:
    """The value furthest beyond its bound, in units of its error: value, index and state."""
    at = int(((found - allowed) / error.clamp_min(torch.finfo(torch.float64).tiny)).argmax())
    if bool((found - error > allowed).any()):
        state = BROKEN
    else:
        state = DOUBTFUL if bool((found + error > allowed).any()) else HOLDS
    return float(found[at]), at, state


def _remedy(state: str, error: Tensor, allowed: Tensor) -> str:
    if state == HOLDS:
        return ""
    few = state == DOUBTFUL and bool((error > allowed).any())
    more = "Give more clean examples: these do not measure it well enough. " if few else ""
    return f"{more}Recalibrate on clean data (batchnorm.recalibrate), or calibrate the monitor (--calibrate)."


def _errors(count: int) -> float:
    """Number of standard errors that none of ``count`` normal errors exceeds, with probability 99 %."""
    return NormalDist().inv_cdf(1 - (1 - _CONFIDENCE) / (2 * count))


def _one(error: Tensor, count: int, at: int) -> float:
    return float(error[at]) / _errors(count)


def _channel(known: Reference, at: int) -> str:
    for layer, size in zip(known.layers, known.sizes, strict=True):
        if at < size:
            return f"{at} of layer {layer!r}"
        at -= size
    raise IndexError(at)


# -- tails and order ----------------------------------------------------------------------------------------------


def _tails(known: Reference, q: Tensor) -> Condition:
    name, seen = "no few examples carry most of the energy", tails.Tails(known)
    seen.add(known.of_layers(q))
    at = int(seen.ratios.argmax())
    told = f"E[Q^2] / E[Q]^2 is {float(seen.ratios[at]):.3g} in layer {known.layers[at]!r}"
    told += f"; {float(tails.limits(known)[at]):.3g} is allowed"
    if (tail := seen.heavy) is not None:
        return Condition(name, DOUBTFUL, f"{tail}; {told}", tail.remedy)
    if len(q) < tails.LEAST:
        return Condition(name, DOUBTFUL, f"not judged: {len(q)} observations", f"Give {tails.LEAST} or more.")
    return Condition(name, HOLDS, told, "")


def _neighbours(known: Reference, z: Tensor) -> Condition:
    """Correlation in windows, as the monitor judges it."""
    name, found = "neighbouring observations are no more alike than others", Autocorrelation()
    found.add(z, known.center, known.spread)
    if found.count < _NEIGHBOURS:
        return Condition(name, DOUBTFUL, f"not judged: {len(z)} observations", f"Give {_NEIGHBOURS} or more.")
    told, larger = f"correlation {found.r:.2f}", "Use a larger unit: --unit batch, or a function that gives keys."
    if found.is_wrong:
        return Condition(name, BROKEN, told, larger)
    # 0.1 is allowed, and a standard error is at most 1 / sqrt(n)
    return Condition(name, DOUBTFUL, told, larger) if found.r > 0.1 else Condition(name, HOLDS, told, "")


def _order(known: Reference, z: Tensor, q: Tensor, limit: float) -> Condition:
    """Whether later observations look like earlier ones, by the bets of a calibrated monitor."""
    name = "later observations are like earlier ones"
    half = 0 if known.clean is not None else len(z) // 2
    if known.clean is None and half < LEAST:
        return Condition(name, DOUBTFUL, f"not judged: {len(z)} observations", f"Give {2 * LEAST} or more.")
    evidence = ShiftEvidence.start(known if known.clean is not None else known.calibrated(z[:half], q[:half]))
    most = 0.0
    for at in range(half, len(z), _ROUND):
        evidence = evidence.after(z[at : at + _ROUND], q[at : at + _ROUND])
        most = max(most, evidence.log)
    among = "the second half among the first" if known.clean is None else "all among those of the calibration"
    told = f"evidence of {among}: {_size(most)}; 1 is none, the limit is {_size(limit)}"
    if most < math.log(_SUSPECT):
        return Condition(name, HOLDS, told, "")
    remedy = "Shuffle if the order has no meaning; else use a larger unit, or calibrate on data of one kind."
    return Condition(name, BROKEN if most >= limit else DOUBTFUL, told, remedy)


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
