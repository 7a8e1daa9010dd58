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

from batchnorm.kernels import operators, reference, running
from batchnorm.kernels.choice import kernel_for
from batchnorm.kernels.operators import train_backward, train_forward

__all__ = ["normalize", "train", "train_backward", "train_forward", "update_running"]


def train(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The batch normalized by its own statistics, its mean and its biased variance.

    Differentiable any number of times in x, weight and bias; the statistics carry no gradient. A batch of no
    values has statistics NaN and gradients 0.
    """
    y, mean, residual, var = _train_forward(x)(x, weight, bias, eps)
    return y, (mean + residual).detach(), var.detach()


def _train_forward(x: Tensor) -> Any:
    if _is_plain(x):
        return _Train.apply
    return reference.train_forward if _inside_derivative() else train_forward


class _Train(torch.autograd.Function):
    """``operators.train_forward`` and its gradient without the cost of a registered operator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
        output = operators.laid_out_forward(x, weight, bias, eps)
        operators.save_for_backward(ctx, (x, weight, bias, eps), output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # pyrefly: ignore
        # a backward pass that will itself be differentiated goes through the operator
        plain = not torch.is_grad_enabled() and _is_plain(grads[0])
        return operators.backward(ctx, operators.laid_out_backward if plain else train_backward, *grads)


def normalize(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``x`` normalized by given statistics, value by value: an example's result does not depend on its batch."""
    tracked = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    kernel = kernel_for(x) if _is_plain(x) and not tracked else reference
    return kernel.normalize(x, mean, var, weight, bias, eps)


def update_running(*args: Any) -> None:
    """Move running statistics in place; arguments are those of ``running.update``."""
    (running.update if _is_plain(args[0], args[4]) else operators.update_running)(*args)


def _is_plain(*tensors: Tensor) -> bool:
    """Whether tensors may be computed with by address: nothing watches, wraps or records the operators."""
    if torch.compiler.is_compiling():
        return False
    return not (
        torch.jit.is_tracing()
        or torch._C._functorch.get_interpreter_stack()  # torch has no public questions like these
        or torch._C._len_torch_dispatch_stack()
        or forward_mode._current_level >= 0
        or any(type(t) not in _PLAIN or not torch._C._has_storage(t) for t in tensors)
    )


_PLAIN = {Tensor, torch.nn.Parameter}


# the transforms around a compiled function are part of its graph, so the answer at compile time stays right
@torch.compiler.assume_constant_result
def _inside_derivative() -> bool:
    """Whether torch.func.grad, one of its relatives or forward-mode differentiation is at work."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    derivatives = {torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp}
    return forward_mode._current_level >= 0 or any(level.key() in derivatives for level in stack)
