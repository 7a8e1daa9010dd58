"""Train mode by torch's own batch norm, which is cuDNN's or MIOpen's on a GPU: the path for CUDA until ours is faster.

Running statistics of momentum 1 receive those of the batch, which are then stored with our guard against NaN.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from batchnorm.kernels.activations import activate
from batchnorm.kernels.reference import exact_dtype, wide_dtype
from batchnorm.kernels.running import Running, update


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
