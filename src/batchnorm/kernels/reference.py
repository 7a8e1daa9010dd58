"""The arithmetic of batch norm in plain PyTorch: the specification that every faster kernel must match.

For a channel with n values x over a batch (Ioffe and Szegedy 2015, "Batch Normalization", algorithm 1):

    mean = sum x / n     var = sum (x - mean)^2 / n     rstd = 1 / sqrt(var + eps)
    z = (x - mean) rstd  p = gamma z + beta + residual      y = a(p)

with an activation a and a residual where they are given, and for a gradient of y, with sums over the channel (their
section 3):

    g = a'(p) d_y        d_residual = g       d_beta = sum g       d_gamma = sum g z
    d_x = gamma rstd (g - d_beta / n - z d_gamma / n)

Mean and variance of a batch are float64, whatever x is: the variance of 1e20 is finite, and the mean is subtracted in
two parts, its nearest value in the type of x and what is left of it, so that values far from zero lose no more digits
than their own format has. Half-precision inputs are widened to float32 first. Channels are axis 1 throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.kernels.activations import activate, derivative


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that statistics of values of ``dtype`` are computed and stored in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def exact_dtype(device: torch.device) -> torch.dtype:
    """The type of a batch's statistics: float64, which Apple's GPUs have not."""
    return torch.float32 if device.type == "mps" else torch.float64


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel; NaN for a batch of no values."""
    x, exact = x.to(wide_dtype(x.dtype)), exact_dtype(x.device)
    axes = [axis for axis in range(x.ndim) if axis != 1]
    near = x.mean(axes)
    deviation = (x - along_channels(near, x)).to(exact)
    low = deviation.mean(axes)
    var = deviation.square().mean(axes) - low.square()
    return near.to(exact) + low, var.clamp_min(0)


def train_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None = None,
    param: float = 0.0,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The batch normalized by its own statistics, and those statistics: y, mean, var."""
    mean, var = statistics(x)
    return normalize(x, mean, var, weight, bias, eps, act, param, residual), mean, var


def train_backward(
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
    """Gradients of x, gamma, beta and p, given the gradient of y and what ``train_forward`` returned.

    The gradient of p, which is that of the residual, is returned where an activation met a residual, and is empty
    otherwise. ``y`` may stand for the residual where the sign of y shows the derivative of the activation.
    """
    axes = [axis for axis in range(x.ndim) if axis != 1]
    count = max(x.numel() // max(x.shape[1], 1), 1)
    z = standardize(x, mean, var, eps)
    grad = gradient_before_activation(grad, z, weight, bias, act, param, residual, y)
    met = act is not None and (residual is not None or y is not None)
    d_residual = grad.to(x.dtype) if met else x.new_empty(0)
    d_bias = grad.sum(axes)
    d_weight = (grad * z).sum(axes)
    inner = grad - along_channels(d_bias / count, x) - z * along_channels(d_weight / count, x)
    scale = rstd(x, var, eps) if weight is None else rstd(x, var, eps) * weight
    return (inner * along_channels(scale.to(z.dtype), x)).to(x.dtype), d_weight, d_bias, d_residual


def gradient_before_activation(
    grad: Tensor,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    act: str | None,
    param: float,
    residual: Tensor | None,
    y: Tensor | None,
) -> Tensor:
    """g = a'(p) d_y, in the type of z."""
    grad = grad.to(z.dtype)
    if act is None:
        return grad
    p = _scale_and_shift(z, weight, bias, residual) if y is None else y.to(z.dtype)
    return grad * derivative(p, act, param)


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
    """``x`` normalized by given statistics, value by value: an example's result does not depend on its batch."""
    z = standardize(x, mean, var, eps)
    return activate(_scale_and_shift(z, weight, bias, residual), act, param).to(x.dtype)


def moving_average(old: Tensor, new: Tensor, momentum: Tensor | float) -> Tensor:
    """(1 - momentum) old + momentum new, as torch's running statistics; a non-finite new value leaves the old."""
    average = (old + momentum * (new - old)).to(old.dtype)
    return torch.where(torch.isfinite(average), average, old)


def along_channels(values: Tensor, x: Tensor) -> Tensor:
    """Values of each channel, shaped to broadcast over ``x``."""
    return values.reshape(1, x.shape[1], *[1] * (x.ndim - 2))  # (C,) -> (1, C, 1, ...)


def standardize(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """z, in the type that values of ``x`` are computed in."""
    x, near = x.to(wide_dtype(x.dtype)), mean.to(wide_dtype(x.dtype))
    deviation = x - along_channels(near, x)
    if mean.dtype != near.dtype:
        deviation = deviation - along_channels((mean - near).to(x.dtype), x)
    return deviation * along_channels(rstd(x, var, eps).to(x.dtype), x)


def rstd(x: Tensor, var: Tensor, eps: float) -> Tensor:
    """1 / sqrt(var + eps), in the wider of the types of ``var`` and of what values of ``x`` are computed in."""
    return (var.to(torch.promote_types(var.dtype, wide_dtype(x.dtype))) + eps).rsqrt()


def _scale_and_shift(z: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if weight is not None:
        z = z * along_channels(weight.to(z.dtype), z)
    if bias is not None:
        z = z + along_channels(bias.to(z.dtype), z)
    return z if residual is None else z + residual.to(z.dtype)
