"""Ghost batches (Hoffer, Hubara and Soudry 2017, "Train longer, generalize better"): parts of a batch, each normalized
by its own moments, so that a large batch has the noise of small ones.

N examples make K = ceil(N / size) ghost batches, whose sizes differ by 1 at most: none is larger than ``size``, none is
a small remainder, and no example is left out. An odd batch (N, C) in pairs has one ghost batch of 3 in place of one of
1, which would have no variance. If K divides N, example i belongs to ghost batch i mod K. Then a contiguous batch (N,
C, L) is, without a copy, a batch (N / K, K C, L): each ghost batch has C of the channels, and the kernels compute all
of them at once. A batch in layout channels_last is copied. If K does not divide N, the batch is cut into two parts,
each of which its own number of ghost batches divides. Hoffer et al. use consecutive examples. Examples that are K
apart have another use too: a loader that groups or sorts examples gives each ghost batch a sample of all of the batch.

The stored statistics move once, by the moments of all values of the batch: eval mode needs these. Their variance
includes the differences between the means of ghost batches, which a mean of the ghost batches' variances loses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from batchnorm import kernels
from batchnorm.argument_types import require_whole_number
from batchnorm.kernels import Adjust, ChannelStatistics, Layer, Measured, Sample
from batchnorm.kernels.reference import squared
from batchnorm.padded_batches import least_count

# kernels.train_sample, or a function that computes the same and keeps the moments
Train = Callable[..., tuple[Tensor, Measured]]


@final
class GhostBatches(NamedTuple):
    """Ghost batches of one size, as one batch (examples of each, ghosts C, ...).

    Attributes:
        x: The values.
        sample: The values that count.
        residual: The residual, of the shape of ``x``, or None.
        ghosts: Number of ghost batches.
    """

    x: Tensor
    sample: Sample
    residual: Tensor | None
    ghosts: int


def check_ghost_batch_size(size: object) -> None:
    """Refuse a size of ghost batches that is neither None nor a whole number of 1 or more."""
    if size is None:
        return
    require_whole_number(size, "ghost_batch_size", "It is a number of examples; leave it out for the whole batch.")
    if size < 1:  # type: ignore[operator]
        raise ValueError(f"ghost_batch_size must be 1 or more, got {size}. Leave it out for the whole batch.")


def parts(x: Tensor, sample: Sample, residual: Tensor | None, size: int | None) -> list[GhostBatches]:
    """The ghost batches of a batch (N, C, ...), in one or two parts; the batch itself if it is empty or not cut."""
    if size is None or not x.shape[0]:
        return [GhostBatches(x, sample, residual, 1)]
    sections, channels = _sections(x.shape[0], _ghosts(x, int(size))), x.shape[1]
    values, valid, weight, rest = (_cut(t, channels, sections) for t in (x, sample.valid, sample.weight, residual))
    return [
        GhostBatches(values[i], sample._replace(valid=valid[i], weight=weight[i]), rest[i], ghosts)
        for i, (_, ghosts) in enumerate(sections)
    ]


def least_of(batches: Sequence[GhostBatches]) -> float | None:
    """The smallest count of a channel of a ghost batch, as ``least_count``; 0 for an empty batch."""
    counts = [least_count(part.x, part.sample) for part in batches]
    return None if None in counts else min(counts) if counts else 0  # type: ignore[type-var] - none is None


def train(
    batches: Sequence[GhostBatches],
    layer: Layer,
    x: Tensor,
    train_sample: Train = kernels.train_sample,
    adjust: Adjust | None = None,
) -> tuple[Tensor, Measured]:
    """As ``kernels.train_sample``, for each ghost batch of ``x`` by its own moments; the moments are those of all.

    Args:
        batches: The ghost batches of ``x``.
        layer: The layer's parameters, (C,).
        x: The whole batch.
        train_sample: Trains one part.
        adjust: Called with parameters and moments of all ghost batches of a part, (ghosts C,).
    """
    results = [
        train_sample(part.x, part.sample, repeated(layer, part.ghosts), part.residual, adjust=adjust)
        for part in batches
    ]
    if len(results) == 1 and batches[0].x is x:
        return results[0]
    values = [y.reshape(-1, *x.shape[1:]) for y, _ in results]  # (n / K, K C, ...) -> (n, C, ...)
    return laid_out_as(x, torch.cat(values) if len(values) > 1 else values[0]), union(
        [measured for _, measured in results], x.shape[1]
    )


def repeated(layer: Layer, times: int) -> Layer:
    """The layer for several batches next to each other: its parameters (times C,)."""
    if times == 1:
        return layer
    weight, bias = (None if t is None else t.repeat(times) for t in (layer.weight, layer.bias))
    return layer._replace(weight=weight, bias=bias)


def laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """``y`` with channels last in memory if ``x`` has them so, unless torch.jit.trace records it.

    From transposes in a row the exporter to ONNX that traces makes one with a random axis (torch 2.13).
    """
    if x.ndim < 3 or x.is_contiguous() or not x.movedim(1, -1).is_contiguous():
        return y
    is_traced = not torch.compiler.is_compiling() and torch.jit.is_tracing()
    return y if is_traced else y.movedim(1, -1).contiguous().movedim(-1, 1)


def union(found: Sequence[Measured], channels: int) -> Measured:
    """The moments (C,) of all values together, from those of several batches next to each other, (batches C,)."""
    counts, means, variances = (
        torch.cat([t.expand_as(m.statistics.mean) for m, t in pairs]).unflatten(0, (-1, channels))
        for pairs in zip(*[[(m, m.count), (m, m.statistics.mean), (m, m.statistics.var)] for m in found], strict=True)
    )
    counted = counts > 0
    means, variances = torch.where(counted, means, 0), torch.where(counted, variances, 0)
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total
    var = (counts * (variances + squared(means - mean))).sum(0) / total
    return Measured(ChannelStatistics(mean, var), total)


def _ghosts(x: Tensor, size: int) -> int:
    """Number of ghost batches; none has a single value per channel if ``size`` allows more."""
    ghosts = -(-x.shape[0] // size)
    is_single = size > 1 and x.ndim == 2
    return max(1, min(ghosts, x.shape[0] // 2)) if is_single else ghosts


def _sections(examples: int, ghosts: int) -> list[tuple[int, int]]:
    """The parts of a batch: their numbers of examples and of ghost batches."""
    each, larger = examples // ghosts, examples % ghosts  # so many ghost batches have one example more
    found = [(larger * (each + 1), larger), ((ghosts - larger) * each, ghosts - larger)]
    return found if larger else found[1:]


def _cut(t: Tensor | None, channels: int, sections: Sequence[tuple[int, int]]) -> list[Any]:
    """Values, a mask or None, for each part. A single part is not cut: the gradient of a slice is a copy."""
    if t is None:
        return [None for _ in sections]
    cut = t.split([n for n, _ in sections]) if len(sections) > 1 else [t]
    return [joined(part, channels, ghosts) for part, (_, ghosts) in zip(cut, sections, strict=True)]


def joined(t: Tensor, channels: int, ghosts: int) -> Tensor:
    """Values or a mask of n examples, (n, C or 1, ...), as (n / ghosts, ghosts C, ...)."""
    t = t.expand(t.shape[0], channels, *t.shape[2:])
    return t.reshape(t.shape[0] // ghosts, ghosts * channels, *t.shape[2:])
