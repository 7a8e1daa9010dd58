"""PyTorch-Ignite: watches an engine's training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

from torch import nn

from batchnorm.integrations.missing_packages import needed
from batchnorm.integrations.watch_session import Session, WatchArguments, raised

if TYPE_CHECKING:
    from ignite.engine import Engine


def attach(engine: Engine, model: nn.Module, **watch: Unpack[WatchArguments]) -> Session:
    """A session that watches each run of the engine; the weights are trained as without it, bit for bit.

    Each ``engine.run()`` has its own watch, ``session.run``. The watch ends with the run, also after an exception or
    ``terminate()``. Exception handlers work as before. If the engine's output is a number, it is logged as the loss.

    Args:
        engine: The engine that trains.
        model: The model that the engine trains.
        watch: Arguments of ``batchnorm.watch``: ``log``, ``every``, ``budget``, ``probe``, ``loss``, ``sinks`` and
            ``group``.

    Raises:
        ModuleNotFoundError: If ignite is not installed.
        ValueError: When the engine runs, if the model has no batch norm or an argument is out of range.
    """
    with needed("ignite", "pytorch-ignite"):
        from ignite.engine import Events

    session = Session(**watch)

    def end_raising(engine: Engine, error: BaseException) -> None:
        session.end(raised(error))
        if len(engine._event_handlers[Events.EXCEPTION_RAISED]) == 1:
            raise error  # an engine without handlers raises, so our handler must not count

    engine.add_event_handler(Events.STARTED, lambda: session.begin(model))
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: session.note_loss(engine.state.output))
    engine.add_event_handler(Events.TERMINATE, lambda: session.end("terminated"))
    engine.add_event_handler(Events.COMPLETED, session.end, "finished")
    engine.add_event_handler(Events.EXCEPTION_RAISED, end_raising)
    return session
