"""Batch norm as registered operators: what vmap, torch.compile, torch.export and double backward see of it.

Four operators are registered with torch.library:

- ``batchnorm::train_forward`` (x, weight, bias, eps, act, param, residual) -> y, mean, var
- ``batchnorm::train_backward`` (grad, x, mean, var, weight, eps, bias, act, param, residual, y)
  -> d_x, d_weight, d_bias, d_residual
- ``batchnorm::moved_running`` (mean, var, batches, skipped, mean and var of a batch, count, momentum)
  -> what the first four move to
- ``batchnorm::update_running`` moves running statistics in place, for torch.func.grad and its relatives alone, which
  let nobody copy into a tensor that they did not get as an argument

An operator that mutates its arguments cannot have a gradient, which is why the update stands apart. It is also one
that ``torch.func.functionalize`` refuses, and ``draft_export`` does so after a batch that moved nothing: hence the
third operator, behind which the new values are copied. Under ``torch.func.vmap`` the models of an ensemble become more
channels of one call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from batchnorm.kernels import reference, running_statistics
from batchnorm.kernels.activations import sign_shows
from batchnorm.kernels.choice import kernel_for

if TYPE_CHECKING:
    from collections.abc import Sequence


def laid_out_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None = None,
    param: float = 0.0,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """train_forward by the kernels that the table names, with y in the memory layout of x."""
    y, mean, var = kernel_for(x).train_forward(x, weight, bias, eps, act, param, residual)
    return _laid_out_as(x, y), mean, var


train_forward = torch.library.custom_op("batchnorm::train_forward", laid_out_forward, mutates_args=())


@train_forward.register_fake
def _(x: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor, Tensor]:
    exact = reference.exact_dtype(x.device)
    return torch.empty_like(x), _empty_channels(x, exact), _empty_channels(x, exact)


def laid_out_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    eps: float,
    bias: Tensor | None = None,
    act: str | None = None,
    param: float = 0.0,
    residual: Tensor | None = None,
    y: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """train_backward by the kernels that the table names, with d_x and d_residual in the memory layout of x."""
    gradients = kernel_for(x).train_backward(grad, x, mean, var, weight, eps, bias, act, param, residual, y)
    d_x, d_weight, d_bias, d_residual = gradients
    met = act is not None and (residual is not None or y is not None)
    return _laid_out_as(x, d_x), d_weight, d_bias, _laid_out_as(x, d_residual) if met else x.new_empty(0)


train_backward = torch.library.custom_op("batchnorm::train_backward", laid_out_backward, mutates_args=())


@train_backward.register_fake
def _(_grad, x, _mean, _var, _weight, _eps, _bias=None, act=None, _param=0.0, residual=None, y=None):
    wide = reference.wide_dtype(x.dtype)
    other = act is not None and (residual is not None or y is not None)
    d_residual = torch.empty_like(x) if other else x.new_empty(0)
    return torch.empty_like(x), _empty_channels(x, wide), _empty_channels(x, wide), d_residual


def _laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """``y`` with the memory layout that ``torch.empty_like(x)`` has, which the fake operator promises."""
    if y.stride() == x.stride():  # y is dense, so x is, and keeps its strides
        return y
    target = torch.empty_like(x)
    return y if y.stride() == target.stride() else target.copy_(y)


def _empty_channels(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[1], dtype=dtype)


def save(ctx: Any, residual: Tensor | None, y: Tensor, *tensors: Tensor | None) -> None:
    """Keep what a backward pass needs: tensors, and behind them the residual or, where its sign is enough, y."""
    _, act, param = ctx.call[:3]
    ctx.has_residual = residual is not None
    kept = (None, y) if ctx.has_residual and sign_shows(act, param) else (None if act is None else residual, None)
    ctx.save_for_backward(*tensors, *kept)


def for_autograd(ctx: Any, grad: Tensor, found: Sequence[Tensor], weight: Tensor | None, bias: Tensor | None) -> Any:
    """What a backward pass found for x, weight, bias and residual, in the types of parameters; None for none."""
    d_x, d_weight, d_bias, d_residual = found
    d_weight = None if weight is None else d_weight.to(weight.dtype)
    d_bias = None if bias is None else d_bias.to(bias.dtype)
    return d_x, d_weight, d_bias, (d_residual if ctx.call[1] else grad) if ctx.has_residual else None


def _save_for_backward(ctx, inputs, output) -> None:
    x, weight, bias, *ctx.call, residual = inputs
    y, mean, var = output
    save(ctx, residual, y, x, mean, var, weight, bias)
    ctx.mark_non_differentiable(mean, var)


def _train_backward(ctx, grad, *_statistics):
    x, mean, var, weight, bias, residual, y = ctx.saved_tensors
    eps, act, param = ctx.call
    found = train_backward(grad, x, mean, var, weight, eps, bias, act, param, residual, y)
    d_x, d_weight, d_bias, d_residual = for_autograd(ctx, grad, found, weight, bias)
    return d_x, d_weight, d_bias, None, None, None, d_residual


train_forward.register_autograd(_train_backward, setup_context=_save_for_backward)


def _save_for_double_backward(ctx, inputs, output) -> None:  # noqa: ARG001 - torch passes it by name
    grad, x, _mean, _var, weight, ctx.eps, bias, ctx.act, ctx.param, residual, y = inputs
    ctx.save_for_backward(grad, x, weight, bias, residual, y)


def _double_backward(ctx, *cotangents):
    """Derivatives of the backward pass: the specification is differentiated, statistics as functions of x."""
    *tensors, y = ctx.saved_tensors
    if tensors[1].numel() == 0:  # the statistics are NaN, but no value depends on them
        d_grad, d_x, d_weight, d_bias, d_residual = (None if t is None else torch.zeros_like(t) for t in tensors)
    else:
        higher = torch.is_grad_enabled()
        with torch.enable_grad():
            grad, x, weight, bias, residual = tracked = [None if t is None else _tracked(t) for t in tensors]
            tail = (bias, ctx.act, ctx.param, residual, y)
            outputs = reference.train_backward(grad, x, *reference.statistics(x), weight, ctx.eps, *tail)  # pyrefly: ignore
            found = _gradients(outputs, tracked, cotangents, create_graph=higher)
        d_grad, d_x, d_weight, d_bias, d_residual = found
    return d_grad, d_x, None, None, d_weight, None, d_bias, None, None, d_residual, None


def _gradients(outputs, inputs, cotangents, **options):
    """torch.autograd.grad for inputs of which some are None, and outputs of which some may be empty."""
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad and c is not None]
    wanted = [t for t in inputs if t is not None]
    found = iter(
        torch.autograd.grad([o for o, _ in pairs], wanted, [c for _, c in pairs], allow_unused=True, **options)
    )
    return [None if t is None else next(found) for t in inputs]


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
def _(info, in_dims, x, weight, bias, eps, act=None, param=0.0, residual=None):
    models = info.batch_size
    in_dims = (*in_dims, *[None] * 7)  # defaults are not passed
    x, weight, bias, residual = _models_first((x, weight, bias, residual), (*in_dims[:3], in_dims[6]), models)
    flat = [None if t is None else t.reshape(-1) for t in (weight, bias)]
    flat_residual = None if residual is None else _as_channels(residual)
    y, *channels = train_forward(_as_channels(x), *flat, eps, act, param, flat_residual)
    unflat = [t.unflatten(0, (models, -1)) for t in channels]
    return (y.unflatten(1, (models, x.shape[2])), *unflat), (1, 0, 0)


@train_backward.register_vmap
def _(info, in_dims, grad, x, mean, var, weight, eps, bias=None, act=None, param=0.0, residual=None, y=None):
    models, dims = info.batch_size, (*in_dims, *[None] * 11)
    whole = _models_first((grad, x, residual, y), (*dims[:2], *dims[9:11]), models)
    channels = _models_first((mean, var, weight, bias), (*dims[2:5], dims[6]), models)
    grad, x, residual, y = (None if t is None else _as_channels(t) for t in whole)
    mean, var, weight, bias = (None if t is None else t.reshape(-1) for t in channels)
    found = train_backward(grad, x, mean, var, weight, eps, bias, act, param, residual, y)
    d_x, d_weight, d_bias, d_residual = found
    unflat = [t.unflatten(0, (models, -1)) for t in (d_weight, d_bias)]
    sizes = (models, d_x.shape[1] // models)
    if not d_residual.numel():
        return (d_x.unflatten(1, sizes), *unflat, d_residual), (1, 0, 0, None)
    return (d_x.unflatten(1, sizes), *unflat, d_residual.unflatten(1, sizes)), (1, 0, 0, 1)


def _moved(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    skipped: Tensor,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stored = running_mean.clone(), running_var.clone(), num_batches_tracked.clone(), skipped.clone()
    running_statistics.update(*stored, mean, var, count, momentum)
    return stored


moved_running = torch.library.custom_op("batchnorm::moved_running", _moved, mutates_args=())


@moved_running.register_fake
def _(*tensors: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t) for t in tensors[:4])


@moved_running.register_vmap
def _(info, in_dims, *arguments):
    *stored, skipped, mean, var, count, momentum = _for_each_model(info, in_dims, arguments)
    return moved_running(*stored, skipped, mean, var, count, momentum), (0, 0, 0, None)


def move(*arguments: Any) -> None:
    """Move running statistics in place: new values are computed, and then copied."""
    for stored, moved in zip(arguments, moved_running(*arguments), strict=False):
        stored.copy_(moved if torch.compiler.is_compiling() else _fitting(stored, moved))


def _fitting(stored: Tensor, moved: Tensor) -> Tensor:
    """New values without torch.func.functionalize's wrapping, for a buffer that it did not get as an argument."""
    if torch._is_functional_tensor(stored) or not torch._is_functional_tensor(moved):
        return moved
    torch._sync(moved)
    return torch._from_functional_tensor(moved)


update_running = torch.library.custom_op(
    "batchnorm::update_running",
    running_statistics.update,
    mutates_args={"running_mean", "running_var", "num_batches_tracked", "skipped"},
)


@update_running.register_fake
def _(*_: object) -> None:
    return None


@update_running.register_vmap
def _(info, in_dims, *arguments):
    update_running(*_for_each_model(info, in_dims, arguments))
    return None, None


def _for_each_model(info: Any, in_dims: Sequence[int | None], arguments: Sequence[Any]) -> list[Any]:
    """What an update takes, with the models of the ensemble on axis 0; ``skipped`` is one for all."""
    if any(dim is None for dim in in_dims[:3]):
        raise RuntimeError(
            "BatchNorm in train mode under vmap needs running statistics for each model, got one set shared by "
            f"{info.batch_size}. Pass the buffers of torch.func.stack_module_state through vmap, or use "
            "track_running_stats=False."
        )
    skipped, mean, var, count, momentum = arguments[3:]
    if in_dims[3] is not None:  # a recorder's, which is thrown away
        skipped = skipped.select(in_dims[3], 0)
    stored = _models_first(arguments[:3], in_dims, info.batch_size)
    return [*stored, skipped, *_models_first((mean, var), in_dims[4:6], info.batch_size), count, momentum]
