"""Samples: which values the moments of a channel are computed from, and which values are padding.

With counts c of the values x of a channel, 0 in the padding:

    n = sum c       mean = sum c x / n      var = sum c (x - mean)^2 / n
    d_x = gamma rstd (g - c d_beta / n - c z d_gamma / n)

and the unbiased variance is var n / (n - 1): a count of 2 is the same as two equal values. The sums can include the
values of other batches, those of a ``Group``: then n, mean, var, sum g and sum g z are of all of them, while the
gradients of gamma and beta stay those of this batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.autograd import Function

from batchnorm.kernels import choice, cpu, operators, reference, wide_rows
from batchnorm.kernels.choice import is_plain
from batchnorm.kernels.interface import (
    ChannelStatistics,
    ForwardPass,
    Group,
    Kernel,
    Layer,
    Measured,
    PaddedKernel,
)
from batchnorm.kernels.operators import Context
from batchnorm.kernels.shapes import values_per_channel


@final
class Sample(NamedTuple):
    """The values of a batch that count.

    Attributes:
        valid: Which values are no padding: bool, broadcastable to x; None: all. Padding is not counted, not read and
            gets the gradient 0. Its results are 0.
        weight: How many values each value counts as, 0 or more, broadcastable to x; None: 1. A value of weight 0 is
            normalized like all others.
        keep: Whether padding is normalized too, in place of results 0, and has a gradient.
    """

    valid: Tensor | None = None
    weight: Tensor | None = None
    keep: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether every value counts as one."""
        return self.valid is None and self.weight is None

    def counts(self, x: Tensor) -> Tensor:
        """How many values each value counts as, bool or a number, broadcastable to ``x``."""
        if self.is_whole:
            return torch.ones([1] * x.ndim, device=x.device)
        if self.valid is None or self.weight is None:
            return self.valid if self.weight is None else self.weight  # type: ignore[return-value] - one is given
        return torch.where(self.valid, self.weight, 0)

    def positions(self, x: Tensor) -> Tensor | None:
        """The valid positions (N, ...) without the channels, contiguous; None if these do not describe the sample."""
        if self.weight is not None or self.keep or self.valid is None or self.valid.shape[1] != 1:
            return None
        return self.valid.squeeze(1).expand(x.shape[0], *x.shape[2:]).contiguous()

    def hidden(self, x: Tensor) -> Tensor:
        """``x`` with 0 in the padding, unless padding is kept."""
        return x if self.keep or self.valid is None else torch.where(self.valid, x, 0)


# a layer's parameters as they are applied, from these parameters and the moments that the batch is normalized by
Adjust = Callable[[Layer, Measured], Layer]


def train(
    x: Tensor,
    sample: Sample,
    layer: Layer,
    residual: Tensor | None,
    *,
    group: Group | None = None,
    adjust: Adjust | None = None,
) -> tuple[Tensor, Measured]:
    """The batch normalized by the moments of a sample, and these moments, which have no gradient.

    Differentiable in x, weight, bias and residual any number of times.
    """
    valid = sample.positions(x)
    by_kernels = is_for_kernels(sample, valid, x, residual, layer.weight, layer.bias)
    if by_kernels and valid is None and group is None and adjust is None:
        return _in_one_call(x, layer, residual)
    measured = _measured(x, valid) if by_kernels else Measured(*reference.measure_counted(x, sample.counts(x)))
    if group is not None:
        measured = group.union(measured)
    if adjust is not None:
        layer = adjust(layer, measured.detached())
    if by_kernels:
        y = _ByMoments.apply(x, layer.weight, layer.bias, residual, (layer, valid, measured, group), None)
    else:
        y = normalize_by_formula(x, sample, measured.statistics, layer, residual)
    return y, measured.detached()


def is_for_kernels(sample: Sample, valid: Tensor | None, x: Tensor, *others: Tensor | None) -> bool:
    """Whether kernels compute a sample whose valid positions are ``valid``, from ``x`` and the other tensors."""
    return (sample.is_whole or valid is not None) and is_plain(x, *others, valid) and not x.is_complex()


def _in_one_call(x: Tensor, layer: Layer, residual: Tensor | None) -> tuple[Tensor, Measured]:
    """As ``train``, for a whole batch alone: the kernel reads memory once if a channel fits the cache."""
    with torch.no_grad():
        y, statistics = _whole_kernel(x).train_forward(x, layer, residual)
    measured = Measured(statistics, _count(x))
    return _ByMoments.apply(x, layer.weight, layer.bias, residual, (layer, None, measured, None), y), measured


def measure(x: Tensor, sample: Sample) -> Measured:
    """The moments of a sample of the batch, with a gradient if ``x`` has one."""
    valid, is_tracked = sample.positions(x), torch.is_grad_enabled() and x.requires_grad
    if not is_tracked and is_for_kernels(sample, valid, x):
        return _measured(x, valid)
    return Measured(*reference.measure_counted(x, sample.counts(x)))


def normalize(
    x: Tensor, sample: Sample, statistics: ChannelStatistics, layer: Layer, residual: Tensor | None
) -> Tensor:
    """``x`` normalized by stored statistics; padding is not read, gets the gradient 0, and is 0 in the result."""
    valid = sample.positions(x)
    is_tracked = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, layer.weight, layer.bias, residual, *statistics)
    )
    if valid is not None and not is_tracked and is_plain(x, residual, layer.weight, layer.bias, valid, *statistics):
        return _padded_kernel(x).normalize(x, statistics, layer, residual, valid)
    return normalize_by_formula(x, sample, statistics, layer, residual)


def _padded_kernel(x: Tensor) -> PaddedKernel:
    """The native kernel if it reads ``x``, otherwise the reference."""
    return cpu if choice.kernel_for(x) is cpu else reference


def normalize_by_formula(
    x: Tensor, sample: Sample, statistics: ChannelStatistics, layer: Layer, residual: Tensor | None
) -> Tensor:
    """As ``normalize``, by torch's operators: differentiable in the statistics too."""
    residual = None if residual is None else sample.hidden(residual)
    return sample.hidden(reference.normalize(sample.hidden(x), statistics, layer, residual))


def _measured(x: Tensor, valid: Tensor | None) -> Measured:
    """The moments of a batch's values, or of its valid positions, by a kernel."""
    x = x.detach()
    if valid is None:
        return Measured(_whole_kernel(x).measure(x), _count(x))
    return Measured(_padded_kernel(x).measure(x, valid), valid.count_nonzero().to(reference.exact_dtype(x.device)))


def _count(x: Tensor) -> Tensor:
    return torch.tensor(values_per_channel(x), dtype=reference.exact_dtype(x.device), device=x.device)


def _whole_kernel(x: Tensor) -> Kernel:
    """The kernel for a whole batch."""
    return wide_rows if wide_rows.supports(x) else choice.kernel_for(x)


class _ByMoments(Function):
    """Batch norm by moments of the batch, or of a group of batches."""

    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        _weight: Tensor | None,
        _bias: Tensor | None,
        residual: Tensor | None,
        call: tuple[Layer, Tensor | None, Measured, Group | None],
        y: Tensor | None,
    ) -> Tensor:
        """y, unless it is known; weight and bias are those of the layer, as arguments so that autograd tracks them."""
        layer, ctx.valid, (ctx.statistics, ctx.count), ctx.group = call
        ctx.settings = layer[2:]
        ctx.save_for_backward(x, layer.weight, layer.bias, residual)
        if y is not None:
            return y.view_as(y)
        if ctx.valid is None:
            return _whole_kernel(x).normalize(x, ctx.statistics, layer, residual)
        return _padded_kernel(x).normalize(x, ctx.statistics, layer, residual, ctx.valid)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore
        x, weight, bias, residual = ctx.saved_tensors
        layer = Layer(weight, bias, *ctx.settings)
        if torch.is_grad_enabled() or not is_plain(grad):  # this pass may itself be differentiated
            return *_differentiable_backward(ctx, grad, layer), None, None
        forward = ForwardPass(x, ctx.statistics, layer, residual=residual, valid=ctx.valid)
        d_x, d_residual, sums = _gradients(ctx, grad, forward)
        d_bias, d_weight = (
            None if t is None else each.to(t.dtype) for t, each in zip((bias, weight), sums, strict=True)
        )
        return d_x, d_weight, d_bias, d_residual, None, None


def _gradients(
    ctx: Context, grad: Tensor, forward: ForwardPass
) -> tuple[Tensor, Tensor | None, Sequence[Tensor] | Tensor]:
    """The gradients of the input and of the residual, and the batch's own sums."""
    if ctx.valid is None and ctx.group is None:
        d_x, d_weight, d_bias, d_p = _whole_kernel(forward.x).train_backward(grad, forward)
        return d_x, None if forward.residual is None else grad if d_p is None else d_p, (d_bias, d_weight)
    sums, d_p = sum_gradients(grad, forward)
    total = sums if ctx.group is None else ctx.group.total(sums)
    return *gradients_by_total(grad, forward, total, ctx.count, d_p), sums


def sum_gradients(grad: Tensor, forward: ForwardPass) -> tuple[Tensor, Tensor | None]:
    """As the kernels' function, by the kernel for the input: the sums (2, C), and the gradient of p or None."""
    return _kernel_of(forward).sum_gradients(grad, forward)


def gradients_by_total(
    grad: Tensor, forward: ForwardPass, total: Tensor, count: Tensor, d_p: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the input and of the residual, from the sums (2, C) of all batches of a group.

    Args:
        grad: The gradient of y.
        forward: The forward pass.
        total: The sums over the group, which ``count`` values were normalized with.
        count: Values of each channel, () or (C,).
        d_p: The second result of ``sum_gradients``.
    """
    # a count of 0 is that of an empty group, whose sums are 0
    d_x = _kernel_of(forward).input_gradient(grad, forward, total / count.clamp_min(1), d_p)
    if forward.residual is None or d_p is not None:
        return d_x, d_p
    return d_x, grad if forward.valid is None else reference.without_padding(grad, forward.valid)


def _kernel_of(forward: ForwardPass) -> PaddedKernel | Kernel:
    return _whole_kernel(forward.x) if forward.valid is None else _padded_kernel(forward.x)


def _differentiable_backward(ctx: Context, grad: Tensor, layer: Layer) -> list[Tensor | None]:
    """Gradients of x, weight, bias and residual that can be differentiated again: those of the formula."""
    x, *_, residual = inputs = ctx.saved_tensors
    sample = Sample(None if ctx.valid is None else ctx.valid.unsqueeze(1))
    with torch.enable_grad():
        measured = Measured(*reference.measure_counted(x, sample.counts(x)))
        measured = measured if ctx.group is None else ctx.group.union(measured)
        y = normalize_by_formula(x, sample, measured.statistics, layer, residual)
    tracked = [t if t is not None and t.requires_grad else None for t in inputs]
    return operators.gradients([y], tracked, [grad], create_graph=torch.is_grad_enabled())
