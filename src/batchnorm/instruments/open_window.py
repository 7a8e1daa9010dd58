"""The open window: copies of what layers store after each step, until there are enough for a measurement ("look")."""

from __future__ import annotations

from typing import final

import torch

from batchnorm.instruments.passes import End, Passes
from batchnorm.instruments.snapshots import Layers, Snapshot

WINDOW = 8  # steps of one look, which give 6 second differences for each channel
_LONGEST = 4 * WINDOW  # steps of the longest window, if a layer is not updated in every step


@final
class OpenWindow:
    """A window of consecutive steps; ``ends`` is empty while the window is closed.

    Args:
        layers: The layers whose stored statistics are copied.
        passes: Records the passes between two steps while the window is open.

    Attributes:
        ends: One copy from when the window was opened, and one copy after each step.
        since: Number of steps since a look became due; None if no look is due.
    """

    def __init__(self, layers: Layers, passes: Passes) -> None:
        self._layers, self._passes = layers, passes
        self.ends: list[End] = []
        self.since: int | None = None

    def open(self) -> None:
        """Open the window with a copy of the statistics stored now."""
        self._passes.on()
        self.ends = [End.alone(Snapshot.of(self._layers))]

    def add(self, taker: int) -> None:
        """Copy the stored statistics after a step; ``taker`` is the id of the optimizer that made the step."""
        self.ends.append(End(Snapshot.of(self._layers), self._passes.taken(), taker))

    def close(self) -> None:
        """Drop all copies, and stop recording passes."""
        self._passes.off()
        self.ends, self.since = [], None

    def taken(self) -> list[End]:
        """Close the window, and return the ends that the look needs, on the CPU."""
        ends = [end.cpu() for end in self.ends[-max(self.since or 0, WINDOW) - 1 :]]
        self.close()
        return ends

    def is_enough(self) -> bool:
        """Whether every layer that was updated was updated in W steps; True after 4 W steps in any case.

        W is ``WINDOW``. Before 4 W steps it is False unless the number of steps since a look became due is a multiple
        of W.
        """
        if self.since is None or self.since < WINDOW or (self.since < _LONGEST and self.since % WINDOW):
            return False
        if self.since >= _LONGEST:
            return True
        counts = torch.stack([end.snapshot.updates for end in self.ends[-self.since - 1 :]]).cpu()
        moved = (counts.diff(dim=0) > 0).sum(0)
        return bool(((moved == 0) | (moved >= WINDOW)).all())
