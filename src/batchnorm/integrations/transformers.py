"""Hugging Face Trainer: callbacks that watch, can recalibrate when training ends, and store each step once.

The Trainer calls ``model.train()`` in every step, which undoes ``layer.eval()``, but not ``batchnorm.freeze(model)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Unpack, final

from torch import nn

from batchnorm.call_types import Batch
from batchnorm.instruments import Watch
from batchnorm.integrations.accumulated_step import AccumulatedStep
from batchnorm.integrations.missing_packages import needed
from batchnorm.integrations.recalibration_in_training import calibrate
from batchnorm.integrations.watch_session import Session, WatchArguments
from batchnorm.population.batches import call

with needed("transformers", "'transformers[torch]'"):
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.training_args import ParallelMode


@final
class BatchNormCallback(TrainerCallback):
    """Measures batch norm while the Trainer trains; the weights are trained as without it, bit for bit.

    A Trainer does not inform its callbacks about an exception: then the log has no end yet, and the watch ends when the
    next training begins.

    Args:
        recalibrate: Whether to replace running averages by the statistics of the training data when training ends.
            With ``load_best_model_at_end``, the best model is loaded before. Save the model afterwards: the Trainer's
            checkpoints are older. With several processes the statistics are those of the data of all processes.
        max_examples: Number of examples of all processes to recalibrate on; None for all.
        watch: Arguments of ``batchnorm.watch``: ``log``, ``every``, ``budget``, ``probe``, ``loss``, ``sinks`` and
            ``group``.

    Raises:
        ValueError: When training begins, if the model has no batch norm or an argument is out of range.
    """

    def __init__(
        self, *, recalibrate: bool = False, max_examples: int | None = None, **watch: Unpack[WatchArguments]
    ) -> None:
        super().__init__()
        self._recalibrate, self._max_examples = recalibrate, max_examples
        self._session = Session(**watch)

    @property
    def run(self) -> Watch | None:
        """The watch of the current or last training."""
        return self._session.run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the watch."""
        self._session.begin(kwargs["model"])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log the loss that the Trainer reports: its mean since the last report."""
        self._session.note_loss((kwargs.get("logs") or {}).get("loss"))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the watch, and recalibrate if ``recalibrate``."""
        self._session.end()
        if self._recalibrate:
            calibrate(
                kwargs["model"], kwargs["train_dataloader"], self._max_examples, forward=_called,
                is_distributed=args.parallel_mode == ParallelMode.DISTRIBUTED,
            )  # fmt: skip


@final
class AccumulatedStatistics(TrainerCallback):
    """Moves stored statistics once for each step of the optimizer, with ``gradient_accumulation_steps``.

    The micro-batches of a step count together, as in ``batchnorm.step``; each is normalized by its own statistics. A
    Trainer does not inform its callbacks about an exception: call ``discard`` before the model is used elsewhere.

    Raises:
        ValueError: When training begins, if the model has batch norm layers that are not of this package, or none.
    """

    def __init__(self) -> None:
        super().__init__()
        self._step = AccumulatedStep()

    def discard(self) -> None:
        """End a step that an exception left open, and store nothing."""
        self._step.discard()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Discard what an earlier training left open."""
        self._step.discard()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin a step: the Trainer calls this for its first micro-batch."""
        self._step.begin(kwargs["model"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Store the statistics of the step."""
        self._step.store()


def _called(model: nn.Module, batch: Batch) -> object:
    """The model's output for a batch, called as by the Trainer: with the fields that the model's forward accepts."""
    if not isinstance(batch, Mapping):
        return call(model, batch)
    parameters = inspect.signature(model.forward).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return model(**{name: value for name, value in batch.items() if takes_all or name in parameters})
