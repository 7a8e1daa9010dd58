"""Gradients of one batch: how they grow from layer to layer, and how far they cancel between examples.

With z_l the input of layer l, l counted in the order of execution, and L the loss of the batch in train mode,

    S_l = sum over examples, channels and positions of (dL/dz_l)^2        log S_l = c - l log(factor)

where c is a constant. The backward pass through one layer multiplies S by ``factor``, which is computed from the median
slope over all pairs of layers. A deep net of linear layers of equal width, each followed by batch norm and ReLU, has
the factor pi / (pi - 1) = 1.467 at initialization for large batches and widths. Without an activation the factor is
(N - 2) / (N - 3) for batches of N examples; without batch norm it is 1 (Yang et al. 2019, "A Mean Field Theory of Batch
Normalization"). The gradient of a weight is a sum of one term per example and position, and

    cancellation = mean |sum of terms| / mean (sum of |terms|)                     [means over the weight's entries]

is 1 if all terms have the same sign, and about 1 / sqrt(K) for K independent normal terms (Bjorck et al. 2018,
"Understanding Batch Normalization", on gradients at initialization). Each term of a linear layer is the product of an
input and the gradient of an output. So the sum of |terms| is the weight gradient that the layer computes from |inputs|
and |gradients of outputs|.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations, pairwise
from statistics import median
from typing import final

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.modules.conv import _ConvNd

from batchnorm.call_types import Batch
from batchnorm.instruments.network_vectors import inner, of_one, wide
from batchnorm.instruments.probe_tier import Loss, unwrapped, with_shape
from batchnorm.layers import batch_norms
from batchnorm.population.batches import call, on_device_of
from batchnorm.population.eager import own_run
from batchnorm.population.hooks import attached, seeing
from batchnorm.population.state_shield import preserve_state


@final
@dataclass(frozen=True, slots=True)
class LayerGradient:
    """The gradient with respect to the input of one layer.

    Args:
        name: Dotted path of the layer.
        squared: S_l, summed over examples, channels, positions and calls of the layer, in units of loss^2 / input^2.
        log: Natural logarithm of ``squared``; -inf if no gradient arrives.
    """

    name: str
    squared: float
    log: float


@final
@dataclass(frozen=True, slots=True)
class Cancellation:
    """How far the terms of a weight's gradient cancel: ``ratio`` is 1 for not at all, 0 for fully, NaN if all are 0."""

    name: str
    ratio: float


@final
@dataclass(frozen=True, slots=True)
class GradientDepth:
    """Gradients by depth.

    Args:
        layers: The layers that ran, in the order of execution.
        factor: The factor by which S grows per layer in the backward pass; NaN for fewer than two layers with a
            gradient.
        error: Standard error of log(factor), from the scatter of log S from layer to layer; NaN for fewer than three
            layers with a gradient.
        cancellations: Cancellation of each trained weight of a linear layer or convolution, in the order of execution.
        loss: Loss of the batch.
    """

    layers: tuple[LayerGradient, ...]
    factor: float
    error: float
    cancellations: tuple[Cancellation, ...]
    loss: float

    def __str__(self) -> str:
        first, last = (self.layers[i] for i in (0, -1))
        ratios = [each.ratio for each in self.cancellations] or [math.nan]
        return (
            f"squared gradients x {self.factor:.3g} per layer on the way back (log {math.log(self.factor):+.3f} "
            f"+- {self.error:.3f}, {len(self.layers)} layers): {last.squared:.3g} at {last.name}, {first.squared:.3g} "
            f"at {first.name}; weight gradients keep {min(ratios):.1%} to {max(ratios):.1%} of their terms"
        )


def gradient_depth(model: nn.Module, batch: Batch, loss: Loss, layers: Sequence[str] | None = None) -> GradientDepth:
    """How gradients grow with depth, and how far they cancel between examples; the model is not changed.

    Costs one forward and backward pass of the model, and two more of every linear layer and convolution. A model in
    eval mode is measured in train mode; in a model in train mode every module keeps its mode, as in training. Dropout
    draws the same numbers as a training step would.

    Unit: S is in units of loss^2 / input^2; ``factor`` and the cancellations have no unit. Noise floor: ``error`` for
    the logarithm of the factor, mostly from the random weights; the cancellation of K independent normal terms is
    about 1 / sqrt(K), not 0. No cancellation is computed for inputs of batch norm, whose gradients always sum to 0.

    How to read it: with a factor above 1 gradients explode towards the input, below 1 they vanish. Layers of batch norm
    and ReLU have the factor 1.47 at initialization. The factor misleads if widths differ much (S is a sum over
    channels), and with skip connections (the gradient that goes past the layer counts too, and a layer is not a step of
    depth). If the loss is the mean over N examples instead of the sum, S is divided by N^2 in all layers, which does
    not change the factor. Cancellation depends on the batch: it is smaller for larger batches.

    Args:
        model: Any module, compiled or not.
        batch: A batch in any form that ``recalibrate`` accepts.
        loss: ``loss(output, batch)`` returns a scalar.
        layers: Dotted paths of the modules whose inputs are measured; None means all batch norm layers. To compare
            with a network without batch norm, name the activations in both.

    Raises:
        TypeError: If the loss does not return a tensor.
        ValueError: If a name in ``layers`` is unknown, there is no layer to measure, no layer runs, a layer receives
            one value per channel in train mode, or the loss is not a finite scalar with a gradient.

    References:
        Yang et al. 2019; Bjorck et al. 2018.
    """
    what = "gradient_depth"
    model = unwrapped(model)
    wanted = _modules(model, layers) if layers is not None else dict(with_shape(model, what))
    batch = on_device_of(model, batch)
    with training(model, what), ExitStack() as hooks:
        inputs = hooks.enter_context(_inputs_of(wanted))
        calls = hooks.enter_context(_calls_of(_linear_layers(model)))
        value = finite(scalar(loss(call(model, batch), batch), what), what)
        inputs, calls = [*inputs], [*calls]  # a checkpointed model calls its layers again in the backward pass
        if not inputs:
            raise ValueError(
                f"{what} needs a batch that reaches the layers, but none of {', '.join(map(repr, wanted))} ran. "
                "Name layers that the model's forward calls."
            )
        edges = [edge for *_, edge in inputs] + [edge for *_, edge in calls]
        gradients = torch.autograd.grad(differentiable(value, what), edges, allow_unused=True)
        measured = _squares([name for name, _ in inputs], gradients)
        behind = zip(calls, gradients[len(inputs) :], strict=True)
        cancellations = _cancellations(model, [(name, x, slope) for (name, x, _), slope in behind])
    factor, error = _slope([layer.log for layer in measured])
    return GradientDepth(measured, factor, error, cancellations, float(value.detach()))


@contextmanager
def training(model: nn.Module, what: str) -> Iterator[None]:
    """A block in which a model runs as in a training step, uncompiled so that hooks run; then all state is restored."""
    with preserve_state(model), own_run(), torch.enable_grad():
        if not model.training:
            model.train()
        with refuse_single_values(model, what):
            yield


@contextmanager
def refuse_single_values(model: nn.Module, what: str) -> Iterator[None]:
    """A block that raises, with the layer's name, if a layer would compute the variance of a single value.

    It does not raise for a layer of this package that is set to accept single values (``single_element``).
    """

    def check(name: str, layer: nn.Module, x: Tensor) -> None:
        alone = isinstance(x, Tensor) and x.ndim > 1 and x[:, :1].numel() == 1
        if alone and layer.training and getattr(layer, "single_element", "error") == "error":
            raise ValueError(
                f"{what} needs 2 or more values per channel in train mode, got {tuple(x.shape)} in layer "
                f"{name!r}. Pass batches of 2 examples or more: drop_last=True in a loader."
            )

    with seeing(batch_norms(model), check):
        yield


def scalar(value: Batch, what: str) -> Tensor:
    """Return the loss unchanged, or raise if it is not one number."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} needs a loss that returns a tensor, got {type(value).__name__}. Leave out .item().")
    if value.numel() != 1:
        raise ValueError(f"{what} needs a loss of one number, got shape {tuple(value.shape)}. Return its mean.")
    return value


def finite(value: Tensor, what: str) -> Tensor:
    """Return the loss unchanged, or raise if it is infinite or NaN."""
    if not bool(value.isfinite()):
        raise ValueError(
            f"{what} needs a finite loss, got {float(value.detach())}. Look for the examples that cause this."
        )
    return value


def differentiable(value: Tensor, what: str) -> Tensor:
    """Return the loss unchanged, or raise if it has no gradient."""
    if not value.requires_grad:
        raise ValueError(
            f"{what} needs a loss with a gradient, got a loss that depends on no trained parameter. Leave out "
            "detach() and no_grad() in the model and in the loss, or set requires_grad."
        )
    return value


def loss_and_gradients(
    model: nn.Module, batch: Batch, loss: Loss, parameters: Sequence[Tensor], what: str
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss of a batch, finite or not, and its gradients; None for a parameter on which the loss does not depend.

    Random states and buffers are restored, so that each evaluation draws the same numbers and normalizes alike.
    """
    with preserve_state(model):
        value = scalar(loss(call(model, batch), batch), what)
        gradients = torch.autograd.grad(differentiable(value, what), parameters, allow_unused=True)
    return value.detach(), list(gradients)


def _modules(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    unknown = [name for name in names if name not in modules]
    if unknown or not names:
        raise ValueError(
            f"gradient_depth needs names of modules, got {', '.join(map(repr, unknown)) or 'none'}. "
            "Take them from model.named_modules()."
        )
    return {name: modules[name] for name in names}


@contextmanager
def _inputs_of(modules: dict[str, nn.Module]) -> Iterator[list[tuple[str, GradientEdge]]]:
    """A block that collects the gradient edge of each module's input, in the order of execution.

    An edge stays valid if the module later overwrites its input. An input that depends on no parameter is replaced by a
    copy that requires a gradient.
    """
    seen: list[tuple[str, GradientEdge]] = []

    def see(name: str, _: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        key = None if args else next(iter(kwargs))
        x = args[0] if key is None else kwargs[key]
        if not x.requires_grad:
            x = x.detach().clone().requires_grad_()
        seen.append((name, get_gradient_edge(x)))
        return ((x, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: x})

    with attached(m.register_forward_pre_hook(partial(see, name), with_kwargs=True) for name, m in modules.items()):
        yield seen


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The trained linear layers and convolutions by name, without subclasses, whose forward may differ."""
    kinds = {nn.Linear, *(kind for kind in vars(nn.modules.conv).values() if _is_convolution(kind))}
    return {
        name: m for name, m in model.named_modules() if type(m) in kinds and m.get_parameter("weight").requires_grad
    }


def _is_convolution(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, _ConvNd) and not kind.__name__.startswith(("_", "Lazy"))


@contextmanager
def _calls_of(modules: dict[str, nn.Module]) -> Iterator[list[tuple[str, Tensor, GradientEdge]]]:
    """A block that collects for every call the name, a copy of the input, and the gradient edge of the output."""
    seen: list[tuple[str, Tensor, GradientEdge]] = []

    def see(name: str, _: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if output.requires_grad:
            # a copy, because layers that save memory may overwrite their inputs
            seen.append((name, x.detach().clone(), get_gradient_edge(output)))

    with attached(m.register_forward_hook(partial(see, name), with_kwargs=True) for name, m in modules.items()):
        yield seen


def _squares(names: list[str], gradients: Sequence[Tensor | None]) -> tuple[LayerGradient, ...]:
    sums = dict.fromkeys(names, 0.0)
    for name, gradient in zip(names, gradients, strict=False):
        sums[name] += float(inner(of_one([gradient]), of_one([gradient])))
    return tuple(LayerGradient(name, s, math.log(s) if s > 0 else -math.inf) for name, s in sums.items())


def _slope(logs: list[float]) -> tuple[float, float]:
    """Factor per layer in the backward pass, from the median slope over pairs of layers, and the error of log(factor).

    A single layer with another scale, such as the first, changes a least-squares slope but hardly the median (Theil
    1950, Sen 1968).
    """
    points = [(depth, log) for depth, log in enumerate(logs) if math.isfinite(log)]
    slopes = [(b - a) / (j - i) for (i, a), (j, b) in combinations(points, 2)]
    if not slopes:
        return math.nan, math.nan
    slope = median(slopes)
    # log S is a random walk with independent steps; 1.48 median deviations are the standard deviation of a normal step
    steps = [(b - a) / (j - i) for (i, a), (j, b) in pairwise(points)]
    scatter = 1.4826 * median(abs(step - median(steps)) for step in steps)
    return math.exp(-slope), scatter / math.sqrt(len(steps)) if len(steps) > 1 else math.nan


def _cancellations(model: nn.Module, calls: list[tuple[str, Tensor, Tensor | None]]) -> tuple[Cancellation, ...]:
    """Cancellation of every weight's gradient; the terms of several calls of a layer are added."""
    signed: dict[str, Tensor] = {}
    absolute: dict[str, Tensor] = {}
    for name, x, slope in calls:
        if slope is not None:
            layer = model.get_submodule(name)
            for sums, terms in ((signed, (x, slope)), (absolute, (x.abs(), slope.abs()))):
                gradient = _gradient_of_weight(layer, *terms)
                sums[name] = sums[name] + gradient if name in sums else gradient
    return tuple(Cancellation(name, _share(signed[name], absolute[name])) for name in signed)


def _gradient_of_weight(layer: nn.Module, x: Tensor, slope: Tensor) -> Tensor:
    weight = layer.get_parameter("weight")
    # in the weight's type, because the model's pass may have used another type under autocast
    (gradient,) = torch.autograd.grad(layer.forward(x.to(weight.dtype)), weight, slope.to(weight.dtype))
    return wide(gradient)


def _share(signed: Tensor, absolute: Tensor) -> float:
    total = float(absolute.sum())
    return float(signed.abs().sum()) / total if total > 0 else math.nan
