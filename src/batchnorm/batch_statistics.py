"""Which values a batch is normalized by, and when a layer stores them.

A layer's own batch is the usual case, which ``layers`` computes in one pass. Here the moments are those of a sample of
the batch, and each further setting changes one step:

    measure     the moments of the sample, or of each ghost batch
    group       merges them with those of other batches
    adjust      changes gamma and beta by them: batch renorm
    normalize   by them, or by the stored statistics, mixed with an example's own if it has a weight
    store       moves the stored statistics towards them
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

from torch import Tensor

from batchnorm import kernels, processes
from batchnorm.kernels import Adjust, ChannelStatistics, Layer, Measured, Running, Sample, reference
from batchnorm.layer_checks import (
    AnyBatchNorm,
    about_eps,
    about_few_counts,
    about_few_counts_of_ranks,
    check_complex,
)
from batchnorm.recomputation import first_values
from batchnorm.variants import ghost_batches, own_weight, renorm


class StepStatistics(Protocol):
    """Batches of a layer whose statistics are stored once, at the end of a block; set as ``layer._step``.

    Attributes:
        is_joined: Whether a batch is normalized by the moments of all of them, so that it may have one value or none.
    """

    is_joined: bool

    def train(
        self, x: Tensor, sample: Sample, layer: Layer, residual: Tensor | None, **options: object
    ) -> tuple[Tensor, Measured]:
        """As ``kernels.train_sample``."""
        ...

    def store(self, running: Running, measured: Measured) -> None:
        """As ``kernels.store``, once the block ends."""
        ...


class OwnLayer(AnyBatchNorm, Protocol):
    """What this module reads of a layer of this package: its settings, and when its stored statistics move."""

    training: bool
    _step: StepStatistics | None
    _renorm: bool | renorm.Renorm
    _ghost_batch_size: int | None
    _own_weight: float

    def _is_alone(self, count: float | None) -> bool: ...

    def _running(self, mean: Tensor | None, var: Tensor | None) -> Running | None: ...

    def _counters(self) -> tuple[Tensor, Tensor]: ...


def normalized(
    layer: OwnLayer, x: Tensor, sample: Sample, parameters: Layer, residual: Tensor | None,
    stored: ChannelStatistics | None,
) -> Tensor:  # fmt: skip
    """The result of a layer whose batch is not simply normalized by its own moments.

    Args:
        layer: One of our layers.
        x: Its input, (N, C, ...).
        sample: The values that count.
        parameters: The layer's gamma, beta, eps and activation.
        residual: Added before the activation.
        stored: The layer's stored statistics; None without any.
    """
    step, exchange = layer._step, processes.exchange_of(layer, x)
    is_joined = (step is not None and step.is_joined) or (exchange is not None and layer._ghost_batch_size is None)
    check_complex(layer, x, parameters.weight, parameters.bias, None if stored is None else stored.mean)
    is_measured = layer.training or stored is None
    batches = ghost_batches.parts(x, sample, residual, layer._ghost_batch_size) if is_measured else []
    least = ghost_batches.least_of(batches) if is_measured and x.numel() and not is_joined else None
    if stored is not None and not (layer.training and not layer._is_alone(least if exchange is None else None)):
        if layer.training:
            stored = stored_for_one(layer, measured_one(x, sample), stored)
        return by_stored(layer, x, sample, parameters, residual, stored)
    renorm.check_stored(type(layer).__name__, layer._renorm, is_tracked=stored is not None)
    if not x.numel() and exchange is None and not is_joined:
        return kernels.train(x, parameters, residual)
    is_short = least is not None and not least > 1
    if not layer.eps > 0 or (is_short and exchange is None):
        raise ValueError(about_few_counts(layer, x, least) if layer.eps > 0 else about_eps(layer.eps))
    try:
        if least is not None and is_short and exchange is not None:  # the other ranks wait for this one
            exchange.refuse(measured_one(x, sample), least)
        y, measured = _trained(layer, x, batches, parameters, _adjustment(layer, stored), exchange)
    except processes.TooFewValuesError as few:
        return _of_too_few_values(few, layer, x, sample, parameters, residual, stored)
    if x.numel() or exchange is not None:
        _store(layer, stored, measured)
    return y


def _of_too_few_values(
    few: processes.TooFewValuesError,
    layer: OwnLayer,
    x: Tensor,
    sample: Sample,
    parameters: Layer,
    residual: Tensor | None,
    stored: ChannelStatistics | None,
) -> Tensor:
    """The result if the batches of all ranks leave a channel without a variance, which every rank knows."""
    if few.is_empty:  # every rank returns its empty batch
        return kernels.train(x, parameters, residual)
    if stored is not None and layer._is_alone(few.least):
        stored = stored_for_one(layer, few.measured, stored)
        return kernels.normalize_sample(x, sample, stored, parameters, residual)
    raise ValueError(
        about_few_counts_of_ranks(layer, few.least, few.ranks, is_ghost=few.in_ghost is not None)
    ) from None


def _trained(
    layer: OwnLayer,
    x: Tensor,
    batches: Sequence[ghost_batches.GhostBatches],
    parameters: Layer,
    adjust: Adjust | None,
    exchange: processes.Exchange | None,
) -> tuple[Tensor, Measured]:
    """The result by the moments of the batch, and the moments to store.

    Ghost batches are parts of the batch of one rank; the moments that they store are those of all ranks.
    """
    train = kernels.train_sample if layer._step is None else layer._step.train
    if exchange is None or layer._ghost_batch_size is None:
        return ghost_batches.train(batches, parameters, x, partial(train, group=exchange), adjust)
    y, measured = ghost_batches.train(batches, parameters, x, train, adjust)
    return y, exchange.union(measured)


def stored_for_one(layer: OwnLayer, measured: Measured, stored: ChannelStatistics) -> ChannelStatistics:
    """The stored statistics that normalize one value per channel in train mode: in a repetition, those of the first.

    The value does not move them, but counts in the moments of a step.

    Args:
        layer: The layer.
        measured: The moments of the value.
        stored: The layer's stored statistics.
    """
    if layer._step is not None:
        _store(layer, stored, measured)
    present = tuple(map(kernels.snapshot, stored))
    return ChannelStatistics(*first_values(layer, measured.statistics, lambda: present))


def measured_one(x: Tensor, sample: Sample) -> Measured:
    """The moments of a batch with one value per channel; its variance is 0."""
    return Measured(*reference.measure_counted(x.detach(), sample.counts(x)))


def _store(layer: OwnLayer, stored: ChannelStatistics | None, measured: Measured) -> None:
    """Move a layer's stored statistics, or let a step keep the moments until it ends."""
    running = None if stored is None else layer._running(*stored)
    if running is not None:
        (kernels.store if layer._step is None else layer._step.store)(running, measured)


def by_stored(
    layer: OwnLayer, x: Tensor, sample: Sample, parameters: Layer, residual: Tensor | None, stored: ChannelStatistics
) -> Tensor:
    """The result by stored statistics; in eval mode an example's own statistics have the layer's ``own_weight``."""
    if layer._own_weight and not layer.training and x.numel():
        return own_weight.normalize(x, sample, stored, parameters, residual, layer._own_weight)
    return kernels.normalize_sample(x, sample, stored, parameters, residual)


def _adjustment(layer: OwnLayer, stored: ChannelStatistics | None) -> Adjust | None:
    """How batch renorm changes gamma and beta; None without it. A repetition uses the values of the first forward."""
    if not layer._renorm or stored is None:
        return None
    limits = (renorm.PAPER if layer._renorm is True else layer._renorm).limits(layer._counters()[0])
    present = tuple(kernels.snapshot(t) for t in (*stored, *limits))

    def adjust(parameters: Layer, measured: Measured) -> Layer:
        mean, var, *most = first_values(layer, measured.statistics, lambda: present)
        return renorm.renormalized(parameters, measured, ChannelStatistics(mean, var), most)

    return adjust
