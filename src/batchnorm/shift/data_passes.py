"""Passes over a data set that return the observer's statistics of every batch and leave the model as it was."""

from __future__ import annotations

from collections.abc import Generator, Iterable

import torch
from torch import Tensor, nn

from batchnorm.call_types import Batch
from batchnorm.population.batch_rows import settle
from batchnorm.population.batches import Batches, call, device_of
from batchnorm.population.eager import uncompiled
from batchnorm.population.eval_mode import to_eval
from batchnorm.population.state_shield import preserve_random_state, preserve_state
from batchnorm.shift.layer_observer import LayerObserver


def passes(
    model: nn.Module, tap: LayerObserver, loader: Iterable[Batch], max_examples: int | None, who: str
) -> Generator[tuple[Batch, Tensor, Tensor]]:
    """Each batch's inputs, with the means and energies of its examples, (n, channels), in eval mode.

    Args:
        model: The model that ``tap`` observes.
        tap: The observer; its hooks are attached during the passes.
        loader: Batches, in the forms that ``recalibrate`` accepts.
        max_examples: Largest number of examples to use; None uses all.
        who: The caller's name in error messages.

    Raises:
        TypeError: If ``loader`` is not an iterable of batches, or ``max_examples`` is not a whole number.
        ValueError: If there is no batch, a layer does not run in a pass, or layers receive different numbers of
            examples.
    """
    batches = Batches(loader, max_examples, device_of(model), who=who)
    with preserve_state(model), preserve_random_state(*batches.generators):
        to_eval(model)
        with uncompiled():
            settle(batches, model)
        with tap.attached():
            yield from _passes(model, tap, batches, who)


def _passes(
    model: nn.Module, tap: LayerObserver, batches: Batches, who: str
) -> Generator[tuple[Batch, Tensor, Tensor]]:
    for batch in batches:
        inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
        unchanged = inputs.clone() if isinstance(inputs, Tensor) else inputs  # the model may overwrite its input
        with uncompiled(), torch.no_grad():
            call(model, batch)
        if (statistics := tap.taken()) is None:
            raise ValueError(passes_needed(who))
        yield unchanged, *statistics


def passes_needed(who: str) -> str:
    """The error message for a model whose layers do not all receive whole batches."""
    return (
        f"{who} needs passes that reach every batch norm layer with each example once, got a pass that does not. "
        "Give a model whose layers all receive whole batches."
    )
