"""torch's own batch norm: train mode on a GPU, where it is cuDNN's or MIOpen's, and eval mode in recorded programs.

Running statistics of momentum 1 receive those of the batch, which are then stored with our guard against NaN.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.kernels.activations import activate
from batchnorm.kernels.reference import exact_dtype, wide_dtype
from batchnorm.kernels.running_statistics import Running, update


def train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None,
    param: float,
    residual: Tensor | None,
    running: Running | None,
) -> Tensor:
    """As kernels.train, for a batch of more than one value a channel."""
    wide = wide_dtype(x.dtype)
    mean, var = (x.new_zeros(x.shape[1], dtype=wide) for _ in range(2))
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    y = F.batch_norm(x, mean, var, weight, bias, training=True, momentum=1.0, eps=eps)
    if running is not None:
        count, exact = x.numel() // x.shape[1], exact_dtype(x.device)
        biased = var.to(exact) * ((count - 1) / count)
        update(*running[:4], mean.to(exact), biased, count, running.momentum)
    return activate(y if residual is None else y + residual, act, param)


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None,
    param: float,
    residual: Tensor | None,
) -> Tensor:
    """As kernels.normalize, by one call of torch's operator; types that it refuses together are widened to one."""
    types = {t.dtype for t in (x, mean, var, weight, bias) if t is not None}
    wide = torch.float64 if torch.float64 in types else torch.float32
    z = x if wide == torch.float32 else _cast(x, wide)
    mean, var, weight, bias = (_cast(t, wide) for t in (mean, var, weight, bias))
    y = _cast(F.batch_norm(z, mean, var, weight, bias, training=False, eps=eps), x.dtype)
    return activate(y if residual is None else y + residual, act, param)


def _cast(values: Tensor | None, dtype: torch.dtype) -> Any:
    """Values in another type; no operation where they have it."""
    return values if values is None or values.dtype == dtype else values.to(dtype)
