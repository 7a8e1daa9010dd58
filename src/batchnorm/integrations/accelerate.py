"""accelerate: gradient accumulation that stores the statistics of each step once. It needs no import of accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from torch import nn

from batchnorm.integrations.accumulated_step import AccumulatedStep

if TYPE_CHECKING:
    from accelerate import Accelerator

_steps: WeakKeyDictionary[nn.Module, AccumulatedStep] = WeakKeyDictionary()


@contextmanager
def accumulate(accelerator: Accelerator, *models: nn.Module) -> Iterator[None]:
    """``accelerator.accumulate(*models)``, in which stored statistics move once for each step of the optimizer.

    The micro-batches of all blocks since the last step count, as in ``batchnorm.step``. After an exception in a block
    the micro-batches of its step store nothing.

    Args:
        accelerator: The accelerator, with its ``gradient_accumulation_steps``.
        models: The models, before or after ``prepare``.

    Raises:
        ValueError: If a model has batch norm layers that are not of this package, or none.
    """
    steps = [_steps.setdefault(model, AccumulatedStep()) for model in models]
    try:
        with accelerator.accumulate(*models):
            for step, model in zip(steps, models, strict=True):
                step.begin(model)
            yield
    except BaseException:
        for step in steps:
            step.discard()
        raise
    if accelerator.sync_gradients:
        for step in steps:
            step.store()
