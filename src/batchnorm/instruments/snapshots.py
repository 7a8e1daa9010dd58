"""Snapshots of the running averages, and a step's batch statistics computed from the snapshots before and after it.

A step with n forward passes moves a running average from r to r', with momentum a and k = (1 - a)^n:

    r' = k r + sum_i a (1 - a)^(n-i) mu_i      so      (r' - k r) / (1 - k)

is the weighted mean of the means mu_i of the n batches; for n = 1 it is the batch's mean. For independent batches, the
variance of this weighted mean is ``share`` times the variance of one batch's mean, with

    share = a (1 + k) / ((2 - a) (1 - k))

If the batches are not independent, the statistics of each pass must be computed separately (module ``passes``).
With ``momentum=None`` the average over c batches becomes an average over c + n batches: k = c / (c + n), and
share = 1 / n. running_var stores unbiased variances, so the computed batch variances are unbiased too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.population.tensor_memory import whole

STORED = ("running_mean", "running_var", "num_batches_tracked")


@final
class Layers:
    """The batch norm layers of a model; the channels of all layers are the entries of one long vector.

    Args:
        named: Layers by name, none of them lazy. In a snapshot, a layer without stored statistics has NaN.
    """

    def __init__(self, named: dict[str, _BatchNorm]) -> None:
        self.names = tuple(named)
        self.layers = tuple(named.values())
        self.sizes = [layer.num_features for layer in self.layers]
        self.of_channel = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))  # (channels,)

    def mean(self, values: Tensor, counted: Tensor | None = None) -> Tensor:
        """Mean over each layer's channels: (..., channels) -> (..., layers).

        Only channels for which ``counted`` is True are used, all channels if it is None; NaN for a layer without any.
        """
        weight = torch.ones_like(values) if counted is None else counted.to(values.dtype)
        values = torch.where(weight > 0, values, 0)
        return self._sum(values) / self._sum(weight)

    def _sum(self, values: Tensor) -> Tensor:
        zeros = values.new_zeros(*values.shape[:-1], len(self.sizes))
        return zeros.index_add_(-1, self.of_channel, values)

    def median(self, values: Tensor) -> Tensor:
        """Median over each layer's channels (the lower of the two in the middle): (channels,) -> (layers,)."""
        return torch.stack([part.median() for part in values.split(self.sizes)])

    def part(self, indices: Sequence[int]) -> tuple[Layers, Tensor]:
        """The layers with these indices, and the positions of their channels in the long vector."""
        selected = Layers({self.names[i]: self.layers[i] for i in indices})
        chosen = torch.zeros(len(self.names), dtype=torch.bool)
        chosen[list(indices)] = True
        return selected, chosen[self.of_channel].nonzero().flatten()

    def each(self, of_layer: Tensor) -> Tensor:
        """Repeat a layer's number for each of its channels: (..., layers) -> (..., channels)."""
        return of_layer[..., self.of_channel]

    def numbers(self, read: str, missing: float) -> Tensor:
        """The attribute called ``read`` of every layer, (layers,), in float64; ``missing`` in place of None."""
        values = [getattr(layer, read) for layer in self.layers]
        return torch.tensor([missing if value is None else float(value) for value in values], dtype=torch.float64)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Gamma and beta of every channel, in float64 on the CPU; 1 and 0 for a layer without gamma or beta.

        NaN if they cannot be read, because they are sharded over ranks or their memory was released.
        """
        parts = [
            [getattr(layer, name) for layer in self.layers]
            for name in ("weight", "bias")
        ]  # fmt: skip
        gamma, beta = (
            torch.cat([_plain(value, size, default) for value, size in zip(found, self.sizes, strict=True)])
            for found, default in zip(parts, (1.0, 0.0), strict=True)
        )
        return gamma, beta


@final
@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Running statistics of every layer at one moment, on the device of the first layer that has them.

    Missing statistics and statistics that cannot be read are NaN.

    Args:
        mean: running_mean, (channels,).
        var: running_var, (channels,), which is unbiased.
        updates: num_batches_tracked, (layers,); -1 for a layer that has no such counter.
    """

    mean: Tensor
    var: Tensor
    updates: Tensor

    @classmethod
    def of(cls, layers: Layers) -> Snapshot:
        """A copy of the statistics that the layers store now; a GPU is not waited for if it has all of them."""
        found = [layer._buffers for layer in layers.layers]  # attribute access would take as long as the copy
        means, variances, counts = ([readable(held.get(name)) for held in found] for name in STORED)
        return cls(joined(means, layers.sizes), joined(variances, layers.sizes), _counts(counts))

    def part(self, layers: Sequence[int], channels: Tensor) -> Snapshot:
        """The snapshot of some layers, given by their indices and their channels' positions."""
        return Snapshot(self.mean[channels], self.var[channels], self.updates[list(layers)])

    def cpu(self) -> Snapshot:
        """The same snapshot in float64 on the CPU."""
        return Snapshot(self.mean.cpu().double(), self.var.cpu().double(), self.updates.cpu())


@final
@dataclass(frozen=True, slots=True, eq=False)
class Updates:
    """The batch statistics of W steps, computed from W + 1 snapshots: before the first step and after each step.

    Args:
        mean: Weighted mean of the batch means of a step, (W, channels).
        var: Weighted mean of the unbiased batch variances of a step, (W, channels).
        share: Variance of ``mean`` divided by the variance of one batch's mean, for independent batches, (W, layers).
        passes: Number of forward passes in train mode in each step, (W, layers).
        rounding: Size of the error in ``mean`` that comes from rounding of the stored mean to float32, (W, channels).
    """

    mean: Tensor
    var: Tensor
    share: Tensor
    passes: Tensor
    rounding: Tensor

    @property
    def measurable(self) -> Tensor:
        """Whether every step updated the layer, with a momentum above 0 or None, (layers,)."""
        return (self.passes > 0).all(0) & self.share.isfinite().all(0)


def updates(snapshots: Sequence[Snapshot], layers: Layers) -> Updates:
    """Compute the batch statistics of W consecutive steps from W + 1 snapshots."""
    mean, var = (torch.stack([getattr(s, name) for s in snapshots]) for name in ("mean", "var"))  # (W + 1, channels)
    count = torch.stack([s.updates for s in snapshots]).double()  # (W + 1, layers)
    passes = count.diff(dim=0)
    momentum = layers.numbers("momentum", torch.nan)
    averaged = momentum.isnan()
    kept = torch.where(averaged, count[:-1] / count[1:], (1 - momentum) ** passes)
    share = torch.where(averaged, 1 / passes, momentum * (1 + kept) / ((2 - momentum) * (1 - kept)))
    weight = layers.each(1 - kept)
    read = [(x[1:] - layers.each(kept) * x[:-1]) / weight for x in (mean, var)]
    rounding = torch.finfo(torch.float32).eps * mean[1:].abs() / weight
    return Updates(read[0], read[1], share, passes, rounding)


def readable(tensor: Tensor | None) -> Tensor | None:
    """Return an ordinary dense tensor as it is, and other tensors as dense copies; None if the numbers cannot be read.

    The check for an ordinary tensor takes a microsecond; ``whole``, which reads other tensors, takes thirty.
    """
    if tensor is None:
        return None
    usual = type(tensor) is Tensor and tensor.layout == torch.strided and not tensor.is_meta
    usual = usual and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    if usual and tensor.untyped_storage().nbytes() >= tensor.nbytes:
        return tensor
    return whole(tensor)


def joined(parts: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
    """The parts in one vector, in float32 or wider, on the device of the first part that is not None; NaN for None."""
    present = [part for part in parts if part is not None]
    vectors = [torch.full((n,), torch.nan) if part is None else part for part, n in zip(parts, sizes, strict=True)]
    device = present[0].device if present else vectors[0].device
    if any(part.device != device or part.dtype != torch.float32 for part in vectors):
        vectors = [part.detach().to(device, torch.promote_types(part.dtype, torch.float32)) for part in vectors]
    return torch.cat(vectors)


def _counts(parts: Sequence[Tensor | None]) -> Tensor:
    device = next((part.device for part in parts if part is not None), torch.device("cpu"))
    return torch.stack([torch.tensor(-1, device=device) if part is None else part.to(device) for part in parts])


def _plain(value: Tensor | None, size: int, default: float) -> Tensor:
    if value is None:
        return torch.full((size,), default, dtype=torch.float64)
    plain = whole(value, size)  # None if sharded: to read all shards would wait for other ranks
    return torch.full((size,), torch.nan, dtype=torch.float64) if plain is None else plain.double().cpu()
