"""Samples: which values of a batch the moments of a channel are taken over, and which values are padding.

With counts c of the values x of a channel, 0 in the padding:

    n = sum c       mean = sum c x / n      var = sum c (x - mean)^2 / n
    d_x = gamma rstd (g - c d_beta / n - c z d_gamma / n)

and the unbiased variance is var n / (n - 1): a count of 2 is the same as two equal values.
"""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.autograd import Function

from batchnorm.kernels import choice, cpu, operators, reference
from batchnorm.kernels.choice import is_plain
from batchnorm.kernels.interface import ChannelStatistics, ForwardPass, Layer, PaddedKernel
from batchnorm.kernels.operators import Context


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
    def counts(self) -> Tensor:
        """How many values each value counts as, bool or a number."""
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


def train(x: Tensor, sample: Sample, layer: Layer, residual: Tensor | None) -> tuple[Tensor, ChannelStatistics]:
    """The batch normalized by the moments of a sample; and its mean with half of its unbiased variance.

    With these, ``update_running`` for a count of 2 stores the unbiased variance. It is not finite in a channel whose
    counts add up to 1 or less. Differentiable any number of times in x, weight, bias and residual.
    """
    valid = sample.positions(x)
    if valid is not None and is_plain(x, residual, layer.weight, layer.bias, valid):
        y, (mean, var), count = _by_kernels(x, valid, layer, residual)
    else:
        y, (mean, var), count = _by_formula(x, sample, layer, residual)
    return y, ChannelStatistics(mean.detach(), var.detach() * (count / (count - 1)) / 2)


def normalize(
    x: Tensor, sample: Sample, statistics: ChannelStatistics, layer: Layer, residual: Tensor | None
) -> Tensor:
    """``x`` normalized by stored statistics; padding is not read, gets the gradient 0, and is 0 in the result."""
    valid = sample.positions(x)
    is_tracked = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, layer.weight, layer.bias, residual, *statistics)
    )
    if valid is not None and not is_tracked and is_plain(x, residual, layer.weight, layer.bias, valid, *statistics):
        return _kernel_for(x).normalize(x, statistics, layer, residual, valid)
    return _normalize_by_formula(x, sample, statistics, layer, residual)


def _kernel_for(x: Tensor) -> PaddedKernel:
    """The native kernel if it reads ``x``, otherwise the reference."""
    return cpu if choice.kernel_for(x) is cpu else reference


def _by_formula(
    x: Tensor, sample: Sample, layer: Layer, residual: Tensor | None
) -> tuple[Tensor, ChannelStatistics, Tensor]:
    statistics, count = reference.measure_counted(x, sample.counts)
    return _normalize_by_formula(x, sample, statistics, layer, residual), statistics, count


def _normalize_by_formula(
    x: Tensor, sample: Sample, statistics: ChannelStatistics, layer: Layer, residual: Tensor | None
) -> Tensor:
    residual = None if residual is None else sample.hidden(residual)
    return sample.hidden(reference.normalize(sample.hidden(x), statistics, layer, residual))


def _by_kernels(
    x: Tensor, valid: Tensor, layer: Layer, residual: Tensor | None
) -> tuple[Tensor, ChannelStatistics, Tensor]:
    measured: list[ChannelStatistics] = []  # filled by the forward pass
    count = valid.count_nonzero().to(reference.exact_dtype(x.device))
    y = _TrainValid.apply(x, layer.weight, layer.bias, residual, (layer, valid, count, measured))
    return y, measured[0], count


class _TrainValid(Function):
    """Batch norm by the moments of the valid positions."""

    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        _weight: Tensor | None,
        _bias: Tensor | None,
        residual: Tensor | None,
        call: tuple[Layer, Tensor, Tensor, list[ChannelStatistics]],
    ) -> Tensor:
        """y; weight and bias are those of the layer, given so that autograd knows of them."""
        layer, ctx.valid, ctx.count, measured = call
        ctx.settings = layer[2:]
        ctx.save_for_backward(x, layer.weight, layer.bias, residual)
        kernel = _kernel_for(x)
        ctx.statistics = kernel.measure(x, ctx.valid)
        measured.append(ctx.statistics)
        return kernel.normalize(x, ctx.statistics, layer, residual, ctx.valid)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore
        x, weight, bias, residual = inputs = ctx.saved_tensors
        layer = Layer(weight, bias, *ctx.settings)
        is_higher = torch.is_grad_enabled()
        if is_higher or not is_plain(grad):  # this pass may itself be differentiated
            with torch.enable_grad():
                y, *_ = _by_formula(x, Sample(ctx.valid.unsqueeze(1)), layer, residual)
            tracked = [t if t is not None and t.requires_grad else None for t in inputs]
            return *operators.gradients([y], tracked, [grad], create_graph=is_higher), None
        kernel = _kernel_for(x)
        forward = ForwardPass(x, ctx.statistics, layer, residual=residual, valid=ctx.valid)
        sums, d_residual = kernel.sum_gradients(grad, forward)
        d_x = kernel.input_gradient(grad, forward, sums / ctx.count, d_residual)
        if residual is not None and d_residual is None:
            d_residual = reference.without_padding(grad, ctx.valid)
        d_bias, d_weight = (
            None if t is None else each.to(t.dtype) for t, each in zip((bias, weight), sums, strict=True)
        )
        return d_x, d_weight, d_bias, d_residual, None
