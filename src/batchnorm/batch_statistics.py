"""Which values a batch is normalized by, and when a layer stores them.

A layer's own batch is the usual case, which ``layers`` computes in one pass. Here the moments are those of a sample of
the batch, and each further setting changes one step:

    measure     the moments of the sample
    group       merges them with those of other batches
    adjust      changes gamma and beta by them
    normalize   by them, or by the stored statistics
    store       moves the stored statistics towards them
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from batchnorm import kernels
from batchnorm.kernels import ChannelStatistics, Layer, Sample, reference
from batchnorm.layer_checks import about_eps, about_few_counts
from batchnorm.padded_batches import least_count
from batchnorm.recomputation import first_values


def normalized(
    layer: Any, x: Tensor, sample: Sample, parameters: Layer, residual: Tensor | None, stored: ChannelStatistics | None
) -> Tensor:
    """The result of a layer whose batch is not simply normalized by its own moments.

    Args:
        layer: One of our layers.
        x: Its input, (N, C, ...).
        sample: The values that count.
        parameters: The layer's gamma, beta, eps and activation.
        residual: Added before the activation.
        stored: The layer's stored statistics; None without any.
    """
    least = least_count(x, sample) if layer.training or stored is None else None
    if stored is not None and not (layer.training and not layer._is_alone(least)):
        if layer.training:
            stored = first_stored(layer, reference.measure_counted(x.detach(), sample.counts(x))[0], stored)
        return kernels.normalize_sample(x, sample, stored, parameters, residual)
    if not layer.eps > 0 or (least is not None and not least > 1):
        raise ValueError(about_few_counts(layer, x, least) if layer.eps > 0 else about_eps(layer.eps))
    y, measured = kernels.train_sample(x, sample, parameters, residual)
    running = None if stored is None else layer._running(*stored)
    if running is not None:
        kernels.store(running, measured)
    return y


def first_stored(layer: Any, moments: Sequence[Tensor], stored: ChannelStatistics) -> ChannelStatistics:
    """The stored statistics by which a batch in train mode is normalized: in a repeated forward those of the first."""
    return ChannelStatistics(*first_values(layer, moments, lambda: stored))
