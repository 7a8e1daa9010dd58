"""Landscape: what the loss and its gradient do along the step that training would take next.

At parameters w with loss L, gradient g and update u (-rate g, or what an optimizer would do), for fractions f:

    loss range       = max_f L(w + f u) - min_f L(w + f u)
    gradient change  = max_f ||grad L(w + f u) - g||              (small: the gradient is predictive)
    beta             = max_f ||grad L(w + f u) - g|| / ||f u||    (effective smoothness)
    eta              = ||u|| / ||g||                              (the learning rate of plain gradient descent)
    eta beta         = max_f ||grad L(w + f u) - g|| / (f ||g||)
    cosine           = min_f cos(g, grad L(w + f u))

(Santurkar et al. 2018, "How Does Batch Normalization Help Optimization?", section 3.1, with fractions from 1/2 to 4.)
On a quadratic with curvature c along g, beta is c, and plain gradient descent is stable while eta beta < 2 (Cohen et
al. 2021, "Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from batchnorm.instruments.gradients import Loss, finite, inner, loss_and_gradients, minus, norm, training
from batchnorm.instruments.internal_covariate_shift import check_optimizer, moved_parameters, values_after_step
from batchnorm.instruments.probe_tier import unwrapped
from batchnorm.population.batches import on_device_of
from batchnorm.population.tensor_memory import require

FRACTIONS = (0.5, 1.0, 2.0, 4.0)  # of the update, as in the paper


@final
@dataclass(frozen=True, slots=True)
class Landscape:
    """The loss along an update.

    Args:
        loss: Before the step.
        fractions: Of the update at which the loss was evaluated.
        losses: At each of them; may be infinite or NaN.
        loss_range: Largest minus smallest of them; infinite if one is not finite.
        gradient_change: Largest change of the gradient; infinite if one is not finite.
        beta: Effective smoothness, in 1 / learning rate.
        eta: Length of the update over that of the gradient.
        eta_beta: Largest relative change of the gradient per update.
        cosine: Smallest cosine between the gradients; NaN where one is not finite.
        floor: ||g - g again|| / ||g|| of two evaluations at w.
    """

    loss: float
    fractions: tuple[float, ...]
    losses: tuple[float, ...]
    loss_range: float
    gradient_change: float
    beta: float
    eta: float
    eta_beta: float
    cosine: float
    floor: float

    def __str__(self) -> str:
        steps = ", ".join(f"{value:.4g}" for value in self.losses)
        return (
            f"loss {self.loss:.4g}, along {'/'.join(f'{f:g}' for f in self.fractions)} updates {steps} "
            f"(range {self.loss_range:.3g}); gradient changes by {self.gradient_change:.3g}, eta x beta "
            f"{self.eta_beta:.3g}, smallest cosine {self.cosine:+.3f}; beta {self.beta:.3g} at eta {self.eta:.3g}"
        )


def landscape(
    model: nn.Module,
    batch: Any,
    loss: Loss,
    optimizer: torch.optim.Optimizer | None = None,
    fractions: Sequence[float] = FRACTIONS,
    *,
    lr: float | None = None,
) -> Landscape:
    """How rough the loss of a batch is along the next update; model and optimizer stay as they are.

    The direction is the update that ``optimizer`` would make now on this batch, with momentum and weight decay, or
    the negative gradient times ``lr``. Gradients are those of the parameters that move. The model runs in train mode
    with the same random numbers at all points (a model in train mode keeps the modes of its modules), and running
    statistics take no part. Costs 2 + len(fractions) forward and backward passes and the memory of two more models.

    Unit: ``loss_range`` in that of the loss, ``gradient_change`` in loss per unit of the parameters, ``beta`` in 1 /
    learning rate, ``eta_beta`` and ``cosine`` in none. Noise floor: ``floor``, measured, for ``eta_beta``; times
    ||g|| for the gradient's change.

    How to read it: ``eta_beta`` near 2 is the edge of stability, where plain full-batch gradient descent settles;
    far below it the step could be longer. A cosine below 0 says that the gradient has turned round before the
    longest step ends. It misleads to compare ``beta`` alone: it is not invariant to the scale of weights before
    batch norm. The same network with those weights doubled has a quarter of their share in beta, at half the
    gradient. ``eta_beta`` and ``cosine`` say what a step meets. 2 is a bound for plain gradient descent; with
    momentum, Adam, or small batches compare ``eta_beta`` with itself over time. One batch is one sample.

    Args:
        model: Any module, with batch norm or without, compiled or not.
        batch: As ``recalibrate`` takes one.
        loss: ``loss(output, batch)`` gives a scalar.
        optimizer: Whose step is looked along; give this or ``lr``.
        fractions: Two or more positive multiples of the update.
        lr: Rate of plain gradient descent.

    Raises:
        TypeError: If ``optimizer`` is none, needs a closure (LBFGS), or the loss does not give a tensor.
        ValueError: If not exactly one of ``optimizer`` and ``lr`` is given, the optimizer holds none of the model's
            parameters, a fraction or ``lr`` is not positive, the update or gradient is 0, a layer gets one value
            per channel, or the loss at w is not a finite scalar.

    References:
        Santurkar et al. 2018, section 3.1; Cohen et al. 2021.
    """
    what = "landscape"
    model = unwrapped(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    _check(optimizer, fractions, lr, parameters)
    require({name: p for name, p in model.named_parameters() if p.requires_grad}, what)
    batch = on_device_of(model, batch)
    with training(model, what):
        value, gradients = loss_and_gradients(model, batch, loss, parameters, what)
        finite(value, what)
        moving = _next(optimizer, lr, parameters, gradients)
        update = minus(list(moving.values()), list(moving))
        here = [g for p, g in zip(parameters, gradients, strict=True) if p in moving]
        points = [_at(model, batch, loss, moving, update, f) for f in (0.0, *fractions)]
    return _summary(float(value), here, norm(update), tuple(map(float, fractions)), points)


def _check(
    optimizer: torch.optim.Optimizer | None,
    fractions: Sequence[float],
    lr: float | None,
    parameters: list[nn.Parameter],
) -> None:
    if (optimizer is None) == (lr is None):
        got = "none" if lr is None else "both"
        raise ValueError(f"landscape needs either an optimizer or lr, got {got}. Pass the one that trains the model.")
    if lr is not None and not 0 < lr < math.inf:
        raise ValueError(f"landscape needs a positive lr, got {lr}. Pass the learning rate of training.")
    if len(set(fractions)) < 2 or not all(0 < f < math.inf for f in fractions):
        raise ValueError(
            f"landscape needs two or more positive fractions, got {tuple(fractions)}. Leave them out for 1/2 to 4."
        )
    if optimizer is not None:
        check_optimizer(optimizer, parameters, "landscape")


def _next(
    optimizer: torch.optim.Optimizer | None,
    lr: float | None,
    parameters: list[nn.Parameter],
    gradients: list[Tensor | None],
) -> dict[Tensor, Tensor]:
    """Each parameter that moves, and where a whole update takes it."""
    if optimizer is not None:
        return values_after_step(optimizer, parameters, gradients)
    assert lr is not None  # noqa: S101 - _check sees to it
    return {p: p.detach() - lr * g for p, g in zip(parameters, gradients, strict=True) if g is not None}


def _at(
    model: nn.Module, batch: Any, loss: Loss, moving: dict[Tensor, Tensor], update: list[Tensor | None], fraction: float
) -> tuple[float, list[Tensor | None]]:
    there = [
        (parameter, parameter.detach() + fraction * step)
        for parameter, step in zip(moving, update, strict=True)
        if step is not None
    ]
    with moved_parameters(there):
        value, gradients = loss_and_gradients(model, batch, loss, list(moving), "landscape")
    return float(value), gradients


def _summary(
    loss: float,
    here: list[Tensor | None],
    length: float,
    fractions: tuple[float, ...],
    points: list[tuple[float, list[Tensor | None]]],
) -> Landscape:
    slope = norm(here)
    if not slope or not length:
        raise ValueError(
            f"landscape needs an update and a gradient that are not 0, got lengths {length:g} and {slope:g}. "
            "Check the learning rate, and that the loss depends on the parameters."
        )
    again, *reached = [there for _, there in points]
    losses = tuple(value for value, _ in points[1:])
    changes = [_or_infinite(norm(minus(there, here))) for there in reached]
    relative = max(change / fraction for change, fraction in zip(changes, fractions, strict=True))
    cosines = [_cosine(here, there) for there in reached]
    return Landscape(
        loss=loss,
        fractions=fractions,
        losses=losses,
        loss_range=_or_infinite(max(losses) - min(losses)) if all(map(math.isfinite, losses)) else math.inf,
        gradient_change=max(changes),
        beta=relative / length,
        eta=length / slope,
        eta_beta=relative / slope,
        cosine=math.nan if any(map(math.isnan, cosines)) else min(cosines),
        floor=norm(minus(again, here)) / slope,
    )


def _or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _cosine(a: list[Tensor | None], b: list[Tensor | None]) -> float:
    lengths = norm(a) * norm(b)
    return inner(a, b) / lengths if lengths else math.nan
