"""Batch norm as registered operators, for vmap, torch.compile, torch.export and double backward.

An operator's arguments can only be tensors, numbers and strings. So a Layer is split into these before a call and built
again inside. The schemas are strings below; exported programs contain them.

``train_forward`` and ``train_backward`` compute the two passes. An operator that mutates its arguments cannot have a
gradient, so running statistics have operators of their own, in ``running_operators``. Under ``torch.func.vmap`` the
models of an ensemble become additional channels of one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._functorch.autograd_function import VmapInfo

from batchnorm.kernels import reference
from batchnorm.kernels.activations import sign_shows
from batchnorm.kernels.choice import kernel_for
from batchnorm.kernels.interface import ChannelStatistics, ForwardPass, Gradients, Group, Layer
from batchnorm.kernels.repeated_forwards import is_repeated

# for each argument, the axis of the models; None if the argument is shared
Axes = Sequence[int | None]
Gradient = Tensor | None

# an argument as torch passes it, of the type in the schema
Flat = Any

_FORWARD = (
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, str? act=None, float param=0., Tensor? residual=None)"
    " -> (Tensor, Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor? weight, float eps, Tensor? bias=None, str? act=None, "
    "float param=0., Tensor? residual=None, Tensor? y=None) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _of_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, act: str | None = None, param: float = 0.0,
    residual: Tensor | None = None,
) -> tuple[Tensor, Layer, Tensor | None]:  # fmt: skip
    """The arguments of a forward operator, with a Layer built from those of the layer."""
    return x, Layer(weight, bias, eps, act, param), residual


def _of_backward(
    grad: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, eps: float, bias: Tensor | None = None,
    act: str | None = None, param: float = 0.0, residual: Tensor | None = None, y: Tensor | None = None,
) -> tuple[Tensor, ForwardPass]:  # fmt: skip
    """The arguments of a backward operator: the gradient, and a ForwardPass built from the others."""
    layer = Layer(weight, bias, eps, act, param)
    return grad, ForwardPass(x, ChannelStatistics(mean, var), layer, residual=residual, y=y)


def laid_out_forward(x: Tensor, layer: Layer, residual: Tensor | None) -> tuple[Tensor, ChannelStatistics]:
    """train_forward by the kernel that ``choice`` selects, with y in the memory layout of x."""
    kernel = kernel_for(x)
    y, statistics = kernel.train_forward(x, layer, residual)
    return _laid_out_as(x, y) if kernel is reference else y, statistics


def laid_out_backward(grad: Tensor, forward: ForwardPass) -> Gradients:
    """train_backward by the kernel that ``choice`` selects, with d_x and d_residual in the memory layout of x."""
    x, kernel = forward.x, kernel_for(forward.x)
    d_x, d_weight, d_bias, d_residual = kernel.train_backward(grad, forward)
    if kernel is reference:  # other kernels write into torch.empty_like(x)
        d_x = _laid_out_as(x, d_x)
        d_residual = None if d_residual is None else _laid_out_as(x, d_residual)
    return d_x, d_weight, d_bias, d_residual


def _laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """``y`` in the memory layout of ``torch.empty_like(x)``, because the fake operator returns that layout."""
    if y.stride() == x.stride():  # y is dense, so x is, and keeps its strides
        return y
    target = torch.empty_like(x)
    return y if y.stride() == target.stride() else target.copy_(y)


def _train_forward(*flat: Flat) -> tuple[Tensor, Tensor, Tensor]:
    y, (mean, var) = laid_out_forward(*_of_forward(*flat))
    return y, mean, var


def _train_backward(*flat: Flat) -> tuple[Tensor, ...]:
    grad, forward = _of_backward(*flat)
    *gradients, d_residual = laid_out_backward(grad, forward)
    return *gradients, forward.x.new_empty(0) if d_residual is None else d_residual


train_forward = torch.library.custom_op("batchnorm::train_forward", _train_forward, mutates_args=(), schema=_FORWARD)
train_backward = torch.library.custom_op(
    "batchnorm::train_backward", _train_backward, mutates_args=(), schema=_BACKWARD
)


@train_forward.register_fake
def _(x: Tensor, *_: Flat, **__: Flat) -> tuple[Tensor, Tensor, Tensor]:
    exact = reference.exact_dtype(x.device)
    return torch.empty_like(x), _empty_channels(x, exact), _empty_channels(x, exact)


@train_backward.register_fake
def _(*flat: Flat) -> tuple[Tensor, ...]:
    _, forward = _of_backward(*flat)
    x, wide = forward.x, reference.wide_dtype(forward.x.dtype)
    d_residual = torch.empty_like(x) if forward.gradient_of_p else x.new_empty(0)
    return torch.empty_like(x), _empty_channels(x, wide), _empty_channels(x, wide), d_residual


def _empty_channels(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[1], dtype=dtype)


# --- gradients --------------------------------------------------------------------------------------------


class Context(Protocol):
    """The object in which a node of autograd's graph keeps what its backward pass needs."""

    saved_tensors: tuple[Tensor, ...]
    statistics: ChannelStatistics
    valid: Tensor | None
    count: Tensor
    group: Group | None
    settings: tuple[float, str | None, float]  # the attributes of a Layer except its tensors
    has_residual: bool
    inplace: bool

    save_for_backward: Callable[..., None]
    mark_non_differentiable: Callable[..., None]
    mark_dirty: Callable[..., None]


def save(ctx: Context, forward: ForwardPass, *statistics: Tensor) -> None:
    """Keep a forward pass for ``saved``: with the residual or y if the backward pass needs one of them."""
    x, _, layer, residual, y, *_ = forward
    ctx.settings = layer[2:]
    ctx.has_residual = residual is not None
    if residual is None or layer.act is None:
        residual = y = None
    elif sign_shows(layer.act, layer.param):
        residual = None
    else:
        y = None
    ctx.save_for_backward(x, layer.weight, layer.bias, residual, y, *statistics)


def saved(ctx: Context, statistics: ChannelStatistics | None = None) -> ForwardPass:
    """The forward pass that ``save`` kept; ``statistics`` is None if ``save`` kept them too."""
    x, weight, bias, residual, y, *kept = ctx.saved_tensors
    statistics = ChannelStatistics(*kept) if statistics is None else statistics
    return ForwardPass(x, statistics, Layer(weight, bias, *ctx.settings), residual=residual, y=y)


def differentiable_backward(grad: Tensor, forward: ForwardPass) -> Gradients:
    """As ``laid_out_backward``, but by the operator ``train_backward``, which can be differentiated again."""
    x, statistics, (weight, bias, *rest), residual, y, *_ = forward
    eps, act, param = rest
    return train_backward(grad, x, *statistics, weight, eps, bias, act, param, residual, y)


def for_autograd(ctx: Context, grad: Tensor, gradients: Gradients, layer: Layer) -> tuple[Gradient, ...]:
    """Gradients of x, weight, bias and residual, in the type of each tensor; None for a tensor that is None."""
    d_x, d_weight, d_bias, d_residual = gradients
    of_residual = (grad if layer.act is None else d_residual) if ctx.has_residual else None
    return d_x, _typed_as(layer.weight, d_weight), _typed_as(layer.bias, d_bias), of_residual


def _typed_as(parameter: Tensor | None, gradient: Tensor) -> Gradient:
    """A parameter's gradient in the parameter's type; None if the parameter is None."""
    if parameter is None or parameter.dtype == gradient.dtype:
        return None if parameter is None else gradient
    return gradient.to(parameter.dtype)


def _save_for_backward(ctx: Context, inputs: Sequence[Flat], output: tuple[Tensor, ...]) -> None:
    x, layer, residual = _of_forward(*inputs)
    y, mean, var = output
    save(ctx, ForwardPass(x, ChannelStatistics(mean, var), layer, residual=residual, y=y), mean, var)
    ctx.mark_non_differentiable(mean, var)


def _backward(ctx: Context, grad: Tensor, *_statistics: Tensor) -> tuple[Gradient, ...]:
    forward = saved(ctx)
    gradients = differentiable_backward(grad, forward)
    d_x, d_weight, d_bias, d_residual = for_autograd(ctx, grad, gradients, forward.layer)
    return d_x, d_weight, d_bias, None, None, None, d_residual


train_forward.register_autograd(_backward, setup_context=_save_for_backward)


def _save_for_double_backward(ctx: Context, inputs: Sequence[Flat], output: tuple[Tensor, ...]) -> None:  # noqa: ARG001 - torch passes it by name
    grad, (x, _, layer, residual, y, *_) = _of_backward(*inputs)
    ctx.settings = layer[2:]
    ctx.save_for_backward(grad, x, layer.weight, layer.bias, residual, y)


def _double_backward(ctx: Context, *cotangents: Gradient) -> tuple[Gradient, ...]:
    """Derivatives of the backward pass: torch differentiates the specification, with statistics as functions of x."""
    *tensors, y = ctx.saved_tensors
    if tensors[1].numel() == 0:  # the statistics are NaN, but no value depends on them
        found = [None if t is None else torch.zeros_like(t) for t in tensors]
    else:
        higher = torch.is_grad_enabled()
        with torch.enable_grad():
            grad, x = _tracked(tensors[0]), _tracked(tensors[1])
            weight, bias, residual = others = [None if t is None else _tracked(t) for t in tensors[2:]]
            layer = Layer(weight, bias, *ctx.settings)
            outputs = reference.train_backward(
                grad, ForwardPass(x, reference.measure(x), layer, residual=residual, y=y)
            )
            found = gradients(outputs, (grad, x, *others), cotangents, create_graph=higher)
    d_grad, d_x, d_weight, d_bias, d_residual = found
    return d_grad, d_x, None, None, d_weight, None, d_bias, None, None, d_residual, None


def gradients(
    outputs: Sequence[Gradient], inputs: Sequence[Tensor | None], cotangents: Sequence[Gradient], *, create_graph: bool
) -> list[Gradient]:
    """torch.autograd.grad for inputs and outputs that may be None; the gradient of None is None."""
    pairs = [
        (o, c) for o, c in zip(outputs, cotangents, strict=True) if o is not None and o.requires_grad and c is not None
    ]
    differentiated = [t for t in inputs if t is not None]
    values, weights = [o for o, _ in pairs], [c for _, c in pairs]
    gradients = iter(torch.autograd.grad(values, differentiated, weights, allow_unused=True, create_graph=create_graph))
    return [None if t is None else next(gradients) for t in inputs]


def _tracked(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


train_backward.register_autograd(_double_backward, setup_context=_save_for_double_backward)


# --- ensembles --------------------------------------------------------------------------------------------


def models_first(value: Flat, axis: int | None, models: int) -> Flat:
    """A tensor with the models of the ensemble on axis 0; a shared tensor is expanded, not copied."""
    if not isinstance(value, Tensor):
        return value
    return value.expand(models, *value.shape) if axis is None else value.movedim(axis, 0)


def _as_channels(value: Flat) -> Flat:
    """A tensor of all models, (models, C) or (models, N, C, ...), as that of one model with models * C channels."""
    if not isinstance(value, Tensor):
        return value
    return value.reshape(-1) if value.ndim == 2 else value.movedim(0, 1).flatten(1, 2)


def _of_each_model(value: Tensor, models: int) -> tuple[Tensor, int | None]:
    """A result of one call for all models, split into models, and the axis of the models; None if it is not split."""
    if value.ndim == 1 and not value.numel():  # an empty tensor in place of d_residual
        return value, None
    axis = min(value.ndim - 1, 1)
    return value.unflatten(axis, (models, value.shape[axis] // models)), axis


def _in_one_call(operator: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[tuple[Tensor, ...], Axes]]:
    """An operator's rule for vmap: one call, in which the models of the ensemble become additional channels."""

    def of_ensemble(info: VmapInfo, in_dims: Axes, *flat: Flat) -> tuple[tuple[Tensor, ...], Axes]:
        models = info.batch_size
        joined = [_as_channels(models_first(t, axis, models)) for t, axis in zip(flat, in_dims, strict=True)]
        values, axes = zip(*(_of_each_model(value, models) for value in operator(*joined)), strict=True)
        return values, axes

    return of_ensemble


train_forward.register_vmap(_in_one_call(train_forward))
train_backward.register_vmap(_in_one_call(train_backward))


# --- snapshots --------------------------------------------------------------------------------------------


def _snapshot(values: Tensor) -> Tensor:
    if is_repeated():
        raise RuntimeError(
            "A compiled batch norm layer that reads stored statistics in train mode (renorm, or one value per channel "
            "with single_element='population') must not run again inside a backward pass: they may have moved since "
            "its forward. Leave the layer out of the activation checkpoint, leave out torch.compile, or leave out the "
            "setting."
        )
    return values.clone()


# torch.compile computes cheap values again in the backward pass, also from buffers that have moved since; no operator
# that it does not know
snapshot = torch.library.custom_op(
    "batchnorm::snapshot", _snapshot, mutates_args=(), schema="(Tensor values) -> Tensor"
)


@snapshot.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty_like(values)


@snapshot.register_vmap
def _(_: VmapInfo, in_dims: Axes, values: Tensor) -> tuple[Tensor, int | None]:
    return values.clone(), in_dims[0]
