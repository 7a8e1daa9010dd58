"""Gradients of one batch: how they grow from layer to layer, and how far they cancel between examples.

With z_l the input of layer l, l counted in the order of execution, and L the loss of the batch in train mode,

    S_l = sum over examples, channels and positions of (dL/dz_l)^2        log S_l = c - l log(factor)

``factor`` is what S is multiplied by on the way back through one layer: the median slope over all pairs of layers. A
deep net of linear layers of one width, batch norm and ReLU has pi / (pi - 1) = 1.467 at initialization for large
batches and widths; without an activation it has (N - 2) / (N - 3), without batch norm 1 (Yang et al. 2019, "A Mean
Field Theory of Batch Normalization"). The gradient of a weight is a sum of one term per example and position, and

    cancellation = mean |sum of terms| / mean (sum of |terms|)                          [means over its entries]

is 1 where all terms agree, and about 1 / sqrt(K) for K independent normal ones (Bjorck et al. 2018, "Understanding
Batch Normalization", on gradients at initialization). The terms of a linear layer are products of an input and of an
output's gradient, so the sum of their absolute values is the layer's own gradient for |input| and |gradient|.
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
from batchnorm.population.eager import uncompiled
from batchnorm.population.hooks import attached, seeing
from batchnorm.population.state_shield import preserve_state


@final
@dataclass(frozen=True, slots=True)
class LayerGradient:
    """The gradient at the entrance of one layer.

    Args:
        name: Dotted path.
        squared: S_l, summed over examples, channels, positions and calls; the loss's unit squared over the input's.
        log: Natural logarithm of it, -inf where no gradient arrives.
    """

    name: str
    squared: float
    log: float


@final
@dataclass(frozen=True, slots=True)
class Cancellation:
    """How far the terms of a weight's gradient cancel: 1 not at all, 0 completely; NaN where all terms are 0."""

    name: str
    ratio: float


@final
@dataclass(frozen=True, slots=True)
class GradientDepth:
    """Gradients by depth.

    Args:
        layers: The layers that ran, in the order of execution.
        factor: By which S grows for each layer on the way back; NaN for fewer than two layers.
        error: Standard error of log(factor) by the scatter of its steps from layer to layer; NaN for fewer than three
            layers.
        cancellations: Of the weights of linear layers and convolutions, in the order of execution.
        loss: Of the batch.
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
    """How gradients grow with depth, and how far they cancel between examples; the model stays as it is.

    One forward and backward pass, and one of every linear layer alone. A model in eval mode is measured in train
    mode; in a model in train mode every module keeps its mode, as in training. Dropout draws what a training step
    would draw now.

    Unit: S is in units of loss^2 / input^2, ``factor`` and ``cancellation`` have none. Noise floor: the factor of
    one network scatters by ``error``, mostly from its random weights; a cancellation of K independent normal terms is
    about 1 / sqrt(K), not 0. The input of batch norm itself has no cancellation to tell of: its gradients sum to 0.

    How to read it: with a factor above 1 gradients explode towards the input, below 1 they vanish. Batch norm with
    ReLU alone has 1.47 at initialization. It misleads where widths differ much (S is a sum
    over channels), with skip connections (the gradient past the layer counts as well, and a layer is not a step of
    depth), and for a loss that is a mean: S then has a factor of 1 / N^2 in all layers alike. Cancellation is that of
    one batch, so it falls with the batch size.

    Args:
        model: Any module, compiled or not.
        batch: As ``recalibrate`` takes one.
        loss: ``loss(output, batch)`` gives a scalar.
        layers: Dotted paths of the modules whose inputs are measured; None takes all batch norm layers. Name the
            activations of a network without batch norm to compare with one that has it.

    Raises:
        TypeError: If the loss does not give a tensor.
        ValueError: If there is no layer to measure, a layer gets one value per channel in train mode, or the loss is
            not a finite scalar that depends on the inputs of layers.

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
                f"{what} needs a batch that reaches its layers, got none that ran of {', '.join(map(repr, wanted))}. "
                "Name layers that this forward uses."
            )
        edges = [edge for *_, edge in inputs] + [edge for *_, edge in calls]
        found = torch.autograd.grad(differentiable(value, what), edges, allow_unused=True)
        measured = _squares([name for name, _ in inputs], found)
        behind = zip(calls, found[len(inputs) :], strict=True)
        cancellations = _cancellations(model, [(name, x, slope) for (name, x, _), slope in behind])
    factor, error = _slope([layer.log for layer in measured])
    return GradientDepth(measured, factor, error, cancellations, float(value.detach()))


@contextmanager
def training(model: nn.Module, what: str) -> Iterator[None]:
    """A block in which a model runs as in a training step, uncompiled so that hooks run; no trace is left behind it."""
    with preserve_state(model), uncompiled(), torch.enable_grad():
        if not model.training:
            model.train()
        with refuse_single_values(model, what):
            yield


@contextmanager
def refuse_single_values(model: nn.Module, what: str) -> Iterator[None]:
    """A block in which a layer raises, with its name, if it would take the variance of a single value."""

    def check(name: str, layer: nn.Module, x: Tensor) -> None:
        alone = isinstance(x, Tensor) and x.ndim > 1 and x[:, :1].numel() == 1
        if alone and layer.training and getattr(layer, "single_element", "error") == "error":
            raise ValueError(
                f"{what} needs 2 or more values per channel in train mode, got {tuple(x.shape)} in layer "
                f"{name!r}. Give batches of 2 examples or more: drop_last=True in a loader."
            )

    with seeing(batch_norms(model), check):
        yield


def scalar(value: Batch, what: str) -> Tensor:
    """The loss itself, if it is one number."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} needs a loss that gives a tensor, got {type(value).__name__}. Leave out .item().")
    if value.numel() != 1:
        raise ValueError(f"{what} needs a loss that gives one number, got shape {tuple(value.shape)}. Take its mean.")
    return value


def finite(value: Tensor, what: str) -> Tensor:
    """The loss itself, if it is neither infinite nor NaN."""
    if not bool(value.isfinite()):
        raise ValueError(
            f"{what} needs a finite loss, got {float(value.detach())}. Look for the examples that cause it."
        )
    return value


def differentiable(value: Tensor, what: str) -> Tensor:
    """The loss itself, if it depends on anything."""
    if not value.requires_grad:
        raise ValueError(
            f"{what} needs a loss with a gradient, got one that depends on no parameter that is trained. Leave out "
            "detach() and no_grad() in the model and in the loss, or set requires_grad."
        )
    return value


def loss_and_gradients(
    model: nn.Module, batch: Batch, loss: Loss, parameters: Sequence[Tensor], what: str
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss of a batch, which may be infinite, and its gradients; None for a parameter that it does not depend on.

    Random states and buffers are as before behind it, so that each evaluation draws and normalizes alike.
    """
    with preserve_state(model):
        value = scalar(loss(call(model, batch), batch), what)
        gradients = torch.autograd.grad(differentiable(value, what), parameters, allow_unused=True)
    return value.detach(), list(gradients)


def _modules(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    known = dict(model.named_modules())
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(
            f"gradient_depth needs names of modules, got {', '.join(map(repr, unknown)) or 'none'}. "
            "Take them from model.named_modules()."
        )
    return {name: known[name] for name in names}


@contextmanager
def _inputs_of(modules: dict[str, nn.Module]) -> Iterator[list[tuple[str, GradientEdge]]]:
    """A block that collects the gradient edge of what each module receives, in the order of execution.

    An edge stays what it was when the module writes over its input later. An input that does not depend on
    parameters is made a leaf of its own.
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
    """Modules whose weight gradient is a sum of products of input and output gradient; subclasses are left out."""
    kinds = {nn.Linear, *(kind for kind in vars(nn.modules.conv).values() if _is_convolution(kind))}
    return {
        name: m for name, m in model.named_modules() if type(m) in kinds and m.get_parameter("weight").requires_grad
    }


def _is_convolution(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, _ConvNd) and not kind.__name__.startswith(("_", "Lazy"))


@contextmanager
def _calls_of(modules: dict[str, nn.Module]) -> Iterator[list[tuple[str, Tensor, GradientEdge]]]:
    """A block that collects every call: name, a copy of the input, and the gradient edge of the output."""
    seen: list[tuple[str, Tensor, GradientEdge]] = []

    def see(name: str, _: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if output.requires_grad:
            # a copy: layers that save memory may overwrite what they can compute again
            seen.append((name, x.detach().clone(), get_gradient_edge(output)))

    with attached(m.register_forward_hook(partial(see, name), with_kwargs=True) for name, m in modules.items()):
        yield seen


def _squares(names: list[str], gradients: Sequence[Tensor | None]) -> tuple[LayerGradient, ...]:
    sums = dict.fromkeys(names, 0.0)
    for name, gradient in zip(names, gradients, strict=False):
        sums[name] += float(inner(of_one([gradient]), of_one([gradient])))
    return tuple(LayerGradient(name, s, math.log(s) if s > 0 else -math.inf) for name, s in sums.items())


def _slope(logs: list[float]) -> tuple[float, float]:
    """Factor per layer on the way back by the median slope over pairs of layers, and the error of its logarithm.

    One layer of another scale, such as the first, moves least squares but not the median (Theil 1950, Sen 1968).
    """
    points = [(depth, log) for depth, log in enumerate(logs) if math.isfinite(log)]
    slopes = [(b - a) / (j - i) for (i, a), (j, b) in combinations(points, 2)]
    if not slopes:
        return math.nan, math.nan
    slope = median(slopes)
    # the logarithm is a random walk with independent steps; 1.48 median deviations are a normal one's sd
    steps = [(b - a) / (j - i) for (i, a), (j, b) in pairwise(points)]
    scatter = 1.4826 * median(abs(step - median(steps)) for step in steps)
    return math.exp(-slope), scatter / math.sqrt(len(steps)) if len(steps) > 1 else math.nan


def _cancellations(model: nn.Module, calls: list[tuple[str, Tensor, Tensor | None]]) -> tuple[Cancellation, ...]:
    """|sum| over sum of || of the terms of every weight's gradient, calls added up."""
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
    # without the autocast of the model's own pass, in which types may differ
    (gradient,) = torch.autograd.grad(layer.forward(x.to(weight.dtype)), weight, slope.to(weight.dtype))
    return wide(gradient)


def _share(signed: Tensor, absolute: Tensor) -> float:
    total = float(absolute.sum())
    return float(signed.abs().sum()) / total if total > 0 else math.nan
