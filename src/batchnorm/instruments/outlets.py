"""Outlets: where a watched training's numbers go, its log and what users add to it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, final

from torch import Tensor

from batchnorm.record import Record, Writer

if TYPE_CHECKING:
    from batchnorm.instruments.snapshots import Layers


class Sink(Protocol):
    """Where numbers go besides the log: TensorBoard, MLflow, a metric store of one's own."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take numbers of one step, by names such as "batchnorm/noise/layer1.0.bn1" and "loss"."""

    def close(self) -> None:
        """Nothing more will come."""


@final
class Outlets:
    """The log, if there is one, and sinks. A sink that fails gets no more; the training goes on without it.

    Args:
        log: Folder of the log; None for none.
        sinks: Where numbers go besides.
    """

    def __init__(self, log: Any, sinks: Sequence[Sink]) -> None:
        self._log, self._sinks = log, list(sinks)
        self._writer: Writer | None = None
        self._noted: dict[str, tuple[Any, int]] = {}  # sums of the user's numbers

    @property
    def has_log(self) -> bool:
        """Whether somebody can read what happened."""
        return self._writer is not None

    def open(self, layers: Layers, about: Mapping[str, Any]) -> int | None:
        """Open the log; the steps that it has already, None without a log."""
        if self._log is None:
            return None
        self._writer = Writer(self._log, _described(layers), **about)
        return self._writer.step

    def note(self, values: Mapping[str, float | Tensor]) -> None:
        """Take the user's numbers, whose means the next ``progress`` tells; tensors are not waited for."""
        for name, value in values.items():
            number = value.detach() if isinstance(value, Tensor) else float(value)
            total, count = self._noted.get(name, (0.0, 0))
            self._noted[name] = total + number, count + 1

    def record(self, record: Record) -> None:
        """Tell a record to all."""
        if self._writer is not None:
            self._writer.write(record)
        self._send(record.step, dict(_flat(record)) if self._sinks else {})

    def event(self, step: int, message: str, layer: str | None = None, code: str | None = None) -> None:
        """Tell the log what happened."""
        if self._writer is not None:
            self._writer.event(step, message, layer=layer, code=code)

    def progress(self, step: int, cost: float) -> None:
        """Tell how far the training is, and what the user noted."""
        means = {name: float(total) / count for name, (total, count) in self._noted.items()}
        self._noted = {}
        if self._writer is not None:
            self._writer.progress(step, time.time(), means, cost)
        self._send(step, {**means, "batchnorm/cost": cost})

    def close(self, step: int, reason: str, cost: float) -> None:
        """End the log, and tell sinks that it is over."""
        if self._writer is not None:
            self._writer.end(step, reason, cost=round(cost, 5))
        self._writer = None
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:  # noqa: BLE001 - it is over anyway
                _warn(f"{type(sink).__name__} could not be closed: {type(error).__name__}: {error}.")

    def _send(self, step: int, numbers: Mapping[str, float]) -> None:
        for sink in tuple(self._sinks):
            try:
                sink.write(step, numbers)
            except Exception as error:  # noqa: BLE001 - the log and the training do without it
                self._sinks.remove(sink)
                _warn(f"{type(sink).__name__} failed and gets no more numbers: {type(error).__name__}: {error}.")


def _flat(record: Record) -> Iterable[tuple[str, float]]:
    for name, row in record.values.items():
        yield from (
            (f"batchnorm/{name}/{layer}", v) for layer, v in zip(record.layers, row, strict=True) if v is not None
        )
    yield from ((f"batchnorm/{name}", value) for name, value in record.model.items() if value is not None)


def _described(layers: Layers) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "channels": layer.num_features,
            "kind": type(layer).__name__,
            "eps": layer.eps,
            "momentum": layer.momentum,
        }
        for name, layer in zip(layers.names, layers.layers, strict=True)
    ]


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=5)
