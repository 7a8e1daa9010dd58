"""torch's own batch norm: in train mode on a GPU, by cuDNN or MIOpen, and in eval mode in recorded programs.

torch writes the batch's statistics into temporary tensors (momentum 1). ``update_running`` then moves the layer's
statistics and skips NaN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.kernels.activations import activate
from batchnorm.kernels.choice import update_running
from batchnorm.kernels.interface import ChannelStatistics, Layer
from batchnorm.kernels.reference import exact_dtype, wide_dtype
from batchnorm.kernels.running_statistics import Running
from batchnorm.kernels.shapes import values_per_channel


def train(x: Tensor, layer: Layer, residual: Tensor | None, running: Running | None) -> Tensor:
    """As kernels.train, for a batch of at least 2 values per channel."""
    y, mean, var = _batch_norm(x, layer)
    if running is not None:
        update_running(running, _biased(x, mean, var), values_per_channel(x))
    return _activated(y, layer, residual)


def train_measured(x: Tensor, layer: Layer, residual: Tensor | None) -> tuple[Tensor, ChannelStatistics]:
    """As ``train``, and the batch's statistics."""
    y, mean, var = _batch_norm(x, layer)
    return _activated(y, layer, residual), _biased(x, mean, var)


def _batch_norm(x: Tensor, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """The batch normalized, its mean and its unbiased variance."""
    wide = wide_dtype(x.dtype)
    mean, var = (x.new_zeros(x.shape[1], dtype=wide) for _ in range(2))
    affine = (_cast(t, wide) for t in (layer.weight, layer.bias))
    y = F.batch_norm(x, mean, var, *affine, training=True, momentum=1.0, eps=layer.eps)
    return y, mean, var


def _biased(x: Tensor, mean: Tensor, var: Tensor) -> ChannelStatistics:
    count, exact = values_per_channel(x), exact_dtype(x.device)
    return ChannelStatistics(mean.to(exact), var.to(exact) * ((count - 1) / count))


def normalize(x: Tensor, statistics: ChannelStatistics, layer: Layer, residual: Tensor | None = None) -> Tensor:
    """As kernels.normalize, by one call of torch's operator; if it refuses a mix of types, they are widened to one."""
    tensors = (*statistics, layer.weight, layer.bias)
    wide = torch.float64 if torch.float64 in {t.dtype for t in (x, *tensors) if t is not None} else torch.float32
    z = x if wide == torch.float32 or x.dtype == wide else x.to(wide)
    y = F.batch_norm(z, *(_cast(t, wide) for t in tensors), training=False, eps=layer.eps)
    return _activated(y if y.dtype == x.dtype else y.to(x.dtype), layer, residual)


def _activated(y: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
    return activate(y if residual is None else y + residual, layer.act, layer.param)


def _cast(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Values in another type; the same tensor if it has this type."""
    return values if values is None or values.dtype == dtype else values.to(dtype)
