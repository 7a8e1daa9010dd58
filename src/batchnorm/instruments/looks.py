"""Looks: each returns a record, of a window of steps or of a pass over the probe batch, and reports what changed."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import final

from torch import Tensor, nn

from batchnorm.instruments.free_tier import StepWindow, shift, shift_floor
from batchnorm.instruments.gamma_and_beta import census
from batchnorm.instruments.open_window import OpenWindow
from batchnorm.instruments.passes import Passes
from batchnorm.instruments.probe_tier import Probe, View
from batchnorm.instruments.sinks import number_of
from batchnorm.instruments.snapshots import Layers, Snapshot
from batchnorm.instruments.training_events import Events, TrainingEvent
from batchnorm.record import QUANTITIES, Record

Row = list[float | None]  # one number for each layer; None if it could not be measured


@final
class Looks:
    """The looks at one model while it trains; each look is compared with the look before.

    Args:
        layers: The model's batch norm layers.
        passes: Records the model's passes between two steps of an open window.
        events: The states that have begun and not ended, also states that began before this log was opened.
    """

    def __init__(self, layers: Layers, passes: Passes, events: Events) -> None:
        self._layers, self._events = layers, events
        self.names = layers.names
        self.window = OpenWindow(layers, passes)
        self.last: tuple[int, Snapshot] | None = None  # step and last snapshot of the last look
        self._view: tuple[int, View] | None = None

    def free(self, step: int) -> tuple[Record, list[TrainingEvent]]:
        """The record of the window that ends at this step, and the events since the last look."""
        ends = self.window.taken()
        window, seen = [end.snapshot for end in ends], StepWindow.of(ends, self._layers)
        values = {field.name: getattr(seen, field.name) for field in fields(StepWindow) if field.name in QUANTITIES}
        values |= self._moved(step, window[-1], seen.wander) | census(self._layers, window[-1])
        record = Record(step, self._layers.names, _rows(values), {}, "free", time.time())
        events = self._began(step, window, {**record.values, **_rows({"short_var": seen.short_var})})
        self.last = step, window[-1]
        return record, events

    def _moved(self, step: int, now: Snapshot, noise: Tensor) -> dict[str, Tensor]:
        if self.last is None:
            return {}
        last, before = self.last
        scale = 100 / (step - last)
        floor = shift_floor(before, now, self._layers, noise)
        return {"shift": scale * shift(before, now, self._layers), "shift_floor": scale * floor}

    def probed(self, step: int, probe: Probe, model: nn.Module) -> Record:
        """The record of a pass over the probe."""
        view = probe.look(model, self._layers)
        values = {name: row for name, row in view.values().items() if name != "gap"}  # the free tier measures it
        if self._view is not None:
            last, earlier = self._view
            scale = 100 / (step - last)
            values["drift"] = [None if moved is None else scale * moved for moved in view.drift_from(earlier)]
        self._view = step, view
        return Record(step, self._layers.names, values, view.of_model, "probe", time.time(), view.arrays())

    def _began(
        self, step: int, window: list[Snapshot], values: Mapping[str, Sequence[float | None]]
    ) -> list[TrainingEvent]:
        names, last = self._layers.names, window[-1]
        moves = (last.updates > window[0].updates).tolist()
        finite = [bool(part.isfinite().all()) for part in (last.mean + last.var).split(self._layers.sizes)]
        counts = [update >= 0 for update in last.updates.tolist()]
        return [
            *self._events.of_updates({n: m for n, m, c in zip(names, moves, counts, strict=True) if c}),
            *self._events.of_poison({n: f for n, f, c in zip(names, finite, counts, strict=True) if c}),
            *self._events.of_passes(names, values),
            *self._events.of(names, values, early=step < _early(self._layers)),
        ]


def _rows(values: Mapping[str, Tensor]) -> dict[str, Row]:
    """Tensors as lists of numbers; None in place of NaN, which marks what could not be measured."""
    return {name: [None if math.isnan(v) else v for v in value.tolist()] for name, value in values.items()}


def _early(layers: Layers) -> float:
    """Number of updates after which initial values make up less than 1 % of every running average.

    Layers with momentum None or 0 are left out; 0 if no layer is left.
    """
    momenta = [layer.momentum for layer in layers.layers if layer.momentum]
    return max((4.6 / momentum for momentum in momenta), default=0.0)


def lab_record(
    step: int, names: Sequence[str], values: Mapping[str, Mapping[str, float]], model: Mapping[str, float]
) -> Record:
    """The record of a measurement on demand.

    Args:
        step: The training step.
        names: The layers' names.
        values: Quantity -> layer -> number; a layer without a number gets None.
        model: Quantity -> number of the whole model.
    """
    rows = {name: [_plain(row.get(layer)) for layer in names] for name, row in values.items()}
    return Record(step, names, rows, {name: _plain(value) for name, value in model.items()}, "lab", time.time())


def _plain(value: float | Tensor | None) -> float | None:
    """The value as a float; None if it is not a number."""
    with suppress(Exception):
        return float(number_of(value))
    return None
