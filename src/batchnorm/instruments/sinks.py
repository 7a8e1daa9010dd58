"""Outlets: the log and the sinks that receive the numbers of a watched training."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Protocol, final

import torch
from torch import Tensor, nn

from batchnorm.instruments.snapshots import Layers
from batchnorm.processes import is_synchronized
from batchnorm.processes.membership import members
from batchnorm.record import Record, Writer
from batchnorm.record.log_entry import Described, JsonValue

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Sink(Protocol):
    """A receiver of numbers besides the log, such as TensorBoard, MLflow or your own metric store."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Receive the numbers of one step by name, such as "batchnorm/noise/layer1.0.bn1" or "loss"."""

    def close(self) -> None:
        """Called once, after the last ``write``; not called if a ``write`` has failed."""


@final
class Outlets:
    """The log, if there is one, and sinks. After an error a sink gets no more numbers; the training continues.

    Args:
        log: Folder of the log; None writes no log.
        sinks: Further receivers of the numbers.
    """

    def __init__(self, log: str | os.PathLike[str] | None, sinks: Sequence[Sink]) -> None:
        self._log, self._sinks = log, list(sinks)
        self._writer: Writer | None = None
        self._noted: dict[str, tuple[float | Tensor, int]] = {}  # name -> sum and count of the user's numbers
        self.unsaid: list[str] = []  # messages to warn of at the end, without a log
        self._no_numbers: dict[str, str] = {}  # name -> kind of a logged value that is no number

    @property
    def has_log(self) -> bool:
        """Whether a log is open."""
        return self._writer is not None

    def open(
        self, model: nn.Module, layers: Layers, schedule: Mapping[str, float], group: ProcessGroup | None = None
    ) -> int | None:
        """Open the log, and return the number of steps that it already has; None without a log.

        Args:
            model: The model that trains.
            layers: Its batch norm layers.
            schedule: The settings of the schedule.
            group: The processes that train it together; None if this process trains alone.
        """
        if self._log is None:
            return None
        self._writer = Writer(
            self._log,
            _described(layers),
            model=type(model).__name__,
            parameters=sum(p.numel() for p in model.parameters()),
            schedule=dict(schedule),
            versions={name: version(name) for name in ("batchnorm", "torch")},
            **_of_ranks(layers, group),
        )
        return self._writer.step

    def note(self, values: Mapping[str, float | Tensor]) -> None:
        """Add the user's numbers; the next ``progress`` sends their means. A GPU is not waited for.

        A value that is no single number is left out without an error, so that the training continues.
        """
        for name, value in values.items():
            try:
                total, count = self._noted.get(name, (0.0, 0))
                self._noted[name] = total + number_of(value), count + 1
            except Exception:  # noqa: BLE001 - a value may raise anything
                self._no_numbers.setdefault(name, _kind(value))

    def tell_left_out(self, step: int) -> None:
        """Report the logged values that are no numbers, each name once; None values are not reported."""
        if kinds := {name: kind for name, kind in self._no_numbers.items() if kind}:
            named = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
            self.tell(step, f"logged values were left out, since each is no single number: {named}")
        self._no_numbers = dict.fromkeys(self._no_numbers, "")

    def tell(self, step: int, message: str) -> None:
        """Write an event to the log; without a log, keep the message in ``unsaid``."""
        if self._writer is not None:
            self._writer.event(step, message)
        else:
            self.unsaid.append(f"watch: {message}.")

    def record(self, record: Record) -> None:
        """Send a record to the log and to all sinks."""
        if self._writer is not None:
            self._writer.write(record)
        self._send(record.step, dict(_flat(record)) if self._sinks else {})

    def event(self, step: int, message: str, layer: str | None = None, code: str | None = None) -> None:
        """Write an event to the log."""
        if self._writer is not None:
            self._writer.event(step, message, layer=layer, code=code)

    def progress(self, step: int, cost: float) -> None:
        """Send the progress of the training and the means of the user's numbers."""
        means = {}
        for name, (total, count) in self._noted.items():
            try:
                means[name] = float(total) / count
            except Exception:  # noqa: BLE001 - a tensor that can no longer be read
                self._no_numbers.setdefault(name, _kind(total))
        self._noted = {}
        if self._writer is not None:
            self._writer.progress(step, time.time(), means, cost)
        self._send(step, {**means, "batchnorm/cost": cost})

    def close(self, step: int, reason: str, cost: float) -> None:
        """End the log, and close the sinks."""
        if self._writer is not None:
            self._writer.end(step, reason, cost=round(cost, 5))
        self._writer = None
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:  # noqa: BLE001 - the training is over
                _warn(f"{type(sink).__name__} could not be closed: {type(error).__name__}: {error}.")

    def _send(self, step: int, numbers: Mapping[str, float]) -> None:
        for sink in tuple(self._sinks):
            try:
                sink.write(step, numbers)
            except Exception as error:  # noqa: BLE001 - the training continues without this sink
                self._sinks.remove(sink)
                _warn(f"{type(sink).__name__} failed and gets no more numbers: {type(error).__name__}: {error}.")


def number_of(value: Any) -> float | Tensor:
    """The value as a number in float32 or wider; a tensor stays on its device.

    Raises:
        TypeError: If the value is text or complex.
        Exception: Any error of the conversion, for example RuntimeError for a tensor of several numbers.
    """
    if isinstance(value, (str, bytes)):
        raise TypeError("a number is expected, got text. Leave it out.")
    if not isinstance(value, Tensor):
        return float(value.item() if hasattr(value, "item") else value)  # an array of one number
    if value.is_complex():
        raise TypeError("a real number is expected, got a complex one. Log its absolute value.")
    number = value.detach().reshape(())
    return number if number.dtype == torch.float64 else number.float()


def _kind(value: object) -> str:
    """The kind of a value that is not a number, in words; "" for None."""
    if value is None:
        return ""
    shape = getattr(value, "shape", None)
    return type(value).__name__ + (f" of shape {tuple(shape)}" if isinstance(shape, tuple) and shape else "")


def _flat(record: Record) -> Iterable[tuple[str, float]]:
    for name, row in record.values.items():
        yield from (
            (f"batchnorm/{name}/{layer}", v) for layer, v in zip(record.layers, row, strict=True) if v is not None
        )
    yield from ((f"batchnorm/{name}", value) for name, value in record.model.items() if value is not None)


def _of_ranks(layers: Layers, group: ProcessGroup | None) -> dict[str, JsonValue]:
    """Fields of a log that several processes train for: the rank that measures, and whose batches it measures."""
    if group is None:
        return {}
    ranks = members(group)
    return {"rank": ranks[0], "ranks": ranks, "synchronized": sum(map(is_synchronized, layers.layers))}


def _described(layers: Layers) -> list[Described]:
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
