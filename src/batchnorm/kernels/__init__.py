"""Batch norm as operators: what autograd, vmap, torch.compile and torch.export see of the arithmetic.

Three operators are registered with torch.library:

- ``batchnorm::train_forward``  (x, weight, bias, eps) -> y, mean, residual, var
- ``batchnorm::train_backward`` (grad, x, mean, residual, var, weight, eps) -> d_x, d_weight, d_bias
- ``batchnorm::update_running`` moves running statistics in place

An operator that mutates its arguments cannot have a gradient, which is why the update stands apart. Under
``torch.func.vmap`` the models of an ensemble become more channels of one call. Inside ``torch.func.grad`` and
its relatives and under forward-mode differentiation, which accept no operator with a registered gradient, the
specification runs as it is written.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.autograd.forward_ad as forward_mode
from torch import Tensor

from batchnorm.kernels import reference
from batchnorm.kernels.reference import normalize

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["normalize", "train", "update_running"]


def train(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The batch normalized by its own statistics, its mean and its biased variance.

    Differentiable any number of times in x, weight and bias; the statistics carry no gradient. A batch of no
    values has statistics NaN and gradients 0.
    """
    forward = reference.train_forward if _inside_derivative() else train_forward
    y, mean, residual, var = forward(x, weight, bias, eps)
    return y, (mean + residual).detach(), var.detach()


# the transforms around a compiled function are part of its graph, so the answer at compile time stays right
@torch.compiler.assume_constant_result
def _inside_derivative() -> bool:
    """Whether torch.func.grad, one of its relatives or forward-mode differentiation is at work."""
    stack = torch._C._functorch.get_interpreter_stack() or ()  # torch has no public question for this
    derivatives = {torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp}
    return forward_mode._current_level >= 0 or any(level.key() in derivatives for level in stack)


@torch.library.custom_op("batchnorm::train_forward", mutates_args=())
def train_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, mean, residual, var = reference.train_forward(x, weight, bias, eps)
    return _laid_out_as(x, y), mean, residual, var


@train_forward.register_fake
def _(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), _empty_channels(x), _empty_channels(x), _empty_channels(x)


@torch.library.custom_op("batchnorm::train_backward", mutates_args=())
def train_backward(
    grad: Tensor, x: Tensor, mean: Tensor, residual: Tensor, var: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    d_x, d_weight, d_bias = reference.train_backward(grad, x, mean, residual, var, weight, eps)
    return _laid_out_as(x, d_x), d_weight, d_bias


@train_backward.register_fake
def _(_grad: Tensor, x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), _empty_channels(x), _empty_channels(x)


def _laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """``y`` with the memory layout that ``torch.empty_like(x)`` has, which the fake operator promises."""
    target = torch.empty_like(x)
    return y if y.stride() == target.stride() else target.copy_(y)


def _empty_channels(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=reference.wide_dtype(x.dtype))


def _save_for_backward(ctx, inputs, output) -> None:
    x, weight, bias, ctx.eps = inputs
    _, mean, residual, var = output
    ctx.save_for_backward(x, mean, residual, var, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(mean, residual, var)


def _backward(ctx, grad, *_statistics):
    x, mean, residual, var, weight = ctx.saved_tensors
    d_x, d_weight, d_bias = train_backward(grad, x, mean, residual, var, weight, ctx.eps)
    d_weight = None if weight is None else d_weight.to(weight.dtype)
    return d_x, d_weight, None if ctx.bias_dtype is None else d_bias.to(ctx.bias_dtype), None


train_forward.register_autograd(_backward, setup_context=_save_for_backward)


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


@torch.library.custom_op(
    "batchnorm::update_running", mutates_args={"running_mean", "running_var", "num_batches_tracked", "skipped"}
)
def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    skipped: Tensor,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float | None,
) -> None:
    """Move running statistics towards those of a batch of ``count`` values a channel, in place.

    Args:
        running_mean: Stored mean, (C,) or (models, C).
        running_var: Stored variance; receives the unbiased one, as in torch.
        num_batches_tracked: Integer, () or (models,): batches so far, or batches averaged if momentum is None.
        skipped: Integer scalar: incremented if a channel's new mean or variance is NaN or infinite. Such a
            channel keeps its stored values; an average of all batches leaves the batch out for every channel.
        mean: The batch's mean.
        var: The batch's biased variance.
        count: Values of each channel in the batch, at least 2.
        momentum: Weight of the new value; None averages all batches equally.
    """
    unbiased = var * (count / (count - 1))
    finite = torch.isfinite(mean) & torch.isfinite(unbiased)
    if momentum is None:  # one count serves all channels, so a batch enters the average of each or of none
        whole = finite.all(-1)
        num_batches_tracked.add_(whole)
        used = whole.unsqueeze(-1).expand_as(finite)
        factor = 1 / num_batches_tracked.to(running_mean.dtype).unsqueeze(-1)
    else:
        num_batches_tracked.add_(1)
        used, factor = finite, momentum
    for stored, new in ((running_mean, mean), (running_var, unbiased)):
        stored.copy_(reference.moving_average(stored, torch.where(used, new, torch.nan), factor))
    skipped.add_((~finite).any())
    if warns_at_once(finite.device) and not finite.all():
        _warn_of_skipped(finite, "this batch is left out of all" if momentum is None else "these channels keep their")


def _warn_of_skipped(finite: Tensor, what_happens: str) -> None:
    warnings.warn(
        f"NaN or infinity in the batch statistics of {int((~finite).sum())} of {finite.numel()} channels: "
        f"{what_happens} running statistics. layer.skipped_updates counts such batches.",
        RuntimeWarning,
        stacklevel=3,
    )


def warns_at_once(device: torch.device) -> bool:
    """Whether ``update_running`` warns of what it did not store; on an accelerator asking would make it wait."""
    return device.type == "cpu"


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
