"""Evaluation with the example's own weight (Summers and Dinneen 2020, "Four Things Everyone Should Know to Improve
Batch Normalization", section 3.1): in train mode an example is part of the statistics that it is normalized by, so in
eval mode it can be too.

With the weight a, the example's own moments of a channel over its positions, and the stored ones:

    mean = a mean_own + (1 - a) mean_stored
    var = a var_own + (1 - a) var_stored + a (1 - a) (mean_own - mean_stored)^2

which is the variance of a mixture, as E[x^2] - E[x]^2 of mixed E[x] and E[x^2] without that formula's loss of digits.
The result of an example depends on this example alone. An example without valid positions has the stored statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm import kernels
from batchnorm.argument_types import require_number
from batchnorm.kernels import ChannelStatistics, Layer, Measured, Sample
from batchnorm.kernels.reference import applied, real_dtype, squared, wide_dtype
from batchnorm.variants.ghost_batches import joined, laid_out_as, repeated


def check_own_weight(weight: object) -> None:
    """Refuse a value of the setting ``own_weight`` that is not a number from 0 to 1."""
    require_number(weight, "own_weight", "0 uses stored statistics alone.")
    if not 0 <= weight <= 1:  # type: ignore[operator]
        raise ValueError(f"own_weight must be from 0 to 1, got {weight}. 0 uses stored statistics alone.")


def normalize(
    x: Tensor, sample: Sample, stored: ChannelStatistics, layer: Layer, residual: Tensor | None, weight: float
) -> Tensor:
    """``x``, (N, C, ...), normalized by stored statistics in which each example's own have this weight.

    The examples are additional channels: a contiguous batch is read as (1, N C, ...) without a copy.
    """
    if x.ndim == 2 and sample.is_whole:
        return _of_single_values(x, stored, layer, residual, weight)
    examples = x.shape[0]
    values, valid, counts, rest = (
        None if t is None else joined(t, x.shape[1], examples) for t in (x, sample.valid, sample.weight, residual)
    )
    assert values is not None  # noqa: S101 - x is no None
    sample = sample._replace(valid=valid, weight=counts)
    if sample.is_whole:
        # with a mask, also one that is True everywhere, a channel's sums have the same bits beside any other channels
        sample = Sample(torch.ones_like(values[:, :1], dtype=torch.bool))
    own = kernels.measure_sample(values, sample)
    statistics = _mixed(own, ChannelStatistics(*(t.repeat(examples) for t in stored)), weight)
    y = kernels.normalize_sample(values, sample, statistics, repeated(layer, examples), rest)
    return laid_out_as(x, y.reshape(x.shape))


def _of_single_values(
    x: Tensor, stored: ChannelStatistics, layer: Layer, residual: Tensor | None, weight: float
) -> Tensor:
    """As ``normalize`` for (N, C): the only value is the mean, so with the stored z of x and s = sqrt(var + eps)

    x - mean = (1 - a) s z      var = (1 - a) var_stored + a (1 - a) s^2 z^2
    """
    wide = x.to(wide_dtype(x.dtype))
    z = kernels.normalize(wide, stored, Layer(eps=layer.eps))
    var = stored.var.to(real_dtype(x.dtype))
    square, rest = var + layer.eps, 1 - weight
    mixture = rest * var + weight * rest * square * squared(z)
    return applied(rest * square.sqrt() * z * (mixture + layer.eps).rsqrt(), layer, residual).to(x.dtype)


def _mixed(own: Measured, stored: ChannelStatistics, weight: float) -> ChannelStatistics:
    """The moments of a mixture of own and stored values; the stored moments for a channel without own values."""
    has_values = own.count > 0
    mean, var = (torch.where(has_values, t, s.to(t.dtype)) for t, s in zip(own.statistics, stored, strict=True))
    a = has_values.to(var.dtype) * weight
    distance = mean - stored.mean.to(mean.dtype)
    between = a * (1 - a) * squared(distance)
    return ChannelStatistics(mean - (1 - a) * distance, a * var + (1 - a) * stored.var.to(var.dtype) + between)
