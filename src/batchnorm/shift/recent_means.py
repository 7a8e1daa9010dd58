"""Recent: what was observed since the evidence was least.

On clean data the evidence sinks, to its least again and again; from a change on it rises. Means over the whole stream
would show a change the less, the longer all was well before it. With an average run length the evidence goes up and
down on clean data: so the least is forgotten little by little.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from batchnorm.shift.stream_state import State

_FORGOTTEN = 0.05  # of the least logarithm, with each round


@final
class Recent:
    """Sums of channel means and energies since then.

    Args:
        channels: Of all layers.
        name: In a state.
    """

    def __init__(self, channels: int, name: str = "recent") -> None:
        self._name = name
        self.sums = torch.zeros(2, channels, dtype=torch.float64)
        self.count = 0  # observations
        self._least = 0.0  # evidence before any observation

    def add(self, sums: Tensor, count: int, log: float) -> None:
        """Take a round of observations, after which the logarithm of the evidence was ``log``."""
        self._least += _FORGOTTEN
        if log <= self._least:
            self.restart()
            self._least = log
        else:
            self.take(sums, count)

    def take(self, sums: Tensor, count: int) -> None:
        """Take a round of observations, whatever the evidence is."""
        self.sums, self.count = self.sums + sums, self.count + count

    @property
    def means(self) -> Tensor | None:
        """Means of z and q, (2, channels); None without observations."""
        return self.sums / self.count if self.count else None

    def restart(self) -> None:
        """Forget what came until now."""
        self.sums, self.count = torch.zeros_like(self.sums), 0

    def state(self) -> State:
        """All of it."""
        return State({self._name: self.sums}, {self._name: {"count": self.count, "least": self._least}})

    def put(self, state: State) -> None:
        """Go on from a state."""
        about = state.about[self._name]
        self.sums, self.count, self._least = state.tensors[self._name].clone(), about["count"], about["least"]
