"""The open window: copies of what layers store after each step, until there are enough for a look."""

from __future__ import annotations

from typing import final

import torch

from batchnorm.instruments.passes import End, Passes
from batchnorm.instruments.snapshots import Layers, Snapshot

WINDOW = 8  # steps of one look: 6 second differences, pooled over channels
_LONGEST = 4 * WINDOW  # where a layer is not updated in every step


@final
class OpenWindow:
    """A window of consecutive steps; without an end while none is open.

    Args:
        layers: Whose stored statistics are copied.
        passes: The passes between two steps, seen while the window is open.

    Attributes:
        ends: Of the steps so far, with the moment at which it was opened.
        since: Steps since a look was due; None while none is.
    """

    def __init__(self, layers: Layers, passes: Passes) -> None:
        self._layers, self._passes = layers, passes
        self.ends: list[End] = []
        self.since: int | None = None

    def open(self) -> None:
        """Begin with what is stored now."""
        self._passes.on()
        self.ends = [End.alone(Snapshot.of(self._layers))]

    def add(self, taker: int) -> None:
        """Copy what is stored after a step of this optimizer."""
        self.ends.append(End(Snapshot.of(self._layers), self._passes.taken(), taker))

    def close(self) -> None:
        """Keep nothing, and see no more passes."""
        self._passes.off()
        self.ends, self.since = [], None

    def taken(self) -> list[End]:
        """The ends that the look is about, on the CPU; the window is closed."""
        ends = [end.cpu() for end in self.ends[-max(self.since or 0, WINDOW) - 1 :]]
        self.close()
        return ends

    def is_enough(self) -> bool:
        """Whether every updated layer was updated often enough; checked after W, 2 W and 4 W steps."""
        if self.since is None or self.since < WINDOW or (self.since < _LONGEST and self.since % WINDOW):
            return False
        if self.since >= _LONGEST:
            return True
        counts = torch.stack([end.snapshot.updates for end in self.ends[-self.since - 1 :]]).cpu()
        moved = (counts.diff(dim=0) > 0).sum(0)
        return bool(((moved == 0) | (moved >= WINDOW)).all())
