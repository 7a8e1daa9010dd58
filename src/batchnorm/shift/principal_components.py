"""Components: principal components of neighbouring channels; a component may move far although no channel does.

Channels of a layer vary together from one example to the next, and the differences between them vary little. A change
that moves each channel by one standard deviation may move such a difference by several standard deviations. So each
layer's channels are divided into blocks of sixteen, and the principal components of a block's means, and separately of
its energies, are computed.

Directions are chosen on a random half of the calibration observations (at most 1,000); center and variance are measured
on the rest, because on the same observations the smallest variance would be underestimated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import final

import torch
from torch import Tensor

TOGETHER = 16  # channels in a block; even 100 observations measure so small a covariance well enough

MOST_CHOOSE = 1000  # most observations to choose directions; further observations are worth more for comparison


@final
@dataclass(frozen=True, eq=False)
class Components:
    """Components of channels' means z and of their relative energies q.

    Args:
        sizes: Number of channels of each layer.
        axes: Unit vectors, the columns of each matrix, (2, blocks, 16, 16), for z and for q. A block has 16 slots; axes
            are 0 in slots without a channel. In float32, because axes are most of a reference's file.
        center: Expected value of each component, (2 * channels,): for z, then for q.
        delta: Largest distance of a component's mean from the center, (2 * channels,).
        kappa: Largest variance of a component, (2 * channels,).
    """

    sizes: tuple[int, ...]
    axes: Tensor
    center: Tensor
    delta: Tensor
    kappa: Tensor

    @classmethod
    def measured(
        cls, sizes: tuple[int, ...], z: Tensor, q: Tensor, bounds: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    ) -> Components:
        """Components of clean observations.

        Args:
            sizes: Channels of each layer.
            z: Channel means in stored sd, (n, channels).
            q: Relative energies of channels, (n, channels).
            bounds: Returns center, delta and kappa of observed components.
        """
        first, second = halves(len(z))
        axes = torch.stack([axes_of(x[first], sizes) for x in (z, q)])
        return cls(sizes, axes, *bounds(turned(axes, sizes, z[second], q[second])))

    def of(self, z: Tensor, q: Tensor) -> Tensor:
        """Components of observations, (n, channels) each -> (n, 2 * channels)."""
        return turned(self.axes, self.sizes, z, q)


def halves(n: int) -> tuple[Tensor, Tensor]:
    """Two random parts of n observations: half of them, at most 1,000, to choose directions, and the rest to measure.

    The split is the same in every call. It is random because observations may alternate, such as a picture and its
    mirror image.
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    half = min(n // 2, MOST_CHOOSE)
    return order[:half], order[half:]


def axes_shape(sizes: Sequence[int]) -> tuple[int, int, int, int]:
    """Shape of ``axes`` for layers of these sizes."""
    return 2, sum(-(-size // TOGETHER) for size in sizes), TOGETHER, TOGETHER


def axes_of(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Principal directions: eigenvectors of each block's covariance, (blocks, 16, 16), by rising variance."""
    blocks = _blocks(x - x.mean(0), sizes)
    covariance = blocks.mT @ blocks
    is_channel = _blocks(torch.ones_like(x[:1]), sizes)[:, 0]
    # slots without a channel get the largest variances: their axes come last and are dropped
    spare = (1 - is_channel) * (1 + 2 * covariance.diagonal(dim1=1, dim2=2).sum(1, keepdim=True))
    axes = torch.linalg.eigh(covariance + spare.diag_embed()).eigenvectors
    return (axes * is_channel[:, :, None] * is_channel[:, None, :]).float()


def turned(axes: Tensor, sizes: Sequence[int], z: Tensor, q: Tensor) -> Tensor:
    """Components along ``axes``, (n, 2 * channels): of z, then of q, in the dtype of z and q."""
    parts = [_blocks(x, sizes) @ turn for x, turn in zip((z, q), axes.to(z.dtype), strict=True)]
    flat = torch.stack(parts).permute(2, 0, 1, 3).flatten(2)  # (n, 2, slots)
    return (flat if flat.shape[2] == z.shape[1] else flat[:, :, _slots(tuple(sizes))]).flatten(1)


def _blocks(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Observations by block: x (n, channels) -> (blocks, n, 16), with 0 in slots without a channel."""
    blocks = axes_shape(sizes)[1]
    if blocks * TOGETHER == x.shape[1]:
        return x.unflatten(1, (blocks, TOGETHER)).transpose(0, 1)
    padded = x.new_zeros(len(x), blocks * TOGETHER)
    padded[:, _slots(tuple(sizes))] = x
    return padded.unflatten(1, (blocks, TOGETHER)).transpose(0, 1)


@lru_cache(maxsize=64)
def _slots(sizes: tuple[int, ...]) -> Tensor:
    """Each channel's index among the slots of all blocks, (channels,); a block holds channels of one layer."""
    slots, start = [], 0
    for size in sizes:
        slots.append(torch.arange(start, start + size))
        start += -(-size // TOGETHER) * TOGETHER
    return torch.cat(slots)
