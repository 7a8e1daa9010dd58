"""Networks normalized by other statistics: those of groups within a batch, or of the whole population."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import vmap

from batchnorm import kernels
from batchnorm.layers import BatchNorm1d
from batchnorm.lecture.networks import Ensemble, Norm, fully_connected
from batchnorm.moments import Moments


class GhostNorm(BatchNorm1d):
    """BatchNorm1d that normalizes each group of ``size`` neighbours in the batch separately (Hoffer et al. 2017).

    Train mode does not update the stored statistics; eval mode uses them, as in BatchNorm1d.

    Args:
        num_features: Number of channels.
        size: Number of examples in a group; the number of examples in a batch must be a multiple of it.
    """

    def __init__(self, num_features: int, *, size: int) -> None:
        super().__init__(num_features)
        self.size = size

    def forward(self, input: Tensor, *_: object, **__: object) -> Tensor:  # noqa: A002 - the layer's own name
        """The normalized batch, (N, C); in train mode by the mean and variance of each group."""
        if not self.training:
            return super().forward(input)
        groups = input.unflatten(0, (-1, self.size))  # (N, C) -> (groups, size, C)
        return vmap(lambda x: kernels.train(x, kernels.Layer(self.weight, self.bias, self.eps)))(groups).flatten(0, 1)


def with_norm(trained: Ensemble, sizes: Sequence[int], norm: Norm = BatchNorm1d) -> Ensemble:
    """Fully connected networks with the parameters of ``trained``, and new normalization with fresh statistics."""
    fresh = Ensemble.of(lambda: fully_connected(sizes, norm=norm), range(trained.size))
    return Ensemble(fresh.template, trained.parameters, fresh.buffers)


def with_population(trained: Ensemble, sizes: Sequence[int], x: Tensor) -> Ensemble:
    """The same networks with exact population statistics, layer by layer as ``recalibrate`` measures them.

    Args:
        trained: Networks with batch norm of any kind, which are not changed; the result shares their parameters.
        sizes: As in ``fully_connected``.
        x: All examples of the population of each network, (R, N, features).
    """
    exact = with_norm(trained, sizes)
    with torch.no_grad():
        for name, child in exact.template.named_children():
            if isinstance(child, BatchNorm1d):
                received = Moments.of(x, (0, 2))  # (R, N, C) -> (R, C)
                exact.buffers[f"{name}.running_mean"] = received.mean.float()
                exact.buffers[f"{name}.running_var"] = received.unbiased_var.float()
            x = exact.through(child, x, prefix=f"{name}.")
    return exact
