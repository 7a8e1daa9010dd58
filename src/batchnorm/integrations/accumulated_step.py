"""The step that a framework accumulates: opened at its first micro-batch, stored when the optimizer has stepped."""

from __future__ import annotations

from typing import final

from torch import nn

from batchnorm.micro_batches.whole_step import OpenStep


@final
class AccumulatedStep:
    """At most one open step of a model."""

    def __init__(self) -> None:
        self._open: OpenStep | None = None

    def begin(self, model: nn.Module) -> None:
        """Open a step; nothing if one is open.

        Raises:
            ValueError: If the model has batch norm layers that are not of this package, or none.
        """
        if self._open is None:
            self._open = OpenStep(model)

    def store(self) -> None:
        """End the step and store its statistics; nothing if none is open."""
        opened, self._open = self._open, None
        if opened is not None:
            opened.store()

    def discard(self) -> None:
        """End the step and store nothing."""
        opened, self._open = self._open, None
        if opened is not None:
            opened.discard()
