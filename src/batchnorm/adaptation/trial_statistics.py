"""Trial: new statistics that are tested beside the deployed ones, with the model's predictions under both."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn

from batchnorm.adaptation.answer_window import PredictionWindow
from batchnorm.adaptation.cumulative import Cumulative
from batchnorm.population.batches import Batches
from batchnorm.population.eager import uncompiled
from batchnorm.population.hooks import seeing
from batchnorm.population.state_shield import preserve_random_state
from batchnorm.population.stored_statistics import Statistics

if TYPE_CHECKING:
    from batchnorm.call_types import Answer, Arguments, Keywords
    from batchnorm.population.stored_statistics import Layers


@final
class Trial:
    """New statistics of a model beside its deployed ones.

    Args:
        layers: The layers of the model, by path.
        deployed: The model's deployed statistics.
        prior: Number of examples that the deployed statistics count as.
        floor: Smallest weight of a new example.
        window: Number of latest examples for the guards.
    """

    def __init__(self, layers: Layers, deployed: Statistics, *, prior: float, floor: float, window: int) -> None:
        self._layers, self._deployed = layers, deployed
        self.growing = Cumulative(deployed, prior, floor)
        self.statistics = deployed
        self.new, self.old = PredictionWindow(window), PredictionWindow(window)
        self._before: tuple[Cumulative, Statistics] | None = None

    def shadow(self, model: nn.Module, args: Arguments, kwargs: Keywords) -> Answer:
        """The model's output under statistics that include these inputs; the layers are restored.

        The model gets copies of the inputs, and random states are restored: the caller's own pass is not affected.
        """
        ((args, kwargs),) = Batches([(args, kwargs)], None, None)
        before = Statistics.of(self._layers)
        try:
            self.statistics.put(self._layers)
            with seeing(self._layers, self.growing.see), uncompiled(), torch.no_grad(), preserve_random_state():
                output = model.forward(*args, **kwargs)
            self.statistics = Statistics.of(self._layers)
        finally:
            before.put(self._layers)
        return output

    def begin(self) -> None:
        """Save the state, in case the pass fails."""
        self._before = self.growing.copy(), Statistics.of(self._layers)

    def undo(self) -> None:
        """Return to the state at ``begin``."""
        if self._before is not None:
            self.growing, self.statistics = self._before
            self.statistics.put(self._layers)

    def count(self, answers: Tensor | None, examples: int) -> None:
        """Add a batch's predicted probabilities and energies to the window of the new statistics."""
        self.new.add_energies(self.growing.energies, examples)
        self.new.add_answers(answers, examples)
        self.growing.energies = {}
