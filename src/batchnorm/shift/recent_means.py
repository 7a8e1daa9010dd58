"""Recent means: means over the observations since the evidence of a shift was last at its lowest.

On clean data the evidence falls to new lows again and again; after a change it rises. A mean over the whole stream
would dilute a change by all clean observations before it. If the stream is set to an average run length (``arl``), the
evidence also rises at times on clean data; so the lowest value slowly loses its force.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from batchnorm.shift.stream_state import StreamState

_RISE = 0.05  # added to the lowest log evidence in each round, so that an old lowest value is forgotten


@final
class RecentMeans:
    """Sums over observations, and their means: of z (channel means) and q (channel energies, that is mean squares).

    ``add`` counts the observations since the evidence was lowest, ``take`` counts every observation.

    Args:
        channels: Number of channels of all layers.
        name: The key of these sums in a state.
    """

    def __init__(self, channels: int, name: str = "recent") -> None:
        self._name = name
        self.sums = torch.zeros(2, channels, dtype=torch.float64)
        self.count = 0  # number of observations
        self._least = 0.0  # lowest log evidence, plus _RISE for each later round; 0 before any observation

    def add(self, sums: Tensor, count: int, log: float) -> None:
        """Add a round of observations; or, if the evidence is at its lowest after it, forget all observations.

        Args:
            sums: Sums of z and q over the round, (2, channels).
            count: Number of observations of the round.
            log: Logarithm of the evidence after the round; with ``arl`` minus log(observations).
        """
        self._least += _RISE
        if log <= self._least:
            self.restart()
            self._least = log
        else:
            self.take(sums, count)

    def take(self, sums: Tensor, count: int) -> None:
        """Add a round of observations, also if the evidence is at its lowest."""
        self.sums, self.count = self.sums + sums, self.count + count

    @property
    def means(self) -> Tensor | None:
        """Means of the channel means and of the energies, (2, channels); None if there are no observations."""
        return self.sums / self.count if self.count else None

    def restart(self) -> None:
        """Forget all earlier observations."""
        self.sums, self.count = torch.zeros_like(self.sums), 0

    def state(self) -> StreamState:
        """The sums, as part of a state."""
        return StreamState({self._name: self.sums}, {self._name: {"count": self.count, "least": self._least}})

    def put(self, state: StreamState) -> None:
        """Continue from a state."""
        about = state.about[self._name]
        self.sums, self.count, self._least = state.tensors[self._name].clone(), about["count"], about["least"]
