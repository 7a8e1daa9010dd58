"""Window: a model's predictions for the latest examples, and the energy of each layer's inputs."""

from __future__ import annotations

from collections import deque
from typing import final

from torch import Tensor

from batchnorm.adaptation.predictions import Predictions

_LEAST = 1e-12


@final
class PredictionWindow:
    """The last ``size`` examples, or all since the start if there are fewer.

    Args:
        size: Number of examples.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.examples = 0  # since the start
        self._energies: dict[str, tuple[float, float]] = {}  # of each layer, running means
        self._measured = 0
        self._answers: deque[Predictions] = deque(maxlen=size)

    def add_answers(self, p: Tensor | None, examples: int) -> None:
        """Add predicted probabilities, (N, K), if there are any."""
        self.examples += examples
        if p is not None:
            self._answers.extend(Predictions.of(row[None]) for row in p[-self.size :])

    def add_energies(self, energies: dict[str, tuple[float, float]], examples: int) -> None:
        """Add a batch's energy in each layer, and its expected energy."""
        self._measured = min(self._measured + examples, max(self.size, examples))
        share = examples / max(1, self._measured)
        for path, new in energies.items():
            old = self._energies.get(path, new)
            self._energies[path] = old[0] + share * (new[0] - old[0]), old[1] + share * (new[1] - old[1])

    @property
    def energies(self) -> dict[str, float]:
        """Energy of each layer, in units of the expected energy."""
        return {path: found / max(expected, _LEAST) for path, (found, expected) in self._energies.items()}

    @property
    def answers(self) -> Predictions | None:
        """Sums over all predictions; None without any."""
        found = list(self._answers)
        return sum(found[1:], found[0]) if found else None
