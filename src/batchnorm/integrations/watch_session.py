"""Session: one ``watch`` for each training, started and ended by the events of a framework.

A framework can train several times with one callback, and most frameworks do not report a training that ends by an
exception. If a watch is still open when the next training begins, it is ended at that time. Frameworks call their
callbacks on every rank; ``watch`` sees to it that there is one log, and that the ranks are compared.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, TypedDict, Unpack, final

from torch import Tensor, nn

from batchnorm.instruments import Sink, Watch, watch
from batchnorm.instruments.probe_tier import Loss
from batchnorm.instruments.watched_training import Group


class WatchArguments(TypedDict, total=False):
    """The arguments of ``batchnorm.watch``, except the model; ``watch`` describes them."""

    log: str | os.PathLike[str] | None
    every: int
    budget: float
    probe: Any
    loss: Loss | None
    sinks: Iterable[Sink]
    group: Group


@final
class Session:
    """The watches of a framework's trainings.

    Attributes:
        run: The watch of the current or last training; None before the first one.
    """

    def __init__(self, **arguments: Unpack[WatchArguments]) -> None:
        self.run: Watch | None = None
        self._sinks = tuple(arguments.pop("sinks", ()))
        self._arguments: dict[str, Any] = dict(arguments)

    def begin(self, model: nn.Module, *sinks: Sink) -> Watch:
        """Start a new watch of the model; end the previous watch if it is open."""
        self.end("interrupted")
        self.run = watch(model, **self._arguments, sinks=(*self._sinks, *sinks)).start()
        return self.run

    def end(self, reason: str = "finished") -> None:
        """End the watch: measure the remaining steps and end the log. Do nothing if no watch is open."""
        if self.run is not None:
            self.run.stop(reason)

    def note_loss(self, value: object, times: float = 1.0) -> None:
        """Log the loss of this step times ``times``, if the loss is a number and a watch has been started."""
        is_number = isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
        if self.run is not None and is_number:
            self.run.log(loss=value * times)


def raised(error: BaseException) -> str:
    """The reason that the log of ``watch`` has for a training that an error ended."""
    return f"raised {type(error).__name__}"
