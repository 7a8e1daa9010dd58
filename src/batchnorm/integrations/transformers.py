"""Hugging Face Trainer: a callback that watches, and can recalibrate when training ends.

The Trainer calls ``model.train()`` in every step, which undoes ``layer.eval()``, but not ``batchnorm.freeze(model)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Unpack, final

from torch import nn

from batchnorm.call_types import Batch
from batchnorm.instruments import Watch
from batchnorm.integrations.missing_packages import needed
from batchnorm.integrations.recalibration_in_training import calibrate
from batchnorm.integrations.watch_session import Session, WatchArguments
from batchnorm.population.batches import call

with needed("transformers", "'transformers[torch]'"):
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


@final
class BatchNormCallback(TrainerCallback):
    """Measures batch norm while the Trainer trains; the weights stay the same, bit for bit.

    A Trainer does not inform its callbacks about an exception: the log then has no end, and an open watch is ended when
    the next training begins.

    Args:
        recalibrate: When training ends, replace running averages by the statistics of the training data, after the
            best model is loaded (if it is). Save the model afterwards: checkpoints were written before.
        max_examples: Examples to recalibrate on; None for all.
        watch: ``log``, ``every``, ``budget``, ``probe``, ``loss`` and ``sinks``, as ``batchnorm.watch`` takes them.

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
        """Start."""
        self._session.begin(kwargs["model"])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the loss."""
        self._session.note_loss((kwargs.get("logs") or {}).get("loss"))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop, and recalibrate if wanted."""
        self._session.end()
        if self._recalibrate:
            calibrate(kwargs["model"], kwargs["train_dataloader"], self._max_examples, forward=_called)


def _called(model: nn.Module, batch: Batch) -> object:
    """The model's output for a batch, without labels if its forward does not take them, like the Trainer."""
    if not isinstance(batch, Mapping):
        return call(model, batch)
    known = inspect.signature(model.forward).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    return model(**{name: value for name, value in batch.items() if takes_all or name in known})
