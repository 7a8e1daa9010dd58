"""Trial: statistics that grow with a stream, what a model answers under them, and what it answers without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from batchnorm.adaptation.answer_window import Window
from batchnorm.adaptation.cumulative import Cumulative
from batchnorm.population.batches import Batches
from batchnorm.population.eager import uncompiled
from batchnorm.population.hooks import seeing
from batchnorm.population.state_shield import preserve_random_state
from batchnorm.population.stored_statistics import Statistics

if TYPE_CHECKING:
    from batchnorm.call_types import Arguments, Keywords
    from batchnorm.population.stored_statistics import Layers


@final
class Trial:
    """New statistics of a model beside its deployed ones.

    Args:
        layers: Whose statistics they are.
        deployed: Those that the model came with.
        prior: How many examples these count as.
        floor: Least weight of a new example.
        window: Examples that are remembered for the guards.
    """

    def __init__(self, layers: Layers, deployed: Statistics, *, prior: float, floor: float, window: int) -> None:
        self._layers, self._deployed = layers, deployed
        self.growing = Cumulative(deployed, prior, floor)
        self.statistics = deployed
        self.new, self.old = Window(window), Window(window)
        self._before: tuple[Cumulative, Statistics] | None = None

    def shadow(self, model: nn.Module, args: Arguments, kwargs: Keywords) -> Any:
        """The model's answer under statistics that include these inputs; the layers are then as they were.

        Inputs are copies, and random states stay: the pass that is served notices nothing.
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
        """Remember what a pass that fails should not have changed."""
        self._before = self.growing.copy(), Statistics.of(self._layers)

    def undo(self) -> None:
        """Take back what was counted since ``begin``."""
        if self._before is not None:
            self.growing, self.statistics = self._before
            self.statistics.put(self._layers)

    def count(self, answers: Tensor | None, examples: int) -> None:
        """Take a batch into the window."""
        self.new.add_energies(self.growing.energies, examples)
        self.new.add_answers(answers, examples)
        self.growing.energies = {}
