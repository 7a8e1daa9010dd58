"""The arithmetic of batch norm in plain PyTorch: the specification that every faster kernel must match.

For a channel with n values x over a batch (Ioffe and Szegedy 2015, "Batch Normalization", algorithm 1):

    mean = sum x / n     var = sum (x - mean)^2 / n     rstd = 1 / sqrt(var + eps)
    z = (x - mean) rstd  p = gamma z + beta + residual      y = a(p)

with an activation a and a residual; without them, a(p) = p and residual = 0. From the gradient d_y of y, with sums over
the channel (section 3 of the paper):

    g = a'(p) d_y        d_residual = g       d_beta = sum g       d_gamma = sum g z
    d_x = gamma rstd (g - d_beta / n - z d_gamma / n)

Mean and variance of a batch are float64 for any type of x, so that the variance of values of 1e20 is finite. The mean
is subtracted in two parts, its rounding to the type of x and the rounding error, so that values far from zero lose no
digits but those that the type of x does not have. Half-precision inputs are widened to float32 first. Channels are on
axis 1.

Complex values have a complex mean and the real variance sum |x - mean|^2 / n; gamma and beta are complex. autograd
differentiates ``measure_counted`` and ``normalize`` of complex values; the backward functions here are for real values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from batchnorm.kernels import running_statistics
from batchnorm.kernels.activations import activate, derivative
from batchnorm.kernels.interface import ChannelStatistics, ForwardPass, Gradients, Layer
from batchnorm.kernels.shapes import values_per_channel


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of the arithmetic on values of ``dtype``, and of their running mean: two precisions, real or complex."""
    if dtype.is_complex:
        return torch.complex128 if dtype == torch.complex128 else torch.complex64
    return torch.float64 if dtype == torch.float64 else torch.float32


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of the variance of values of ``dtype``: float64 or float32."""
    return torch.float64 if dtype in {torch.float64, torch.complex128} else torch.float32


def exact_dtype(device: torch.device) -> torch.dtype:
    """The type of a batch's statistics: float64; on Apple's GPUs, which do not support it, float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def train_forward(x: Tensor, layer: Layer, residual: Tensor | None = None) -> tuple[Tensor, ChannelStatistics]:
    """The batch normalized by its own statistics, and those statistics."""
    statistics = measure(x)
    return normalize(x, statistics, layer, residual), statistics


def train_backward(grad: Tensor, forward: ForwardPass) -> Gradients:
    """Gradients of x, gamma, beta and p, from the gradient of y; the last is None unless ``forward.gradient_of_p``."""
    z, g = _z_and_gradient_of_p(grad, forward)
    d_bias, d_weight = _sums(g, z)
    count = max(values_per_channel(forward.x), 1)
    means = None if forward.constant else (d_bias / count, d_weight / count)
    d_residual = g.to(forward.x.dtype) if forward.gradient_of_p else None
    return _input_gradient(g, z, forward, means), d_weight, d_bias, d_residual


def measure(x: Tensor, valid: Tensor | None = None) -> ChannelStatistics:
    """Mean and biased variance of every channel; NaN for an empty batch, or one that is all padding."""
    if valid is not None:
        return measure_counted(x, valid.unsqueeze(1))[0]
    x = x.to(wide_dtype(x.dtype))
    exact, axes = torch.promote_types(exact_dtype(x.device), x.dtype), _axes(x)
    near = x.mean(axes)
    deviation = (x - along_channels(near, x)).to(exact)
    low = deviation.mean(axes)
    var = squared(deviation).mean(axes) - squared(low)
    return ChannelStatistics(near.to(exact) + low, var.clamp_min(0))


def measure_counted(x: Tensor, counts: Tensor) -> tuple[ChannelStatistics, Tensor]:
    """Mean and biased variance of every channel if a value counts as ``counts`` values, and the sum of counts (C,).

    Counts are 0 or more, or bool, and broadcast to ``x``. A value with count 0 may be NaN or infinite. Without any
    count the statistics are NaN.
    """
    x, exact = torch.where(counts > 0, x, 0).to(wide_dtype(x.dtype)), exact_dtype(x.device)
    axes, counts = _axes(x), counts.to(exact)
    total = counts.expand_as(x).sum(axes)
    near = ((x * counts).sum(axes) / total).to(x.dtype)
    deviation = (x - along_channels(near, x)).to(torch.promote_types(exact, x.dtype))
    low = (deviation * counts).sum(axes) / total
    var = (squared(deviation) * counts).sum(axes) / total - squared(low)
    return ChannelStatistics(near + low, var.clamp_min(0)), total


def squared(x: Tensor) -> Tensor:
    """The real numbers |x|^2."""
    return x.real.square() + x.imag.square() if x.is_complex() else x.square()


def normalize(
    x: Tensor, statistics: ChannelStatistics, layer: Layer, residual: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """``x`` normalized by given statistics, value by value: an example's result does not depend on its batch."""
    if valid is not None:
        x, residual = without_padding(x, valid), None if residual is None else without_padding(residual, valid)
    z = _standardize(x, statistics, layer.eps)
    y = applied(z, layer, residual).to(x.dtype)
    return y if valid is None else without_padding(y, valid)


def applied(z: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
    """y from z, in the type of z."""
    return activate(_scale_and_shift(z, layer, residual), layer.act, layer.param)


def without_padding(x: Tensor, valid: Tensor) -> Tensor:
    """``x`` with 0 where ``valid``, bool (N, ...) without the channels, is False."""
    return torch.where(valid.unsqueeze(1), x, 0)


def sum_gradients(grad: Tensor, forward: ForwardPass) -> tuple[Tensor, Tensor | None]:
    """Sum g and sum g z, in one tensor (2, C); and g, or None unless ``forward.gradient_of_p``."""
    grad, forward = _without_padding(grad, forward)
    z, g = _z_and_gradient_of_p(grad, forward)
    return torch.stack(_sums(g, z)), g.to(forward.x.dtype) if forward.gradient_of_p else None


def input_gradient(grad: Tensor, forward: ForwardPass, means: Tensor | None, g: Tensor | None = None) -> Tensor:
    """d_x from the means of g and g z (2, C), or None for constant statistics; ``g`` is computed if it is None."""
    grad, forward = _without_padding(grad, forward)
    if g is None:
        z, g = _z_and_gradient_of_p(grad, forward)
    else:
        z = _standardize(forward.x, forward.statistics, forward.layer.eps)
    d_x = _input_gradient(g.to(z.dtype), z, forward, None if means is None else means.unbind())
    return d_x if forward.valid is None else without_padding(d_x, forward.valid)


def _without_padding(grad: Tensor, forward: ForwardPass) -> tuple[Tensor, ForwardPass]:
    """The gradient and the tensors of a forward pass with 0 in the padding: it may hold NaN, and 0 times NaN is NaN."""
    if (valid := forward.valid) is None:
        return grad, forward
    residual, y = (None if t is None else without_padding(t, valid) for t in (forward.residual, forward.y))
    x = without_padding(forward.x, valid)
    return without_padding(grad, valid), forward._replace(x=x, residual=residual, y=y)


def _z_and_gradient_of_p(grad: Tensor, forward: ForwardPass) -> tuple[Tensor, Tensor]:
    """z and g = a'(p) d_y, both in the type of z."""
    x, statistics, layer, residual, y, *_ = forward
    z = _standardize(x, statistics, layer.eps)
    grad = grad.to(z.dtype)
    if layer.act is None:
        return z, grad
    p = _scale_and_shift(z, layer, residual) if y is None else y.to(z.dtype)
    return z, grad * derivative(p, layer.act, layer.param)


def _sums(g: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Sum g and sum g z of each channel."""
    axes = _axes(g)
    return g.sum(axes), (g * z).sum(axes)


def _input_gradient(g: Tensor, z: Tensor, forward: ForwardPass, means: Sequence[Tensor] | None) -> Tensor:
    x, weight = forward.x, forward.layer.weight
    scale = _rstd(x, forward.statistics.var, forward.layer.eps)
    scale = scale if weight is None else scale * weight
    if means is not None:
        mean_g, mean_gz = (along_channels(mean.to(z.dtype), x) for mean in means)
        g = g - mean_g - z * mean_gz
    return (g * along_channels(scale.to(z.dtype), x)).to(x.dtype)


def update_running(running: running_statistics.Running, statistics: ChannelStatistics, count: int) -> None:
    """Move running statistics in place towards those of a batch with ``count`` values per channel, at least 2."""
    mean, var = statistics
    unbiased = var * (count / (count - 1))
    # a value that overflows the stored type counts as infinite
    finite = torch.isfinite(mean.to(running.mean.dtype)) & torch.isfinite(unbiased.to(running.var.dtype))
    if running.momentum is None:  # all channels share one count, so a batch enters the average of all or of none
        all_finite = finite.all(-1)
        running.batches.add_(all_finite)
        used = all_finite.unsqueeze(-1).expand_as(finite)
        factor = 1 / running.batches.to(var.dtype).unsqueeze(-1)
    else:
        running.batches.add_(1)
        used, factor = finite, running.momentum
    for stored, new in ((running.mean, mean), (running.var, unbiased)):
        stored.copy_(_moving_average(stored, torch.where(used, new, torch.nan), factor))
    running.skipped.add_((~finite).any())
    if running_statistics.warns_at_once(finite.device) and not finite.all():
        running_statistics.warn_of_skipped(int((~finite).sum()), mean.numel(), mean.device, running.momentum)


def _moving_average(old: Tensor, new: Tensor, momentum: Tensor | float) -> Tensor:
    """(1 - momentum) old + momentum new, as in torch; where that is NaN or infinite, old."""
    average = (old + momentum * (new - old)).to(old.dtype)
    return torch.where(torch.isfinite(average), average, old)


def along_channels(values: Tensor, x: Tensor) -> Tensor:
    """Values of each channel, shaped to broadcast over ``x``."""
    return values.reshape(1, x.shape[1], *[1] * (x.ndim - 2))  # (C,) -> (1, C, 1, ...)


def _axes(x: Tensor) -> list[int]:
    """All axes except the one of the channels."""
    return [axis for axis in range(x.ndim) if axis != 1]


def _standardize(x: Tensor, statistics: ChannelStatistics, eps: float) -> Tensor:
    """z, in the type of the arithmetic on ``x``."""
    mean, var = statistics
    x, near = x.to(wide_dtype(x.dtype)), mean.to(wide_dtype(x.dtype))
    deviation = x - along_channels(near, x)
    if mean.dtype != near.dtype:
        deviation = deviation - along_channels((mean - near).to(x.dtype), x)
    return deviation * along_channels(_rstd(x, var, eps).to(real_dtype(x.dtype)), x)


def _rstd(x: Tensor, var: Tensor, eps: float) -> Tensor:
    """1 / sqrt(var + eps), in the wider of two types: that of ``var`` and that of the arithmetic on ``x``."""
    return (var.to(torch.promote_types(var.dtype, real_dtype(x.dtype))) + eps).rsqrt()


def _scale_and_shift(z: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
    """p = gamma z + beta + residual."""
    if layer.weight is not None:
        z = z * along_channels(layer.weight.to(z.dtype), z)
    if layer.bias is not None:
        z = z + along_channels(layer.bias.to(z.dtype), z)
    return z if residual is None else z + residual.to(z.dtype)
