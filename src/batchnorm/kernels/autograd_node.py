"""Plain tensors: kernels called as one node of the autograd graph, without the cost of a registered operator."""

from __future__ import annotations

from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.autograd import Function

from batchnorm import memory
from batchnorm.kernels import cpu, operators, reference, running_statistics
from batchnorm.kernels.activations import sign_shows
from batchnorm.kernels.choice import is_plain, kernel_for
from batchnorm.kernels.running_statistics import Running

# A leaky ReLU's input is recovered from its output with an error of this many roundings of z at most
_WORST_RECOVERY = 32
# and not at all where its results become subnormal in half precision
_LEAST_SLOPE = 2**-10


def train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None,
    param: float,
    residual: Tensor | None,
    running: Running | None,
    *,
    save: bool,
) -> Tensor:
    """As kernels.train. With ``save``, a leaky ReLU's y is written over x; any other y can be computed again."""
    inplace = save and _is_invertible(x, weight, bias, act, param, residual)
    call = _Call(eps, act, param, running, inplace)
    if not _tracked(x, weight, bias, residual):
        return _forward(x, weight, bias, residual, call)[0]
    y = _Train.apply(x, weight, bias, residual, call)
    if save and not inplace and (residual is None or not sign_shows(act, param)):  # which are kept anyway
        node = y.grad_fn
        memory.remember(y, _recipe(x, node.mean, node.var, weight, bias, eps, act, param, residual))
    return y


@final
class _Call(NamedTuple):
    """What a training step takes besides tensors."""

    eps: float
    act: str | None
    param: float
    running: Running | None
    inplace: bool


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None,
    param: float,
    residual: Tensor | None,
) -> Tensor:
    """As kernels.normalize."""
    kernel, arguments = kernel_for(x), (x, mean, var, weight, bias, eps, act, param, residual)
    if kernel is reference or not _tracked(x, weight, bias, residual):
        return kernel.normalize(*arguments)
    if kernel is not cpu or _tracked(mean, var):
        return reference.normalize(*arguments)
    return _Normalize.apply(*arguments)


class _Train(Function):
    """Batch norm by the statistics of the batch."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: _Call
    ) -> Tensor:
        y, ctx.mean, ctx.var = _forward(x, weight, bias, residual, call)
        ctx.call = call
        if call.inplace:
            ctx.mark_dirty(x)
        operators.save(ctx, residual, y, y if call.inplace else x, weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyrefly: ignore
        x, weight, bias, residual, y = ctx.saved_tensors
        eps, act, param, _, inplace = ctx.call
        arguments = (grad, x, ctx.mean, ctx.var, weight, eps, bias, act, param, residual, y)
        # a backward pass that will itself be differentiated goes through the operator
        if torch.is_grad_enabled() or not is_plain(grad):
            if inplace:
                raise RuntimeError(
                    "memory='save' wrote over the input, which second derivatives and batched gradients need. "
                    "Set memory=None."
                )
            found = operators.train_backward(*arguments)
        elif inplace or kernel_for(x) is cpu:
            found = cpu.train_backward(*arguments, inverted=inplace)
        else:
            found = operators.laid_out_backward(*arguments)
        return *operators.for_autograd(ctx, grad, found, weight, bias), None


class _Normalize(Function):
    """Batch norm by stored statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        act: str | None,
        param: float,
        residual: Tensor | None,
    ) -> Tensor:
        y = cpu.normalize(x, mean, var, weight, bias, eps, act, param, residual)
        # stored statistics move with the next batch: those of now are needed
        ctx.mean, ctx.var, ctx.call = mean.detach().clone(), var.detach().clone(), _Call(eps, act, param, None, False)
        operators.save(ctx, residual, y, x, weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyrefly: ignore
        x, weight, bias, residual, y = ctx.saved_tensors
        eps, act, param = ctx.call[:3]
        if torch.is_grad_enabled() or not is_plain(grad):
            found = _differentiable(grad, x, ctx.mean, ctx.var, weight, bias, eps, act, param, residual, y)
        else:
            tail = (bias, act, param, residual, y)
            found = cpu.train_backward(grad, x, ctx.mean, ctx.var, weight, eps, *tail, constant=True)
        d_x, d_weight, d_bias, d_residual = operators.for_autograd(ctx, grad, found, weight, bias)
        return d_x, None, None, d_weight, d_bias, None, None, None, d_residual


def _differentiable(grad, x, mean, var, weight, bias, eps, act, param, residual, y):
    """The gradients of normalize by operations that can be differentiated again."""
    z = reference.standardize(x, mean, var, eps)
    g = reference.gradient_before_activation(grad, z, weight, bias, act, param, residual, y)
    axes = [axis for axis in range(x.ndim) if axis != 1]
    scale = reference.rstd(x, var, eps) if weight is None else reference.rstd(x, var, eps) * weight
    d_x = (g * reference.along_channels(scale.to(g.dtype), x)).to(x.dtype)
    return d_x, (g * z).sum(axes), g.sum(axes), g.to(x.dtype)


def _forward(x, weight, bias, residual, call):
    """y, mean and var, with running statistics moved."""
    eps, act, param, stored, inplace = call
    if kernel_for(x) is not cpu:
        y, mean, var = operators.laid_out_forward(x, weight, bias, eps, act, param, residual)
    elif stored is None or cpu.supports_update(stored):
        return cpu.train_forward(x, weight, bias, eps, act, param, residual, stored, inplace=inplace)
    else:
        y, mean, var = cpu.train_forward(x, weight, bias, eps, act, param, residual, inplace=inplace)
    if stored is not None:
        tensors, momentum = stored[:4], stored.momentum
        running_statistics.update(*tensors, mean.detach(), var.detach(), x.numel() // x.shape[1], momentum)  # pyrefly: ignore
    return y, mean, var


def _recipe(x, mean, var, weight, bias, eps, act, param, residual):
    """How to compute y again, with the same bits."""
    kept, kernel = [None if t is None else t.detach() for t in (x, mean, var, weight, bias, residual)], kernel_for(x)
    versions = [None if t is None else t._version for t in kept]

    def compute() -> Tensor:
        if versions != [None if t is None else t._version for t in kept]:
            raise RuntimeError(
                "memory='save' computes a result again in the backward pass and needs what it was made of, but the "
                "input, gamma, beta or the residual was modified by an inplace operation. Call backward() first, or "
                "set memory=None."
            )
        return kernel.normalize(*kept[:5], eps, act, param, kept[5])

    return compute


def _is_invertible(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, act: str | None, param: float, residual: Tensor | None
) -> bool:
    """Whether y may be written over x: a leaky ReLU that gives z back to within rounding, and nobody else's tensor."""
    if act != "leaky_relu" or param < _LEAST_SLOPE or residual is not None or kernel_for(x) is not cpu:
        return False
    if not torch.is_grad_enabled() or x.grad_fn is None or x._is_view():
        return False
    if weight is None:
        return bias is None or bool(bias.detach().abs().max() <= _WORST_RECOVERY)
    shift = weight.detach().new_ones(()) if bias is None else bias.detach().abs().clamp_min(1)
    return bool((weight.detach().abs() * _WORST_RECOVERY >= shift).all())


def _tracked(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
