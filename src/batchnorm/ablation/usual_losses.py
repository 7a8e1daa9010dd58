"""The loss that is meant where the user gives none: cross-entropy for classes, mean squared error for numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.call_types import Answer, Batch

_KEYS = ("labels", "label", "targets", "target", "y")
_REMEDY = "Give your own: --loss file.py:loss with loss(output, batch) -> scalar."


def default_loss(output: Answer, batch: Batch) -> Tensor:
    """Cross-entropy of logits (N, K, ...) and classes (N, ...), or mean squared error of numbers of one shape.

    Raises:
        ValueError: If output and targets are neither.
    """
    target = target_of(batch)
    if not isinstance(output, Tensor):
        raise ValueError(  # noqa: TRY004 - the model is the user's value, not a wrong call
            f"the loss is known for models that give one tensor, got {type(output).__name__}. {_REMEDY}"
        )
    if _is_classes(output, target):
        return F.cross_entropy(output, target.long())
    if target.is_floating_point() and output.is_floating_point() and target.squeeze().shape == output.squeeze().shape:
        return F.mse_loss(output, target.view_as(output))
    raise ValueError(
        f"the loss is known for classes (N,) of logits (N, K) and for numbers of the output's shape, got targets "
        f"{tuple(target.shape)} {target.dtype} and output {tuple(output.shape)}. {_REMEDY}"
    )


def accuracy(output: Answer, batch: Batch) -> float | None:
    """Share of classes that are right; None where targets are no classes."""
    target = target_of(batch)
    if not isinstance(output, Tensor) or not _is_classes(output, target):
        return None
    finite = output.isfinite().all(1)
    return float(((output.argmax(1) == target) & finite).float().mean())


def target_of(batch: Batch) -> Tensor:
    """The second part of a tuple or list, or what a mapping or an object calls labels, targets or y.

    Raises:
        ValueError: If there is none.
    """
    found: Batch = None
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        found = batch[1]
    elif isinstance(batch, Mapping):
        found = next((batch[key] for key in _KEYS if key in batch), None)
    else:
        found = next((getattr(batch, key) for key in _KEYS if hasattr(batch, key)), None)
    if not isinstance(found, Tensor):
        raise ValueError(  # noqa: TRY004 - the batch is the user's value, not a wrong call
            f"the loss needs targets, as in batches (x, y) or with a key {', '.join(_KEYS)}; got "
            f"{type(batch).__name__} without. {_REMEDY}"
        )
    return found


def _is_classes(output: Tensor, target: Tensor) -> bool:
    whole = not target.is_floating_point() and not target.is_complex() and target.dtype != torch.bool
    return whole and output.ndim >= 2 and target.shape == (output.shape[0], *output.shape[2:])
