"""Landscape: the loss and its gradient along the next step of training.

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
    batch: Batch,
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
        here = of_one([g for p, g in zip(parameters, gradients, strict=True) if p in moving])
        update = of_one(minus(list(moving.values()), list(moving)))
        _refuse_standstill(norm(here), norm(update))
        evaluate = _evaluation(model, batch, loss, list(moving))
        start = [p.detach().unsqueeze(0) for p in moving]
        floor = float(norm(minus(evaluate(start)[1], here)) / norm(here))
        found = along_update(evaluate, start, value.reshape(1), here, update, fractions)
    losses = tuple(found.losses[0].tolist())
    numbers = {name: float(getattr(found, name)) for name in _NUMBERS}
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
    """Each parameter that moves, and its value after a whole update."""
    if optimizer is not None:
        return values_after_step(optimizer, parameters, gradients)
    assert lr is not None  # noqa: S101 - _check sees to it
    return {p: p.detach() - lr * g for p, g in zip(parameters, gradients, strict=True) if g is not None}


# -- of R networks at once ------------------------------------------------------------------------------------

# The loss of R networks, (R,), and its gradient, of the parameters' shapes (R, ...), at given parameters
Evaluate = Callable[[Sequence[Tensor]], tuple[Tensor, Vectors]]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Roughness:
    """The loss of R networks along an update of each; the quantities of Landscape, (R,) each, in float64.

    Args:
        loss, loss_range, gradient_change, beta, eta, eta_beta, cosine: As there.
        losses: At every fraction, (R, fractions).
        cosine_after: Cosine between the gradients at the first fraction of 1 or more: before and after a step.
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
        """Several of them as one, by stacking or by ``torch.cat``."""
        return cls(*(join([getattr(each, name) for each in met]) for name in _QUANTITIES))

    @classmethod
    def of_nothing(cls) -> Roughness:
        """That of no network."""
        return cls(*[torch.zeros(0)] * len(_QUANTITIES))


_QUANTITIES = tuple(field.name for field in fields(Roughness))


def along_gradient(evaluate: Evaluate, parameters: Sequence[Tensor], rates: Tensor) -> Roughness:
    """The loss of R networks along the steps that plain gradient descent would take.

    Args:
        evaluate: Loss and gradient at given parameters.
        parameters: The point to start from, (R, ...) each.
        rates: Learning rate of each network, (R,).
    """
    loss, gradient = evaluate(parameters)
    update = [None if g is None else -rates.view(-1, *[1] * (g.ndim - 1)) * g for g in gradient]
    return along_update(evaluate, parameters, loss, gradient, update)


def along_update(
    evaluate: Evaluate, parameters: Sequence[Tensor], loss: Tensor, gradient: Vectors, update: Vectors,
    fractions: Sequence[float] = FRACTIONS,
) -> Roughness:  # fmt: skip
    """The loss of R networks along updates of their parameters; all (R, ...) each.

    Args:
        evaluate: Loss and gradient at given parameters.
        parameters: The point to start from.
        loss: There.
        gradient: There.
        update: What a whole step adds.
        fractions: Of the update at which the loss is evaluated.
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
