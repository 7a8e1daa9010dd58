"""skorch: a callback that watches, and can recalibrate when training ends."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import final

from torch import Tensor

from batchnorm.call_types import Answer, Batch
from batchnorm.instruments import Sink, Watch
from batchnorm.integrations.missing_packages import needed
from batchnorm.integrations.recalibration_in_training import calibrate
from batchnorm.integrations.watch_session import Session
from batchnorm.processes import is_alone

with needed("skorch", "skorch"):
    from skorch import NeuralNet
    from skorch.callbacks import Callback


@final
class BatchNormCallback(Callback):
    """Measures batch norm while a net is fitted; the weights are trained as without it, bit for bit.

    The arguments are attributes, so that scikit-learn can clone and tune them. A net does not inform its callbacks
    about an exception: then the log has no end yet, and the watch ends when the next training begins.

    Args:
        log, every, budget, probe, loss, sinks: Arguments of ``batchnorm.watch``.
        recalibrate: Whether to replace running averages by the statistics of the training examples when training ends,
            of all processes if there are several.
        max_examples: Number of examples to recalibrate on; None for all.

    Raises:
        ValueError: When training begins, if the module has no batch norm or an argument is out of range.
    """

    def __init__(
        self,
        *,
        log: str | os.PathLike[str] | None = None,
        every: int = 100,
        budget: float = 0.02,
        probe: object = None,
        loss: Callable[[Answer, Batch], Tensor] | None = None,
        sinks: Iterable[Sink] = (),
        recalibrate: bool = False,
        max_examples: int | None = None,
    ) -> None:
        self.log, self.every, self.budget, self.probe, self.loss, self.sinks = log, every, budget, probe, loss, sinks
        self.recalibrate, self.max_examples = recalibrate, max_examples

    def initialize(self) -> BatchNormCallback:
        """Prepare for a new training; end the watch of an earlier training."""
        session = getattr(self, "session_", None)
        if session is not None:
            session.end("interrupted")
        self.session_ = Session(
            log=self.log, every=self.every, budget=self.budget, probe=self.probe, loss=self.loss, sinks=self.sinks
        )
        return self

    @property
    def run_(self) -> Watch | None:
        """The watch of the current or last training."""
        return self.session_.run

    def on_train_begin(self, net: NeuralNet, X: object = None, y: object = None, **kwargs: object) -> None:
        """Start the watch."""
        self.session_.begin(net.module_)

    def on_epoch_begin(
        self, net: NeuralNet, dataset_train: object = None, dataset_valid: object = None, **kwargs: object
    ) -> None:
        """Keep the training examples; X and y of ``on_train_end`` contain the validation examples too."""
        self.trained_on_ = dataset_train

    def on_batch_end(self, net: NeuralNet, batch: Batch = None, training: bool | None = None, **kwargs: object) -> None:
        """Log the loss."""
        if training:
            self.session_.note_loss(kwargs.get("loss"))

    def on_train_end(self, net: NeuralNet, X: object = None, y: object = None, **kwargs: object) -> None:
        """End the watch, and recalibrate if ``recalibrate``."""
        self.session_.end()
        trained_on, self.trained_on_ = getattr(self, "trained_on_", None), None
        if self.recalibrate and trained_on is not None:
            batches = net.get_iterator(trained_on, training=True)
            calibrate(
                net.module_, batches, self.max_examples, forward=lambda _, batch: net.infer(batch[0]),
                is_distributed=not is_alone(),
            )  # fmt: skip
