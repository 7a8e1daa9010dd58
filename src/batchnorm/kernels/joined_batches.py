"""The backward pass of batches that are normalized together, in two stages, so that nothing has to wait in between.

With n, mean and var of all batches together, and with the sums over all of them,

    d_x = gamma rstd (g - c sum g / n - c z sum g z / n)

as in ``samples``. The first stage returns a batch's share of the sums, the second the gradients from the total.
"""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from torch import Tensor

from batchnorm.kernels import autograd_node, reference, samples
from batchnorm.kernels.choice import is_plain
from batchnorm.kernels.interface import ChannelStatistics, ForwardPass, Layer, Measured
from batchnorm.kernels.operators import gradients
from batchnorm.kernels.samples import Sample

# gradients of the input, gamma, beta and the residual
Four = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@final
class JoinedBatch(NamedTuple):
    """One of several batches that are normalized by the moments of all of them.

    Attributes:
        x: The batch, (N, C, ...).
        sample: The values that count.
        layer: The layer's parameters and settings.
        residual: Added before the activation, or None.
        measured: The moments of all batches.
    """

    x: Tensor
    sample: Sample
    layer: Layer
    residual: Tensor | None
    measured: Measured

    @property
    def tensors(self) -> Four:
        """The tensors that can have a gradient."""
        return self.x, self.layer.weight, self.layer.bias, self.residual

    def detached(self) -> JoinedBatch:
        """The same batch without the history of its tensors."""
        weight, bias, residual = (None if t is None else t.detach() for t in self.tensors[1:])
        return self._replace(x=self.x.detach(), layer=self.layer._replace(weight=weight, bias=bias), residual=residual)


def normalize(batch: JoinedBatch) -> Tensor:
    """The normalized batch, without history."""
    with torch.no_grad():
        if batch.sample.is_whole and is_plain(*batch.tensors):
            return autograd_node.normalize(batch.x, batch.measured.statistics, batch.layer, batch.residual)
        return samples.normalize(batch.x, batch.sample, batch.measured.statistics, batch.layer, batch.residual)


def shares(batch: JoinedBatch, grad: Tensor) -> tuple[Tensor, Four]:
    """A batch's share (2, C) of the sums, and what the second stage needs of the first: see ``from_total``."""
    batch = batch.detached()
    forward = _forward_pass(batch)
    if forward is None:
        return _shares_by_formula(batch, grad)
    sums, d_p = samples.sum_gradients(grad, forward)
    return sums, (None, sums[1], sums[0], d_p)


def from_total(batch: JoinedBatch, grad: Tensor, kept: Four, total: Tensor) -> Four:
    """The gradients of a batch's tensors from the total of all shares, each in its tensor's type."""
    batch = batch.detached()
    direct, d_weight, d_bias, d_residual = kept
    forward = _forward_pass(batch)
    if forward is not None:
        d_x, d_residual = samples.gradients_by_total(grad, forward, total, batch.measured.count, d_residual)
    else:
        d_x = _through_moments(batch, total)
        d_x = d_x if direct is None else d_x + direct
    found = (d_x, d_weight, d_bias, d_residual)
    return tuple(None if t is None or d is None else d.to(t.dtype) for t, d in zip(batch.tensors, found, strict=True))  # type: ignore[return-value] - four tensors


def _forward_pass(batch: JoinedBatch) -> ForwardPass | None:
    """The pass as the kernels know it; None if they do not compute such a sample."""
    x, sample, layer, residual, measured = batch
    valid = sample.positions(x)
    if not samples.is_for_kernels(sample, valid, x, *batch.tensors[1:]):
        return None
    return ForwardPass(x, measured.statistics, layer, residual=residual, valid=valid)


def _shares_by_formula(batch: JoinedBatch, grad: Tensor) -> tuple[Tensor, Four]:
    """The gradients of mean and variance, (2, C), and those of the batch's tensors for constant moments."""
    inputs = [None if t is None else t.requires_grad_() for t in batch.tensors]
    mean, var = (t.detach().requires_grad_() for t in batch.measured.statistics)
    with torch.enable_grad():
        y = samples.normalize_by_formula(
            batch.x, batch.sample, ChannelStatistics(mean, var), batch.layer, batch.residual
        )
    d_mean, d_var, *others = gradients([y], [mean, var, *inputs], [grad], create_graph=False)
    zeros = torch.zeros_like(mean)
    sums = torch.stack([zeros if each is None else each for each in (d_mean, d_var)])
    return sums, tuple(others)  # type: ignore[return-value] - four tensors


def _through_moments(batch: JoinedBatch, total: Tensor) -> Tensor:
    """The gradient that reaches the input through mean and variance: c d_mean / n + 2 c (x - mean) d_var / n."""
    counts = batch.sample.counts(batch.x)
    mean, count = batch.measured.statistics.mean, batch.measured.count.clamp_min(1)
    x = torch.where(counts > 0, batch.x, 0).to(mean.dtype)
    d_mean, d_var, mean = (reference.along_channels(t, x) for t in (*(total / count), mean))
    return counts * (d_mean + 2 * d_var * (x - mean))
