"""Rows: whether a part of a batch is a batch of its own, as the model answers it.

The first axis of a tensor may count examples, or the nodes of a graph, the points of a cloud, the words of several
texts in a row. Tensors do not tell; what refers to rows that were cut off does: the model raises, or answers otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from batchnorm.population.batches import Batches, arguments, call, device_of
from batchnorm.population.eval_mode import to_eval
from batchnorm.population.state_shield import preserve_random_state, preserve_state
from batchnorm.population.tensor_trees import are_sequences, examples_in, tensors_in, why_without_rows

if TYPE_CHECKING:
    from batchnorm.call_types import Batch
    from batchnorm.population.batches import Forward


def settle(batches: Batches, model: nn.Module, forward: Forward | None = None) -> None:
    """Have batches cut by their limit only where the model takes the part for a batch of its own."""
    if forward is None:
        batches.given = lambda batch: arguments(model, batch)
    with preserve_random_state(*batches.generators):
        last = batches.to_be_cut()
        if last is not None:
            batches.has_rows = not why_whole(model, *last, forward=forward, device=batches.device)


def why_whole(
    model: nn.Module, batch: Batch, count: int, *, forward: Forward | None = None, device: torch.device | None = None
) -> str:
    """Why the first ``count`` rows of a batch are no batch of their own, as the end of a sentence; "" if they are.

    They are if all tensors that the model is given share their first axis, and the model, in eval mode, gives the part
    the outputs that it gives these rows within the whole, to half of the digits. Outputs that do not grow with the rows
    say no; without outputs it is enough that the model runs. Sequences that are packed or nested are examples by their
    type, and nothing is run. The model is left as it was, bit for bit.

    Args:
        model: Run twice.
        batch: As ``recalibrate`` takes one.
        count: Rows, fewer than the batch has.
        forward: Called as ``forward(model, batch)`` in place of the usual rules.
        device: Where the batch is moved, if not to the model's.

    Raises:
        Exception: What the model raises on the whole batch.
    """
    given = batch if forward is not None else arguments(model, batch)
    if forward is None and (why := why_without_rows(given)):
        return why
    if are_sequences(given):
        return ""
    size, device = examples_in(batch) or 0, device or device_of(model)
    run = forward or call
    with preserve_state(model), torch.no_grad():
        to_eval(model)
        whole = _outputs(run(model, next(iter(Batches([batch], None, device)))))
        try:
            part = _outputs(run(model, next(iter(Batches([batch], count, device)))))
        except Exception as error:  # noqa: BLE001 - whatever the user's model raises is the answer
            return f"the model does not run on {count} of its {size} rows ({type(error).__name__}: {error})"
    if len(whole) != len(part) or any(len(y) * size != len(z) * count for y, z in zip(part, whole, strict=True)):
        return "the model's outputs are not one for each row"
    of_rows = [(few, all_[:count]) for few, all_ in zip(part, whole, strict=True) if len(few) == count]
    if not all(_is_close(few, all_) for few, all_ in of_rows):
        return f"the model answers {count} of its {size} rows otherwise than within the whole"
    return ""


def _outputs(value: object) -> list[Tensor]:
    return [y for y in tensors_in(value) if y.is_floating_point() and not y.is_nested and y.ndim]


def _is_close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    scale = b.abs().nan_to_num(0, 0, 0).amax() if b.numel() else 1.0
    digits = torch.finfo(b.dtype).eps ** 0.5
    return torch.allclose(a, b, rtol=digits, atol=float(scale) * digits, equal_nan=True)
