"""Window: a model's predictions for the latest examples, and the energy of each layer's inputs."""

from __future__ import annotations

from collections import deque
from typing import final

from torch import Tensor

from batchnorm.adaptation.predictions import Predictions

_LEAST_EXPECTED = 1e-12


@final
class PredictionWindow:
    """Predictions and energies of the last ``size`` examples, or of all since the start if there are fewer.

    Args:
        size: Number of examples.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.examples = 0  # number of examples since the start
        self._energies: dict[str, tuple[float, float]] = {}  # by layer: running means of energy and expected energy
        self._measured = 0  # number of examples in the running means
        self._answers: deque[Predictions] = deque(maxlen=size)

    def add_answers(self, p: Tensor | None, examples: int) -> None:
        """Count ``examples``, and add their predicted probabilities ``p``, (N, K); None if there are no classes."""
        self.examples += examples
        if p is not None:
            self._answers.extend(Predictions.of(row[None]) for row in p[-self.size :])

    def add_energies(self, energies: dict[str, tuple[float, float]], examples: int) -> None:
        """Add a batch's energy and expected energy in each layer, by path."""
        self._measured = min(self._measured + examples, max(self.size, examples))
        share = examples / max(1, self._measured)
        for path, new in energies.items():
            old = self._energies.get(path, new)
            self._energies[path] = old[0] + share * (new[0] - old[0]), old[1] + share * (new[1] - old[1])

    @property
    def energies(self) -> dict[str, float]:
        """Energy of each layer divided by its expected energy, by path."""
        return {path: energy / max(expected, _LEAST_EXPECTED) for path, (energy, expected) in self._energies.items()}

    @property
    def answers(self) -> Predictions | None:
        """Sums over all predictions in the window; None if there are none."""
        predictions = list(self._answers)
        return sum(predictions[1:], predictions[0]) if predictions else None
