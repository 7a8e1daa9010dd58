"""Rows: whether the first rows of a batch are a valid smaller batch for the model.

The first axis of a tensor may count examples, the nodes of a graph, the points of a cloud, or the words of several
texts. Shapes do not show which, but the model does: if rows are missing that other rows refer to, it raises an error,
or its outputs differ.
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
    """Let batches be cut at their limit only if the model treats the first rows as a smaller batch."""
    if forward is None:
        batches.given = lambda batch: arguments(model, batch)
    with preserve_random_state(*batches.generators):
        last = batches.to_be_cut()
        if last is not None:
            batches.has_rows = not why_whole(model, *last, forward=forward, device=batches.device)


def why_whole(
    model: nn.Module, batch: Batch, count: int, *, forward: Forward | None = None, device: torch.device | None = None
) -> str:
    """Why the first ``count`` rows of a batch are not a valid batch, as the end of a sentence; "" if they are.

    The rows are valid if the first axes of all tensors that the model receives have the same size, and the model in
    eval mode returns for these rows alone what it returns for them within the whole batch, to half of the digits. They
    are not valid if the number of outputs is not proportional to the number of rows. If there are no outputs, a run
    without an error is enough. Sequences of a packed or nested tensor are examples by their type, and the model is not
    run. The model is left as it was, bit for bit.

    Args:
        model: The model; it runs at most twice.
        batch: A batch, in a form that ``recalibrate`` accepts.
        count: Number of rows, fewer than the batch has.
        forward: Called as ``forward(model, batch)`` instead of the usual rules.
        device: Device to which the batch is moved; the model's device by default.

    Raises:
        Exception: The error that the model raises on the whole batch.
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
        except Exception as error:  # noqa: BLE001 - any error of the user's model is the answer
            return f"the model does not run on {count} of the batch's {size} rows ({type(error).__name__}: {error})"
    if len(whole) != len(part) or any(len(y) * size != len(z) * count for y, z in zip(part, whole, strict=True)):
        return "the model does not return one output for each row"
    of_rows = [(few, all_[:count]) for few, all_ in zip(part, whole, strict=True) if len(few) == count]
    if not all(_is_close(few, all_) for few, all_ in of_rows):
        return f"the model's outputs for {count} of the {size} rows differ from those within the whole batch"
    return ""


def _outputs(value: object) -> list[Tensor]:
    return [y for y in tensors_in(value) if y.is_floating_point() and not y.is_nested and y.ndim]


def _is_close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    scale = b.abs().nan_to_num(0, 0, 0).amax() if b.numel() else 1.0
    digits = torch.finfo(b.dtype).eps ** 0.5
    return torch.allclose(a, b, rtol=digits, atol=float(scale) * digits, equal_nan=True)
