"""Batch norm as registered operators: what vmap, torch.compile, torch.export and double backward see of it.

Three operators are registered with torch.library:

- ``batchnorm::train_forward``  (x, weight, bias, eps) -> y, mean, residual, var
- ``batchnorm::train_backward`` (grad, x, mean, residual, var, weight, eps) -> d_x, d_weight, d_bias
- ``batchnorm::update_running`` moves running statistics in place

An operator that mutates its arguments cannot have a gradient, which is why the update stands apart. Under
``torch.func.vmap`` the models of an ensemble become more channels of one call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from batchnorm.kernels import reference, running
from batchnorm.kernels.choice import kernel_for

if TYPE_CHECKING:
    from collections.abc import Sequence


def laid_out_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """train_forward by the kernels that the table names, with y in the memory layout of x."""
    y, mean, residual, var = kernel_for(x).train_forward(x, weight, bias, eps)
    return _laid_out_as(x, y), mean, residual, var


train_forward = torch.library.custom_op("batchnorm::train_forward", laid_out_forward, mutates_args=())


@train_forward.register_fake
def _(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), _empty_channels(x), _empty_channels(x), _empty_channels(x)


def laid_out_backward(
    grad: Tensor, x: Tensor, mean: Tensor, residual: Tensor, var: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """train_backward by the kernels that the table names, with d_x in the memory layout of x."""
    d_x, d_weight, d_bias = kernel_for(x).train_backward(grad, x, mean, residual, var, weight, eps)
    return _laid_out_as(x, d_x), d_weight, d_bias


train_backward = torch.library.custom_op("batchnorm::train_backward", laid_out_backward, mutates_args=())


@train_backward.register_fake
def _(_grad: Tensor, x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), _empty_channels(x), _empty_channels(x)


def _laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """``y`` with the memory layout that ``torch.empty_like(x)`` has, which the fake operator promises."""
    if y.stride() == x.stride():  # y is dense, so x is, and keeps its strides
        return y
    target = torch.empty_like(x)
    return y if y.stride() == target.stride() else target.copy_(y)


def _empty_channels(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=reference.wide_dtype(x.dtype))


def save_for_backward(ctx, inputs, output) -> None:
    """What the gradient of train_forward needs."""
    x, weight, bias, ctx.eps = inputs
    _, mean, residual, var = output
    ctx.save_for_backward(x, mean, residual, var, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(mean, residual, var)


def backward(ctx, train_backward, grad, *_statistics):
    """Gradients of train_forward's arguments, by one of the functions called train_backward."""
    x, mean, residual, var, weight = ctx.saved_tensors
    d_x, d_weight, d_bias = train_backward(grad, x, mean, residual, var, weight, ctx.eps)
    d_weight = None if weight is None else d_weight.to(weight.dtype)
    return d_x, d_weight, None if ctx.bias_dtype is None else d_bias.to(ctx.bias_dtype), None


train_forward.register_autograd(
    lambda ctx, *grads: backward(ctx, train_backward, *grads), setup_context=save_for_backward
)


def _save_for_double_backward(ctx, inputs, output) -> None:  # noqa: ARG001 - torch passes it by name
    grad, x, _mean, _residual, _var, weight, ctx.eps = inputs
    ctx.save_for_backward(grad, x, weight)


def _double_backward(ctx, *cotangents):
    """Derivatives of the backward pass: the specification is differentiated, statistics as functions of x."""
    grad, x, weight = ctx.saved_tensors
    if x.numel() == 0:  # the statistics are NaN, but no value depends on them
        d_weight = None if weight is None else torch.zeros_like(weight)
        return torch.zeros_like(grad), torch.zeros_like(x), None, None, None, d_weight, None
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        grad, x = _tracked(grad), _tracked(x)
        weight = None if weight is None else _tracked(weight)
        outputs = reference.train_backward(grad, x, *reference.statistics(x), weight, ctx.eps)
        wanted = [t for t in (grad, x, weight) if t is not None]
        d_grad, d_x, *d_weight = torch.autograd.grad(
            outputs, wanted, cotangents, create_graph=higher, allow_unused=True
        )
    return d_grad, d_x, None, None, None, d_weight[0] if d_weight else None, None


def _tracked(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


train_backward.register_autograd(_double_backward, setup_context=_save_for_double_backward)


def _models_first(tensors: Sequence[Tensor | None], in_dims: Sequence[int | None], models: int) -> list[Any]:
    """Each tensor, or None, with the models of the ensemble on axis 0; what they share is repeated, not copied."""
    return [
        t if t is None else t.expand(models, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(tensors, in_dims, strict=False)
    ]


def _as_channels(x: Tensor) -> Tensor:
    return x.movedim(0, 1).flatten(1, 2)  # (models, N, C, ...) -> (N, models * C, ...)


@train_forward.register_vmap
def _(info, in_dims, x, weight, bias, eps):
    models = info.batch_size
    x, weight, bias = _models_first((x, weight, bias), in_dims, models)
    flat = [None if t is None else t.reshape(-1) for t in (weight, bias)]
    y, *channels = train_forward(_as_channels(x), *flat, eps)
    unflat = [t.unflatten(0, (models, -1)) for t in channels]
    return (y.unflatten(1, (models, x.shape[2])), *unflat), (1, 0, 0, 0)


@train_backward.register_vmap
def _(info, in_dims, grad, x, mean, residual, var, weight, eps):
    models = info.batch_size
    grad, x, *channels = _models_first((grad, x, mean, residual, var, weight), in_dims, models)
    flat = [None if t is None else t.reshape(-1) for t in channels]
    d_x, d_weight, d_bias = train_backward(_as_channels(grad), _as_channels(x), *flat, eps)
    unflat = [t.unflatten(0, (models, -1)) for t in (d_weight, d_bias)]
    return (d_x.unflatten(1, (models, x.shape[2])), *unflat), (1, 0, 0)


update_running = torch.library.custom_op(
    "batchnorm::update_running",
    running.update,
    mutates_args={"running_mean", "running_var", "num_batches_tracked", "skipped"},
)


@update_running.register_fake
def _(*_: object) -> None:
    return None


@update_running.register_vmap
def _(info, in_dims, running_mean, running_var, num_batches_tracked, skipped, mean, var, count, momentum):
    if any(dim is None for dim in in_dims[:3]):
        raise RuntimeError(
            "BatchNorm in train mode under vmap needs running statistics for each model, got one set shared by "
            f"{info.batch_size}. Pass the buffers of torch.func.stack_module_state through vmap, or use "
            "track_running_stats=False."
        )
    stored = [
        t.movedim(dim, 0) for t, dim in zip((running_mean, running_var, num_batches_tracked), in_dims, strict=False)
    ]
    new = _models_first((mean, var), in_dims[4:6], info.batch_size)
    update_running(*stored, skipped, *new, count, momentum)
    return None, None
