"""Kernels on plain tensors: each call is one node of the autograd graph, without the cost of a registered operator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function

from batchnorm import memory
from batchnorm.kernels import cpu, operators, reference
from batchnorm.kernels.activations import sign_shows
from batchnorm.kernels.choice import is_plain, kernel_for, update_running
from batchnorm.kernels.interface import ChannelStatistics, ForwardPass, Layer
from batchnorm.kernels.operators import Context
from batchnorm.kernels.running_statistics import Running
from batchnorm.kernels.shapes import values_per_channel

# The input is recovered from a leaky ReLU's result only if the error is at most this many roundings of z
_WORST_RECOVERY = 32
# and only if the slope is at least this: with a smaller one results become subnormal in half precision
_LEAST_SLOPE = 2**-10


# further arguments of a training step: the layer, running statistics, whether y is written over x
Step = tuple[Layer, Running | None, bool]
# those of a normalization by stored statistics
Call = tuple[Layer, ChannelStatistics]


def train(x: Tensor, layer: Layer, residual: Tensor | None, running: Running | None, *, save: bool) -> Tensor:
    """As kernels.train. With ``save``, y is written over x if x can be recovered; otherwise y can be computed again."""
    return train_measured(x, layer, residual, running, save=save)[0]


def train_measured(
    x: Tensor, layer: Layer, residual: Tensor | None, running: Running | None, *, save: bool
) -> tuple[Tensor, ChannelStatistics]:
    """As ``train``, and the batch's statistics."""
    inplace = save and _is_invertible(x, layer, residual)
    step = layer, running, inplace
    if not _tracked(x, layer.weight, layer.bias, residual):
        return _forward(x, residual, step)
    y = _Train.apply(x, layer.weight, layer.bias, residual, step)
    if save and not inplace and (residual is None or not sign_shows(layer.act, layer.param)):  # else backward keeps y
        memory.remember(y, _recipe(ForwardPass(x, y.grad_fn.statistics, layer, residual)))
    return y, y.grad_fn.statistics


def normalize(x: Tensor, statistics: ChannelStatistics, layer: Layer, residual: Tensor | None) -> Tensor:
    """As kernels.normalize."""
    kernel = kernel_for(x)
    if kernel is reference or not _tracked(x, layer.weight, layer.bias, residual):
        return kernel.normalize(x, statistics, layer, residual)
    if kernel is not cpu or _tracked(*statistics):
        return reference.normalize(x, statistics, layer, residual)
    return _Normalize.apply(x, layer.weight, layer.bias, residual, (layer, statistics))


class _Train(Function):
    """Batch norm by the statistics of the batch."""

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, _weight: Tensor | None, _bias: Tensor | None, residual: Tensor | None, step: Step
    ) -> Tensor:
        """y; weight and bias are the layer's tensors, passed as arguments so that autograd tracks them."""
        layer, _, ctx.inplace = step
        y, ctx.statistics = _forward(x, residual, step)
        if ctx.inplace:
            ctx.mark_dirty(x)
        operators.save(ctx, ForwardPass(y if ctx.inplace else x, ctx.statistics, layer, residual=residual, y=y))
        return y

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore
        forward = operators.saved(ctx, ctx.statistics)
        # a backward pass that will itself be differentiated needs the operator
        if torch.is_grad_enabled() or not is_plain(grad):
            if ctx.inplace:
                raise RuntimeError(
                    "memory='save' wrote the result over the input, but second derivatives and batched gradients need "
                    "the input. Set memory=None."
                )
            gradients = operators.differentiable_backward(grad, forward)
        elif ctx.inplace:
            gradients = cpu.train_backward(grad, forward._replace(y=forward.x))
        else:
            gradients = operators.laid_out_backward(grad, forward)
        return *operators.for_autograd(ctx, grad, gradients, forward.layer), None


class _Normalize(Function):
    """Batch norm by stored statistics."""

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, _weight: Tensor | None, _bias: Tensor | None, residual: Tensor | None, call: Call
    ) -> Tensor:
        """y; weight and bias are the layer's tensors, passed as arguments so that autograd tracks them."""
        layer, statistics = call
        y = cpu.normalize(x, statistics, layer, residual)
        # a copy, because the next batch may move the stored statistics before the backward pass
        ctx.statistics = ChannelStatistics(*(t.detach().clone() for t in statistics))
        operators.save(ctx, ForwardPass(x, ctx.statistics, layer, residual=residual, y=y))
        return y

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore
        forward = operators.saved(ctx, ctx.statistics)._replace(constant=True)
        kernel = reference if torch.is_grad_enabled() or not is_plain(grad) else cpu
        gradients = kernel.train_backward(grad, forward)
        return *operators.for_autograd(ctx, grad, gradients, forward.layer), None


def _forward(x: Tensor, residual: Tensor | None, step: Step) -> tuple[Tensor, ChannelStatistics]:
    """y and the batch's statistics; running statistics move."""
    layer, running, inplace = step
    if kernel_for(x) is not cpu:
        y, statistics = operators.laid_out_forward(x, layer, residual)
    elif running is None or cpu.supports_update(running):
        return cpu.train_forward(x, layer, residual, running, inplace=inplace)
    else:
        y, statistics = cpu.train_forward(x, layer, residual, inplace=inplace)
    if running is not None:
        detached = ChannelStatistics(*(t.detach() for t in statistics))
        update_running(running, detached, values_per_channel(x))
    return y, statistics


def _recipe(forward: ForwardPass) -> Callable[[], Tensor]:
    """A function that computes y again, with the same bits."""
    x, (mean, var), layer, residual, *_ = forward
    x, statistics, kernel = x.detach(), ChannelStatistics(mean.detach(), var.detach()), kernel_for(x)
    weight, bias, residual = (None if t is None else t.detach() for t in (layer.weight, layer.bias, residual))
    layer = layer._replace(weight=weight, bias=bias)
    tensors = [t for t in (x, *statistics, weight, bias, residual) if t is not None]
    versions = [t._version for t in tensors]

    def compute() -> Tensor:
        if versions != [t._version for t in tensors]:
            raise RuntimeError(
                "memory='save' computes a result again in the backward pass from the input, gamma, beta and the "
                "residual, but one of them was modified by an inplace operation. Call backward() before that, or set "
                "memory=None."
            )
        return kernel.normalize(x, statistics, layer, residual)

    return compute


def _is_invertible(x: Tensor, layer: Layer, residual: Tensor | None) -> bool:
    """Whether y may be written over x: z can be recovered from a leaky ReLU's y, and x is no view and no leaf."""
    if layer.act != "leaky_relu" or layer.param < _LEAST_SLOPE or residual is not None or kernel_for(x) is not cpu:
        return False
    if not torch.is_grad_enabled() or x.grad_fn is None or x._is_view():
        return False
    weight, bias = (None if t is None else t.detach().abs() for t in (layer.weight, layer.bias))
    if weight is None:
        return bias is None or bool(bias.max() <= _WORST_RECOVERY)
    shift = weight.new_ones(()) if bias is None else bias.clamp_min(1)
    return bool((weight * _WORST_RECOVERY >= shift).all())


def _tracked(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False
