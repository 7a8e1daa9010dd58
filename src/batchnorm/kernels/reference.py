"""The arithmetic of batch norm in plain PyTorch: the specification that every faster kernel must match.

For a channel with n values x over a batch (Ioffe and Szegedy 2015, "Batch Normalization", algorithm 1):

    mean = sum x / n     var = sum (x - mean)^2 / n     rstd = 1 / sqrt(var + eps)
    z = (x - mean) rstd  y = gamma z + beta

and for a gradient g of y, with sums over the channel (their section 3):

    d_beta = sum g       d_gamma = sum g z
    d_x = gamma rstd (g - d_beta / n - z d_gamma / n)

The mean is kept in two parts, ``mean`` and the ``residual`` that rounding left of it, so that values far from
zero lose no more digits than their own format has: (x - mean) - residual. Half-precision inputs are widened to
float32 first; float64 stays float64. Channels are axis 1 throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that statistics of values of ``dtype`` are computed and stored in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, residual of the mean and biased variance of every channel; NaN for a batch of no values."""
    x = x.to(wide_dtype(x.dtype))
    axes = [axis for axis in range(x.ndim) if axis != 1]
    mean = x.mean(axes)
    deviation = x - along_channels(mean, x)
    residual = deviation.mean(axes)
    var = deviation.square().mean(axes) - residual.square()
    return mean, residual, var.clamp_min(0)


def train_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The batch normalized by its own statistics, and those statistics: y, mean, residual, var."""
    mean, residual, var = statistics(x)
    z = _standardize(x, mean, residual, var, eps)
    return _scale_and_shift(z, weight, bias).to(x.dtype), mean, residual, var


def train_backward(
    grad: Tensor, x: Tensor, mean: Tensor, residual: Tensor, var: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gamma and beta, given the gradient of y and what ``train_forward`` returned."""
    axes = [axis for axis in range(x.ndim) if axis != 1]
    count = max(x.numel() // max(x.shape[1], 1), 1)
    z = _standardize(x, mean, residual, var, eps)
    grad = grad.to(z.dtype)
    d_bias = grad.sum(axes)
    d_weight = (grad * z).sum(axes)
    inner = grad - along_channels(d_bias / count, x) - z * along_channels(d_weight / count, x)
    scale = (var + eps).rsqrt() if weight is None else (var + eps).rsqrt() * weight
    return (inner * along_channels(scale, x)).to(x.dtype), d_weight, d_bias


def normalize(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``x`` normalized by given statistics, value by value: an example's result does not depend on its batch."""
    wide = wide_dtype(x.dtype)
    z = (x.to(wide) - along_channels(mean.to(wide), x)) * along_channels((var.to(wide) + eps).rsqrt(), x)
    return _scale_and_shift(z, weight, bias).to(x.dtype)


def moving_average(old: Tensor, new: Tensor, momentum: Tensor | float) -> Tensor:
    """(1 - momentum) old + momentum new, as torch's running statistics; a non-finite new value leaves the old."""
    average = old + momentum * (new.to(old.dtype) - old)
    return torch.where(torch.isfinite(average), average, old)


def along_channels(values: Tensor, x: Tensor) -> Tensor:
    """Values of each channel, shaped to broadcast over ``x``."""
    return values.reshape(1, x.shape[1], *[1] * (x.ndim - 2))  # (C,) -> (1, C, 1, ...)


def _standardize(x: Tensor, mean: Tensor, residual: Tensor, var: Tensor, eps: float) -> Tensor:
    deviation = x.to(mean.dtype) - along_channels(mean, x) - along_channels(residual, x)
    return deviation * along_channels((var + eps).rsqrt(), x)


def _scale_and_shift(z: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        z = z * along_channels(weight.to(z.dtype), z)
    if bias is not None:
        z = z + along_channels(bias.to(z.dtype), z)
    return z
