"""Batch norm's arithmetic behind three functions: train, normalize, update_running.

On plain tensors the kernels that ``choice`` names are called directly. Where a transform, a compiler, a tracer or a
dispatch mode wants to see what is computed, registered operators (``operators``) run instead, and inside
``torch.func.grad``, its relatives and forward-mode differentiation, which accept no such operator, the specification
(``reference``) runs as it is written.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as forward_mode
from torch import Tensor

from batchnorm.kernels import autograd_node, operators, reference, running_statistics, torch_batch_norm
from batchnorm.kernels.choice import is_plain, is_recorded, is_torchs
from batchnorm.kernels.operators import train_backward, train_forward
from batchnorm.kernels.running_statistics import Running
from batchnorm.kernels.shapes import check_layout

__all__ = ["Running", "normalize", "train", "train_backward", "train_forward", "update_running"]


def train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None = None,
    param: float = 0.0,
    residual: Tensor | None = None,
    running: Running | None = None,
    *,
    save: bool = False,
) -> Tensor:
    """The batch normalized by its own statistics, with a residual added and an activation applied where given.

    Moves running statistics towards those of the batch; they carry no gradient. Differentiable any number of times in
    x, weight, bias and residual. A batch of no values has gradients 0. With ``save`` memory is saved for some time: see
    ``direct.train``.
    """
    stored = (None, None) if running is None else running[:2]
    if is_plain(x, residual, weight, bias, *stored):
        if is_torchs(x):
            return torch_batch_norm.train(x, weight, bias, eps, act, param, residual, running)
        return autograd_node.train(x, weight, bias, eps, act, param, residual, running, save=save)
    check_layout(x)
    whole = _inside_derivative() or (running is None and _exports_to_onnx())
    if running is not None and _exports_to_onnx():
        raise RuntimeError(
            "ONNX export needs batch norm layers in eval mode, got one in train mode, which no ONNX operator computes. "
            "Call model.eval() first, and leave out training=TrainingMode.TRAINING."
        )
    forward = reference.train_forward if whole else train_forward
    y, mean, var = forward(x, weight, bias, eps, act, param, residual)
    if running is not None:
        mean_, var_, batches, skipped, momentum = running
        if torch.compiler.is_exporting() or (is_recorded(batches) and not torch.compiler.is_compiling()):
            skipped = torch.zeros_like(batches)  # a program keeps parameters and buffers only
        update_running(mean_, var_, batches, skipped, mean.detach(), var.detach(), values_per_channel(x), momentum)
    return y


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None = None,
    param: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """``x`` normalized by given statistics, value by value: an example's result does not depend on its batch.

    In what compilers, exporters and tracers record it is torch's own operator, which passes behind them know, with
    torch's rounding: a mean far from 0 takes digits.
    """
    compute = autograd_node.normalize
    if not is_plain(x, residual, weight, bias, mean, var):
        check_layout(x)
        compute = torch_batch_norm.normalize if is_recorded(x) else reference.normalize
    return compute(x, mean, var, weight, bias, eps, act, param, residual)


def update_running(*args: Any) -> None:
    """Move running statistics in place; arguments are those of ``running.update``."""
    if is_plain(args[0], args[4]):
        running_statistics.update(*args)
    elif _inside_derivative():
        operators.update_running(*args)
    else:
        operators.move(*args)


def values_per_channel(x: Tensor) -> int:
    """Values of each channel, on axis 1."""
    return x.shape[0] * x.shape[2:].numel()


def _constant(function: Any) -> Any:
    """torch.compiler.assume_constant_result, which would import the whole compiler, seconds of it, to do this."""
    function._dynamo_marked_constant = True
    return function


@_constant
def _exports_to_onnx() -> bool:
    return (torch.compiler.is_exporting() or torch._C._is_tracing()) and torch.onnx.is_in_onnx_export()


# the transforms around a compiled function are part of its graph, so the answer at compile time stays right
@_constant
def _inside_derivative() -> bool:
    """Whether torch.func.grad, one of its relatives or forward-mode differentiation is at work."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    derivatives = {torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp}
    return forward_mode._current_level >= 0 or any(level.key() in derivatives for level in stack)
