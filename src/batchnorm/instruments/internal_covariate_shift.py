"""Gradient shift: how much a step of the earlier parameters changes the gradient of a weight.

With W_1 .. W_k the parameters in the order of ``model.parameters()`` and L the loss of one batch at time t,

    G  = grad_(W_i) L(W_1^t     .. W_(i-1)^t,     W_i^t .. W_k^t)
    G' = grad_(W_i) L(W_1^(t+1) .. W_(i-1)^(t+1), W_i^t .. W_k^t)
    ics = ||G - G'||        relative = ||G - G'|| / ||G||        cosine = <G, G'> / (||G|| ||G'||)

(Santurkar et al. 2018, "How Does Batch Normalization Help Optimization?", definition 2.1: the internal covariate
shift of gradients.) The optimizer moves W_i by G, although the parameters before it move in the same step: after their
move G' would be right. Batch and random numbers are the same for G and G'.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from typing import Any, final

import torch
from torch import Tensor, nn

from batchnorm.call_types import Batch
from batchnorm.instruments.gradients import Loss, finite, loss_and_gradients, training
from batchnorm.instruments.network_vectors import Vectors, cosine, minus, norm, of_one
from batchnorm.instruments.probe_tier import unwrapped
from batchnorm.population.batches import on_device_of
from batchnorm.population.tensor_memory import require

_WEIGHTS = 5  # measured by default; each costs a forward and a backward pass


@final
@dataclass(frozen=True, slots=True)
class WeightShift:
    """Gradient shift of one weight.

    Args:
        name: The parameter's name.
        ics: ||G - G'||, in units of loss per unit of the weight.
        relative: ||G - G'|| / ||G||; NaN if G is 0.
        cosine: Cosine of the angle between G and G'; NaN if G or G' is 0.
        norm: ||G||.
    """

    name: str
    ics: float
    relative: float
    cosine: float
    norm: float


@final
@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """How far the gradients of R networks turned: the numbers of ``WeightShift``, (R,) each, in float64."""

    ics: Tensor
    relative: Tensor
    cosine: Tensor
    norm: Tensor

    @classmethod
    def between(cls, old: Vectors, new: Vectors) -> Turn:
        """The turn from G = ``old`` to G' = ``new``."""
        ics, length = norm(minus(old, new)), norm(old)
        return cls(ics, torch.where(length > 0, ics / length, torch.nan), cosine(old, new), length)


@final
@dataclass(frozen=True, slots=True)
class GradientShift:
    """Gradient shift of chosen weights.

    Args:
        weights: One entry for each chosen weight; without ``layers`` in the order of the parameters.
        loss: Loss of the batch before the step.
        floor: Largest ``relative`` of the chosen weights between two evaluations without any step: 0 on a
            deterministic device, rounding on others; more if the model draws random numbers of its own.
    """

    weights: tuple[WeightShift, ...]
    loss: float
    floor: float

    def __str__(self) -> str:
        lines = (f"{w.name}: relative {w.relative:.3g}, cosine {w.cosine:+.3f}, ics {w.ics:.3g}" for w in self.weights)
        return f"gradient shift by one step (floor {self.floor:.1g}): " + "; ".join(lines)


def gradient_shift(
    model: nn.Module, batch: Batch, loss: Loss, optimizer: torch.optim.Optimizer, layers: Sequence[str] | None = None
) -> GradientShift:
    """How far a step of the earlier parameters turns a weight's gradient; model and optimizer are not changed.

    A copy of ``optimizer`` takes the step that the optimizer would take now on this batch, with its momentum, weight
    decay and learning rates. Gamma and beta are parameters like others. The model runs in train mode, so running
    statistics are not used; the modules of a model in train mode keep their modes. Costs two forward and backward
    passes, one more for each chosen weight, and the memory of two more models and one more optimizer state.

    Unit: ``ics`` in loss per unit of the weight; ``relative`` and ``cosine`` have no unit. Noise floor: ``floor``, from
    a second evaluation without a step.

    How to read it: with relative 0 and cosine 1 the step of the earlier parameters left the gradient as it was. With
    relative above 1 or a cosine near 0 the gradient was computed for a network that no longer exists. The numbers
    mislead in four cases: ``ics`` scales with the gradient, so its values for two weights or networks cannot be
    compared; a network that does not learn does not shift; the shift grows with the step, so its values for two
    learning rates cannot be compared; and the "earlier" parameters are registered before the weight, but may not run
    before it. Changes of the gradient between backward and step, such as clipping, are not reproduced.

    Args:
        model: Any module, with batch norm or without, compiled or not.
        batch: A batch in any form that ``recalibrate`` accepts.
        loss: ``loss(output, batch)`` returns a scalar.
        optimizer: An optimizer of torch.optim, or a subclass that keeps its state in ``state`` and ``param_groups``.
        layers: Names of parameters, or paths of modules whose ``weight`` is meant. None chooses up to five weights of
            two axes or more, evenly spaced, without the first parameter of the model.

    Raises:
        TypeError: If ``optimizer`` is no torch.optim optimizer, needs a closure (LBFGS), or the loss returns no tensor.
        ValueError: If ``optimizer`` has none of the model's parameters, a name is unknown, there is no weight to
            choose, a parameter cannot be read, a layer receives one value per channel, or the loss is not a finite
            scalar with a gradient.

    References:
        Santurkar et al. 2018, section 2.2.
    """
    what = "gradient_shift"
    model = unwrapped(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tensors = list(parameters.values())
    check_optimizer(optimizer, tensors, what)
    require(parameters, what)
    chosen = _chosen(model, list(parameters), layers)
    batch = on_device_of(model, batch)
    with training(model, what):
        value, gradients = loss_and_gradients(model, batch, loss, tensors, what)
        finite(value, what)
        _, again = loss_and_gradients(model, batch, loss, [parameters[name] for name in chosen], what)
        after = values_after_step(optimizer, tensors, gradients)
        of_name = dict(zip(parameters, gradients, strict=True))
        shifted = []
        for name in chosen:
            with moved_parameters(list(_before(parameters, name, after))):
                _, gradients_after = loss_and_gradients(model, batch, loss, [parameters[name]], what)
            shifted.append(_compare(name, of_name[name], gradients_after[0]))
    floors = [_compare(n, of_name[n], g).relative for n, g in zip(chosen, again, strict=True)]
    floor = max((each for each in floors if not math.isnan(each)), default=0.0)
    return GradientShift(tuple(shifted), float(value), floor)


def check_optimizer(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], what: str) -> None:
    """Raise unless ``optimizer`` has one of these parameters and takes a step without a closure."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"{what} needs a torch.optim.Optimizer, got {type(optimizer).__name__}. Pass the optimizer.")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(f"{what} needs an optimizer that steps without a closure, got LBFGS. Pass SGD, for example.")
    own = set(map(id, parameters))
    if not any(id(p) in own for p in _held(optimizer)):
        raise ValueError(
            f"{what} needs an optimizer of the model's parameters, got one with "
            f"{len(_held(optimizer))} other parameters. Make it from this model's parameters(), after the model was "
            "moved or converted."
        )


def values_after_step(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> dict[Tensor, Tensor]:
    """The values of the parameters after a step of the optimizer with these gradients.

    A parameter that has no gradient, or that the optimizer does not train, is left out.
    The optimizer and the parameters are not changed: a copy of the optimizer takes the step, without hooks.
    """
    copy = deepcopy(optimizer)
    of = dict(zip(parameters, gradients, strict=True))
    pairs = list(zip(_held(optimizer), _held(copy), strict=True))
    for original, copied in pairs:
        copied.grad = of.get(original)
    step: Any = type(copy).step
    # the function inside of torch's wrapper, which would call the user's hooks
    (step.__wrapped__ if getattr(step, "hooked", False) else step)(copy)
    return {original: copied.detach() for original, copied in pairs if of.get(original) is not None}


@contextmanager
def moved_parameters(values: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """A block in which parameters have other values, given as pairs (parameter, value)."""
    before = [parameter.detach().clone() for parameter, _ in values]
    try:
        for parameter, value in values:
            parameter.data.copy_(value)  # graphs that were recorded before stay valid
        yield
    finally:
        for (parameter, _), value in zip(values, before, strict=True):
            parameter.data.copy_(value)


def _held(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return list(chain.from_iterable(group["params"] for group in optimizer.param_groups))


def _chosen(model: nn.Module, names: list[str], layers: Sequence[str] | None) -> list[str]:
    if layers is not None:
        return [_parameter(names, name) for name in layers]
    matrices = [name for i, name in enumerate(names) if i and model.get_parameter(name).ndim > 1]
    if not matrices:
        raise ValueError(
            "gradient_shift needs a trained weight of two axes or more that is not the model's first parameter, got "
            "none. Name parameters by layers=."
        )
    count = min(_WEIGHTS, len(matrices))
    return [matrices[round(i * (len(matrices) - 1) / max(count - 1, 1))] for i in range(count)]


def _parameter(names: list[str], name: str) -> str:
    for candidate in (name, f"{name}.weight"):
        if candidate in names:
            return candidate
    raise ValueError(
        f"gradient_shift needs names of trained parameters, or of modules with a trained weight, got {name!r}. "
        "Take names from model.named_parameters()."
    )


def _before(parameters: dict[str, nn.Parameter], name: str, after: dict[Tensor, Tensor]) -> Iterator[tuple]:
    for other, parameter in parameters.items():
        if other == name:
            return
        if parameter in after:
            yield parameter, after[parameter]


def _compare(name: str, old: Tensor | None, new: Tensor | None) -> WeightShift:
    turned = Turn.between(of_one([old]), of_one([new]))
    return WeightShift(name, float(turned.ics), float(turned.relative), float(turned.cosine), float(turned.norm))
