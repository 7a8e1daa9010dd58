"""The default loss: cross-entropy for classes, mean squared error for numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.call_types import Answer, Batch

_KEYS = ("labels", "label", "targets", "target", "y")
_REMEDY = "Give your own: --loss file.py:loss with loss(output, batch) -> scalar."


def default_loss(output: Answer, batch: Batch) -> Tensor:
    """Cross-entropy of logits (N, K, ...) and classes (N, ...), or mean squared error of numbers of equal shape.

    Axes of length 1 do not count in the comparison of shapes of numbers.

    Raises:
        ValueError: If output and targets fit neither loss, or the batch has no targets.
    """
    target = target_of(batch)
    if not isinstance(output, Tensor):
        raise ValueError(  # noqa: TRY004 - the model is the user's value, not a wrong call
            f"the default loss needs a model that returns one tensor, got {type(output).__name__}. {_REMEDY}"
        )
    if _is_classes(output, target):
        return F.cross_entropy(output, target.long())
    if target.is_floating_point() and output.is_floating_point() and target.squeeze().shape == output.squeeze().shape:
        return F.mse_loss(output, target.view_as(output))
    raise ValueError(
        f"the default loss needs classes (N,) with logits (N, K), or numbers of the output's shape, got targets "
        f"{tuple(target.shape)} {target.dtype} and output {tuple(output.shape)}. {_REMEDY}"
    )


def accuracy(output: Answer, batch: Batch) -> float | None:
    """Share of examples or positions with the right class; None if output and targets are not logits and classes."""
    target = target_of(batch)
    if not isinstance(output, Tensor) or not _is_classes(output, target):
        return None
    finite = output.isfinite().all(1)
    return float(((output.argmax(1) == target) & finite).float().mean())


def target_of(batch: Batch) -> Tensor:
    """The targets: the second part of a tuple or list, or the key or attribute labels, label, targets, target or y.

    Raises:
        ValueError: If there are no targets, or they are no tensor.
    """
    target: Batch = None
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        target = batch[1]
    elif isinstance(batch, Mapping):
        target = next((batch[key] for key in _KEYS if key in batch), None)
    else:
        target = next((getattr(batch, key) for key in _KEYS if hasattr(batch, key)), None)
    if not isinstance(target, Tensor):
        raise ValueError(  # noqa: TRY004 - the batch is the user's value, not a wrong call
            f"the loss needs targets, as in batches (x, y) or with a key {', '.join(_KEYS)}; got "
            f"{type(batch).__name__} without targets. {_REMEDY}"
        )
    return target


def _is_classes(output: Tensor, target: Tensor) -> bool:
    whole = not target.is_floating_point() and not target.is_complex() and target.dtype != torch.bool
    return whole and output.ndim >= 2 and target.shape == (output.shape[0], *output.shape[2:])
