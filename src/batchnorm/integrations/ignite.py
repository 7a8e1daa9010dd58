"""PyTorch-Ignite: an engine that trains is watched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

from torch import nn

from batchnorm.integrations.missing_packages import needed
from batchnorm.integrations.watch_session import Session, WatchArguments, raised

if TYPE_CHECKING:
    from ignite.engine import Engine


def attach(engine: Engine, model: nn.Module, **watch: Unpack[WatchArguments]) -> Session:
    """A session whose ``run`` is the watch of the engine's run; the weights stay the same, bit for bit.

    A new watch begins with each ``engine.run()`` and ends with it, also by an exception or ``terminate()``. Handlers
    of exceptions work as before. The engine's output is noted as the loss if it is a number.

    Args:
        engine: The engine that trains.
        model: The model that it trains.
        watch: ``log``, ``every``, ``budget``, ``probe``, ``loss`` and ``sinks``, as ``batchnorm.watch`` takes them.

    Raises:
        ValueError: When the engine runs, if the model has no batch norm or an argument is out of range.
    """
    with needed("ignite", "pytorch-ignite"):
        from ignite.engine import Events

    session = Session(**watch)

    def end_raising(engine: Engine, error: BaseException) -> None:
        session.end(raised(error))
        if len(engine._event_handlers[Events.EXCEPTION_RAISED]) == 1:
            raise error  # an engine without a handler raises, and this one shall not count

    engine.add_event_handler(Events.STARTED, lambda: session.begin(model))
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: session.note_loss(engine.state.output))
    engine.add_event_handler(Events.TERMINATE, lambda: session.end("terminated"))
    engine.add_event_handler(Events.COMPLETED, session.end, "finished")
    engine.add_event_handler(Events.EXCEPTION_RAISED, end_raising)
    return session
