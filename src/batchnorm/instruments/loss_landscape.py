"""Landscape: the loss and its gradient along the next step of training.

At parameters w with loss L, gradient g and update u (-rate g, or what an optimizer would do), at fractions f of u:

    loss range       = max_f L(w + f u) - min_f L(w + f u)
    gradient change  = max_f ||grad L(w + f u) - g||              (small: the gradient is predictive)
    beta             = max_f ||grad L(w + f u) - g|| / ||f u||    (effective smoothness)
    eta              = ||u|| / ||g||                              (the learning rate of plain gradient descent)
    eta beta         = max_f ||grad L(w + f u) - g|| / (f ||g||)
    cosine           = min_f cos(g, grad L(w + f u))

(Santurkar et al. 2018, "How Does Batch Normalization Help Optimization?", section 3.1, with fractions from 1/2 to 4.)
If the loss is quadratic with curvature c along g, beta is c, and plain gradient descent is stable for eta beta < 2
(Cohen et al. 2021, "Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import final

import torch
from torch import Tensor, nn

from batchnorm.call_types import Batch
from batchnorm.instruments.gradients import Loss, finite, loss_and_gradients, training
from batchnorm.instruments.internal_covariate_shift import check_optimizer, moved_parameters, values_after_step
from batchnorm.instruments.network_vectors import Vectors, cosine, minus, norm, of_one
from batchnorm.instruments.probe_tier import unwrapped
from batchnorm.population.batches import on_device_of
from batchnorm.population.tensor_memory import require

FRACTIONS = (0.5, 1.0, 2.0, 4.0)  # of the update, as in the paper


@final
@dataclass(frozen=True, slots=True)
class Landscape:
    """The loss along an update.

    Args:
        loss: Loss before the step.
        fractions: The fractions of the update at which the loss was evaluated.
        losses: Loss at each fraction; may be infinite or NaN.
        loss_range: Largest minus smallest of ``losses``; infinite if a loss is not finite.
        gradient_change: Largest change of the gradient; infinite if a gradient is not finite.
        beta: Effective smoothness, in 1 / learning rate; infinite if a gradient is not finite.
        eta: Length of the update divided by the length of the gradient.
        eta_beta: Largest relative change of the gradient per update; infinite if a gradient is not finite.
        cosine: Smallest cosine between g and a later gradient; NaN if a gradient is not finite.
        floor: ||g - g'|| / ||g||, where g' is a second evaluation of the gradient at w.
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
    batch: Batch,
    loss: Loss,
    optimizer: torch.optim.Optimizer | None = None,
    fractions: Sequence[float] = FRACTIONS,
    *,
    lr: float | None = None,
) -> Landscape:
    """How rough the loss of a batch is along the next update; model and optimizer are not changed.

    The direction is the update that ``optimizer`` would make now on this batch, with momentum and weight decay, or
    the negative gradient times ``lr``. Only the gradients of parameters that move are compared. The model runs in train
    mode with the same random numbers at all points; the modules of a model in train mode keep their modes, and running
    statistics are not used. Costs 2 + len(fractions) forward and backward passes and the memory of two more models.

    Unit: ``loss_range`` in the unit of the loss, ``gradient_change`` in loss per unit of the parameters, ``beta`` in
    1 / learning rate; ``eta_beta`` and ``cosine`` have no unit. Noise floor: ``floor`` for ``eta_beta``, and ``floor``
    times ||g|| for ``gradient_change``.

    How to read it: ``eta_beta`` near 2 is the edge of stability, where plain full-batch gradient descent settles;
    far below 2 the step could be longer. A cosine below 0 means that the gradient reverses its direction along the
    update. Do not compare ``beta`` alone between networks: it depends on the scale of the weights before batch norm.
    If those weights are doubled, their gradients are halved and their part of beta is divided by four, though the
    function of the network is the same. ``eta_beta`` and ``cosine`` describe the actual step. The bound 2 is for plain
    gradient descent; with momentum, Adam, or small batches compare ``eta_beta`` with its own earlier values. One batch
    is one sample.

    Args:
        model: Any module, with batch norm or without, compiled or not.
        batch: A batch in any form that ``recalibrate`` accepts.
        loss: ``loss(output, batch)`` returns a scalar.
        optimizer: The optimizer whose next update is the direction; pass either ``optimizer`` or ``lr``.
        fractions: Two or more positive multiples of the update.
        lr: Learning rate of plain gradient descent.

    Raises:
        TypeError: If ``optimizer`` is no torch.optim optimizer, needs a closure (LBFGS), or the loss returns no tensor.
        ValueError: If not exactly one of ``optimizer`` and ``lr`` is given, the optimizer has none of the model's
            parameters, there are fewer than two different fractions, a fraction or ``lr`` is not positive, the update
            or gradient is 0, a parameter cannot be read, a layer receives one value per channel, or the loss before the
            step is not a finite scalar with a gradient.

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
        here = of_one([g for p, g in zip(parameters, gradients, strict=True) if p in moving])
        update = of_one(minus(list(moving.values()), list(moving)))
        _refuse_standstill(norm(here), norm(update))
        evaluate = _evaluation(model, batch, loss, list(moving))
        start = [p.detach().unsqueeze(0) for p in moving]
        floor = float(norm(minus(evaluate(start)[1], here)) / norm(here))
        roughness = along_update(evaluate, start, value.reshape(1), here, update, fractions)
    losses = tuple(roughness.losses[0].tolist())
    numbers = {name: float(getattr(roughness, name)) for name in _NUMBERS}
    return Landscape(loss=float(value), fractions=tuple(map(float, fractions)), losses=losses, floor=floor, **numbers)


def _evaluation(model: nn.Module, batch: Batch, loss: Loss, moving: list[Tensor]) -> Evaluate:
    def evaluate(there: Sequence[Tensor]) -> tuple[Tensor, Vectors]:
        with moved_parameters([(p, values[0]) for p, values in zip(moving, there, strict=True)]):
            value, gradients = loss_and_gradients(model, batch, loss, moving, "landscape")
        return value.reshape(1), of_one(gradients)

    return evaluate


_NUMBERS = ("loss_range", "gradient_change", "beta", "eta", "eta_beta", "cosine")


def _refuse_standstill(slope: Tensor, length: Tensor) -> None:
    if not slope or not length:
        raise ValueError(
            f"landscape needs an update and a gradient that are not 0, got lengths {float(length):g} and "
            f"{float(slope):g}. Check the learning rate, and that the loss depends on the parameters."
        )


def _check(
    optimizer: torch.optim.Optimizer | None,
    fractions: Sequence[float],
    lr: float | None,
    parameters: list[nn.Parameter],
) -> None:
    if (optimizer is None) == (lr is None):
        got = "none" if lr is None else "both"
        raise ValueError(f"landscape needs either an optimizer or lr, got {got}. Pass exactly one of them.")
    if lr is not None and not 0 < lr < math.inf:
        raise ValueError(f"landscape needs a positive lr, got {lr}. Pass the learning rate of training.")
    if len(set(fractions)) < 2 or not all(0 < f < math.inf for f in fractions):
        raise ValueError(
            f"landscape needs two or more different positive fractions, got {tuple(fractions)}. Leave "
            "them out for 1/2 to 4."
        )
    if optimizer is not None:
        check_optimizer(optimizer, parameters, "landscape")


def _next(
    optimizer: torch.optim.Optimizer | None,
    lr: float | None,
    parameters: list[nn.Parameter],
    gradients: list[Tensor | None],
) -> dict[Tensor, Tensor]:
    """The parameters that move, each with its value after a whole update."""
    if optimizer is not None:
        return values_after_step(optimizer, parameters, gradients)
    assert lr is not None  # noqa: S101 - _check has raised if both are None
    return {p: p.detach() - lr * g for p, g in zip(parameters, gradients, strict=True) if g is not None}


# -- R networks at once ---------------------------------------------------------------------------------------

# Called with the parameters of R networks, (R, ...) each; returns their losses, (R,), and gradients, (R, ...) each
Evaluate = Callable[[Sequence[Tensor]], tuple[Tensor, Vectors]]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Roughness:
    """The loss of R networks along an update of each network, in float64.

    Args:
        loss, loss_range, gradient_change, beta, eta, eta_beta, cosine: As in ``Landscape``, (R,) each.
        losses: Loss at every fraction, (R, fractions).
        cosine_after: Cosine between the gradients before and after a step, (R,); the step is the first fraction of 1 or
            more, or the last fraction if all are below 1.
    """

    loss: Tensor
    losses: Tensor
    loss_range: Tensor
    gradient_change: Tensor
    beta: Tensor
    eta: Tensor
    eta_beta: Tensor
    cosine: Tensor
    cosine_after: Tensor

    @classmethod
    def joined(cls, met: Sequence[Roughness], join: Callable[[list[Tensor]], Tensor] = torch.stack) -> Roughness:
        """Several results as one; ``join`` is torch.stack or torch.cat."""
        return cls(*(join([getattr(each, name) for each in met]) for name in _QUANTITIES))

    @classmethod
    def of_nothing(cls) -> Roughness:
        """The result of no network: every tensor is empty."""
        return cls(*[torch.zeros(0)] * len(_QUANTITIES))


_QUANTITIES = tuple(field.name for field in fields(Roughness))


def along_gradient(evaluate: Evaluate, parameters: Sequence[Tensor], rates: Tensor) -> Roughness:
    """The loss of R networks along the steps that plain gradient descent would take.

    Args:
        evaluate: Returns loss and gradient at given parameters.
        parameters: The parameters before the step, (R, ...) each.
        rates: Learning rate of each network, (R,).
    """
    loss, gradient = evaluate(parameters)
    update = [None if g is None else -rates.view(-1, *[1] * (g.ndim - 1)) * g for g in gradient]
    return along_update(evaluate, parameters, loss, gradient, update)


def along_update(
    evaluate: Evaluate, parameters: Sequence[Tensor], loss: Tensor, gradient: Vectors, update: Vectors,
    fractions: Sequence[float] = FRACTIONS,
) -> Roughness:  # fmt: skip
    """The loss of R networks along updates of their parameters.

    Args:
        evaluate: Returns loss and gradient at given parameters.
        parameters: The parameters before the step, (R, ...) each.
        loss: Loss before the step, (R,).
        gradient: Gradient before the step, (R, ...) for each parameter.
        update: What a whole step adds to each parameter, (R, ...).
        fractions: The fractions of the update at which the loss is evaluated.
    """
    moves = list(zip(parameters, update, strict=True))
    points = [evaluate([p if u is None else p.detach() + f * u for p, u in moves]) for f in fractions]
    losses = torch.stack([value.double().cpu() for value, _ in points], 1)
    changes = torch.stack([norm(minus(there, gradient)) for _, there in points], 1)  # (R, fractions)
    cosines = torch.stack([cosine(gradient, there) for _, there in points], 1)
    slope, length = norm(gradient), norm(update)
    relative = _or_infinite((changes / torch.tensor(fractions, dtype=torch.float64)).amax(1))
    after = next((n for n, fraction in enumerate(fractions) if fraction >= 1), -1)
    return Roughness(
        loss=loss.double().cpu(),
        losses=losses,
        loss_range=_or_infinite(losses.amax(1) - losses.amin(1)),
        gradient_change=_or_infinite(changes.amax(1)),
        beta=relative / length,
        eta=length / slope,
        eta_beta=relative / slope,
        cosine=cosines.amin(1),
        cosine_after=cosines[:, after],
    )


def _or_infinite(values: Tensor) -> Tensor:
    return torch.where(values.isfinite(), values, torch.inf)
