"""Training of an ensemble by SGD with one learning rate for each network; losses and accuracies."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from batchnorm.lecture.data_sets import Examples
    from batchnorm.lecture.networks import Ensemble

# Called with the number of finished steps: before the first step, and after each step
Observer = Callable[[int], None]


def losses(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of every network, nats: logits (R, N, K), classes (R, N) or (N,) -> (R,)."""
    y = y.expand(logits.shape[:2])
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y).mean(1)


def accuracies(logits: Tensor, y: Tensor) -> Tensor:
    """Share of examples with the right class: logits (R, N, K), classes (R, N) or (N,) -> (R,)."""
    finite = logits.isfinite().all(-1)  # argmax of NaN gives a class, which must not count
    return ((logits.argmax(-1) == y) & finite).float().mean(1)


def sgd(
    ensemble: Ensemble, examples: Examples, indices: Tensor, rates: Tensor, observe: Observer = lambda _: None
) -> None:
    """Train every network of ``ensemble`` in place by plain SGD.

    Args:
        ensemble: The networks; their parameters and stored statistics are changed.
        examples: All examples.
        indices: Indices of the examples of each step, (R, steps, batch).
        rates: Learning rate of each network, (R,).
        observe: Called with 0 before the first step and with t after step t.
    """
    with warnings.catch_warnings():
        # no warning for a rate that is too large: its divergence is a result here
        warnings.filterwarnings("ignore", "NaN or infinity in the batch statistics", RuntimeWarning)
        observe(0)
        for step in range(indices.shape[1]):
            batch = examples[indices[:, step]]
            _step(ensemble, batch, rates)
            observe(step + 1)


def _step(ensemble: Ensemble, batch: Examples, rates: Tensor) -> None:
    parameters = list(ensemble.parameters.values())
    loss = losses(ensemble(batch.x, train=True), batch.y).sum()
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(gradient * rates.view(-1, *[1] * (gradient.ndim - 1)))
