"""Session: consecutive ``watch`` runs, started and ended by the events of a framework.

A framework can train several times with one callback, and most do not report a training that ends by an exception. A
watch that is still open when the next training begins is ended then.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, TypedDict, Unpack, final

from torch import Tensor, nn

from batchnorm.instruments import Sink, Watch, watch
from batchnorm.instruments.probe_tier import Loss


class WatchArguments(TypedDict, total=False):
    """The arguments of ``watch``; see there."""

    log: str | os.PathLike[str] | None
    every: int
    budget: float
    probe: Any
    loss: Loss | None
    sinks: Iterable[Sink]


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
        """A new watch of the model, started."""
        self.end("interrupted")
        self.run = watch(model, **self._arguments, sinks=(*self._sinks, *sinks)).start()
        return self.run

    def end(self, reason: str = "finished") -> None:
        """Measure the rest and end the log; nothing if this was done."""
        if self.run is not None:
            self.run.stop(reason)

    def note_loss(self, value: Any, times: float = 1.0) -> None:
        """Log the loss of this step, if it is a number."""
        is_number = isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
        if self.run is not None and is_number:
            self.run.log(loss=value * times)


def raised(error: BaseException) -> str:
    """Why a training ended, worded as ``watch`` does."""
    return f"raised {type(error).__name__}"
