"""Snapshots: a batch's statistics read back from what the running averages became, without a hook.

A step with n forward passes moves a running average from r to r', with momentum a and k = (1 - a)^n:

    r' = k r + sum_i a (1 - a)^(n-i) mu_i      so      (r' - k r) / (1 - k)

is the weighted mean of the n batches' means (for n = 1: mu_B itself), whose variance is

    share = a (1 + k) / ((2 - a) (1 - k))

times that of one mean if the n batches are independent; where they are not, each pass is read by itself (``passes``).
With ``momentum=None`` the average of c batches becomes one of c + n: k = c / (c + n), and
share = 1 / n. What is stored as running_var are unbiased variances, so unbiased ones are read back.
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
    """The batch norm layers of a model, side by side: every number of a channel in one long vector.

    Args:
        named: Layers with a shape, by name; a layer without stored statistics reads as NaN.
    """

    def __init__(self, named: dict[str, _BatchNorm]) -> None:
        self.names = tuple(named)
        self.layers = tuple(named.values())
        self.sizes = [layer.num_features for layer in self.layers]
        self.of_channel = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))  # (channels,)

    def mean(self, values: Tensor, counted: Tensor | None = None) -> Tensor:
        """Mean over each layer's counted channels: (..., channels) -> (..., layers); NaN where none is counted."""
        weight = torch.ones_like(values) if counted is None else counted.to(values.dtype)
        values = torch.where(weight > 0, values, 0)
        return self._sum(values) / self._sum(weight)

    def _sum(self, values: Tensor) -> Tensor:
        zeros = values.new_zeros(*values.shape[:-1], len(self.sizes))
        return zeros.index_add_(-1, self.of_channel, values)

    def median(self, values: Tensor) -> Tensor:
        """Median over each layer's channels: (channels,) -> (layers,)."""
        return torch.stack([part.median() for part in values.split(self.sizes)])

    def part(self, indices: Sequence[int]) -> tuple[Layers, Tensor]:
        """Some of the layers, and where their channels are in the long vector."""
        found = Layers({self.names[i]: self.layers[i] for i in indices})
        chosen = torch.zeros(len(self.names), dtype=torch.bool)
        chosen[list(indices)] = True
        return found, chosen[self.of_channel].nonzero().flatten()

    def each(self, of_layer: Tensor) -> Tensor:
        """A layer's number for each of its channels: (..., layers) -> (..., channels)."""
        return of_layer[..., self.of_channel]

    def numbers(self, read: str, missing: float) -> Tensor:
        """A plain attribute of every layer, (layers,), in float64; ``missing`` stands for None."""
        found = [getattr(layer, read) for layer in self.layers]
        return torch.tensor([missing if value is None else float(value) for value in found], dtype=torch.float64)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Gamma and beta of every channel, in float64 on the CPU; 1 and 0 where a layer has none.

        NaN where numbers cannot be read: sharded over ranks, or memory given back.
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
    """Running statistics of every layer at one moment, on the device where they are.

    Args:
        mean: (channels,)
        var: (channels,), unbiased, as stored.
        updates: num_batches_tracked, (layers,); -1 where a layer does not count.
    """

    mean: Tensor
    var: Tensor
    updates: Tensor

    @classmethod
    def of(cls, layers: Layers) -> Snapshot:
        """What the layers store just now, copied. Their devices are left to work: nothing waits for them."""
        found = [layer._buffers for layer in layers.layers]  # nn.Module's own look-up takes as long as the copy
        means, variances, counts = ([readable(held.get(name)) for held in found] for name in STORED)
        return cls(joined(means, layers.sizes), joined(variances, layers.sizes), _counts(counts))

    def part(self, layers: Sequence[int], channels: Tensor) -> Snapshot:
        """Some of the layers, with the places of their channels."""
        return Snapshot(self.mean[channels], self.var[channels], self.updates[list(layers)])

    def cpu(self) -> Snapshot:
        """The snapshot in float64 on the CPU."""
        return Snapshot(self.mean.cpu().double(), self.var.cpu().double(), self.updates.cpu())


@final
@dataclass(frozen=True, slots=True, eq=False)
class Updates:
    """What moved the running averages from one snapshot to the next, for W such steps.

    Args:
        mean: Weighted mean of the step's batch means, (W, channels).
        var: The same of the unbiased batch variances, (W, channels).
        share: Variance of ``mean`` over that of one batch's if batches are independent, (W, layers).
        passes: Forward passes in train mode in each step, (W, layers).
        rounding: Standard deviation of what rounding of the stored mean adds to ``mean``, (W, channels).
    """

    mean: Tensor
    var: Tensor
    share: Tensor
    passes: Tensor
    rounding: Tensor

    @property
    def measurable(self) -> Tensor:
        """Layers that every step updated, with a momentum from which the step can be read back, (layers,)."""
        return (self.passes > 0).all(0) & self.share.isfinite().all(0)


def updates(snapshots: Sequence[Snapshot], layers: Layers) -> Updates:
    """Read W batches' statistics back from W + 1 snapshots taken after consecutive steps."""
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
    """The tensor itself if it is an ordinary one, else its numbers; None if it has no readable numbers.

    The check for an ordinary tensor takes a microsecond, ``whole`` takes thirty.
    """
    if tensor is None:
        return None
    usual = type(tensor) is Tensor and tensor.layout == torch.strided and not tensor.is_meta
    usual = usual and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    if usual and tensor.untyped_storage().nbytes() >= tensor.nbytes:
        return tensor
    return whole(tensor)


def joined(parts: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
    """One vector of the parts, in float32 or wider, on the device of the first; NaN for a missing one."""
    known = [part for part in parts if part is not None]
    whole = [torch.full((n,), torch.nan) if part is None else part for part, n in zip(parts, sizes, strict=True)]
    device = known[0].device if known else whole[0].device
    if any(part.device != device or part.dtype != torch.float32 for part in whole):
        whole = [part.detach().to(device, torch.promote_types(part.dtype, torch.float32)) for part in whole]
    return torch.cat(whole)


def _counts(parts: Sequence[Tensor | None]) -> Tensor:
    device = next((part.device for part in parts if part is not None), torch.device("cpu"))
    return torch.stack([torch.tensor(-1, device=device) if part is None else part.to(device) for part in parts])


def _plain(value: Tensor | None, size: int, default: float) -> Tensor:
    if value is None:
        return torch.full((size,), default, dtype=torch.float64)
    plain = whole(value, size)  # sharded over ranks: to read it all would wait for the others
    return torch.full((size,), torch.nan, dtype=torch.float64) if plain is None else plain.double().cpu()
